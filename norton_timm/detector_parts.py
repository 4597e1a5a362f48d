"""Parts of torchvision's detectors as plain expressions, for exporters.

What torchvision traces in their place has a branch for pictures without boxes and a loop over masks. OpenVINO makes one
detection out of none behind such a branch, and cannot take such a loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torchvision.models.detection import roi_heads
from torchvision.ops import boxes as box_ops


def nms_by_class(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that non-maximum suppression within each class keeps, best first.

    Equal to torchvision's ``_batched_nms_coordinate_trick``: boxes of different classes are moved apart.

    Args:
        boxes: (N, 4) in pixels, not negative; none is fine.
        scores: (N,).
        classes: (N,).
        iou_threshold: a box that overlaps a better one of its class by more is dropped.
    """
    farthest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
    moved = boxes + (classes.to(boxes) * (farthest + 1))[:, None]
    return torch.ops.torchvision.nms(moved, scores, iou_threshold)


def paste_masks(masks: Tensor, boxes: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Each mask, resized bilinearly to its box, in an image of zeros: (N, H, W).

    Equal to torchvision's ``_onnx_paste_masks_in_image_loop``, as two matrix products for all masks.

    Args:
        masks: (N, 1, M, M).
        boxes: (N, 4), whole pixels, the last ones included; they may reach over the image's edge.
        height: of the image, a whole number.
        width: likewise.
    """
    cells = masks.shape[-1]
    rows = _interpolation(boxes[:, 1], boxes[:, 3], cells, height)
    columns = _interpolation(boxes[:, 0], boxes[:, 2], cells, width)
    return rows @ masks[:, 0] @ columns.transpose(1, 2)


def _interpolation(first: Tensor, last: Tensor, cells: int, size: Tensor) -> Tensor:
    """Share of each cell in each pixel of an axis (N, size, cells), if the cells span the pixels first to last."""
    length = (last - first + 1).clamp(min=1).float()
    pixel = torch.arange(size)[None].float() - first[:, None].float()  # type: ignore[call-overload]
    source = ((pixel + 0.5) * (cells / length)[:, None] - 0.5).clamp(0, cells - 1)
    share = (1 - (source[:, :, None] - torch.arange(cells).float()).abs()).clamp(min=0)
    inside = (pixel >= 0) & (pixel < length[:, None])
    return share * inside[:, :, None].float()


@contextmanager
def without_branches() -> Iterator[None]:
    """While this context lasts, torchvision's detectors trace with the parts of this file."""
    with (
        patch.object(box_ops, '_batched_nms_coordinate_trick', nms_by_class),
        patch.object(roi_heads, '_onnx_paste_masks_in_image_loop', paste_masks),
    ):
        yield
