"""Checkpoints of detectors: written whole or not at all, read without unpickling code."""

from __future__ import annotations

import dataclasses
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detection.config import RunConfig, config_from_dict
from detection.rcnn import build_detector

_KEYS = ('model', 'config', 'meta')


class Described(Protocol):
    """What a data set says of its classes, as `detection.data.CocoDataset` does."""

    num_classes: int
    class_names: list[str]
    label_to_category: dict[int, int]
    num_keypoints: int
    skeleton: Any


def describe(dataset: Described, task: str) -> dict[str, Any]:
    """The part of a checkpoint that says what labels and keypoints mean; plain types only."""
    return {
        'task': task,
        'num_classes': dataset.num_classes,
        'class_names': list(dataset.class_names),
        'label_to_category': {int(k): int(v) for k, v in dataset.label_to_category.items()},
        'num_keypoints': int(dataset.num_keypoints),
        'keypoint_names': list(getattr(dataset, 'keypoint_names', ())),
        'skeleton': [[int(a), int(b)] for a, b in dataset.skeleton],
    }


def detector_from_config(config: RunConfig, meta: dict[str, Any]) -> GeneralizedRCNN:
    """The detector that a configuration and a data set (`describe`) ask for."""
    options = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model)}
    rcnn = options.pop('rcnn')
    if meta['num_keypoints']:
        options['num_keypoints'] = meta['num_keypoints']
    return build_detector(config.task, num_classes=meta['num_classes'], **options, **rcnn)


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> Path:
    """Write a dict of tensors and plain types; under the final name there is only ever a whole file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    path.chmod(0o644)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what the training loop wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint file {path}')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f'{path} is not a checkpoint that can be read ({type(error).__name__})') from error
    missing = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f'{path} is not a checkpoint of train_det.py: it lacks {", ".join(missing)}')
    return content


def load_detector(path: str | Path) -> tuple[GeneralizedRCNN, dict[str, Any]]:
    """Rebuild a trained detector, with averaged weights if the run kept them, in evaluation mode.

    Returns:
        The detector and a dict with `task`, `class_names`, `label_to_category`, `num_classes`, `num_keypoints`,
        `keypoint_names`, `skeleton`, `iteration`, `results` and `config` (a `RunConfig`).
    """
    content = load_checkpoint(path)
    # files that the run was started from may be gone by now, and are not needed
    tree = dict(content['config'])
    tree['data'] = {**tree['data'], 'root': None}
    tree['model'] = {**tree['model'], 'weights': None, 'pretrained': False, 'norm': None}
    config = config_from_dict(tree)
    model = detector_from_config(config, content['meta'])
    state = content['ema'] if content.get('ema') is not None else content['model']
    problem = model.load_state_dict(state, strict=False)
    # a frozen batch norm is stored without its counter of batches; in evaluation both kinds are the same
    missing = [key for key in problem.missing_keys if not key.endswith('num_batches_tracked')]
    if missing or problem.unexpected_keys:
        raise ValueError(f'{path} does not fit its own configuration: {[*missing, *problem.unexpected_keys][:3]} ...')
    facts = {'config': config, 'iteration': content.get('iteration'), 'results': content.get('results')}
    meta = {**content['meta'], **facts}
    return model.eval(), meta
