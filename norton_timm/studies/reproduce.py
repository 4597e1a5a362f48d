"""The published CIFAR-10 rows, their controls and ablations, run and kept as rows of CSV files."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tensorly
import torch
from filelock import FileLock
from tensorly.decomposition import parafac
from torch import nn

from norton_timm.checkpoints import base_name
from norton_timm.compression import CompressionReport, CompressionSpec, compress
from norton_timm.models import dense_model, published_accuracy, spec_of, tags
from norton_timm.training import (
    Recovery,
    TrainConfig,
    evaluate,
    is_compressed_tag,
    load_train_config,
    open_data,
    portable,
    preprocessing_of,
)
from norton_timm.utils import is_main, wait_for_all, write_text

log = logging.getLogger(__name__)

CONTROLS: dict[str, dict[str, str]] = {
    **{name: {'criterion': name} for name in ('l1', 'l2', 'geometric_median', 'random')},
    'authors_order': {'strategy': 'authors'},
}
STUDIES = ('rank', 'tag', 'criterion')
_RANKS, _WITH_TENSORLY = range(1, 9), (1, 2, 4)
_CRITERIA = ('pabs', 'vbd', 'cosine', 'euclidean', 'l1', 'l2', 'geometric_median', 'random')
_ABLATED = ('coring_resnet56_cifar.r047', 'norton_resnet56_cifar.r089')
_KEYS = ('study', 'model', 'control', 'rank', 'criterion', 'epochs', 'seed', 'data')


def controlled_spec(model: str, control: str | None) -> CompressionSpec:
    """The recipe of a tag, with what a control changes: which filters stay, not how many.

    Raises:
        ValueError: an unknown tag or control, or a control of a recipe that prunes nothing.
    """
    if not is_compressed_tag(model):
        raise ValueError(f'got {model!r}, expected a compressed tag such as {_ABLATED[1]}')
    spec = spec_of(model)
    if control is None:
        return spec
    if control not in CONTROLS:
        raise ValueError(f'control: got {control!r}, expected one of {", ".join(CONTROLS)}')
    if not any(spec.rate_list() or [0.0]):
        raise ValueError(f'control: {model} prunes no filters, so that {control} would change nothing')
    return dataclasses.replace(spec, **cast(Any, CONTROLS[control]))


def reproduce_tag(
    model: str,
    dense: Path,
    data: str,
    folder: Path,
    device: torch.device,
    *,
    control: str | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    epochs: int | None = None,
) -> dict[str, Any]:
    """Compress, repair, tune and evaluate a published network; started again, the run goes on where it was.

    Args:
        model: a tag, such as `norton_resnet56_cifar.r071`.
        dense: file with the weights of the dense network.
        data: see `norton_timm.training.open_data`.
        folder: where runs are kept; this one gets a folder of its own in it.
        device: where to compute.
        control: one of `CONTROLS`.
        config: YAML file of a `norton_timm.training.TrainConfig`.
        overrides: `key=value` texts over it.
        epochs: of tuning; 0 for none.

    Returns:
        A row of `results/cifar10.csv`.

    Raises:
        ValueError: wrong names, files or settings, or a folder that holds another run.
    """
    spec, recipe = controlled_spec(model, control), None
    if control is not None:
        recipe = str(folder / f'{model}.{control}.yaml')
        folder.mkdir(parents=True, exist_ok=True)
        if is_main():
            write_text(recipe, spec.to_yaml())
        wait_for_all()
    values = {'model': model, 'weights': str(dense), 'data.source': data, 'recipe': recipe, 'optim.epochs': epochs}
    run = load_train_config(config, overrides, values)
    name = '-'.join(str(part) for part in (model, control, run.optim.epochs, run.seed) if part is not None)
    results = Recovery(run, folder / name, device).run()
    figures = ('top1_dense', 'top1_compressed', 'top1_repaired', 'top1')
    published, before = published_accuracy(model)['top1'], published_accuracy(base_name(model))['top1']
    return {
        'model': model, 'control': control or '', **{key: _rounded(results[key]) for key in figures},
        'difference': _rounded(results['top1'] - results['top1_dense']),
        'published_top1': published, 'published_difference': round(published - before, 2),
        **_common(spec, run), 'epochs_before': results['epochs_before'],
        'top1_teacher': _rounded(results['top1_teacher']),
        **{key: _rounded(results[key], 5) for key in ('nmse', 'ms_dense', 'ms')},
        **{key: results[key] for key in ('macs_dense', 'macs', 'params_dense', 'params', 'test_images', 'device',
                                         'threads')},
        'config': json.dumps(portable(run)),
    }  # fmt: skip


def study_specs(study: str) -> list[tuple[str, dict[str, Any], CompressionSpec]]:
    """What an ablation measures: tag, the columns that tell its rows apart, and the recipe.

    Raises:
        ValueError: an unknown study.
    """
    if study == 'rank':
        model = 'norton_resnet56_cifar.r071'
        return [(model, {'rank': rank}, spec_of(model, rank=rank)) for rank in _RANKS]
    if study == 'tag':
        names = [f'{m}_resnet56_cifar.{tag}' for m in ('norton', 'coring') for tag in tags()[m]['resnet56_cifar']]
        return [(name, {}, spec_of(name)) for name in names]
    if study == 'criterion':
        return [
            (name, {'criterion': criterion}, dataclasses.replace(spec_of(name), criterion=criterion))
            for name in _ABLATED
            for criterion in _CRITERIA
        ]
    raise ValueError(f'study: got {study!r}, expected one of {", ".join(STUDIES)}')


def run_study(
    study: str, dense: Path, data: str, path: Path, device: torch.device, config: TrainConfig
) -> Iterator[dict[str, Any]]:
    """Measure an ablation on ResNet-56 without tuning: accuracy after the repair without labels, and before it.

    Each row is written as soon as it is measured. Rows that the file already has are skipped, so that a study that was
    stopped can continue.

    Args:
        study: one of `STUDIES`.
        dense: file with the weights of the dense network.
        data: see `norton_timm.training.open_data`.
        path: CSV file.
        device: where to compute.
        config: gives mean and standard deviation, and the number of calibration images.
    """
    name = 'resnet56_cifar'
    images = open_data(data, preprocessing_of(name, config), device)
    network = dense_model(name, checkpoint=dense, num_classes=len(images.classes)).to(device)
    calibration = images.calibration_batches(config.data.calibration)
    accuracy: float | None = None
    for model, what, spec in study_specs(study):
        row = {'study': study, 'model': model, 'rank': '', 'criterion': '', **what, **_common(spec, config)}
        row['epochs'] = 0
        if row_key(row) in {row_key(known) for known in read_rows(path)}:
            continue
        accuracy = accuracy or evaluate(network, images, device)['top1']
        row.update({'top1_dense': _rounded(accuracy), 'top1_compressed': ''})
        if study != 'criterion':  # where filters were pruned, what is left before the repair is mostly chance
            plain, _ = compress(network, spec)
            row['top1_compressed'] = _rounded(evaluate(plain, images, device)['top1'])
        repaired, report = compress(network, spec, calibration=calibration)
        layers = [layer.name for layer in report.layers if layer.nmse is not None]
        row['top1_repaired'] = _rounded(evaluate(repaired, images, device)['top1'])
        row.update({
            'nmse': _rounded(mean_nmse(report), 5), 'nmse_tensorly': '', 'macs_dense': report.before.macs,
            'macs': report.after.macs, 'params_dense': report.before.params, 'params': report.after.params,
            'calibration_images': config.data.calibration, 'test_images': images.test_size,
        })  # fmt: skip
        if study == 'rank' and what['rank'] in _WITH_TENSORLY:
            row['nmse_tensorly'] = _rounded(tensorly_nmse(network, layers, what['rank']), 5)
        write_row(path, row)
        yield row


def mean_nmse(report: CompressionReport) -> float | None:
    """Mean over the decomposed layers of the mean error of their filters."""
    values = [layer.nmse for layer in report.layers if layer.nmse is not None]
    return sum(values) / len(values) if values else None


def tensorly_nmse(model: nn.Module, layers: Sequence[str], rank: int) -> float:
    """The same mean error when TensorLy decomposes each filter alone, from its SVD start with its default settings."""
    tensorly.set_backend('numpy')
    means = []
    for name in layers:
        weight = cast(torch.Tensor, model.get_submodule(name).weight).detach().cpu().double().numpy()
        with warnings.catch_warnings():
            # a rank above a mode's size is usual here; TensorLy fills the missing columns at random
            warnings.filterwarnings('ignore', message='Trying to compute SVD with n_eigenvecs')
            errors = [parafac(f, rank, init='svd', random_state=0, return_errors=True)[1][-1] for f in weight]  # type: ignore
        means.append(sum(float(e) ** 2 for e in errors) / len(errors))
    return sum(means) / len(means)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, as text; none where there is no file."""
    if not path.is_file():
        return []
    return list(csv.DictReader(io.StringIO(path.read_text(encoding='utf-8'))))


def write_row(path: Path, row: Mapping[str, Any], keys: Sequence[str] = _KEYS) -> None:
    """Add a row to a CSV file, or replace the row of the same run; several processes may do so at once.

    Args:
        path: the file.
        row: values by column.
        keys: columns that tell runs apart.
    """
    lock = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f'norton_timm-{lock}.lock'):
        rows: list[Mapping[str, Any]] = [
            known for known in read_rows(path) if row_key(known, keys) != row_key(row, keys)
        ]
        rows.append(row)
        columns = list(dict.fromkeys(key for known in rows for key in known))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text.getvalue())


def row_key(row: Mapping[str, Any], keys: Sequence[str] = _KEYS) -> tuple[str, ...]:
    """What tells a row from those of other runs, as text."""
    return tuple(str(row.get(key, '')) for key in keys)


def _common(spec: CompressionSpec, config: TrainConfig) -> dict[str, Any]:
    return {
        'epochs': config.optim.epochs, 'seed': config.seed, 'data': Path(config.data.source).name,
        'spec': json.dumps(spec.to_dict()),
        **{name: importlib.metadata.version(name) for name in ('norton-timm', 'torch', 'timm')},
    }  # fmt: skip


def _rounded(value: float | None, digits: int = 2) -> float | str:
    return '' if value is None else round(value, digits)
