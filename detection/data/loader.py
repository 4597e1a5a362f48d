"""Batches of a validation set in order, and what processes that load batches need."""

from __future__ import annotations

import sys

import torch.multiprocessing
from torch.utils.data import DataLoader, Subset

from detection.data.coco import CocoDataset, collate
from norton_timm.utils import rank, world_size

_OPEN_FILES = 4096  # enough for the tensors of some hundred images, each of which is an open file by default


def eval_loader(dataset: CocoDataset, batch_size: int, workers: int) -> DataLoader:
    """Every image exactly once, over all processes together."""
    part = Subset(dataset, range(rank(), len(dataset), world_size()))
    if workers:
        allow_open_files()
    return DataLoader(
        part, batch_size=batch_size, num_workers=workers, collate_fn=collate, worker_init_fn=allow_open_files
    )


def allow_open_files(worker: int | None = None) -> None:
    """Let loading processes hand over many tensors, each of which is an open file by PyTorch's default.

    The process's limit on open files is raised as far as it may. Where it stays low, as after `ulimit -n 256`, tensors
    are shared by name instead; else the run would wait for ever for a process that has no file left.

    Args:
        worker: number of a loading process, which PyTorch passes; it changes nothing.
    """
    if sys.platform == 'win32':  # shares tensors by name
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
        soft = highest
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        torch.multiprocessing.set_sharing_strategy('file_system')
