"""Does an exported file compute what the network does? Compared on images before anybody is told that it worked."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from norton_timm import export
from norton_timm.deploy import relative_difference
from norton_timm.pictures import read_rgb
from norton_timm.trace import tensors_in

BOX_TOLERANCE = 0.5  # pixels
SCORE_TOLERANCE = 1e-3
OUTPUT_TOLERANCE = 1e-3  # of a classifier's largest output
MASK_TOLERANCE = 1e-2  # of a mask's values, 0 to 1, in the mean over a picture
KEYPOINT_TOLERANCE = 2.0  # pixels: of two neighbouring pixels that are equally warm, either may be taken
_ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')


@dataclass
class Agreement:
    """How two networks compare on some images.

    Attributes:
        images: how many were compared.
        same: those with the same answer: the same best class, or the same detections with the same labels.
        difference: largest difference of a classifier's outputs, relative to the largest output.
        box_px: largest difference of a box coordinate in pixels, where the detections are the same.
        score: largest difference of a score there.
        mask: largest mean difference of a mask's values over a picture there; a box that is rounded to another pixel
            moves the whole mask by one.
        keypoint_px: largest difference of a keypoint's coordinate there, in pixels.
        detections: that the original network gave in all.
    """

    images: int = 0
    same: int = 0
    difference: float = 0.0
    box_px: float = 0.0
    score: float = 0.0
    mask: float = 0.0
    keypoint_px: float = 0.0
    detections: int = 0

    def problem(self) -> str | None:
        """What is beyond tolerance; None if nothing is."""
        if self.same < self.images:
            return f'{self.images - self.same} of {self.images} images get another answer'
        if self.difference > OUTPUT_TOLERANCE:
            return f'outputs differ by {self.difference:.1e} of the largest one, more than {OUTPUT_TOLERANCE}'
        if self.box_px > BOX_TOLERANCE or self.score > SCORE_TOLERANCE:
            return (f'boxes differ by {self.box_px:.2f} px and scores by {self.score:.1e}, '
                    f'more than {BOX_TOLERANCE} px or {SCORE_TOLERANCE}')  # fmt: skip
        if self.mask > MASK_TOLERANCE or self.keypoint_px > KEYPOINT_TOLERANCE:
            return (f'masks differ by {self.mask:.1e} and keypoints by {self.keypoint_px:.2f} px, '
                    f'more than {MASK_TOLERANCE} or {KEYPOINT_TOLERANCE} px')  # fmt: skip
        return None

    def __str__(self) -> str:
        told = f'outputs within {self.difference:.1e} of the largest'
        if self.detections:
            told = f'boxes within {self.box_px:.3f} px, scores within {self.score:.1e}'
            told += f', masks within {self.mask:.1e}' * (self.mask > 0)
            told += f', keypoints within {self.keypoint_px:.3f} px' * (self.keypoint_px > 0)
        return f'{self.same} of {self.images} images get the same answer; {told}'

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def read_images(paths: Iterable[Path], size: tuple[int, int]) -> list[Tensor]:
    """Pictures as (3, H, W) in 0..1, resized to (H, W).

    Raises:
        ValueError: a file that is no picture.
    """
    found = []
    for path in paths:
        pixels = np.array(read_rgb(path, path).resize((size[1], size[0]), Image.Resampling.BILINEAR))
        found.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    return found


def find_images(folder: Path, count: int) -> list[Path]:
    """The first pictures of a folder and its subfolders, by name.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(p for p in folder.rglob('*') if p.suffix.lower() in _ENDINGS)[:count] if folder.is_dir() else []
    if not paths:
        raise ValueError(f'{folder}: no pictures there, expected a folder with {", ".join(_ENDINGS)}')
    return paths


@torch.no_grad()
def compare(model: nn.Module, other: export.Runner, images: Sequence[Tensor]) -> Agreement:
    """Run two networks on the same images.

    Args:
        model: the original, from :func:`norton_timm.export.exportable`.
        other: what it is compared with, a function from images (N, C, H, W) to a list of tensors.
        images: batches (N, C, H, W); single ones (1, 3, H, W) for a detector.
    """
    agreement = Agreement()
    for batch in images:
        agreement.images += len(batch)
        if isinstance(model, export.OneImage):
            _compare_detections(model(batch), other(batch), agreement, model.names)
        else:
            expected, found = tensors_in(model(batch)), tensors_in(other(batch))
            difference = relative_difference(found, expected)
            agreement.difference = _larger(agreement.difference, math.inf if difference is None else difference)
            if difference is not None:
                agreement.same += int((expected[0].flatten(1).argmax(1) == found[0].flatten(1).argmax(1)).sum())
    return agreement


def _compare_detections(
    expected: Sequence[Tensor], found: Sequence[Tensor], agreement: Agreement, names: Sequence[str]
) -> None:
    boxes, labels = expected[:2]
    agreement.detections += len(boxes)
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(expected, found)):
        return
    # two detections whose scores are equal up to rounding may change places
    order = _matching(boxes, found[0]) if len(boxes) else torch.arange(0)
    if sorted(order.tolist()) != list(range(len(boxes))) or not torch.equal(labels, found[1][order]):
        return
    agreement.same += 1
    if not len(boxes):
        return
    kept = {'boxes': 'box_px', 'scores': 'score', 'masks': 'mask', 'keypoints': 'keypoint_px'}
    for name, a, b in zip(names, expected, found):
        if name in kept:
            apart = (a - b[order]).abs()
            found_apart = float(apart.flatten(1).mean(1).max() if name == 'masks' else apart.max())
            setattr(agreement, kept[name], _larger(getattr(agreement, kept[name]), found_apart))


def _larger(a: float, b: float) -> float:
    """The maximum, where what is not a number counts as infinite."""
    return max(a, b if math.isfinite(b) else math.inf)


def _matching(boxes: Tensor, others: Tensor) -> Tensor:
    """For each box the nearest one of the others that none before it took."""
    distance = torch.cdist(boxes.double(), others.double(), p=float('inf'))
    order = torch.empty(len(boxes), dtype=torch.long)
    for k in range(len(boxes)):
        order[k] = distance[k].argmin()
        distance[:, order[k]] = float('inf')
    return order


def export_checked(
    model: nn.Module, path: Path, images: Sequence[Tensor], reference: nn.Module | None = None, int8: bool = False
) -> Agreement:
    """Write a network to a file, read it back, and keep the file only if it computes the same on the images.

    Args:
        model: network to export, deployed or not; a detector takes images of one size.
        path: .onnx, .xml or .pt2; it appears whole or not at all.
        images: batches (N, C, H, W), of single images for a detector.
        reference: the network to compare with, if not ``model`` itself: the one before deployment.
        int8: quantise with the runtime's own tool, calibrated on the images. The agreement is then only reported.

    Raises:
        ValueError: no images, a folder that is not there, a format that cannot, or a result that does not agree.
    """
    if not len(images):
        raise ValueError('images: got none, expected at least one to compare on')
    if not path.parent.is_dir():
        raise ValueError(f'{path}: the folder {path.parent} does not exist')
    export.format_of(path)
    expected, source = export.exportable(reference if reference is not None else model), export.exportable(model)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder:
        part = Path(folder) / path.name
        export.write(source, images[0], part)
        if int8:
            from norton_timm.quantise import quantise

            part = quantise(part, images, detector=isinstance(source, export.OneImage))
        agreement = compare(expected, export.read(part), images)
        problem = agreement.problem()
        if problem and not int8:
            raise ValueError(f'{path.name} does not compute what the network does: {problem}; no file was written')
        for file in sorted(p for p in part.parent.iterdir() if p.stem == part.stem):
            os.replace(file, path.with_suffix(file.suffix))
    return agreement


def size_mb(path: Path) -> float:
    """Megabytes of an exported network, OpenVINO's weights beside the .xml included."""
    files: list[Any] = [path, path.with_suffix('.bin')] if path.suffix == '.xml' else [path]
    return sum(file.stat().st_size for file in files) / 1e6
