"""Time for tests: a clock that only they move, and waiting for an event instead of for a while."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import pytest

SAFETY_S = 120.0  # nothing is judged by it: it ends a test that waits for what never comes
_Clock = TypeVar('_Clock', bound='FakeClock')


class FakeClock:
    """Stands in for the module `time`; its time goes on when somebody sleeps, and not otherwise.

    Attributes:
        now: seconds.
    """

    def __init__(self, now: float = 0.0) -> None:
        self._now = now
        self._lock = threading.Lock()

    @property
    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        """Let so much time pass."""
        with self._lock:
            self._now += max(0.0, seconds)

    def perf_counter(self) -> float:
        return self.now

    monotonic = time = perf_counter

    def install(self: _Clock, monkeypatch: pytest.MonkeyPatch, *modules: str) -> _Clock:
        """Give modules, by name, this clock in place of their `time`."""
        for name in modules:
            # by way of import_module: some packages have a function of the same name
            monkeypatch.setattr(importlib.import_module(name), 'time', self)
        return self


class ThreadClock(FakeClock):
    """A clock that runs apart for every thread, as if each had a machine of its own.

    What one thread measures is then not mixed with what the others do meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._own = threading.local()

    @property
    def now(self) -> float:
        return getattr(self._own, 'now', 0.0)

    def sleep(self, seconds: float) -> None:
        self._own.now = self.now + max(0.0, seconds)


def happens(condition: Callable[[], object], within: float, every: float = 0.005) -> bool:
    """Whether a condition comes true before so many seconds are over; returns as soon as it does.

    Args:
        condition: asked again and again.
        within: seconds.
        every: seconds between two questions.
    """
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def wait_until(condition: Callable[[], object], why: str | Callable[[], object] = '', every: float = 0.005) -> None:
    """Wait until a condition comes true.

    Args:
        condition: asked again and again.
        why: what to say where it never does.
        every: seconds between two questions.
    """
    if not happens(condition, SAFETY_S, every):
        raise AssertionError(f'waited in vain: {why() if callable(why) else why}')
