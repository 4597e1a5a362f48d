"""A camera that takes pictures when a test says so."""

from __future__ import annotations

import threading

import numpy as np
from fake_clock import SAFETY_S, FakeClock


class FakeCamera:
    """Stands in for `cv2.VideoCapture`; each picture carries its number, counted from 1, as grey level modulo 256.

    It takes none before `take` is called; its clock goes on by 1 / ``fps`` with each.

    Args:
        clock: moved by the pictures.
        fps: its rate.
        size: (H, W) of the pictures.
    """

    def __init__(self, clock: FakeClock, fps: float = 60.0, size: tuple[int, int] = (48, 64)) -> None:
        self.clock, self.fps, self.size = clock, fps, size
        self.taken = 0
        self.released = False
        self._due = 0
        self._asked = self._unplugged = False
        self._changed = threading.Condition()

    def take(self, pictures: int = 1) -> None:
        """Take so many pictures; returns when the reader has them all."""
        with self._changed:
            self._due += pictures
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._unplugged or (self._asked and not self._due), SAFETY_S), (
                'nobody reads the camera'
            )

    def unplug(self) -> None:
        """No more pictures; ends a reader's waiting."""
        with self._changed:
            self._unplugged = True
            self._changed.notify_all()

    def isOpened(self) -> bool:
        return True

    def read(self) -> tuple[bool, np.ndarray | None]:
        with self._changed:
            self._asked = True
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._due or self._unplugged, SAFETY_S), 'no picture was taken'
            self._asked = False
            if not self._due:
                return False, None
            self._due -= 1
            self.taken += 1
            self.clock.sleep(1 / self.fps)
        return True, np.full((*self.size, 3), self.taken % 256, np.uint8)

    def get(self, _: int) -> float:
        return self.fps

    def release(self) -> None:
        self.released = True
