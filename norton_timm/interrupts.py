"""Ctrl-C and SIGTERM held back until a loop has come to a state that can be kept."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from norton_timm.distributed import world_size

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
