"""Batches in an order that is a function of seed, epoch and step alone, so that a resumed run sees the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Sampler, Subset

from detection.data import CocoDataset, collate
from detection.distributed import rank, world_size


class BatchStream(Sampler[list[int]]):
    """Batches of one epoch for this process: all processes together take each image at most once.

    Args:
        groups: a group number for every image; batches hold one group where possible (e.g. wide or tall images, so
            that little of a batch is padding). One group: plain shuffling.
        batch_size: images of one process.
        seed: with the epoch, decides the order.
    """

    def __init__(self, groups: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.groups, self.batch_size, self.seed = list(groups), batch_size, seed
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the batch in it to begin with."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return max(1, len(self.groups) // (self.batch_size * world_size()))

    def __iter__(self) -> Iterator[list[int]]:
        step = self.batch_size * world_size()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.groups), generator=generator).tolist()
        if len(order) < step:  # fewer images than a step takes: some come twice
            order = (order * (step // len(order) + 1))[:step]
        buckets: dict[int, list[int]] = {}
        batches = []
        for index in order:
            bucket = buckets.setdefault(self.groups[index], [])
            bucket.append(index)
            if len(bucket) == step:
                batches.append(bucket)
                buckets[self.groups[index]] = []
        rest = [index for bucket in buckets.values() for index in bucket]
        batches += [rest[i : i + step] for i in range(0, len(rest) - step + 1, step)]
        mix = torch.randperm(len(batches), generator=generator).tolist()
        first = rank() * self.batch_size
        for k in mix[self.start : len(self)]:
            yield batches[k][first : first + self.batch_size]


def train_loader(dataset: CocoDataset, batch_size: int, workers: int, seed: int, pin: bool = False) -> DataLoader:
    """Loader over a `BatchStream` (its `batch_sampler`), wide and tall images apart."""
    sizes = [dataset.height_and_width(i) for i in range(len(dataset))]
    stream = BatchStream([int(h > w) for h, w in sizes], batch_size, seed)
    return DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=workers > 0,
    )


def eval_loader(dataset: CocoDataset, batch_size: int, workers: int) -> DataLoader:
    """Every image exactly once, over all processes together."""
    part = Subset(dataset, range(rank(), len(dataset), world_size()))
    return DataLoader(part, batch_size=batch_size, num_workers=workers, collate_fn=collate)
