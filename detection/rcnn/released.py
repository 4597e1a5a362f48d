"""Torchvision's detectors trained on COCO, by name: what they are, and their files.

Version 2 is that of Li et al. (2021), "Benchmarking Detection Transfer Learning with Vision Transformers",
arXiv:2111.11429.
"""

from __future__ import annotations

import http.client
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torchvision.models import get_model_weights
from tqdm import tqdm

from detection.rcnn.mobilenet import MOBILENET
from norton_timm.checkpoints import cache_folder


@dataclass(frozen=True)
class ReleasedDetector:
    """One of torchvision's trained detectors, as `build_detector` makes it.

    `shapes` are the arguments that its weights need, `settings` those that it was trained with; `zero_eps`: torchvision
    computes with an epsilon of 0 in its frozen batch norms.
    """

    task: str
    shapes: dict[str, Any]
    settings: dict[str, Any]
    zero_eps: bool = False


def _resnet50(task: str, version: int = 1) -> ReleasedDetector:
    shapes: dict[str, Any] = {'backbone': 'resnet50', 'version': version, 'fpn_channels': 256, 'box_head': 1024}
    if task == 'mask':
        shapes['mask_layers'] = (256,) * 4
    if task == 'keypoint':
        shapes['keypoint_layers'] = (512,) * 8
    return ReleasedDetector(task, shapes, {'anchor_sizes': (32, 64, 128, 256, 512)}, zero_eps=version == 1)


def _mobilenet(**settings: Any) -> ReleasedDetector:
    shapes = {'backbone': MOBILENET, 'version': 1, 'fpn_channels': 256, 'box_head': 1024}
    return ReleasedDetector('box', shapes, {'anchor_sizes': (32, 64, 128, 256, 512), **settings})


RELEASED = {
    'fasterrcnn_resnet50_fpn': _resnet50('box'),
    'fasterrcnn_resnet50_fpn_v2': _resnet50('box', 2),
    'maskrcnn_resnet50_fpn': _resnet50('mask'),
    'maskrcnn_resnet50_fpn_v2': _resnet50('mask', 2),
    'keypointrcnn_resnet50_fpn': _resnet50('keypoint'),
    'fasterrcnn_mobilenet_v3_large_fpn': _mobilenet(rcnn={'rpn_score_thresh': 0.05}),
    'fasterrcnn_mobilenet_v3_large_320_fpn': _mobilenet(
        min_size=(320,),
        max_size=640,
        rcnn={'rpn_score_thresh': 0.05, 'rpn_pre_nms_top_n_test': 150, 'rpn_post_nms_top_n_test': 150},
    ),
}


def is_released(weights: object) -> bool:
    """Whether weights are a name of torchvision's; a file of that name goes first."""
    return str(weights) in RELEASED and not Path(str(weights)).is_file()


def differences(weights: object, task: str, shapes: dict[str, Any], partial: bool = False) -> list[str]:
    """What was asked for and one of torchvision's detectors does not have, as lines; `partial` asks for its backbone.

    Args:
        weights: a name in `RELEASED`.
        task: what was asked for.
        shapes: arguments of `build_detector`.
        partial: other layers than those of the backbone may differ.

    Example:
        >>> differences('fasterrcnn_resnet50_fpn', 'box', {'backbone': 'resnet18'})
        ["backbone is 'resnet18', expected 'resnet50' with weights fasterrcnn_resnet50_fpn"]
    """
    released = RELEASED[str(weights)]
    expected = {'task': released.task, **released.shapes}
    given = {'task': task, **shapes}
    keys = ['backbone'] if partial else list(expected)
    return [
        f'{key} is {given[key]!r}, expected {expected[key]!r} with weights {weights}'
        for key in keys
        if key in given and _plain(given[key]) != _plain(expected[key])
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def released_file(name: str, cache_dir: str | Path | None = None) -> Path:
    """The file of one of torchvision's detectors, from the cache of torch's hub; downloaded once, as torchvision does.

    The download is checked by the digits of its SHA-256 in the file's name.

    Args:
        name: a key of `RELEASED`.
        cache_dir: where files are kept; torch's hub directory by default.

    Raises:
        ConnectionError: it cannot be downloaded now; the message says where to put the file.
        ValueError: the download has another checksum; nothing is kept.
    """
    url = get_model_weights(name).DEFAULT.url  # type: ignore[attr-defined]
    target = cache_folder(cache_dir) / url.rpartition('/')[2]
    if target.is_file():  # perhaps in a folder that cannot be written
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f'{target}.lock'):  # several processes of one training start at once
        if target.is_file():
            return target
        digits = re.search(r'-([0-9a-f]{8,})\.', target.name)
        tqdm.write(f'downloading {url} to {target}', file=sys.stderr)
        try:
            torch.hub.download_url_to_file(url, str(target), digits[1] if digits else None)
        except (OSError, http.client.HTTPException) as error:  # urllib's URLError is an OSError
            reason = getattr(error, 'reason', error)
            raise ConnectionError(
                f'{name}: {url} cannot be downloaded ({reason}); take it by hand and put it at {target}'
            ) from None
        except RuntimeError as error:
            raise ValueError(f'{name}: {url} was refused and removed: {" ".join(str(error).split())}') from None
    return target


def with_usual_eps(tensors: dict[str, Tensor], eps: float = 1e-5) -> dict[str, Tensor]:
    """Variances of batch norms in the backbone for `eps` where torchvision computes with 0: less by just that.

    A layer divides by the root of variance + eps, so its outputs stay the same, with no setting that a checkpoint
    would have to keep.
    """
    return {
        name: t - eps if name.startswith('backbone.body.') and name.endswith('.running_var') else t
        for name, t in tensors.items()
    }
