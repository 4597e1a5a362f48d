"""Processes started by torchrun, and the device of each. One process without torchrun needs nothing of it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


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


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """The context of mixed precision: ``none``, ``bf16`` or ``fp16``."""
    return torch.autocast(device.type, _DTYPES[amp]) if amp in _DTYPES else contextlib.nullcontext()


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


AMP = ('none', 'bf16', 'fp16')  # mixed precisions
_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """A context in which Ctrl-C and SIGTERM only leave a note; a second one of them acts at once.

    A loop asks `arrived` between its steps, keeps its state, and calls `deliver`. Outside the main thread, where
    Python delivers no signals, nothing is held.
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
        """The signal that came to this process, 0 for none."""
        return self._noted

    def arrived(self, device: torch.device) -> bool:
        """Whether one came, to this process or, where there are several, to any: all get the same answer.

        Args:
            device: of this process; all processes must ask at the same step.
        """
        if world_size() > 1:
            noted = torch.tensor(self._noted, device=device)
            dist.all_reduce(noted, dist.ReduceOp.MAX)
            self._noted = int(noted)
        return self._noted != 0

    def deliver(self) -> None:
        """Let the signal that arrived do what it would have done."""
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
        if os.getpid() != self._owner:  # a loading process, which its parent ends
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        again, self._noted = self._noted, number
        if again and callable(self._before.get(number)):
            self._before[number](number, frame)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A short block into which Ctrl-C and SIGTERM do not break; they act behind it.

    Native code that reads a file may turn the exception of a signal into an error of its own, and the file would be
    called damaged.
    """
    held = HeldSignals()
    try:
        with held:
            yield
    finally:  # the handlers are those of before: no signal slips in between
        if held.noted:
            held.deliver()
