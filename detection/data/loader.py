"""Batches of a validation set, in order."""

from __future__ import annotations

from torch.utils.data import DataLoader, Subset

from detection.data.coco import CocoDataset, collate
from norton_timm.utils import rank, world_size


def eval_loader(dataset: CocoDataset, batch_size: int, workers: int) -> DataLoader:
    """Every image exactly once, over all processes together."""
    part = Subset(dataset, range(rank(), len(dataset), world_size()))
    return DataLoader(part, batch_size=batch_size, num_workers=workers, collate_fn=collate)
