"""Sources of frames: files, picture folders, webcams, network streams, and a clip drawn by code.

A source is iterated once and gives `Frame`s with RGB pictures. Files are read at the pace of the reader; live sources
are read by their own thread, which keeps only the newest frame, so that a slow network sees the present and not a
growing past. Writing is in ``video_writer.py``.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from detection.data import read_picture
from detection.visual import Image

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
_OPEN_TIMEOUT_MS = 5000  # a stream that is silent for longer counts as broken
_NTSC = (24, 30, 48, 60, 120)


@dataclass(frozen=True)
class Frame:
    """One picture of a source.

    Attributes:
        image: RGB ``uint8 (H, W, 3)``.
        index: 0-based position in the source; live sources leave out the numbers of dropped frames.
        time: when the picture was read, in seconds on ``time.perf_counter``.
    """

    image: Image
    index: int
    time: float


class Capture(Protocol):
    """The part of ``cv2.VideoCapture`` that is used here; pictures are BGR."""

    def isOpened(self) -> bool: ...
    def read(self) -> tuple[bool, Any]: ...
    def get(self, prop: int, /) -> float: ...
    def release(self) -> None: ...


class FrameSource(ABC):
    """Frames with their rate; a context manager that releases what it opened.

    Attributes:
        name: for messages and results.
        fps: frames per second as an exact fraction.
        count: number of frames, ``None`` where unknown (live sources).
        live: frames arrive by the clock; a slow reader loses frames instead of delaying them.
        dropped: frames of a live source that were never handed out.
        reconnects: how often a live source was opened again.
    """

    name: str
    fps: Fraction
    count: int | None = None
    live: bool = False
    dropped: int = 0
    reconnects: int = 0

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]: ...

    def close(self) -> None:  # noqa: B027  (pictures and drawn clips hold nothing open)
        """Release the capture; more than once is fine."""

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def exact_rate(fps: float, default: Fraction = Fraction(30)) -> Fraction:
    """The fraction behind a rate rounded by a file header: 29.97 is 30000/1001. Nonsense gives the default."""
    if not np.isfinite(fps) or not 0.1 <= fps <= 1000:
        return default
    for n in _NTSC:
        if abs(fps - n * 1000 / 1001) < 0.004:
            return Fraction(n * 1000, 1001)
    return Fraction(fps).limit_denominator(1001)


class FileSource(FrameSource):
    """A video file. Raises ``FileNotFoundError`` or ``ValueError`` at once when it cannot be read."""

    def __init__(self, path: str | Path):
        self.name = str(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f'no video {path}: expected a video file')
        quiet_ffmpeg()
        self._capture = cv2.VideoCapture(str(path))
        self._first: Any = self._capture.read()[1] if self._capture.isOpened() else None
        if self._first is None:
            self._capture.release()
            raise ValueError(f'{path} is not a video that can be decoded: no frame could be read')
        self.fps = exact_rate(self._capture.get(cv2.CAP_PROP_FPS))
        announced = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = announced if announced > 0 else None

    def __iter__(self) -> Iterator[Frame]:
        bgr, index = self._first, 0
        self._first = None
        try:
            while bgr is not None:
                yield Frame(_rgb(bgr), index, time.perf_counter())
                index += 1
                bgr = self._capture.read()[1]
            # containers announce a frame or two more than they hold; more than that is damage
            if self.count is not None and index < self.count - 2 and index < 0.98 * self.count:
                log.warning('%s ended after %d of %d frames: the file is damaged', self.name, index, self.count)
        finally:
            self.close()

    def close(self) -> None:
        self._capture.release()


class ImageSource(FrameSource):
    """Picture files in the order given, each fitted into the size of the first."""

    def __init__(self, paths: Sequence[Path], name: str, fps: Fraction = Fraction(10)):
        if not paths:
            raise ValueError(f'{name} has no pictures, expected files ending in {", ".join(IMAGE_SUFFIXES)}')
        self.name, self.fps, self.count, self._paths = name, fps, len(paths), list(paths)

    def __iter__(self) -> Iterator[Frame]:
        size: tuple[int, int] | None = None
        for index, path in enumerate(self._paths):
            image = read_picture(path, oriented=True)
            size = size or (image.shape[1], image.shape[0])
            yield Frame(fit_image(image, size), index, time.perf_counter())


class DrawnSource(FrameSource):
    """Moving figures drawn by ``detection.data.draw_frames``: a clip that is always there."""

    def __init__(self, count: int = 150, size: tuple[int, int] = (640, 480), seed: int = 0):
        self.name, self.fps, self.count = 'drawn clip', Fraction(25), count
        self._size, self._seed = size, seed

    def __iter__(self) -> Iterator[Frame]:
        from detection.data import draw_frames

        for index, image in enumerate(draw_frames(self.count or 0, self._size, self._seed)):
            yield Frame(image, index, time.perf_counter())


class LiveSource(FrameSource):
    """A webcam or stream, read by a thread that keeps only the newest frame.

    A source that breaks is opened again after 0.5 s, then 1 s, 2 s, ... up to ``max_wait``; after ``attempts``
    failures in a row the iteration ends with ``ConnectionError``. A frame that arrives resets the count.

    Args:
        opener: opens the capture, as ``lambda: cv2.VideoCapture(0)``; called again to reconnect.
        name: for messages.
        attempts: consecutive failures to reconnect that are tolerated.
        first_wait: seconds before the first attempt to reconnect.
        max_wait: upper limit of the growing wait, in seconds.

    Raises:
        ValueError: when the source cannot be opened at all.
    """

    live = True

    def __init__(
        self,
        opener: Callable[[], Capture],
        name: str,
        *,
        attempts: int = 5,
        first_wait: float = 0.5,
        max_wait: float = 8.0,
    ):
        self.name, self.attempts, self.first_wait, self.max_wait = name, attempts, first_wait, max_wait
        self._opener = opener
        self._capture: Capture | None = self._connect()
        if self._capture is None:
            raise ValueError(f'cannot open {name}: it does not answer')
        self.fps = exact_rate(self._capture.get(cv2.CAP_PROP_FPS))
        self._fresh = threading.Condition()
        self._newest: Frame | None = None
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._read, name=f'read {name}', daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Frame]:
        try:
            while True:
                with self._fresh:
                    self._fresh.wait_for(lambda: self._newest is not None or self._ended)
                    frame, self._newest = self._newest, None
                if frame is None:
                    if self._stop.is_set():
                        return
                    raise ConnectionError(f'{self.name} was lost and {self.attempts} attempts to reconnect failed')
                yield frame
        finally:
            self.close()

    def close(self) -> None:
        self._stop.set()
        # the thread releases its capture itself: releasing under a running read() crashes FFmpeg
        self._thread.join(timeout=2 * _OPEN_TIMEOUT_MS / 1000)

    def _connect(self) -> Capture | None:
        quiet_ffmpeg()
        capture = self._opener()
        if capture.isOpened():
            return capture
        capture.release()
        return None

    def _read(self) -> None:
        index, failures = 0, 0
        try:
            while not self._stop.is_set():
                ok, bgr = self._capture.read() if self._capture is not None else (False, None)
                if ok:
                    failures = 0
                    frame = Frame(_rgb(bgr), index, time.perf_counter())
                    index += 1
                    with self._fresh:
                        self.dropped += self._newest is not None
                        self._newest = frame
                        self._fresh.notify_all()
                    continue
                if self._capture is not None:
                    self._capture.release()
                    self._capture = None
                if failures >= self.attempts:
                    return
                wait = min(self.max_wait, self.first_wait * 2**failures)
                failures += 1
                log.warning('%s: no picture; attempt %d of %d in %.1f s', self.name, failures, self.attempts, wait)
                if self._stop.wait(wait):
                    return
                self._capture = self._connect()
                self.reconnects += self._capture is not None
        finally:
            if self._capture is not None:
                self._capture.release()
            with self._fresh:
                self._ended = True
                self._fresh.notify_all()


def open_source(name: str | None, *, frames: int = 150) -> FrameSource:
    """Open what the user named.

    Args:
        name: a video file, a picture, a folder of pictures, a webcam's index (``'0'``), a URL
            (``rtsp://``, ``http://``), or ``None`` for the built-in drawn clip.
        frames: length of the drawn clip.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: for a file that cannot be decoded, a folder without pictures, a webcam or stream that does not
            answer.

    Example:
        >>> with open_source('clip.mp4') as source:
        ...     pictures = [frame.image for frame in source]
    """
    if name is None:
        return DrawnSource(frames)
    if name.isdecimal():
        return LiveSource(lambda: cv2.VideoCapture(int(name)), f'webcam {name}')
    if re.match(r'[a-z][a-z0-9+]*://', name):
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _OPEN_TIMEOUT_MS]
        return LiveSource(lambda: cv2.VideoCapture(name, cv2.CAP_FFMPEG, limits), name)
    path = Path(name)
    if path.is_dir():
        return ImageSource(sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), name)
    if not path.exists():
        raise FileNotFoundError(f'no input {name}: expected a video, a picture, a folder, a webcam index or a URL')
    return ImageSource([path], name) if path.suffix.lower() in IMAGE_SUFFIXES else FileSource(path)


def fit_image(image: Image, size: tuple[int, int]) -> Image:
    """Scale into ``size`` (width, height) with the aspect ratio kept, on black. The right size comes back as it is."""
    width, height = size
    if image.shape[1] == width and image.shape[0] == height:
        return image
    scale = min(width / image.shape[1], height / image.shape[0])
    w, h = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    resized = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    canvas = np.zeros((height, width, 3), np.uint8)
    x, y = (width - w) // 2, (height - h) // 2
    canvas[y : y + h, x : x + w] = resized
    return canvas


def _rgb(bgr: Any) -> Image:
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def quiet_ffmpeg() -> None:
    """Silence FFmpeg on stderr, where it would bury our one-line errors; a user's setting wins."""
    os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
