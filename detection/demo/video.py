"""Sources of frames: files, picture folders, webcams, network streams, and a clip drawn by code.

A source is iterated once and gives `Frame`s with RGB pictures. What has a length is read at the pace of the reader;
live sources are read by their own thread, which keeps only the newest frame, so that a slow network sees the present
and not a growing past. Writing is in ``video_writer.py``.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import cv2
import numpy as np

from detection.data import read_picture
from detection.demo.decoder import StreamCapture, VideoReader, live_reader
from detection.demo.times import FrameTimes, exact_rate
from detection.visual import Image

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
_CLOSE_TIMEOUT_S = 10.0
_MOST_WEBCAMS = 1000


@dataclass(frozen=True)
class Frame:
    """One picture of a source.

    Attributes:
        image: RGB ``uint8 (H, W, 3)``.
        index: 0-based position in the source; live sources leave out the numbers of dropped frames.
        time: when the picture was read, in seconds on ``time.perf_counter``.
        at: when it is shown, in seconds after the first frame; ``None``: by the rate of the source.
        lasts: how long it is shown if no frame follows, in seconds; ``None``: by the rate of the source.
    """

    image: Image
    index: int
    time: float
    at: Fraction | None = None
    lasts: Fraction | None = None


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
        fps: nominal frames per second as an exact fraction; the frames of a variable rate have times of their own.
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

    def time_of(self, frame: Frame) -> Fraction:
        """When one of its frames is shown, in seconds after the first."""
        return frame.index / self.fps if frame.at is None else frame.at

    def close(self) -> None:  # noqa: B027  (pictures and drawn clips hold nothing open)
        """Release the capture; more than once is fine."""

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileSource(FrameSource):
    """A video with a length: a file, or an address that is open already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no frame of it can be decoded.
    """

    def __init__(self, path: str | Path, reader: VideoReader | None = None):
        self.name = str(path)
        if reader is None and not Path(path).is_file():
            raise FileNotFoundError(f'no video {path}: expected a video file')
        try:
            self._reader = reader or VideoReader(f'file:{path}')
        except ValueError as error:
            raise ValueError(f'{path} is not a video that can be decoded: {error}') from error
        self._frames = self._reader.frames()
        self._first = next(self._frames, None)
        if self._first is None:
            self.close()
            raise ValueError(f'{path} is not a video that can be decoded: no frame could be read')
        self.fps, self.count = self._reader.rate, self._reader.count

    def __iter__(self) -> Iterator[Frame]:
        times = FrameTimes(self.fps, self._reader.tick)
        found, index = self._first, 0
        self._first = None
        try:
            while found is not None:
                yield Frame(found.image, index, time.perf_counter(), times(found.stamp), times.length(found.lasts))
                index += 1
                found = next(self._frames, None)
            # containers announce a frame or two more than they hold; more than that is damage
            if self.count is not None and index < self.count - 2 and index < 0.98 * self.count:
                log.warning('%s ended after %d of %d frames: the file is damaged', self.name, index, self.count)
            elif self._reader.broken:
                log.warning('%s ended after %d frames: it is damaged (%s)', self.name, index, self._reader.broken)
            if times.repaired:
                log.warning('%s: %d of %d frames had no usable time', self.name, times.repaired, index)
        finally:
            self.close()

    def close(self) -> None:
        self._reader.close()


class ImageSource(FrameSource):
    """Picture files in the order given, each at its own size."""

    def __init__(self, paths: Sequence[Path], name: str, fps: Fraction = Fraction(10)):
        if not paths:
            raise ValueError(f'{name} has no pictures, expected files ending in {", ".join(IMAGE_SUFFIXES)}')
        self.name, self.fps, self.count, self.paths = name, fps, len(paths), list(paths)

    def __iter__(self) -> Iterator[Frame]:
        for index, path in enumerate(self.paths):
            yield Frame(read_picture(path, oriented=True), index, time.perf_counter())


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
        self._since = 0.0
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
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)

    def _connect(self) -> Capture | None:
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
                    now = time.perf_counter()
                    self._since = now if index == 0 else self._since
                    frame = Frame(_rgb(bgr), index, now, Fraction(now - self._since))
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
            (``rtsp://``, ``http://``, ``file://``), or ``None`` for the built-in drawn clip. A file or folder called
            like a number is that file or folder. A URL without a length is live.
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
    check_input(name)
    path = local_path(name)
    if path is None:
        return _open_address(name)
    if name.isdecimal() and not path.exists():
        if int(name) > _MOST_WEBCAMS:
            raise ValueError(f'cannot open webcam {name}, expected an index up to {_MOST_WEBCAMS}')
        return LiveSource(lambda: cv2.VideoCapture(int(name)), f'webcam {name}')
    if path.is_dir():
        return ImageSource(pictures_in(path), name)
    return ImageSource([path], name) if path.suffix.lower() in IMAGE_SUFFIXES else FileSource(path)


def check_input(name: str) -> None:
    """Check that an input is there, where that can be told without opening it.

    Raises:
        FileNotFoundError: it is a path where nothing is.
        ValueError: an empty name, which would be the working folder.
    """
    expected = 'expected a video, a picture, a folder, a webcam index or a URL'
    if not name.strip():
        raise ValueError(f'no input: got an empty name, {expected}')
    path = local_path(name)
    if path is not None and not path.exists() and not name.isdecimal():
        raise FileNotFoundError(f'no input {name}: {expected}')


def local_path(name: str) -> Path | None:
    """The path that an input names, also as a ``file://`` URL; ``None`` for other addresses."""
    scheme, separator, rest = name.partition('://')
    if not separator or not re.fullmatch(r'[a-z][a-z0-9+.-]*', scheme, re.IGNORECASE):
        return Path(name)
    if scheme.lower() != 'file':
        return None
    rest = rest.removeprefix('localhost') if rest.startswith('localhost/') else rest
    path = Path(rest)
    return path if path.exists() else Path(unquote(rest))


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


def _open_address(name: str) -> FrameSource:
    try:
        reader = live_reader(name)
    except ValueError as error:
        raise ValueError(f'cannot open {name}: {error}') from error
    if reader.finite:
        reader.pixels = 'rgb24'
        return FileSource(name, reader)
    opened = [reader]  # which a reconnection cannot use
    return LiveSource(lambda: StreamCapture(name, opened.pop() if opened else None), name)


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
