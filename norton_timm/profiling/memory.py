"""Memory in bytes: what inference with a network needs, and the most that this process has held."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from norton_timm.utils import evaluating, tensors_in

MEGABYTE = 1_000_000


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make and keeps the largest total of those alive at once."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = {StorageWeakRef(t.untyped_storage()).cdata for t in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def note(self, values: Any) -> None:
        """Count the storages of these tensors from now on, for as long as they live."""
        for tensor in tensors_in(values):
            if tensor.layout is not torch.strided:  # packed weights show no storage
                continue
            storage = tensor.untyped_storage()
            ref = StorageWeakRef(storage)
            if ref.cdata not in self._known:
                self._alive[ref.cdata] = ref, storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.note(out)
        return out


def peak_memory(model: nn.Module, example_input: Any) -> int:
    """Bytes that inference needs: parameters, buffers, and the largest total of activations alive at once.

    The network runs in evaluation mode without gradients. The bytes of all tensors count, the input included; an
    operation's input and output are alive together. Scratch space inside a kernel and the allocator's overhead do not
    count, so the figure does not depend on the device.

    Example:
        >>> megabytes = peak_memory(model, torch.rand(1, 3, 224, 224)) / MEGABYTE
    """
    owned = [*model.parameters(), *model.buffers()]
    weights = {StorageWeakRef(t.untyped_storage()).cdata: t.untyped_storage().nbytes() for t in owned}
    with evaluating(model), _LiveBytes(owned) as live:
        live.note(example_input)
        model(example_input)
    return sum(weights.values()) + live.peak


def reset_process_peak() -> bool:
    """Let :func:`process_peak` count anew from what this process holds now; False where the system cannot (not Linux).

    Memory of CUDA devices is not looked at.
    """
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return False
    return True


def process_peak(device: torch.device) -> int:
    """The most bytes that this process has held: allocated on a CUDA device, for others in main memory."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
