"""Detectors for exporters, as functions of one image with named outputs, and the comparison of their detections.

Torchvision's traced code has a branch for images without boxes, and a loop over masks. After such a branch OpenVINO
returns one detection where there is none, and it cannot take such a loop. `nms_by_class` and `paste_masks` replace
both by plain expressions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import boxes as box_ops

from norton_timm.inference import Agreement, TracedNetwork, larger

BOX_TOLERANCE = 0.5  # pixels
SCORE_TOLERANCE = 1e-3
MASK_TOLERANCE = 1e-2  # of a mask's values, 0 to 1, in the mean over a picture
KEYPOINT_TOLERANCE = 2.0  # pixels: two neighbouring pixels of a heatmap may be equally warm
_DISTANCES = {'boxes': 'box_px', 'scores': 'score', 'masks': 'mask', 'keypoints': 'keypoint_px'}


class OneImage(TracedNetwork):
    """A detector as a function from one image (1, 3, H, W) to a tuple of tensors, as exporters need it.

    Attributes:
        names: names of the tensors: boxes, labels, scores, and masks or keypoints.
    """

    kind = 'detector'

    def __init__(self, detector: GeneralizedRCNN) -> None:
        super().__init__()
        self.detector = detector
        extra = [name for name in ('mask', 'keypoint') if getattr(detector.roi_heads, f'has_{name}')()]
        self.names = ['boxes', 'labels', 'scores', *(f'{name}s' for name in extra)]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.detector([image[0]])[0]
        return tuple(found[name] for name in self.names)

    def agreement(self) -> DetectionAgreement:
        """An empty comparison of detections."""
        return DetectionAgreement(names=tuple(self.names))

    def tracing(self):
        """A context that traces the plain expressions of this file instead of torchvision's code."""
        return without_branches()


def exportable(model: nn.Module) -> nn.Module:
    """The network in evaluation mode as exporters take it: a function of one batch, or of one image for a detector.

    Example:
        >>> detector = exportable(build_detector('box', 'norton_resnet50.r078'))
        >>> boxes, labels, scores = detector(torch.rand(1, 3, 480, 640))
    """
    model = model.eval()
    return OneImage(model).eval() if isinstance(model, GeneralizedRCNN) else model


@dataclass
class DetectionAgreement(Agreement):
    """How two detectors compare on some images; the same answer is the same detections with the same labels.

    Attributes:
        box_px: largest difference of a box coordinate in pixels, where the detections are the same.
        score: largest difference of a score there.
        mask: largest mean difference of a mask's values over a picture there; a box that is rounded to another pixel
            moves the whole mask by one.
        keypoint_px: largest difference of a keypoint's coordinate there, in pixels.
        detections: number of detections of the original network, in all images.
        names: names of the compared tensors.
    """

    box_px: float = 0.0
    score: float = 0.0
    mask: float = 0.0
    keypoint_px: float = 0.0
    detections: int = 0
    names: tuple[str, ...] = field(default=('boxes', 'labels', 'scores'), repr=False, compare=False)

    def add(self, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        """Compare the detections in one image."""
        self.images += 1
        boxes, labels = expected[:2]
        self.detections += len(boxes)
        if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(expected, found)):
            return
        # two detections whose scores are equal up to rounding may change places
        order = _matching(boxes, found[0]) if len(boxes) else torch.arange(0)
        if sorted(order.tolist()) != list(range(len(boxes))) or not torch.equal(labels, found[1][order]):
            return
        self.same += 1
        if not len(boxes):
            return
        for name, a, b in zip(self.names, expected, found):
            if name in _DISTANCES:
                apart = (a - b[order]).abs()
                distance = float(apart.flatten(1).mean(1).max() if name == 'masks' else apart.max())
                setattr(self, _DISTANCES[name], larger(getattr(self, _DISTANCES[name]), distance))

    def problem(self) -> str | None:
        """What exceeds the tolerance; None if nothing does."""
        if self.same == self.images and (self.box_px > BOX_TOLERANCE or self.score > SCORE_TOLERANCE):
            return (f'boxes differ by {self.box_px:.2f} px and scores by {self.score:.1e}, '
                    f'more than {BOX_TOLERANCE} px or {SCORE_TOLERANCE}')  # fmt: skip
        if self.same == self.images and (self.mask > MASK_TOLERANCE or self.keypoint_px > KEYPOINT_TOLERANCE):
            return (f'masks differ by {self.mask:.1e} and keypoints by {self.keypoint_px:.2f} px, '
                    f'more than {MASK_TOLERANCE} or {KEYPOINT_TOLERANCE} px')  # fmt: skip
        return super().problem()

    def to_dict(self) -> dict[str, float]:
        """The figures as plain values, for JSON."""
        return {key: value for key, value in super().to_dict().items() if key != 'names'}

    def _distances(self) -> str:
        told = f'boxes within {self.box_px:.3f} px, scores within {self.score:.1e}'
        told += f', masks within {self.mask:.1e}' * (self.mask > 0)
        told += f', keypoints within {self.keypoint_px:.3f} px' * (self.keypoint_px > 0)
        return told


def _matching(boxes: Tensor, others: Tensor) -> Tensor:
    """For each box, the index of the nearest other box that no earlier box has taken."""
    distance = torch.cdist(boxes.double(), others.double(), p=float('inf'))
    order = torch.empty(len(boxes), dtype=torch.long)
    for k in range(len(boxes)):
        order[k] = distance[k].argmin()
        distance[:, order[k]] = float('inf')
    return order


def nms_by_class(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that non-maximum suppression within each class keeps, best first.

    Equal to torchvision's ``_batched_nms_coordinate_trick``: boxes of different classes are moved apart.

    Args:
        boxes: (N, 4) in pixels, not negative; N may be 0.
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
    """A context in which torchvision's detectors are traced with the functions of this file."""
    with (
        patch.object(box_ops, '_batched_nms_coordinate_trick', nms_by_class),
        patch.object(roi_heads, '_onnx_paste_masks_in_image_loop', paste_masks),
    ):
        yield
