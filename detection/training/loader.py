"""Batches in an order that depends on seed, epoch and step alone, so that a resumed run sees the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler

from detection.data import (
    CocoDataset,
    CopyPaste,
    Draw,
    RepeatFactorSampler,
    allow_open_files,
    aspect_groups,
    build_transforms,
    collate,
    repeat_factors,
)
from detection.training.config import DataConfig, RunConfig
from norton_timm.utils import rank, world_size


class BatchStream(Sampler[list[Draw]]):
    """Batches of one epoch for this process: without factors, all processes together take each image at most once.

    Every image comes with its position in the epoch, counted over all processes.

    Args:
        groups: a group number for every image; batches hold one group where possible (e.g. wide or tall images, so
            that little of a batch is padding). One group: plain shuffling.
        batch_size: images of one process.
        seed: with the epoch, decides the order.
        factors: how often each image comes in an epoch, on average; once by default.
    """

    def __init__(
        self, groups: Sequence[int], batch_size: int, seed: int = 0, factors: torch.Tensor | None = None
    ) -> None:
        self.groups, self.batch_size, self.seed = list(groups), batch_size, seed
        self.repeats = None if factors is None else RepeatFactorSampler(factors, seed)
        # all epochs have one length, so that the step of a resumed run tells its epoch
        self.size = len(self.groups) if factors is None else int(factors.sum())
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the batch in it to begin with."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return max(1, self.size // (self.batch_size * world_size()))

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.batch_size * world_size()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.groups), generator=generator).tolist()
        if self.repeats is not None:
            self.repeats.set_epoch(self.epoch)
            order = (self.repeats.indices() + order)[: self.size]  # the rounding is random: fill up or cut off
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
        for place, k in list(enumerate(mix))[self.start : len(self)]:
            mine = range(first, first + self.batch_size)
            yield [Draw(batches[k][i], place * step + i) for i in mine]


def training_sets(config: RunConfig, root: Path) -> tuple[CocoDataset, CocoDataset]:
    """The training split, augmented as configured, and the evaluation split of a folder in COCO layout.

    Labels of both mean the same: the categories of the evaluation split are matched by name.

    Raises:
        ValueError: nothing to train on, or categories or keypoints that cannot be matched.
    """
    data = config.data
    augment = build_transforms(
        config.task,
        True,
        flip=data.flip,
        color=data.color,
        crop=data.crop,
        jitter=data.jitter,
        safe_crop=data.safe_crop,
    )
    pairs, limit = data.keypoint_pairs() if config.task == 'keypoint' else None, data.limit
    train_set = CocoDataset(
        root,
        data.train_split,
        config.task,
        augment,
        seed=config.seed,
        flip_pairs=pairs,
        images=data.images,
        limit=limit,
    )
    if not any(train_set.has_objects(index) for index in range(len(train_set))):
        raise ValueError(f'{train_set.annotation_file} has no object to train on for task {config.task}')
    return train_set, CocoDataset(
        root,
        data.val_split,
        config.task,
        flip_pairs=pairs,
        images=data.images,
        limit=limit,
        class_names=train_set.class_names,
        keypoint_names=train_set.keypoint_names,
    )


def train_loader(dataset: CocoDataset, data: DataConfig, seed: int, pin: bool = False) -> DataLoader:
    """Loader over a `BatchStream` (its `batch_sampler`), wide and tall images apart."""
    factors = None
    if data.repeat_threshold is not None:
        factors = repeat_factors([dataset.labels_of(i) for i in range(len(dataset))], data.repeat_threshold)
    if data.workers:
        allow_open_files()
    return DataLoader(
        CopyPaste(dataset, data.copy_paste) if data.copy_paste else dataset,
        batch_sampler=BatchStream(aspect_groups(dataset), data.batch_size, seed, factors),
        num_workers=data.workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=data.workers > 0,
        worker_init_fn=allow_open_files,
    )
