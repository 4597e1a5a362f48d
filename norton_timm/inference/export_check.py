"""Checked export: a file is kept only if it computes what the network does on some images."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from norton_timm.inference import export
from norton_timm.inference.deploy import relative_difference
from norton_timm.utils import read_rgb, tensors_in

OUTPUT_TOLERANCE = 1e-3  # of the largest output
_ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')


@dataclass
class Agreement:
    """How two networks compare on some images.

    Attributes:
        images: number of images that were compared.
        same: number of images with the same best class.
        difference: largest difference of outputs, relative to the largest output.
    """

    images: int = 0
    same: int = 0
    difference: float = 0.0

    def add(self, expected: Any, found: Any) -> None:
        """Compare the outputs for one batch: class scores (N, K), in whatever container."""
        outputs, others = tensors_in(expected), tensors_in(found)
        self.images += len(outputs[0])
        difference = relative_difference(others, outputs)
        self.difference = larger(self.difference, math.inf if difference is None else difference)
        if difference is not None:
            self.same += int((outputs[0].flatten(1).argmax(1) == others[0].flatten(1).argmax(1)).sum())

    def problem(self) -> str | None:
        """What exceeds the tolerance; None if nothing does."""
        if self.same < self.images:
            return f'{self.images - self.same} of {self.images} images get another answer'
        if self.difference > OUTPUT_TOLERANCE:
            return f'outputs differ by {self.difference:.1e} of the largest one, more than {OUTPUT_TOLERANCE}'
        return None

    def __str__(self) -> str:
        return f'{self.same} of {self.images} images get the same answer; {self._distances()}'

    def _distances(self) -> str:
        return f'outputs within {self.difference:.1e} of the largest'

    def to_dict(self) -> dict[str, float]:
        """The figures as plain values, for JSON."""
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


def find_pictures(folder: Path, count: int) -> list[Path]:
    """The first pictures of a folder and its subfolders, by name.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(p for p in folder.rglob('*') if p.suffix.lower() in _ENDINGS)[:count] if folder.is_dir() else []
    if not paths:
        raise ValueError(f'{folder}: no pictures there, expected a folder with {", ".join(_ENDINGS)}')
    return paths


@torch.no_grad()
def compare_outputs(
    model: nn.Module, other: export.Runner | nn.Module, images: Sequence[Tensor], agreement: Agreement | None = None
) -> Agreement:
    """Run two networks on the same images.

    Args:
        model: the original.
        other: the network or function to compare, from images (N, C, H, W) to a list of tensors.
        images: batches (N, C, H, W).
        agreement: collects the comparison; by default it compares class scores.
    """
    agreement = Agreement() if agreement is None else agreement
    for batch in images:
        agreement.add(model(batch), other(batch))
    return agreement


def larger(a: float, b: float) -> float:
    """The maximum of two numbers; ``b`` counts as infinite if it is NaN."""
    return max(a, b if math.isfinite(b) else math.inf)


def export_checked(
    model: nn.Module, path: Path, images: Sequence[Tensor], reference: nn.Module | None = None, int8: bool = False
) -> Agreement:
    """Write a network to a file, read it back, and keep the file only if it computes the same on the images.

    Args:
        model: network to export, deployed or not.
        path: .onnx, .xml or .pt2; it appears whole or not at all.
        images: batches (N, C, H, W); all of one size for a :class:`norton_timm.inference.TracedNetwork`.
        reference: the network to compare with, such as the one before deployment; by default ``model``.
        int8: quantise with the runtime's own tool, calibrated on the images. The agreement is then only reported.

    Raises:
        ValueError: no images, a missing folder, a format that cannot hold the network, or outputs that do not agree.

    Example:
        >>> images = torch.rand(1, 3, 224, 224)
        >>> agreement = export_checked(deploy(model, images), Path('small.onnx'), [images], reference=model)
    """
    if not len(images):
        raise ValueError('images: got none, expected at least one to compare on')
    if not path.parent.is_dir():
        raise ValueError(f'{path}: the folder {path.parent} does not exist')
    export.format_of(path)
    traced = isinstance(model, export.TracedNetwork)
    model = model.eval()
    expected = model if reference is None else reference.eval()
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder:
        part = Path(folder) / path.name
        export.write_exported(model, images[0], part)
        if int8:
            from norton_timm.inference.quantise import quantise

            part = quantise(part, images, model)
        agreement = compare_outputs(
            expected, export.read_exported(part), images, cast(Any, model).agreement() if traced else None
        )
        problem = agreement.problem()
        if problem and not int8:
            raise ValueError(f'{path.name} does not compute what the network does: {problem}; no file was written')
        for file in sorted(p for p in part.parent.iterdir() if p.stem == part.stem):
            os.replace(file, path.with_suffix(file.suffix))
    return agreement


def size_mb(path: Path) -> float:
    """Megabytes of an exported network; OpenVINO's weights beside the .xml count too."""
    files: list[Any] = [path, path.with_suffix('.bin')] if path.suffix == '.xml' else [path]
    return sum(file.stat().st_size for file in files) / 1e6
