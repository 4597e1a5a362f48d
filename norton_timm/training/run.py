"""A whole run: a dense network is compressed, repaired without labels, trained, measured and saved."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import itertools
import json
import logging
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import PretrainedCfg
from timm.utils import distribute_bn
from torch import nn

from norton_timm.checkpoints import base_name, dense_name, find_file, load, preprocessing_in, read_metadata, save
from norton_timm.compression import OUTPUT_ERROR, CompressionSpec, compress, reestimate_batch_norm
from norton_timm.inference import tune_forms
from norton_timm.models import dense_model, read_recipe, set_normalisation
from norton_timm.profiling import channels_last, compare_latency, count, default_input, ready_to_run
from norton_timm.training.config import TrainConfig
from norton_timm.training.data import Preprocessing
from norton_timm.training.distill import Distillation
from norton_timm.training.loop import Trainer, evaluate
from norton_timm.training.sources import open_data, open_test_split
from norton_timm.utils import (
    check_not_written,
    is_main,
    read_plain,
    read_plain_file,
    settings_from,
    wait_for_all,
    world_size,
    write_text,
)

log = logging.getLogger(__name__)

CONFIG, STAGES, CALIBRATED = 'config.yaml', 'stages.json', 'calibrated.safetensors'
MODEL, RESULTS = 'model.safetensors', 'results.json'
WRITTEN = (MODEL, CALIBRATED, 'checkpoint.pt', 'shot*.pt')
TOP1 = ('top1_dense', 'top1_teacher', 'top1_compressed', 'top1_repaired', 'top1_start', 'top1')
FIGURES = ('nmse', *TOP1, 'top5', 'loss')
_NORM_IMAGES = 8192  # training images that re-estimate the batch norms of averaged weights


def preprocessing_of(name: str, config: TrainConfig) -> Preprocessing:
    """What the dense network expects of its images: as the run says, else the file of its weights, else its name."""
    cfg = (timm.get_pretrained_cfg(name) or PretrainedCfg()).to_dict()
    path = weights_file(name, config)
    recorded = {} if path is None else preprocessing_in(path)
    given = {'mean': config.data.mean, 'std': config.data.std}
    said = {key: value for key, value in given.items() if value is not None}
    return Preprocessing.from_cfg({**cfg, **recorded, **said})


def weights_file(name: str, config: TrainConfig) -> Path | None:
    """The file with the dense network's weights, if they are in a file of the user's or of this package."""
    if config.weights is not None:
        return Path(config.weights)
    return find_file(name) if config.pretrained else None


def tell_normalisation(preprocessing: Preprocessing, name: str, path: Path | None, given: bool = False) -> None:
    """Log how images are normalised, and warn where nobody knows whether the weights were trained so.

    Args:
        preprocessing: what is used.
        name: the network's name.
        path: file with its weights; None: there are none, or they are timm's own.
        given: the user said how.
    """
    if not is_main():
        return
    recorded = path is not None and 'mean' in preprocessing_in(path)
    source = 'as given' if given else f'as {path} says' if recorded else f'those of {name}'
    mean, std = (', '.join(f'{v:.4g}' for v in numbers) for numbers in (preprocessing.mean, preprocessing.std))
    log.info('images are normalised with mean (%s) and std (%s), %s', mean, std, source)
    if path is not None and not recorded and not given:
        log.warning('%s does not say how its images were normalised; with other numbers than its own a network is less '
                    'accurate: give them, as data.mean and data.std of a run', path)  # fmt: skip


def is_compressed_tag(name: str) -> bool:
    """Whether a name is one of ours, such as `norton_resnet56_cifar.r071`."""
    return base_name(name) != name.partition('.')[0]


def spec_of_run(config: TrainConfig) -> CompressionSpec | None:
    """The recipe of a run; None for one that only trains a dense network."""
    source = config.recipe or (config.model if is_compressed_tag(config.model) else None)
    return None if source is None else read_recipe(source)


class Recovery:
    """A run in a folder; started again, it continues where it stopped.

    Args:
        config: the run.
        output: folder for `config.yaml`, `metrics.jsonl`, checkpoints, `model.safetensors` and `results.json`.
        device: where to compute.
        progress: show progress bars.

    Raises:
        ValueError: the folder holds another run; wrong names, weights or data.

    Example:
        >>> config = TrainConfig(model='norton_resnet56_cifar.r071', weights='resnet56_cifar.pt')
        >>> Recovery(config, Path('runs/r071'), torch.device('cpu')).run()['top1']
    """

    def __init__(self, config: TrainConfig, output: Path, device: torch.device, progress: bool = True) -> None:
        self.config, self.output, self.device, self.progress = config, output, device, progress
        name, self.spec = dense_name(config.model), spec_of_run(config)
        self.trained = config.weights is not None or config.pretrained
        if self.spec is not None and config.distill.weight and not self.trained:
            raise ValueError('distillation needs a trained dense network: give weights, or set distill.weight to 0')
        if config.distill.teacher is not None and (self.spec is None or not config.distill.weight):
            raise ValueError('got distill.teacher for a run that distils nothing: it needs a recipe and distill.weight')
        if self.spec is not None and self.spec.distance == OUTPUT_ERROR and not config.data.calibration:
            raise ValueError('data.calibration: got 0 with a recipe by output_error, expected images to prune by')
        refuse_other_run(output, config.to_yaml())
        check_not_written((config.weights, config.distill.teacher, config.start), output, WRITTEN)
        preprocessing = preprocessing_of(name, config)
        self.data = open_data(
            config.data.source, preprocessing, device,
            workers=config.data.workers, augmentation=config.data.augmentation,
        )  # fmt: skip
        tell_normalisation(preprocessing, name, weights_file(name, config), given=config.data.mean is not None)
        self.dense = self._load_dense(config.weights)
        self.teacher = self.dense
        if config.distill.teacher is not None:
            self.teacher = self._load_dense(config.distill.teacher)
            recorded = preprocessing_in(Path(config.distill.teacher))
            if any(recorded.get(key, value) != value for key, value in preprocessing.normalisation().items()):
                log.warning('%s was trained on images normalised in another way', config.distill.teacher)
        output.mkdir(parents=True, exist_ok=True)
        if is_main():
            write_text(output / CONFIG, config.to_yaml())
        self.facts: dict[str, Any] = {}
        if (output / STAGES).is_file():
            self.facts = read_stages(output / STAGES)

    def _load_dense(self, weights: str | None) -> nn.Module:
        """The dense network with the weights of a file, or with its published or random ones."""
        path = None if weights is None else Path(weights)
        pretrained = self.config.pretrained and path is None
        dense = dense_model(dense_name(self.config.model), pretrained, path, num_classes=len(self.data.classes))
        set_normalisation(dense, self.config.data.mean, self.config.data.std)
        return dense.to(self.device)

    def run(self) -> dict[str, Any]:
        """Carry out what is left of the run.

        Returns:
            What `results.json` holds: parameters, MACs, milliseconds, top-1 in percent of the dense network, after
            compression, after repair and after training, and what is needed to repeat it.

        Raises:
            FloatingPointError: the loss became NaN or infinite; the checkpoint keeps the epoch before.
        """
        if self.trained:
            self._measure('top1_dense', self.dense)
        if self.teacher is not self.dense:
            self._measure('top1_teacher', self.teacher)
        model = self.dense if self.spec is None else self._compressed()
        if self.config.optim.epochs:
            trainer = self._trainer(model)
            trainer.run()
            model = trainer.trained
            if self.config.start_share:
                average(model, load(str(self.config.start)).to(self.device), self.config.start_share)
                size = self.config.optim.batch_size
                batches = self.data.train_batches(trainer.epoch, size, self.config.seed)
                reestimate_batch_norm(model, itertools.islice(batches, _NORM_IMAGES // size + 1))
                if world_size() > 1:
                    distribute_bn(model, world_size(), reduce=True)
        model = model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        accuracy = evaluate(model, self.data, self.device)  # in full precision, whatever the training's was
        self.facts.update({'top1': accuracy['top1'], 'top5': accuracy['top5'], 'loss': accuracy['loss']})
        results = self._results(model)
        if is_main():
            provenance = {k: v for k, v in results.items() if v is not None}
            save(model.cpu(), self.output / MODEL, provenance=provenance)
            write_text(self.output / RESULTS, json.dumps(results, indent=1) + '\n')
        return results

    def _compressed(self) -> nn.Module:
        """The network that training starts from: compressed, repaired, after all rounds of a K-shot recipe."""
        if self.config.start is not None:
            return self._start(Path(self.config.start))
        done = self.output / CALIBRATED
        missing = not done.is_file()
        wait_for_all()
        if missing:
            model = self._compress()
            if is_main():
                save(model, done)
            wait_for_all()
        return load(done).to(self.device)  # every run loads the file, so that a resumed one has the same network

    def _start(self, path: Path) -> nn.Module:
        """A network that was compressed, and perhaps trained, before.

        Raises:
            ValueError: it was not compressed from this run's dense network by this run's recipe.
        """
        model, before = load(path), read_metadata(path).get('provenance') or {}
        spec = None if self.spec is None else self.spec.to_dict()
        if model.norton_base['architecture'] != dense_name(self.config.model) or before.get('spec', spec) != spec:
            raise ValueError(
                f'{path} was not compressed from {dense_name(self.config.model)} by the recipe of this run'
            )
        self.facts.update({key: before.get(key) for key in ('nmse', 'top1_compressed', 'top1_repaired')})
        self.facts['epochs_before'] = (before.get('epochs') or 0) + (before.get('epochs_before') or 0)
        self._measure('top1_start', model.to(self.device))
        return model

    def _compress(self) -> nn.Module:
        config, spec = self.config, cast(CompressionSpec, self.spec)
        if 'top1_compressed' not in self.facts and spec.distance != OUTPUT_ERROR:  # which prunes and repairs in one
            plain, report = compress(self.dense, spec)
            nmse = [layer.nmse for layer in report.layers if layer.nmse is not None]
            self.facts['nmse'] = sum(nmse) / len(nmse) if nmse else None
            self._measure('top1_compressed', plain)
        images = self.data.calibration_batches(config.data.calibration) if config.data.calibration else None
        model, _ = compress(self.dense, spec, calibration=images, between_shots=self._tune)
        self._measure('top1_repaired', model)
        return model

    def _tune(self, model: nn.Module, shot: int) -> None:
        if self.config.shot_epochs:
            self._trainer(model, shot).run()

    def _trainer(self, model: nn.Module, shot: int = 0) -> Trainer:
        """The training loop of the run, or of the epochs between two rounds of a K-shot recipe."""
        config, teacher = self.config, None
        if self.spec is not None and config.distill.weight:
            wise = copy.deepcopy(self.teacher)
            if config.channels_last:
                wise = wise.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            teacher = Distillation(wise, model, config.distill)
        optim = dataclasses.replace(config.optim, epochs=config.shot_epochs) if shot else config.optim
        return Trainer(
            model, self.data, optim, self.output, device=self.device, seed=config.seed + 1_000 * shot, teacher=teacher,
            mixup=config.data.mixup, cutmix=config.data.cutmix, channels_last=config.channels_last,
            compile=config.compile, checkpoint=f'shot{shot}.pt' if shot else 'checkpoint.pt', progress=self.progress,
        )  # fmt: skip

    def _measure(self, key: str, model: nn.Module) -> None:
        """Measure the top-1 of a network in percent, and store it for a run that is stopped and started again."""
        if key not in self.facts:
            self.facts[key] = evaluate(model, self.data, self.device)['top1']
            log.info('%s: %.2f %%', key.replace('_', ' '), self.facts[key])
            if is_main():
                write_text(self.output / STAGES, json.dumps(self.facts) + '\n')

    def _results(self, model: nn.Module) -> dict[str, Any]:
        image = default_input(self.dense).to(self.device)
        before, after = count(self.dense, image), count(model, image)
        tuned = ready_to_run(model)
        tune_forms(tuned, channels_last(image))
        ms = compare_latency({'ms_dense': self.dense, 'ms': tuned}, image)
        return {
            'model': self.config.model,
            'spec': None if self.spec is None else self.spec.to_dict(),
            'macs_dense': before.macs, 'macs': after.macs, 'params_dense': before.params, 'params': after.params,
            **{key: self.facts.get(key) for key in FIGURES},
            **{key: round(value, 3) for key, value in ms.items()},
            'epochs': self.config.optim.epochs, 'epochs_before': self.facts.get('epochs_before', 0),
            'start_share': self.config.start_share, 'seed': self.config.seed,
            'data': Path(self.config.data.source).name, 'test_images': self.data.test_size,
            'threads': torch.get_num_threads(), 'device': self.device.type,
            'versions': {name: importlib.metadata.version(name) for name in ('norton-timm', 'torch', 'timm')},
            'config': portable(self.config),
        }  # fmt: skip


@torch.no_grad()
def average(model: nn.Module, other: nn.Module, share: float) -> None:
    """Move weights and running statistics towards those of another network of the same shape, in place.

    Two rounds of training end on two sides of a flat minimum; the mean of both ends often generalises better than
    either (stochastic weight averaging, Izmailov et al., 2018). Its activations have other statistics than the mean of
    both: re-estimate the batch norms on images as in training.
    """
    beside = other.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(beside[name].to(tensor), share)


def portable(config: TrainConfig) -> dict[str, Any]:
    """A configuration for others to read: files by name, without the folders of this machine."""
    values = config.to_dict()
    values.update({key: Path(values[key]).name for key in ('weights', 'recipe', 'start') if values[key] is not None})
    values['data']['source'] = Path(values['data']['source']).name
    if values['distill']['teacher'] is not None:
        values['distill']['teacher'] = Path(values['distill']['teacher']).name
    return values


def evaluate_file(
    model: str,
    data: str,
    device: torch.device,
    *,
    weights: Path | None = None,
    batch_size: int = 256,
    amp: str = 'none',
    workers: int = 4,
) -> dict[str, Any]:
    """Accuracy of a trained network on the test split of a data set, prepared as its `pretrained_cfg` says.

    Args:
        model: a timm name, or a file of `norton_timm.save`.
        data: see `norton_timm.training.open_test_split`.
        device: where to compute.
        weights: file with the weights of the network named; None: its published ones.
        batch_size: images of one process.
        amp: `none`, `bf16` or `fp16`.
        workers: loading processes.

    Returns:
        `top1`, `top5` in percent, `loss`, and what they were measured on.

    Raises:
        ValueError: no such model, weights or data, or a network with another number of classes.
    """
    if model.endswith('.safetensors'):
        if weights is not None:
            raise ValueError(f'got weights {weights} and the file {model}, expected one of them')
        network = load(model)
    else:
        network = dense_model(model, pretrained=weights is None, checkpoint=weights)
    cfg: Any = network.pretrained_cfg
    preprocessing = Preprocessing.from_cfg(cfg)
    tell_normalisation(preprocessing, model, weights)
    images = open_test_split(data, preprocessing, device, workers=workers)
    outputs = getattr(network, 'num_classes', None)
    if outputs != len(images.classes):
        raise ValueError(f'{model} has {outputs} classes, but {data} has {len(images.classes)}')
    results = evaluate(network.to(device), images, device, batch_size, amp)
    return {
        'model': model, 'data': Path(data).name, 'test_images': images.test_size, **results,
        'mean': list(preprocessing.mean), 'std': list(preprocessing.std), 'amp': amp, 'device': device.type,
    }  # fmt: skip


def read_stages(path: Path) -> dict[str, Any]:
    """What a run measured before it was stopped.

    Raises:
        ValueError: the file is damaged.
    """
    facts: Any = None
    with contextlib.suppress(ValueError, RecursionError):  # damaged text, or damaged JSON
        facts = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(facts, dict):
        raise ValueError(f'{path} is damaged: move it away, and the run goes on without some of its figures')
    return facts


def refuse_other_run(output: Path, text: str) -> None:
    """Refuse a folder that holds a run of another configuration.

    Raises:
        ValueError: the folder holds such a run.
    """
    path = output / CONFIG
    if path.is_file() and run_in(path) != run_in(text):
        raise ValueError(f'{output} holds a run with another configuration ({CONFIG}): choose another folder')


def run_in(source: Path | str) -> TrainConfig:
    """The configuration in a run's file, or in its text; keys that an older version did not write get their default.

    Raises:
        ValueError: it is damaged.
    """
    problems: list[str] = []
    values = read_plain(source) if isinstance(source, str) else read_plain_file(source)
    config = settings_from(TrainConfig, values, '', problems)
    if problems:
        raise ValueError(f'{source} is damaged: {problems[0]}')
    return config
