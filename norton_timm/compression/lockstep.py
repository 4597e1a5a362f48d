"""Forward passes that wait for each other: each stops before the same layers, and only one runs at a time.

A layer can then be changed when the inputs of all passes are known, without running the layers before it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from norton_timm.utils import before_call, removing


class _Cancelled(BaseException):
    """Ends a pass that is no longer wanted."""


class Walk:
    """One forward pass, in a thread of its own.

    Attributes:
        at: name of the layer that the pass has stopped before; '' at its end.
        x: input of that layer.
        done: whether it has come to its end.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.at = ''
        self.x: Any = None
        self.done = False
        self.error: BaseException | None = None
        self.cancelled = False
        self.may_go, self.has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._run = run
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        self.may_go.acquire()
        try:
            if not self.cancelled:
                with torch.no_grad():  # the mode belongs to the thread
                    self._run()
        except _Cancelled:
            pass
        except BaseException as error:  # raised again by `advance`
            self.error = error
        self.done, self.at, self.x = True, '', None
        self.has_stopped.release()

    def stop(self, name: str, x: Any) -> None:
        """Wait, within the pass, until it may go on."""
        self.at, self.x = name, x
        self.has_stopped.release()
        self.may_go.acquire()
        self.x = None
        if self.cancelled:
            raise _Cancelled


class Stops:
    """The layers before which passes stop.

    Attributes:
        finished: names of layers that passes no longer stop before.
        running: the pass that runs at present.
    """

    def __init__(self) -> None:
        self.finished: set[str] = set()
        self.running: Walk | None = None
        self._walks: list[Walk] = []

    def walk(self, run: Callable[[], Any]) -> Walk:
        """A new pass, which has not begun."""
        walk = Walk(run)
        self._walks.append(walk)
        walk.thread.start()
        return walk

    def advance(self, walk: Walk) -> None:
        """Let a pass run up to its next stop, or to its end; an exception in it is raised here."""
        if walk.done:
            return
        self.running = walk
        walk.may_go.release()
        walk.has_stopped.acquire()
        self.running = None
        if walk.error is not None:
            raise walk.error

    def cancel(self) -> None:
        """End all passes."""
        for walk in self._walks:
            if not walk.done:
                walk.cancelled = True
                walk.may_go.release()
        for walk in self._walks:
            walk.thread.join()


@contextmanager
def stopping(model: nn.Module, names: Iterable[str]) -> Iterator[Stops]:
    """Within the block, passes of ``model`` stop before these layers; passes that are left over are ended.

    Example:
        >>> with stopping(model, ['conv1']) as stops:
        ...     walk = stops.walk(lambda: model(images))
        ...     stops.advance(walk)
        ...     print(walk.x.shape)
    """
    stops = Stops()

    def wait(name: str, _: nn.Module, x: Any) -> None:
        if stops.running is not None and name not in stops.finished:
            stops.running.stop(name, x)

    hooks = [before_call(model.get_submodule(name), partial(wait, name)) for name in names]
    with removing(hooks):
        try:
            yield stops
        finally:
            stops.cancel()
