"""Restore from files: compressed backbones of `norton_timm.save`, and whole detectors with weights and compression.

Detectors come from our checkpoints or from torchvision's reference training.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

import norton_timm
from detection.rcnn.mobilenet import MobileNetFeatures, is_mobilenet
from detection.rcnn.released import RELEASED, is_released, released_file, with_usual_eps
from norton_timm.checkpoints import (
    convert_state_dict,
    network_tensors,
    read_checkpoint,
    repeat_surgery,
    surgery_of,
)
from norton_timm.graph import Metadata
from norton_timm.models import convert_authors_checkpoint

log = logging.getLogger(__name__)

BODY = 'backbone.body.'
# layers whose shape says how many classes or keypoints there are
LAST = ('roi_heads.box_predictor.', 'roi_heads.mask_predictor.mask_fcn_logits.', 'roi_heads.keypoint_predictor.')


def restore(model: GeneralizedRCNN, content: Mapping[str, Any]) -> None:
    """Give a detector the compression and the weights of a checkpoint (averaged ones if it has them), in place.

    Args:
        model: the dense detector; if the checkpoint has no compression, a detector with its shapes.
        content: the checkpoint.

    Raises:
        ValueError: they do not fit together.
    """
    state = state_of(content)
    # a frozen batch norm is stored without its counter of batches; in evaluation both kinds are the same
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f'{name}.running_mean' in state:
            state.setdefault(f'{name}.num_batches_tracked', torch.tensor(0))
    if content.get('surgery') is not None:
        backbone, batch = model.backbone, torch.rand(1, 3, 64, 64)
        facts = Metadata(backbone.body, batch)
        repeat_surgery(model, content['surgery'], state)
        facts.refresh(backbone.body, batch)
        backbone.out_channels = backbone.fpn.layer_blocks[0][0].out_channels
        return
    problem = model.load_state_dict(state, strict=False)
    if problem.missing_keys or problem.unexpected_keys:
        raise ValueError(f'tensors {[*problem.missing_keys, *problem.unexpected_keys][:3]} ... are not in both')


def load_compressed(body: nn.Module, name: str, path: str | Path) -> None:
    """Give a dense backbone the compression and the weights of a network that `norton_timm.save` wrote, in place.

    Args:
        body: timm's `features_only` model.
        name: timm's name of this model.
        path: the file, of the same architecture; its classifier is left out.

    Raises:
        ValueError: another architecture, or a damaged file.
    """
    network = norton_timm.load(path)
    made = network.norton_base['architecture']
    if made != name:
        raise ValueError(f'{path} holds a compressed {made}, expected {name}')
    places = {n: _place(n, body) for n, _ in network.named_modules()}
    surgery = surgery_of(network)
    for n in surgery.get('low_rank', ()):
        if places[n] is not None:  # the two layers that took its place are not in the dense network
            places.update((f'{n}.{part}', f'{places[n]}.{part}') for part in (0, 1))
    for part in ('layers', 'low_rank', 'maps'):
        if part in surgery:
            surgery[part] = {places[n]: facts for n, facts in surgery[part].items() if places[n] is not None}
    surgery['dropped'] = [place for n in surgery.get('dropped', ()) if (place := places[n]) is not None]
    surgery['buffers'] = {key: shape for n, shape in surgery.get('buffers', {}).items() if (key := _key(n, places))}
    tensors = {key: tensor for n, tensor in network.state_dict().items() if (key := _key(n, places))}
    batch = torch.rand(1, 3, 64, 64)
    facts = Metadata(body, batch)
    repeat_surgery(body, surgery, tensors)
    facts.refresh(body, batch)


def _place(name: str, body: nn.Module) -> str | None:
    """Name of a network's module in timm's feature wrapper: the same, flattened, or below `model`; None if missing."""
    modules = dict(body.named_modules())
    return next((n for n in (name, name.replace('.', '_', 1), f'model.{name}') if n in modules), None)


def _key(tensor: str, places: Mapping[str, str | None]) -> str | None:
    owner, _, leaf = tensor.rpartition('.')
    place = places[owner]
    return None if place is None else f'{place}.{leaf}'.lstrip('.')


def detector_content(path: str | Path) -> dict[str, Any] | None:
    """A checkpoint of train_det.py or of torchvision's reference training; None where the file is something else.

    Args:
        path: the file, or a name in `RELEASED`, whose file is downloaded once.

    Raises:
        ConnectionError: it cannot be downloaded now.
        FileNotFoundError: there is no such file.
    """
    if is_released(path):
        return {'model': _released_tensors(str(path))}
    if not Path(path).is_file():
        raise FileNotFoundError(f'no file with backbone weights at {path}')
    try:
        content = read_checkpoint(Path(path))
    except ValueError:
        return None  # not torch's format, or what timm reads in its own way
    if not is_detector(content):
        return None
    return content if isinstance(content.get('model'), dict) else {'model': content}


def _released_tensors(name: str) -> dict[str, Tensor]:
    """The weights of one of torchvision's detectors, for the usual epsilon of batch norms."""
    file = released_file(name)
    try:
        tensors = network_tensors(read_checkpoint(file))
    except ValueError as error:
        raise ValueError(f'{error}; remove the file to get it again') from None
    if not is_detector(tensors):
        raise ValueError(f'{file} holds no detector: expected tensors under {BODY}; remove the file to get it again')
    return with_usual_eps(tensors) if RELEASED[name].zero_eps else tensors


def is_detector(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint, or a state dict, holds a whole detector."""
    tensors = content['model'] if isinstance(content.get('model'), dict) else content
    return any(str(name).startswith((BODY, f'module.{BODY}')) for name in tensors)


def task_of(tensors: Mapping[str, Any]) -> str:
    """The task of the detector that has these tensors, by its heads."""
    heads = {name.split('.')[1] for name in map(str, tensors) if name.startswith('roi_heads.')}
    return next((task for task in ('mask', 'keypoint') if f'{task}_predictor' in heads), 'box')


def convert_detector_state_dict(path: str | Path) -> tuple[dict[str, Tensor], nn.Module]:
    """Read a detector of torchvision's reference script: its tensors with our names and order, and its backbone.

    Names of torchvision's first version become those of today.

    Args:
        path: the file, or a name in `RELEASED`.

    Returns:
        The state dict of the whole detector, the backbone still under `backbone.body.`, and the backbone as
        `norton_timm.convert_authors_checkpoint` returns it.

    Raises:
        ConnectionError: It cannot be downloaded now.
        ValueError: The file cannot be read safely, holds no detector, or its backbone does not fit.
    """
    named = is_released(path)
    read = _released_tensors(str(path)) if named else network_tensors(read_checkpoint(Path(path)))
    path = released_file(str(path)) if named else path
    tensors = {_current_name(name): t for name, t in read.items()}
    if not is_detector(tensors):
        raise ValueError(f'{path} holds no detector: expected tensors under {BODY}')
    backbone = MobileNetFeatures() if is_mobilenet(tensors, BODY) else convert_authors_checkpoint(path)
    return _by_our_names(tensors, backbone), backbone


def _by_our_names(tensors: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Tensors of a detector; those of its backbone with our names and order, whoever wrote them."""
    body = {name.removeprefix(BODY): t for name, t in tensors.items() if name.startswith(BODY)}
    rest = {name: t for name, t in tensors.items() if not name.startswith(BODY)}
    return {**{BODY + name: t for name, t in convert_state_dict(body, backbone).items()}, **rest}


def version_of(tensors: Mapping[str, Any]) -> int:
    """Torchvision's version of the detector that has these tensors: 2 has batch norms in its FPN."""
    return 2 if 'backbone.fpn.inner_blocks.0.1.weight' in tensors else 1


def state_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint (the averaged ones if it has them), by torchvision's current names."""
    state = content['ema'] if content.get('ema') is not None else content['model']
    return {_current_name(str(name)): tensor for name, tensor in state.items()}


def _current_name(name: str) -> str:
    """Torchvision's name of today for one of its first version, 2019 to 2021, in which its detectors were published."""
    name = name.removeprefix('module.')
    name = re.sub(r'^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$', r'\1.0.\2', name)
    name = re.sub(r'^rpn\.head\.conv\.(weight|bias)$', r'rpn.head.conv.0.0.\1', name)
    return re.sub(r'^(roi_heads\.mask_head)\.mask_fcn(\d+)\.', lambda found: f'{found[1]}.{int(found[2]) - 1}.0.', name)


def start_from(model: GeneralizedRCNN, tensors: Mapping[str, Tensor], path: str | Path, partial: bool = False) -> None:
    """Load a detector's weights, in place; last layers of other classes or keypoints keep their random start.

    Args:
        model: the detector.
        tensors: the weights, as `state_of` gives them.
        path: their file, for messages.
        partial: other layers, too, may keep their random start: those that are not in the file or have another shape.

    Raises:
        ValueError: the backbones differ, or other layers would keep their random start and ``partial`` is False.
    """
    own, tensors = model.state_dict(), _by_our_names(tensors, model.backbone.body)
    fits = {name: t for name, t in tensors.items() if name in own and own[name].shape == t.shape}
    # a frozen batch norm is stored without its counter of batches
    left = [name for name in own if name not in fits and not name.endswith('num_batches_tracked')]
    other = [name for name in (*left, *(n for n in tensors if n not in own)) if name.startswith(BODY)]
    if other:
        raise ValueError(f'{path} has another backbone: {other[0]} does not fit')
    lost = [name for name in left if not (name in tensors and name.startswith(LAST))]
    if lost and not partial:
        why = 'has another shape there' if lost[0] in tensors else 'is not in the file'
        raise ValueError(
            f'{path} does not hold all of this detector: {len(lost)} tensors would keep their random start, the first '
            f'is {lost[0]}, which {why}; partial=True (--partial) allows that'
        )
    model.load_state_dict(fits, strict=False)
    if left:
        log.warning('%s: %d tensors keep their random start: %s', path, len(left), ', '.join(left[:6]))
