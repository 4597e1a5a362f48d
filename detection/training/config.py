"""The configuration of a training run: typed sections, YAML files that inherit, checks before any work.

A file names its parent with `base: other.yaml` (relative to itself) and holds only what differs. Every problem of a
configuration is reported in one `ConfigError`: unknown keys with the nearest valid one, wrong types, values out of
range, missing files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm

from detection.rcnn import MOBILENET, NORMS, RCNN_OPTIONS, RECIPES, RELEASED, VERSIONS, differences, is_released
from detection.tasks import TASKS
from norton_timm.compression import CompressionSpec
from norton_timm.utils import AMP, Settings, brief, checked, merge, outside, read_tree

OPTIMIZERS = ('sgd', 'adamw')
SCHEDULES = ('multistep', 'cosine')
AUTHORS = 'authors'  # weights in place of a file: what the authors of the compression released
_MOST_LAYERS = 16  # of a mask or keypoint head


@dataclass(frozen=True)
class DataConfig:
    """Which data are read, and how they are augmented."""

    root: str | None = None  # COCO folder; None: data/coco if it is there, else the sample set
    train_split: str = 'train'  # names of annotation files; the same one twice shows whether a network can overfit
    val_split: str = 'val'
    images: str | None = None  # folder of the pictures, in root or else from here; None: where layouts have them
    limit: int | None = None  # train and evaluate only on the first so many images with objects
    batch_size: int = 2  # images of one process
    workers: int = 4  # loading processes
    flip: float = 0.5  # probability of a horizontal flip
    color: float = 0.0  # strength of colour changes, 0 to 1
    jitter: tuple[float, float] = (1.0, 1.0)  # range of a random scale factor
    crop: tuple[int, int] | None = None  # height, width of a random crop; jitter is then relative to its size
    safe_crop: float = 0.0  # probability of a random crop that keeps every object whole
    copy_paste: float = 0.0  # probability of pasting objects of another image (task mask only)
    flip_pairs: tuple[str, ...] | None = None  # keypoints that a mirror swaps, LEFT:RIGHT; None: by their names
    repeat_threshold: float | None = None  # classes in a smaller fraction of the images come more often (LVIS)

    def keypoint_pairs(self) -> list[tuple[str | int, str | int]] | None:
        """`flip_pairs` as `CocoDataset` takes them."""
        if self.flip_pairs is None:
            return None
        return [(left, right) for left, right in (pair.split(':') for pair in self.flip_pairs)]


@dataclass(frozen=True)
class ModelConfig:
    """Arguments of `detection.rcnn.build_detector`, see there."""

    backbone: str = 'norton_resnet50.r078'
    recipe: str = 'backbone'
    compress: str | None = None  # YAML file of a CompressionSpec, to compress the backbone (or all) on the fly
    pretrained: bool = False
    # a file; `authors`: the detector that they released for this task and backbone; or the name of torchvision's
    weights: str | None = None
    partial: bool = False  # weights of a whole detector may lack layers, which then start at random
    norm: str | None = None
    frozen_stages: int = 0
    min_size: tuple[int, ...] | None = None
    max_size: int = 1333
    fpn_channels: int = 256
    box_head: int = 1024
    mask_layers: tuple[int, ...] = (256, 256, 256, 256)
    keypoint_layers: tuple[int, ...] = (512,) * 8
    version: int = 1  # torchvision's: 2 has batch norm in FPN and heads, and convolutions in the box head
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    # further arguments of torchvision's R-CNN classes, e.g. rpn_post_nms_top_n_train
    rcnn: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning rate."""

    name: str = 'sgd'
    lr: float = 0.02
    lr_batch: int | None = 16  # images a step for which lr is meant; lr scales linearly with the real number
    momentum: float = 0.9  # SGD only
    weight_decay: float = 1e-4
    schedule: str = 'multistep'
    epochs: float = 26
    iterations: int | None = None  # instead of epochs; steps keep their place relative to the end
    steps: tuple[int, ...] = (16, 22)  # epochs at which lr falls to a tenth (multistep)
    warmup: int = 1000  # iterations of linear warm-up
    clip: float | None = None  # bound on the norm of the gradient
    accumulate: int = 1  # batches per step; their gradients are averaged
    amp: str = 'none'
    ema: float | None = None  # decay of the moving average of the weights that is evaluated


@dataclass(frozen=True)
class RunConfig(Settings):
    """One training run."""

    task: str = 'box'
    seed: int = 0
    deterministic: bool = False  # only operations that give equal bits each time; slower on a GPU
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, ...
    channels_last: bool = True
    log_every: int = 20  # iterations
    eval_every: float | None = None  # epochs; None: at the end only
    save_every: float = 1  # epochs
    keep_checkpoints: int = 1  # the newest ones to keep; the best one, with eval_every, is kept besides
    tensorboard: bool | None = None  # write for TensorBoard; None: where it is installed
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a YAML file with its bases, apply overrides, check everything.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: `key=value` texts such as `optim.lr=0.01`, the value as in YAML; they win over `values`.
        values: dotted keys with values as they are; None means not given.

    Raises:
        ConfigError: with all problems found.
        FileNotFoundError: the file or a base is missing.

    Example:
        >>> config = load_config('configs/detection/keypoint_strong.yaml', ['optim.lr=0.01'])
    """
    tree, problems = read_tree(path, overrides, values)
    model = tree.get('model')
    follows = values_of_weights(model.get('weights')) if isinstance(model, dict) else {}
    if follows:
        told, tree = tree, read_tree(None, (), follows)[0]
        merge(tree, told)
    return config_from_dict(tree, problems)


def values_of_weights(weights: object) -> dict[str, Any]:
    """What a name of torchvision in `model.weights` says: its task and the detector's shapes, by dotted key.

    `load_config` takes them where a file, `values` and `overrides` say nothing. Other weights give an empty dict.

    Example:
        >>> values_of_weights('maskrcnn_resnet50_fpn')['model.backbone']
        'resnet50'
    """
    if not is_released(weights):
        return {}
    released = RELEASED[str(weights)]
    return {
        'task': released.task,
        **{f'model.{key}': deepcopy(value) for key, value in {**released.shapes, **released.settings}.items()},
    }


def config_from_dict(tree: dict[str, Any], problems: Sequence[str] = ()) -> RunConfig:
    """A checked configuration from nested plain types; earlier `problems` are reported with the new ones."""
    data = tree.get('data')
    if isinstance(data, dict) and type(data.get('images')) is int and data.get('limit') is None:
        data = {key: value for key, value in data.items() if key != 'images'} | {'limit': data['images']}
        tree = {**tree, 'data': data}  # a number under this name is of before there was `limit`
    return checked(RunConfig, tree, problems, _check)


def _check(config: RunConfig) -> list[str]:
    """Values out of range, unknown choices, missing files."""
    data, model, optim = config.data, config.model, config.optim
    choices: list[tuple[str, Any, Sequence[Any]]] = [
        ('task', config.task, TASKS),
        ('model.recipe', model.recipe, RECIPES),
        ('model.version', model.version, VERSIONS),
        ('model.norm', model.norm, (None, *NORMS)),
        ('optim.name', optim.name, OPTIMIZERS),
        ('optim.schedule', optim.schedule, SCHEDULES),
        ('optim.amp', optim.amp, AMP),
    ]
    problems = [
        f'{key} is {value!r}, expected one of {", ".join(str(c) for c in allowed if c is not None)}'
        for key, value, allowed in choices
        if value not in allowed
    ]
    for name in model.rcnn:
        if name not in RCNN_OPTIONS:
            near = get_close_matches(str(name), RCNN_OPTIONS, n=1, cutoff=0.5)
            hint = f'did you mean {near[0]}?' if near else f'expected one of {", ".join(RCNN_OPTIONS)}'
            problems.append(f'unknown key model.rcnn.{name}: {hint}')
    problems += outside({
        'data.batch_size': data.batch_size, 'data.limit': data.limit, 'model.max_size': model.max_size,
        'optim.lr_batch': optim.lr_batch, 'optim.accumulate': optim.accumulate,
        **{f'model.anchor_sizes[{k}]': n for k, n in enumerate(model.anchor_sizes[:5])},
    }, 0, 2**20, above=True)  # fmt: skip
    # a checkpoint brings its own configuration: bound the size of what its reader builds
    problems += outside({
        'model.fpn_channels': model.fpn_channels,
        **{f'model.{key}[{k}]': n for key in ('mask_layers', 'keypoint_layers')
           for k, n in enumerate(getattr(model, key)[:_MOST_LAYERS])},
    }, 0, 4096, above=True)  # fmt: skip
    problems += outside({'model.box_head': model.box_head}, 0, 8192, above=True)
    problems += outside({
        'optim.epochs': optim.epochs, 'optim.iterations': optim.iterations, 'log_every': config.log_every,
        'eval_every': config.eval_every, 'save_every': config.save_every, 'keep_checkpoints': config.keep_checkpoints,
    }, 0, 10**12, above=True)  # fmt: skip
    problems += outside({'optim.lr': optim.lr, 'optim.clip': optim.clip}, 0, 1e300, above=True)
    problems += outside({
        'seed': config.seed, 'optim.warmup': optim.warmup, 'optim.weight_decay': optim.weight_decay,
        'optim.momentum': optim.momentum,
    }, 0, 2**32 - 1)  # fmt: skip
    problems += outside({'data.workers': data.workers}, 0, 1024)
    for key in ('flip', 'color', 'safe_crop', 'copy_paste'):
        p = getattr(data, key)
        if not 0 <= p <= 1:
            problems.append(f'data.{key} is {p}, expected 0 to 1')
    if data.copy_paste and config.task in TASKS and config.task != 'mask':
        problems.append(f'data.copy_paste is {data.copy_paste}, expected 0 for task {config.task}: it needs masks')
    if data.repeat_threshold is not None and not 0 < data.repeat_threshold <= 1:
        problems.append(f'data.repeat_threshold is {data.repeat_threshold}, expected a fraction above 0, up to 1')
    if data.flip_pairs is not None and any(len([*filter(None, p.split(':'))]) != 2 for p in data.flip_pairs):
        problems.append(f'data.flip_pairs is {list(data.flip_pairs)}, expected names of two keypoints each, LEFT:RIGHT')
    if optim.ema is not None and not 0 < optim.ema < 1:
        problems.append(f'optim.ema is {optim.ema}, expected a decay between 0 and 1')
    if len(data.jitter) != 2 or not 0 < data.jitter[0] <= data.jitter[1] <= 1000:
        problems.append(f'data.jitter is {list(data.jitter)}, expected two factors above 0, the smaller one first')
    if data.crop is not None and (len(data.crop) != 2 or not 1 <= min(data.crop) <= max(data.crop) <= 2**15):
        problems.append(f'data.crop is {list(data.crop)}, expected [height, width] in pixels')
    if not 0 <= model.frozen_stages <= 4:
        problems.append(f'model.frozen_stages is {model.frozen_stages}, expected 0 to 4')
    if len(model.anchor_sizes) != 5:
        problems.append(f'model.anchor_sizes is {brief(model.anchor_sizes)}, expected five sizes in pixels')
    for key, layers in (('mask_layers', model.mask_layers), ('keypoint_layers', model.keypoint_layers)):
        if not 1 <= len(layers) <= _MOST_LAYERS:
            problems.append(f'model.{key} is {brief(layers)}, expected one width or more, at most {_MOST_LAYERS}')
    if model.min_size is not None and (not model.min_size or min(model.min_size) < 1 or max(model.min_size) > 2**15):
        problems.append(f'model.min_size is {list(model.min_size)}, expected pixels, at least 1')
    if model.backbone != MOBILENET and not timm.is_model(model.backbone.split('.')[0]):
        near = get_close_matches(model.backbone.split('.')[0], timm.list_models(), n=1)
        hint = f'did you mean {near[0]}?' if near else 'expected a timm model name such as norton_resnet50.r078'
        problems.append(f'model.backbone {model.backbone!r} is unknown: {hint}')
    if model.compress is not None:
        try:
            CompressionSpec.from_yaml(Path(model.compress))
        except ValueError as error:
            problems.append(f'model.compress: {error}')
    if is_released(model.weights):
        lines = differences(model.weights, config.task, vars(model), model.partial)
        problems += [line if line.startswith('task ') else f'model.{line}' for line in lines]
    elif model.weights not in (None, AUTHORS) and not Path(model.weights).is_file():
        named = get_close_matches(model.weights, RELEASED, n=1, cutoff=0.8)
        problems.append(f'model.weights: no file {model.weights}' + (f', did you mean {named[0]}?' if named else ''))
    if model.norm == 'frozen' and not model.pretrained and model.weights is None:
        problems.append(
            "model.norm 'frozen' needs model.pretrained or model.weights: random statistics must be trained"
        )
    if data.root is not None and not Path(data.root).is_dir():
        problems.append(f'data.root: no folder {data.root}')
    return problems
