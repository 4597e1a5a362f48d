"""The configuration of a classification run: typed, read from YAML, every problem reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.optim import list_optimizers

from norton_timm.utils import AMP, Settings, checked, outside, read_tree

TIMM_SCHEDULES = ('cosine', 'tanh', 'poly')


@dataclass(frozen=True)
class DataConfig:
    """Which data are read, and how they are augmented."""

    source: str = 'cifar10'  # see norton_timm.training.open_data
    workers: int = 4  # loading processes; images held in memory need none
    mean: tuple[float, ...] | None = None  # of images in 0..1; None: what the network's own configuration says
    std: tuple[float, ...] | None = None
    calibration: int = 512  # training images for the repair without labels; 0: no repair
    mixup: float = 0.0  # timm's Mixup: alpha of mixup and of cutmix, 0 for none
    cutmix: float = 0.0
    augmentation: dict[str, Any] = field(default_factory=dict)  # arguments of timm.data.create_loader


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule, by timm's names."""

    name: str = 'sgd'  # timm.optim.create_optimizer_v2; sgd is Nesterov's
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = 'cosine'  # timm.scheduler.create_scheduler_v2
    epochs: int = 15  # 0: compress and repair only
    warmup: float = 1.0  # epochs of linear warm-up
    batch_size: int = 128  # images of a step of one process, before accumulation
    accumulate: int = 1  # batches per step; their gradients are averaged
    smoothing: float = 0.0  # of the labels
    clip: float | None = None  # bound on the norm of the gradient
    ema: float | None = None  # decay of the moving average of the weights that is evaluated
    amp: str = 'none'
    eval_every: int = 1  # epochs; the end is always evaluated


@dataclass(frozen=True)
class DistillConfig:
    """What the compressed network learns from the dense one (Hinton et al., 2015)."""

    weight: float = 0.9  # of the teacher's soft labels; 0: no teacher
    temperature: float = 4.0
    features: float = 0.0  # weight of the relative error of feature maps of equal width
    teacher: str | None = None  # file with better weights of the dense network, perhaps trained for longer


@dataclass(frozen=True)
class TrainConfig(Settings):
    """One run: dense network, compression, repair, training."""

    model: str = 'norton_resnet56_cifar.r071'  # a timm name; a compressed tag is made from its dense network
    # file with the weights of the dense network; None: random, or the published ones with `pretrained`
    weights: str | None = None
    pretrained: bool = False
    recipe: str | None = None  # compress by this: a tag or a YAML file; None: the tag's own, or no compression
    start: str | None = None  # continue from this file of `norton_timm.save`, compressed by the same recipe
    start_share: float = 0.0  # weight of `start` in the average with the result that is kept (Izmailov et al., 2018)
    shot_epochs: int = 0  # training between the rounds of a K-shot recipe, in epochs
    seed: int = 0
    deterministic: bool = False  # only operations that give equal bits each time; slower on a GPU
    device: str = 'auto'
    channels_last: bool = True
    compile: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)


def load_train_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read a YAML file with its bases, apply overrides, check everything; see `norton_timm.utils.read_tree`.

    Raises:
        ConfigError: with all problems found.
        FileNotFoundError: the file or a base is missing.
    """
    return checked(TrainConfig, *read_tree(path, overrides, values), _check)


def _check(config: TrainConfig) -> list[str]:
    """Values out of range, unknown choices, missing files."""
    data, optim, distill = config.data, config.optim, config.distill
    problems = []
    if optim.amp not in AMP:
        problems.append(f'optim.amp is {optim.amp!r}, expected one of {", ".join(AMP)}')
    if optim.name not in list_optimizers():
        near = get_close_matches(optim.name, [str(n) for n in list_optimizers()], 1)
        problems.append(f'optim.name {optim.name!r} is unknown' + (f': did you mean {near[0]}?' if near else ''))
    if optim.schedule not in TIMM_SCHEDULES:
        problems.append(f'optim.schedule is {optim.schedule!r}, expected one of {", ".join(TIMM_SCHEDULES)}')
    problems += outside({
        'optim.batch_size': optim.batch_size, 'optim.accumulate': optim.accumulate,
        'optim.eval_every': optim.eval_every,
    }, 0, 10**9, above=True)  # fmt: skip
    problems += outside({
        'optim.lr': optim.lr, 'optim.clip': optim.clip, 'distill.temperature': distill.temperature,
    }, 0, 1e300, above=True)  # fmt: skip
    problems += outside({
        'seed': config.seed, 'shot_epochs': config.shot_epochs, 'optim.epochs': optim.epochs,
        'data.calibration': data.calibration, 'data.mixup': data.mixup, 'data.cutmix': data.cutmix,
        'optim.weight_decay': optim.weight_decay, 'optim.warmup': optim.warmup, 'distill.features': distill.features,
    }, 0, 2**32 - 1)  # fmt: skip
    problems += outside({'data.workers': data.workers}, 0, 1024)
    fractions: dict[str, float | None] = {
        'optim.momentum': optim.momentum, 'optim.smoothing': optim.smoothing, 'optim.ema': optim.ema,
    }  # fmt: skip
    problems += [f'{k} is {v}, expected 0 to below 1' for k, v in fractions.items() if v is not None and not 0 <= v < 1]
    if not 0 <= distill.weight <= 1:
        problems.append(f'distill.weight is {distill.weight}, expected 0 to 1')
    if optim.name == 'sgd' and optim.momentum == 0:
        problems.append("optim.momentum is 0, expected more: timm's sgd is Nesterov's; optim.name=momentum takes 0")
    if (data.mixup or data.cutmix) and optim.batch_size % 2:
        problems.append(f'optim.batch_size is {optim.batch_size}, expected an even number: mixup pairs images')
    triples: dict[str, tuple[float, ...] | None] = {'data.mean': data.mean, 'data.std': data.std}
    for key, triple in triples.items():
        if triple is not None and (len(triple) != 3 or min(triple) < 0 or (key == 'data.std' and min(triple) == 0)):
            problems.append(f'{key} is {list(triple)}, expected one number for each of red, green, blue')
    if (data.mean is None) != (data.std is None):
        problems.append('got one of data.mean and data.std, expected both or neither')
    name = config.model.split('.')[0]
    if not timm.is_model(name):
        near = get_close_matches(name, [str(n) for n in timm.list_models()], 1)
        problems.append(f'model {config.model!r} is unknown' + (f': did you mean {near[0]}?' if near else ''))
    if config.weights is not None and not Path(config.weights).is_file():
        problems.append(f'weights: no file {config.weights}')
    if config.start is not None and not Path(config.start).is_file():
        problems.append(f'start: no file {config.start}')
    if distill.teacher is not None and not Path(distill.teacher).is_file():
        problems.append(f'distill.teacher: no file {distill.teacher}')
    if not 0 <= config.start_share < 1 or (config.start_share and config.start is None):
        problems.append(f'start_share is {config.start_share}, expected 0 to below 1, and above 0 only with a start')
    if config.weights is not None and config.pretrained:
        problems.append('got weights and pretrained, expected one of them')
    return problems
