"""Batches of images with class labels: from small images held in memory, or from timm's loader."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from timm.data import create_loader, resolve_data_config
from torch import Tensor
from torch.utils.data import Dataset

from norton_timm.utils import rank, world_size

Batch = tuple[Tensor, Tensor]
_PAD = 4  # pixels of zeros around a CIFAR image before the random crop


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its images; `mean` and `std` are for values in 0..1."""

    input_size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = 'bicubic'
    crop_pct: float = 1.0

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> Preprocessing:
        """The preprocessing that a network's `pretrained_cfg` describes."""
        found = resolve_data_config(pretrained_cfg=dict(cfg))
        size, mean, std = (tuple(found[key]) for key in ('input_size', 'mean', 'std'))
        return cls(size[1:], mean, std, found['interpolation'], found['crop_pct'])

    def normalisation(self) -> dict[str, tuple[float, ...]]:
        """Mean and standard deviation, by the names in a `pretrained_cfg`."""
        return {'mean': self.mean, 'std': self.std}


class ClassificationData(Protocol):
    """A training and a test split. Each process gets its share of every batch."""

    classes: list[str]
    train_size: int
    test_size: int

    def train_batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """Augmented images (N, 3, H, W) and labels (N,) of one epoch; the same for the same epoch and seed."""

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """The test split in order, no image twice."""

    def calibration_batches(self, images: int, batch_size: int = 128) -> list[Batch]:
        """Training images without augmentation, the same ones each time."""


class ArrayData:
    """Small images in memory; augmented (crop after padding, flip) and normalised on the device, a batch at a time.

    Args:
        train: images (N, 3, H, W), uint8, and labels (N,).
        test: the same of the test split.
        classes: names by label.
        preprocessing: normalisation; the size must be that of the images.
        device: where the images are kept and augmented.

    Raises:
        ValueError: images of another size than the network's.
    """

    def __init__(
        self, train: Batch, test: Batch, classes: list[str], preprocessing: Preprocessing, device: torch.device
    ) -> None:
        size = tuple(train[0].shape[2:])
        if size != preprocessing.input_size:
            raise ValueError(f'images are {size} pixels, but the network expects {preprocessing.input_size}')
        self.classes, self.device = classes, device
        self.train, self.test = ((x.to(device), y.to(device)) for x, y in (train, test))
        self.train_size, self.test_size = len(train[0]), len(test[0])
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def train_batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.train_size, generator=generator)
        offsets = torch.randint(2 * _PAD + 1, (2, self.train_size), generator=generator)
        flips = torch.rand(self.train_size, generator=generator) < 0.5
        whole = batch_size * world_size()
        for start in range(0, self.train_size - whole + 1, whole):
            at = order[start + rank() : start + whole : world_size()]
            at, place, flip = (v.to(self.device) for v in (at, offsets[:, at], flips[at]))
            yield self._normalise(crop_and_flip(self.train[0][at], place, flip)), self.train[1][at]

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        for at in torch.arange(rank(), self.test_size, world_size(), device=self.device).split(batch_size):
            yield self._normalise(self.test[0][at]), self.test[1][at]

    def calibration_batches(self, images: int, batch_size: int = 128) -> list[Batch]:
        at = torch.randperm(self.train_size, generator=torch.Generator().manual_seed(0))[:images].to(self.device)
        return [(self._normalise(self.train[0][b]), self.train[1][b]) for b in at.split(batch_size)]

    def _normalise(self, images: Tensor) -> Tensor:
        return (images * self._scale + self._shift).contiguous(memory_format=torch.channels_last)


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Shift images (N, C, H, W) within a border of 4 zeros, by offsets (2, N) in 0..8, and mirror some."""
    n, _, h, w = images.shape
    padded = torch.nn.functional.pad(images, (_PAD,) * 4)
    rows = offsets[0][:, None] + torch.arange(h, device=images.device)
    columns = torch.arange(w, device=images.device).expand(n, w)
    columns = offsets[1][:, None] + torch.where(flips[:, None], w - 1 - columns, columns)
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class LoadedData:
    """Data sets that timm reads, with timm's transforms and loader.

    Args:
        train, test: what `timm.data.create_dataset` returned.
        classes: names by label.
        preprocessing: size, normalisation, interpolation and crop.
        device: where batches are moved.
        workers: loading processes.
        augmentation: further arguments of `timm.data.create_loader` for training, such as `auto_augment`.
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        classes: list[str],
        preprocessing: Preprocessing,
        device: torch.device,
        workers: int = 4,
        augmentation: dict[str, Any] | None = None,
    ) -> None:
        self.classes, self.device, self.workers = classes, device, workers
        self.train, self.test = train, test
        self.train_size, self.test_size = len(train), len(test)
        self.preprocessing, self.augmentation = preprocessing, dict(augmentation or {})

    def train_batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[Batch]:
        # loading processes take their seeds from this one, so that an epoch can be repeated
        _seed_everything(((seed * 1_000_003 + epoch) * 4096 + rank()) % 2**32)
        order = torch.randperm(self.train_size, generator=torch.Generator().manual_seed(seed + 7919 * epoch))
        whole = batch_size * world_size()
        share = order[: self.train_size // whole * whole][rank() :: world_size()]
        yield from self._moved(_Part(self.train, share.tolist()), batch_size, training=True)

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        share = list(range(rank(), self.test_size, world_size()))
        yield from self._moved(_Part(self.test, share), batch_size)

    def calibration_batches(self, images: int, batch_size: int = 128) -> list[Batch]:
        at = torch.randperm(self.train_size, generator=torch.Generator().manual_seed(0))[:images].tolist()
        return list(self._moved(_Part(self.train, at), min(batch_size, len(at))))

    def _moved(self, dataset: _Part, batch_size: int, training: bool = False) -> Iterator[Batch]:
        p = self.preprocessing
        options = {'interpolation': 'random', **self.augmentation} if training else {'interpolation': p.interpolation}
        loader = create_loader(
            cast(Any, dataset),
            input_size=(3, *p.input_size),
            batch_size=batch_size,
            is_training=training,
            mean=cast(Any, p.mean),
            std=cast(Any, p.std),
            crop_pct=p.crop_pct,
            num_workers=self.workers,
            persistent_workers=False,
            use_prefetcher=False,
            **options,
        )
        for images, labels in loader:
            images = images.to(self.device, non_blocking=True)
            yield images.contiguous(memory_format=torch.channels_last), labels.to(self.device, non_blocking=True)


class _Part(Dataset):
    """Some images of a data set, with their own transform, which timm's loader sets."""

    def __init__(self, dataset: Any, indices: list[int]) -> None:
        self.dataset, self.indices, self.transform = dataset, indices, None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, k: int) -> Any:
        image, label = self.dataset[self.indices[k]]
        return (image if self.transform is None else self.transform(image)), label


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
