"""Processes of torchrun, their devices and mixed precision, and signals that are held until a safe point.

All of it works in a single process without torchrun too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

AMP = ('none', 'bf16', 'fp16')  # mixed precisions
_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def rank() -> int:
    """Index of this process among all, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        dist.barrier()


def choose_device(name: str = 'auto') -> torch.device:
    """The device of this name; `auto` is the accelerator if there is one, else the CPU.

    Under torchrun each process gets a GPU of its own.

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


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """The context of mixed precision: ``none``, ``bf16`` or ``fp16``."""
    return torch.autocast(device.type, _DTYPES[amp]) if amp in _DTYPES else contextlib.nullcontext()


def make_deterministic() -> None:
    """Let PyTorch use only deterministic operations; an operation without a deterministic form raises an error.

    Results still depend on the number of threads on a CPU, and on the kind of GPU and PyTorch's version on a GPU.
    """
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes of torchrun during the block, by nccl on GPUs, else gloo; without torchrun do nothing."""
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


class HeldSignals:
    """A context that holds Ctrl-C and SIGTERM back; a second signal acts at once.

    A loop asks `arrived` between its steps, saves its state, and calls `deliver`. Outside the main thread nothing is
    held, because Python delivers no signals there.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._noted = 0
        self._owner = os.getpid()

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # background jobs ignore Ctrl-C
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def noted(self) -> int:
        """Number of the signal that came to this process, 0 for none."""
        return self._noted

    def arrived(self, device: torch.device) -> bool:
        """Whether a signal came to any of the processes; all get the same answer.

        Args:
            device: device of this process. All processes must ask at the same step.
        """
        if world_size() > 1:
            noted = torch.tensor(self._noted, device=device)
            dist.all_reduce(noted, dist.ReduceOp.MAX)
            self._noted = int(noted)
        return self._noted != 0

    def deliver(self) -> None:
        """Let the held signal act as it would have without this context."""
        number = self._noted
        self.__exit__()
        signal.raise_signal(number)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """A part of the loop, such as an evaluation, in which signals act at once."""
        self.__exit__()
        if self._noted:
            self.deliver()
        try:
            yield
        finally:
            self.__enter__()

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._owner:  # a loading process: its parent ends it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        again, self._noted = self._noted, number
        if again and callable(self._before.get(number)):
            self._before[number](number, frame)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM to the end of a short block.

    Native code that reads a file may turn the exception of a signal into an error of its own. We would then call the
    file damaged.
    """
    held = HeldSignals()
    try:
        with held:
            yield
    finally:  # the former handlers are back, so no signal is lost in between
        if held.noted:
            held.deliver()
