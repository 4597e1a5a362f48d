"""Processes started by torchrun, and the device of each. One process without torchrun needs nothing of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn


def rank() -> int:
    """Number of this process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        dist.barrier()


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics (buffers of floating-point numbers), in place."""
    if world_size() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world_size()


def choose_device(name: str = 'auto') -> torch.device:
    """`auto` is the accelerator if there is one, else the CPU; under torchrun each process gets its own.

    Raises:
        ValueError: PyTorch does not know the name, or the device is not there.
    """
    local = int(os.environ.get('LOCAL_RANK', 0))
    if name == 'auto':
        found = torch.accelerator.current_accelerator(check_available=True)
        name = 'cpu' if found is None else found.type
    try:
        device = torch.device(name)
        if device.type == 'cuda' and device.index is None:
            device = torch.device('cuda', local if 'LOCAL_RANK' in os.environ else 0)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f'device {name!r} cannot be used, expected auto, cpu, cuda, cuda:1, ...: {reason}') from error
    return device


def make_deterministic() -> None:
    """Let PyTorch use only operations that give the same bits each time; where there is none, it says which.

    On a CPU the bits depend on the number of threads all the same; on a GPU on its kind and on PyTorch's version.
    """
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes of torchrun (nccl on GPUs, gloo else) for the time of the block; nothing without torchrun."""
    if 'WORLD_SIZE' not in os.environ:
        yield
        return
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    try:
        yield
    finally:
        dist.destroy_process_group()
