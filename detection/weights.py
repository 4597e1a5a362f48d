"""Weights of whole detectors, ours or torchvision's, for a run to start from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_timm.authors import convert_authors_checkpoint, convert_state_dict, network_tensors, read_checkpoint
from norton_timm.pickles import load_plain

log = logging.getLogger(__name__)

BODY = 'backbone.body.'


def detector_content(path: str | Path) -> dict[str, Any] | None:
    """A checkpoint of train_det.py or of torchvision's reference training; None where the file is something else.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'no file with backbone weights at {path}')
    try:
        content = load_plain(Path(path))
    except ValueError:
        return None  # not torch's format, or what timm reads in its own way
    if not isinstance(content, dict):
        return None
    content = content if isinstance(content.get('model'), dict) else {'model': content}
    return content if any(str(name).startswith(BODY) for name in content['model']) else None


def convert_detector_state_dict(path: str | Path) -> tuple[dict[str, Tensor], nn.Module]:
    """A detector trained by torchvision's reference script: its tensors with our names and order, and its backbone.

    Returns:
        The state dict of the whole detector, the backbone still under `backbone.body.`, and the backbone as
        `norton_timm.convert_authors_checkpoint` returns it.

    Raises:
        ValueError: The file cannot be read safely, holds no detector, or its backbone does not fit.
    """
    tensors = network_tensors(read_checkpoint(Path(path)))
    if not any(name.startswith(BODY) for name in tensors):
        raise ValueError(f'{path} holds no detector: expected tensors under {BODY}')
    backbone = convert_authors_checkpoint(path)
    body = {name.removeprefix(BODY): t for name, t in tensors.items() if name.startswith(BODY)}
    rest = {name: t for name, t in tensors.items() if not name.startswith(BODY)}
    return {**{BODY + name: t for name, t in convert_state_dict(body, backbone).items()}, **rest}, backbone


def state_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint to go on with: averaged ones if it has them."""
    return dict(content['ema'] if content.get('ema') is not None else content['model'])


def detector_tensors(path: str | Path) -> dict[str, Tensor] | None:
    """The weights in a file of a whole detector, averaged ones if it has them; None where it is something else."""
    content = detector_content(path)
    return None if content is None else state_of(content)


def start_from(model: GeneralizedRCNN, tensors: Mapping[str, Tensor], path: str | Path, freeze: bool = False) -> None:
    """Load a detector's weights, in place; layers of other classes or keypoints keep their random start.

    Args:
        model: the detector.
        tensors: the weights, as `detector_tensors` gives them.
        path: their file, for messages.
        freeze: make the backbone's batch norms constant afterwards.

    Raises:
        ValueError: the backbones differ.
    """
    own = model.state_dict()
    fits = {name: t for name, t in tensors.items() if name in own and own[name].shape == t.shape}
    # a frozen batch norm is stored without its counter of batches
    left = [name for name in own if name not in fits and not name.endswith('num_batches_tracked')]
    other = [name for name in (*left, *(n for n in tensors if n not in own)) if name.startswith(BODY)]
    if other:
        raise ValueError(f'{path} has another backbone: {other[0]} does not fit')
    model.load_state_dict(fits, strict=False)
    if left:
        log.info('%s: %d tensors keep their random start: %s', path, len(left), ', '.join(left[:6]))
    if freeze:
        body: nn.Module = model.backbone.body
        model.backbone.body = freeze_batch_norm_2d(body)
