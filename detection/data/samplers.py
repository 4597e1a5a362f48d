"""How often images come, and which come together: aspect-ratio groups, repeat-factor sampling, copy-paste."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from detection.data.coco import CocoDataset, Draw
from detection.data.transforms import tight_boxes


def aspect_groups(dataset: CocoDataset, edges: Sequence[float] = (1.0,)) -> list[int]:
    """Group number of every image by height / width, so that a batch of one group needs little padding.

    Args:
        dataset: Data set; no image is read.
        edges: Ascending bounds between groups; the default parts wide images from tall ones.
    """
    if list(edges) != sorted(edges) or any(edge <= 0 for edge in edges):
        raise ValueError(f'got edges {tuple(edges)}; expected ascending ratios above 0')
    sizes = (dataset.height_and_width(i) for i in range(len(dataset)))
    return [bisect.bisect_left(edges, height / width) for height, width in sizes]


def repeat_factors(labels: Sequence[Sequence[int]], threshold: float = 0.001) -> torch.Tensor:
    """How often each image should come, ``(N,)``, so that rare classes are seen more (Gupta et al., LVIS, 2019, A.1).

    A class in a fraction f of the images has the factor max(1, sqrt(threshold / f)); an image has the largest factor
    of its classes, 1 without objects.

    Args:
        labels: Labels of the objects of every image (``CocoDataset.labels_of``).
        threshold: Classes in a smaller fraction of the images are repeated.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f'got threshold={threshold}; expected a fraction above 0, up to 1')
    images = Counter(label for found in labels for label in set(found))
    factor = {label: max(1.0, (threshold * len(labels) / count) ** 0.5) for label, count in images.items()}
    return torch.tensor([max((factor[label] for label in found), default=1.0) for found in labels])


class RepeatFactorSampler(Sampler[int]):
    """Indices in random order, each as often as its factor says; fractions are rounded at random, anew each epoch.

    Args:
        factors: What ``repeat_factors`` returns.
        seed: With the epoch, decides order and rounding.
    """

    def __init__(self, factors: torch.Tensor, seed: int = 0) -> None:
        self.factors, self.seed, self.epoch = factors, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.epoch = epoch

    def indices(self) -> list[int]:
        """All indices of this epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        whole = self.factors.floor()
        extra = torch.rand(len(whole), generator=generator) < self.factors - whole
        repeated = torch.repeat_interleave(torch.arange(len(whole)), (whole + extra).long())
        return repeated[torch.randperm(len(repeated), generator=generator)].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices())

    def __len__(self) -> int:
        return len(self.indices())


class CopyPaste(Dataset):
    """Simple copy-paste (Ghiasi et al., 2021, arXiv:2012.07177): random objects of another image pasted onto each.

    Both images are augmented first; the other one is cut off at the border of the first. Only for the mask task.

    Args:
        dataset: Data set to draw from.
        p: Probability of pasting.
        min_visible: Fraction of an object's mask below which it is dropped when others cover it.
    """

    def __init__(self, dataset: CocoDataset, p: float = 0.5, min_visible: float = 0.1) -> None:
        if dataset.task != 'mask':
            raise ValueError(f'copy-paste needs masks; got a data set for task {dataset.task!r}, expected mask')
        if not 0 <= p <= 1:
            raise ValueError(f'got p={p}; expected a probability from 0 to 1')
        self.dataset, self.p, self.min_visible = dataset, p, min_visible

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int | Draw) -> tuple[torch.Tensor, dict[str, Any]]:
        seed = self.dataset.item_seed(item)
        image, target = self.dataset.augmented(item.image if isinstance(item, Draw) else item, seed)
        rng = np.random.default_rng([seed, 1])
        if rng.random() >= self.p:
            return image, target
        other_image, other = self.dataset.augmented(int(rng.integers(len(self.dataset))), int(rng.integers(2**62)))
        chosen = torch.from_numpy(np.flatnonzero(rng.random(len(other['labels'])) < 0.5))
        return paste(image, target, other_image, other, chosen, self.min_visible)


def paste(
    image: torch.Tensor,
    target: dict[str, Any],
    other_image: torch.Tensor,
    other: dict[str, Any],
    chosen: torch.Tensor,
    min_visible: float = 0.1,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Paste objects ``chosen`` (M,) of one sample onto another; masks, boxes and areas are of the visible parts."""
    height, width = image.shape[1:]
    rows, columns = min(height, other_image.shape[1]), min(width, other_image.shape[2])
    masks = torch.zeros(len(chosen), height, width, dtype=torch.uint8)
    masks[:, :rows, :columns] = other['masks'][chosen, :rows, :columns]
    front = masks.bool().any(0)  # any of uint8 would be uint8
    image = image.clone()
    image[:, :rows, :columns] = torch.where(
        front[:rows, :columns], other_image[:, :rows, :columns], image[:, :rows, :columns]
    )
    before = torch.cat([target['masks'].sum((1, 2)), other['masks'][chosen].sum((1, 2))]).clamp(min=1)
    merged = torch.cat([target['masks'] * ~front, masks])
    area = merged.sum((1, 2))
    keep = (area > 0) & (area >= min_visible * before)
    boxes, _ = tight_boxes(merged[keep].numpy())
    result = {
        'boxes': torch.from_numpy(boxes),
        'labels': torch.cat([target['labels'], other['labels'][chosen]])[keep],
        'masks': merged[keep],
        'area': area[keep].float(),
        'iscrowd': torch.cat([target['iscrowd'], other['iscrowd'][chosen]])[keep],
    }
    return image, {**target, **result}
