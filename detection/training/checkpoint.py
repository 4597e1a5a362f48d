"""Checkpoints of detectors: written whole or not at all, read without unpickling code."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detection.rcnn import RELEASED, build_detector, differences, is_detector, is_released, restore
from detection.tasks import check_same_task
from detection.training.config import AUTHORS, RunConfig, config_from_dict
from detection.training.imported import imported_checkpoint
from norton_timm.checkpoints import dense_name, read_checkpoint
from norton_timm.models import released_detector
from norton_timm.utils import replacing, write_plain

_KEYS = ('model', 'config', 'meta')
_MOST_CLASSES = 10_000  # limit for untrusted files: a larger network would be built before the file is refused


class Described(Protocol):
    """A data set that describes its classes, as `detection.data.CocoDataset` does."""

    num_classes: int
    class_names: list[str]
    label_to_category: dict[int, int]
    num_keypoints: int
    skeleton: Any


def describe_data(dataset: Described, task: str) -> dict[str, Any]:
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
    """The detector for a configuration and a data set (`describe_data`), with the weights that training starts from.

    Raises:
        ValueError: `model.weights` does not fit, or the configuration asks for what cannot be built.
    """
    options = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model)}
    rcnn = options.pop('rcnn')
    if meta['num_keypoints']:
        options['num_keypoints'] = meta['num_keypoints']
    if options['weights'] == AUTHORS:
        options.update(weights=None, pretrained=AUTHORS)
    try:
        return build_detector(config.task, num_classes=meta['num_classes'], **options, **rcnn)
    except RuntimeError as error:
        if not config.model.weights:
            raise
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(f'{config.model.weights} does not fit {config.model.backbone}: {reason} ...') from error


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> Path:
    """Write a dict of tensors and plain types; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_plain(temporary, content)
    return path


def save_latest(folder: str | Path, content: dict[str, Any], keep: int = 1) -> Path:
    """Write `checkpoint.pt`; with `keep` above 1 the newest `keep` also stay as `checkpoint_ITERATION.pt`.

    At every moment `checkpoint.pt` is a whole checkpoint, the newest or the one before. It is a hard link to the newest
    numbered file, or a copy where the file system has no hard links.
    """
    latest = Path(folder) / 'checkpoint.pt'
    if keep == 1:
        return save_checkpoint(latest, content)
    numbered = save_checkpoint(latest.with_name(f'checkpoint_{content["iteration"]:08d}.pt'), content)
    with replacing(latest) as temporary:
        temporary.unlink()
        try:
            os.link(numbered, temporary)
        except OSError:
            shutil.copyfile(numbered, temporary)
    # by time, not by number: an earlier run in this folder may have got further
    written = sorted(latest.parent.glob('checkpoint_*.pt'), key=lambda p: (p.stat().st_mtime_ns, p.name))
    for path in written[:-keep]:
        path.unlink()
    return latest


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what the training loop wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a checkpoint.
    """
    return _complete(_read(path), path)


def _read(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f'no checkpoint file {path}')
    return read_checkpoint(Path(path))


def _complete(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ValueError(f'{path} is not a checkpoint of train_det.py: it lacks {", ".join(missing)}')
    return content


def same_run(path: str | Path, config: RunConfig) -> bool:
    """Whether a checkpoint is of a run with this configuration; device and loading processes do not count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no run can go on from it, because it is damaged or something else; the message says what to do.
    """

    def told(tree: dict[str, Any]) -> Any:
        data = {key: value for key, value in tree['data'].items() if key != 'workers'}
        return json.loads(json.dumps({**tree, 'data': data, 'device': None}))  # tuples become lists

    try:
        content = load_checkpoint(path)
    except ValueError as error:
        older = sorted(p.name for p in Path(path).parent.glob('checkpoint_*.pt'))
        copies = f'copy an older one ({", ".join(older)}) over it, ' if older else ''
        raise ValueError(
            f'{error}: it is damaged or of something else, and no run can go on from it; {copies}move it away to begin '
            'anew, or choose another --output'
        ) from None
    try:
        return told(config_from_dict(content['config']).to_dict()) == told(config.to_dict())
    except (ValueError, LookupError, TypeError, AttributeError):  # a configuration of another version
        return False


def load_detector(
    path: str | Path, task: str | None = None, backbone: str | None = None
) -> tuple[GeneralizedRCNN, dict[str, Any]]:
    """Rebuild a trained detector, with averaged weights if the run kept them, in evaluation mode.

    Args:
        path: a checkpoint of train_det.py, or a file of the authors or of torchvision's reference training as it is,
            see `imported_checkpoint`; or the name of a detector that torchvision trained on COCO, downloaded once.
        task: what the detector should be for; None takes any.
        backbone: timm's name of the backbone that it should have; None takes any.

    Returns:
        The detector and a dict with `task`, `class_names`, `label_to_category`, `num_classes`, `num_keypoints`,
        `keypoint_names`, `skeleton`, `iteration`, `results` and `config` (a `RunConfig`).

    Raises:
        ConnectionError: torchvision's detector cannot be downloaded now; the message says where to put the file.
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, does not fit its own configuration, is for another task, or has another
            backbone.

    Example:
        >>> model, meta = load_detector('runs/keypoint/checkpoint.pt')
        >>> output = model([image])[0]  # image: (3, H, W) in 0..1
    """
    if is_released(path):  # what does not fit is told before the download
        check_same_task(path, RELEASED[str(path)].task, task)
        if problems := differences(path, RELEASED[str(path)].task, {'backbone': backbone} if backbone else {}):
            raise ValueError(problems[0])
        content, model, config = _imported(path)
    elif 'config' not in (content := _read(path)) and is_detector(content):
        content, model, config = _imported(path)
    else:
        model, config = _rebuilt(_complete(content, path), path, 'its own configuration')
    check_same_task(path, config.task, task)
    if backbone is not None and config.model.backbone != backbone:
        raise ValueError(f'{path} is a detector on {config.model.backbone}, expected one on {backbone}')
    facts = {'config': config, 'iteration': content.get('iteration'), 'results': content.get('results')}
    meta = {**content['meta'], **facts}
    return model, meta


def load_authors_detector(task: str | None, backbone: str) -> tuple[GeneralizedRCNN, dict[str, Any]]:
    """The detector that the authors of the compression released, downloaded once; returns what `load_detector` does.

    Args:
        task: `'box'`, `'mask'` or `'keypoint'`.
        backbone: a tag of `norton_resnet50` or `coring_resnet50`.

    Raises:
        ConnectionError: it cannot be downloaded now; the message says how to get it by hand.
        ValueError: there is none, or the file is refused, or is another detector.

    Example:
        >>> model, meta = load_authors_detector('box', 'norton_resnet50.r078')
    """
    return load_detector(released_detector(str(task), backbone), task, backbone)


def import_detector(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours from a file of the authors or of torchvision's reference training, to be written.

    Raises:
        ValueError: the file cannot be read safely, or holds no detector that this package can build.

    Example:
        >>> save_checkpoint('faster.pt', import_detector('model_25.pth'))
    """
    return _imported(path)[0]


def _imported(path: str | Path) -> tuple[dict[str, Any], GeneralizedRCNN, RunConfig]:
    content = imported_checkpoint(path)
    config = content['config']
    return content, *_rebuilt(content, path, f'a {config["task"]} detector on {config["model"]["backbone"]}')


def _rebuilt(content: dict[str, Any], path: str | Path, what: str) -> tuple[GeneralizedRCNN, RunConfig]:
    """The detector of a checkpoint and its configuration; the ValueError names the file and what it does not fit."""
    try:
        return _build(content)
    # a file may claim anything, and fails wherever a false claim is first used
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        told = ' '.join(str(error).split())[:300]
        raise ValueError(f'{path} does not fit {what}: {told}') from None


def _build(content: dict[str, Any]) -> tuple[GeneralizedRCNN, RunConfig]:
    # files that the run was started from may be gone by now, and are not needed
    tree = dict(content['config'])
    tree['data'] = {**tree['data'], 'root': None}
    tree['model'] = {**tree['model'], 'weights': None, 'pretrained': False, 'norm': None, 'compress': None}
    config, meta = config_from_dict(tree), content['meta']
    _check_meta(meta, config.task)
    _fill_names(meta)
    dense = config
    if content.get('surgery') is not None:  # the surgery says what was cut: begin with the dense detector
        options = dataclasses.replace(config.model, backbone=dense_name(config.model.backbone), recipe='backbone')
        dense = dataclasses.replace(config, model=options)
    model = detector_from_config(dense, meta)
    restore(model, content)
    return model.eval(), config


def _fill_names(meta: dict[str, Any]) -> None:
    """Give every label its name, in place; older imported files left the background and COCO's gaps out."""
    names, labels = meta['class_names'], sorted(meta['label_to_category'])
    if len(names) == len(labels) < meta['num_classes'] and labels[-1] < meta['num_classes'] and labels[0] > 0:
        known = dict(zip(labels, names))
        meta['class_names'] = ['__background__'] + [known.get(k, 'N/A') for k in range(1, meta['num_classes'])]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_meta(meta: Any, task: str) -> None:
    """Check what a checkpoint says of classes and keypoints; the ValueError names the wrong entry."""
    known = isinstance(meta, dict)
    said: Any = meta if known else {}
    several = (list, tuple)
    names, labels = (said.get(k) for k in ('class_names', 'label_to_category'))
    points, edges, count = (said.get(k) for k in ('keypoint_names', 'skeleton', 'num_keypoints'))
    good = {
        'task': known and meta.get('task') == task,
        'num_classes': known and _is_int(meta.get('num_classes')) and 1 <= meta['num_classes'] <= _MOST_CLASSES,
        'class_names': isinstance(names, several) and all(isinstance(n, str) for n in names),
        'label_to_category': isinstance(labels, dict) and all(_is_int(k) and _is_int(v) for k, v in labels.items()),
        'num_keypoints': _is_int(count) and 0 <= count <= _MOST_CLASSES,
        'keypoint_names': points is None or (isinstance(points, several) and all(isinstance(n, str) for n in points)),
        'skeleton': isinstance(edges, several) and all(
            isinstance(e, several) and len(e) == 2 and all(_is_int(k) and 0 <= k < count for k in e)
            for e in edges
        ),
    }  # fmt: skip
    wrong = [key for key, fits in good.items() if not fits]
    if wrong:
        raise ValueError(f'what it says of its {wrong[0]} makes no sense')
