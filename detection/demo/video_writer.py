"""Writes an .mp4 that plays: the encoder is tried before use, the frame rate is exact, the result is read back.

H.264 through PyAV when that is installed (browsers, phones and chat programs play it), else what OpenCV's FFmpeg can
encode. The file appears under its name only when it is finished and was found playable.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from detection.demo.video import quiet_ffmpeg
from detection.visual import Image

log = logging.getLogger(__name__)

CODECS = ('auto', 'h264', 'mp4v', 'vp9')
_RESERVE = 2**20  # bytes that must stay free: an .mp4 without its index, written last, is lost as a whole
_CHECK_EVERY = 16  # frames between two looks at the free space


class VideoWriteError(OSError):
    """The video could not be written; the message says why, and nothing unfinished is left behind."""


class _Backend(Protocol):
    name: str

    def write(self, image: Image) -> None: ...
    def close(self) -> None: ...


class _PyAV:
    """libx264 (or another H.264 encoder of the FFmpeg inside PyAV)."""

    def __init__(self, path: Path, fps: Fraction, size: tuple[int, int]):
        import av

        encoder = next((e for e in ('libx264', 'libopenh264', 'h264_videotoolbox') if e in av.codecs_available), None)
        if encoder is None:
            raise ValueError('this PyAV has no H.264 encoder')
        self.name = f'h264 ({encoder})'
        self._av, self._index = av, 0
        self._time_base = 1 / fps
        self._container = av.open(str(path), 'w', format='mp4')
        options = {'preset': 'veryfast', 'crf': '20'} if encoder == 'libx264' else {}
        self._stream: Any = self._container.add_stream(encoder, rate=fps, options=options)
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = 'yuv420p'
        # swscale converts with BT.601; untagged HD video would be shown with BT.709, in wrong colours
        self._stream.codec_context.colorspace = 6
        self._stream.codec_context.color_range = 1

    def write(self, image: Image) -> None:
        frame = self._av.VideoFrame.from_ndarray(image, format='rgb24')
        frame.pts, frame.time_base = self._index, self._time_base
        self._index += 1
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def close(self) -> None:
        try:
            if self._index:
                for packet in self._stream.encode(None):
                    self._container.mux(packet)
        finally:
            self._container.close()


class _OpenCV:
    def __init__(self, path: Path, fps: Fraction, size: tuple[int, int], fourcc: str, name: str):
        self.name = f'{name} (OpenCV)'
        quiet_ffmpeg()
        level = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a missing encoder is reported by us
        try:
            code = cv2.VideoWriter.fourcc(*fourcc)
            self._writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, float(fps), size)
        finally:
            cv2.utils.logging.setLogLevel(level)
        if not self._writer.isOpened():
            raise ValueError(f'OpenCV has no encoder for {name}')

    def write(self, image: Image) -> None:
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        self._writer.release()


_Opener = Callable[[Path, Fraction, tuple[int, int]], _Backend]
_BACKENDS: tuple[tuple[str, _Opener], ...] = (
    ('h264', _PyAV),
    ('h264', lambda path, fps, size: _OpenCV(path, fps, size, 'avc1', 'h264')),
    ('mp4v', lambda path, fps, size: _OpenCV(path, fps, size, 'mp4v', 'mp4v')),
    ('vp9', lambda path, fps, size: _OpenCV(path, fps, size, 'vp09', 'vp9')),
)


class VideoWriter:
    """Writes RGB frames to an .mp4 without sound; a context manager.

    Leaving the block finishes the file, also after an exception, so that an interrupted run leaves a playable, shorter
    one. Only a failure to write leaves none.

    Args:
        path: the file, ending in .mp4; replaced only by a finished one.
        fps: exact frame rate.
        size: width and height of every frame; odd ones are padded by one pixel, as the encoders need even ones.
        codec: one of `CODECS`; ``auto`` takes the first that works in the order h264, mp4v, vp9.

    Raises:
        ValueError: for another suffix, an unknown codec, or one that cannot be encoded here.
        VideoWriteError: when the folder cannot be written, and later when the disk is full.

    Example:
        >>> with VideoWriter('out.mp4', Fraction(25), (640, 480)) as writer:
        ...     writer.write(image)  # RGB uint8 (480, 640, 3)
    """

    def __init__(self, path: str | Path, fps: Fraction, size: tuple[int, int], codec: str = 'auto'):
        self.path = Path(path)
        check_video_output(self.path, codec)
        self.fps, self.size, self.frames = fps, size, 0
        self._even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        self._partial = self.path.with_name(f'.{self.path.stem}.{os.getpid()}.partial.mp4')
        self._backend: _Backend | None = self._open(codec)
        self.codec = self._backend.name

    def write(self, image: Image) -> None:
        """Append one RGB frame of the writer's size."""
        if self._backend is None:
            raise ValueError(f'{self.path} is closed')
        if image.shape != (self.size[1], self.size[0], 3):
            raise ValueError(f'a frame of shape {image.shape} for a video of {self.size[0]} x {self.size[1]}')
        if self._even != self.size:
            right, below = self._even[0] - self.size[0], self._even[1] - self.size[1]
            image = np.ascontiguousarray(np.pad(image, ((0, below), (0, right), (0, 0)), mode='edge'))
        try:
            if self.frames % _CHECK_EVERY == 0 and shutil.disk_usage(self.path.parent).free < _RESERVE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._backend.write(image)
        except OSError as error:
            self._discard()
            raise self._failure(error) from error
        self.frames += 1

    def close(self) -> None:
        """Finish the file, check that it plays, and give it its name; without frames there is no file."""
        if self._backend is None:
            return
        backend, self._backend = self._backend, None
        try:
            backend.close()
            if self.frames:
                check_playable(self._partial, self.frames)
                os.replace(self._partial, self.path)
        except (OSError, ValueError) as error:
            raise self._failure(error) from error
        finally:
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, codec: str) -> _Backend:
        reasons = []
        for name, opener in _BACKENDS:
            if codec not in ('auto', name):
                continue
            try:
                backend = opener(self._partial, self.fps, self._even)
            except ImportError:
                reasons.append(f'{name}: PyAV is not installed (pip install av)')
            except (ValueError, OSError) as error:
                reasons.append(f'{name}: {error}')
            else:
                for reason in reasons:
                    log.info('writing %s as %s, because %s', self.path, backend.name, reason)
                return backend
            self._partial.unlink(missing_ok=True)
        raise ValueError(f'no encoder for {self.path}: {"; ".join(reasons)}')

    def _discard(self) -> None:
        backend, self._backend = self._backend, None
        try:
            if backend is not None:
                backend.close()
        except OSError as error:
            log.debug('closing the unfinished %s: %s', self._partial, error)
        finally:
            self._partial.unlink(missing_ok=True)

    def _failure(self, error: Exception) -> VideoWriteError:
        reason = (isinstance(error, OSError) and error.strerror) or error
        return VideoWriteError(f'cannot write {self.path} after {self.frames} frames: {reason}; nothing was kept')


def check_video_output(path: Path, codec: str = 'auto') -> None:
    """Check suffix, codec name and folder of a video before any work is done.

    Raises:
        ValueError: the video cannot be written there.
    """
    if path.suffix.lower() != '.mp4':
        raise ValueError(f'output {path} ends in {path.suffix or "nothing"!r}, expected .mp4')
    if codec not in CODECS:
        raise ValueError(f'codec {codec!r}, expected one of {", ".join(CODECS)}')
    if path.is_dir():
        raise ValueError(f'output {path} is a folder, expected a file')
    if not path.parent.is_dir():
        raise ValueError(f'output folder {path.parent} does not exist')
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f'output folder {path.parent} cannot be written')


def check_playable(path: Path, frames: int) -> None:
    """Read the file's header, first and last frame back; ``ValueError`` when it does not hold ``frames`` frames."""
    capture = cv2.VideoCapture(str(path))
    try:
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        first = last = capture.read()[0]
        if frames > 1:
            capture.set(cv2.CAP_PROP_POS_FRAMES, frames - 1)
            last = capture.read()[0]
    finally:
        capture.release()
    if not (first and last) or count != frames:
        raise ValueError(f'the result does not play (holds {count} of {frames} frames)')
