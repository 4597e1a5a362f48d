"""Writes an .mp4 that plays: every frame has its time, constant rates are exact, the result is read back.

H.264, which browsers, phones and chat programs play, where PyAV's FFmpeg has an encoder for it. The file appears under
its name only when it is finished and was found playable.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from detection.demo.times import longest_gap, timescale
from detection.visual import Image

log = logging.getLogger(__name__)

CODECS = ('auto', 'h264', 'mp4v', 'vp9')
_RESERVE = 2**20  # bytes that must stay free: an .mp4 without its index, written last, is lost as a whole
_CHECK_EVERY = 16  # frames between two looks at the free space
# without B-frames, which would make an .mp4 count the time between two frames several times over
_OPTIONS = {
    'libx264': {'preset': 'veryfast', 'crf': '20', 'bf': '0'},
    'mpeg4': {'flags': '+qscale', 'global_quality': str(3 * 118)},
    'libvpx-vp9': {'b': '0', 'crf': '24', 'deadline': 'realtime', 'cpu-used': '7'},
}
_ENCODERS = (
    ('h264', 'libx264'),
    ('h264', 'libopenh264'),
    ('h264', 'h264_videotoolbox'),
    ('mp4v', 'mpeg4'),
    ('vp9', 'libvpx-vp9'),
)


class VideoWriteError(OSError):
    """The video could not be written; the message says why, and what was kept of it."""


class _Encoder:
    """One of FFmpeg's encoders, and the .mp4 that its packets go into."""

    def __init__(self, path: Path, fps: Fraction, size: tuple[int, int], codec: str, encoder: str):
        if encoder not in av.codecs_available:
            raise ValueError(f'this PyAV has no {encoder}')
        self.name = f'{codec} ({encoder})'
        self.ticks = min(timescale(fps), 65535) if encoder == 'mpeg4' else timescale(fps)
        self._lasts = 1
        self._container: Any = av.open(str(path), 'w', format='mp4')
        stream: Any = self._container.add_stream(encoder, rate=fps, options=_OPTIONS.get(encoder, {}))
        self._stream = stream
        stream.width, stream.height = size
        stream.pix_fmt = 'yuv420p'
        context = stream.codec_context
        context.time_base = Fraction(1, self.ticks)
        # swscale converts with BT.601; untagged HD video would be shown with BT.709, in wrong colours
        context.colorspace, context.color_range = 6, 1
        self._container.start_encoding()  # an encoder that cannot be opened fails here, and the next one is tried
        self._begun = False

    def write(self, image: Image, ticks: int, lasts: int) -> None:
        frame = av.VideoFrame.from_ndarray(image, format='rgb24')
        frame.pts, frame.time_base = ticks, Fraction(1, self.ticks)
        self._begun, self._lasts = True, lasts
        self._mux(frame)

    def close(self) -> None:
        try:
            if self._begun:
                self._mux(None)
        finally:
            self._container.close()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            packet.duration = self._lasts  # counts for the last one: the others last until the next
            self._container.mux(packet)


class VideoWriter:
    """Writes RGB frames to an .mp4 without sound; a context manager.

    Leaving the block finishes the file, also after an exception, so that an interrupted run leaves a playable, shorter
    one. Only a failure to write leaves none. A finished file that is found not to play is kept beside, its name ending
    in ``.partial``.

    Args:
        path: the file, ending in .mp4; replaced only by a finished one.
        fps: nominal frame rate; frames without a time of their own keep it exactly.
        size: width and height of every frame; odd ones are padded by one pixel, as the encoders need even ones.
        codec: one of `CODECS`; ``auto`` takes the first that works in the order h264, mp4v, vp9.
        overwrite: replace a file of that name; otherwise one that appears before the end stays, and ours is kept as
            ``.partial``.

    Raises:
        ValueError: for another suffix, an unknown codec, or one that cannot be encoded here.
        FileExistsError: the file exists, and ``overwrite`` is false.
        VideoWriteError: when the folder cannot be written, and later when the disk is full.

    Example:
        >>> with VideoWriter('out.mp4', Fraction(25), (640, 480)) as writer:
        ...     writer.write(image)  # RGB uint8 (480, 640, 3)
    """

    def __init__(
        self, path: str | Path, fps: Fraction, size: tuple[int, int], codec: str = 'auto', *, overwrite: bool = True
    ):
        self.path, self.overwrite = Path(path), overwrite
        check_video_output(self.path, codec)
        check_free(self.path, overwrite)
        self.fps, self.size, self.frames = fps, size, 0
        self._even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        self._partial = self.path.with_name(f'.{self.path.stem}.{os.getpid()}.partial.mp4')
        self._last = -1  # tick of the last frame
        self._at: Fraction | float = 0
        self._encoder: _Encoder | None = self._open(codec)
        self.codec, self._ticks = self._encoder.name, self._encoder.ticks

    def write(self, image: Image, at: Fraction | float | None = None, lasts: Fraction | float | None = None) -> None:
        """Append one RGB frame of the writer's size.

        Args:
            image: ``uint8 (H, W, 3)``.
            at: seconds from the beginning at which it is shown, not before the last one; ``None``: by the rate.
            lasts: seconds that it is shown if it is the last one, at most a day; ``None``: by the rate.

        Raises:
            ValueError: another size, a time before the last frame's or hours after it, or the file is closed.
            VideoWriteError: it cannot be written.
        """
        if self._encoder is None:
            raise ValueError(f'{self.path} is closed')
        if image.shape != (self.size[1], self.size[0], 3):
            raise ValueError(f'a frame of shape {image.shape} for a video of {self.size[0]} x {self.size[1]}')
        at = self.frames / self.fps if at is None else at
        ticks = self._place(at)
        if self._even != self.size:
            right, below = self._even[0] - self.size[0], self._even[1] - self.size[1]
            image = np.ascontiguousarray(np.pad(image, ((0, below), (0, right), (0, 0)), mode='edge'))
        try:
            if self.frames % _CHECK_EVERY == 0 and shutil.disk_usage(self.path.parent).free < _RESERVE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._encoder.write(image, ticks, self._length(lasts))
        except (OSError, av.FFmpegError) as error:
            self._discard()
            raise self._failure(error) from error
        self.frames, self._last, self._at = self.frames + 1, ticks, at

    def close(self) -> None:
        """Finish the file, check that it plays, and give it its name; without frames there is no file."""
        if self._encoder is None:
            return
        encoder, self._encoder = self._encoder, None
        try:
            encoder.close()
        except (OSError, av.FFmpegError) as error:
            self._partial.unlink(missing_ok=True)
            raise self._failure(error) from error
        if not self.frames:
            self._partial.unlink(missing_ok=True)
            return
        try:
            check_playable(self._partial, self.frames)
            check_free(self.path, self.overwrite)
            os.replace(self._partial, self.path)
        except (OSError, ValueError) as error:
            raise self._failure(error, self._keep()) from error

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(self, at: Fraction | float) -> int:
        """The tick at which a frame is shown; two within one tick are shown in two."""
        if not math.isfinite(at) or at < self._at:
            raise ValueError(f'a frame at {float(at):g} s, expected a finite time after {float(self._at):g} s')
        ticks = max(round(at * self._ticks), self._last + 1)
        longest = longest_gap(self._ticks)
        if self.frames and ticks - self._last > longest * self._ticks + 1:  # rounded
            gap = (ticks - self._last) / self._ticks
            raise ValueError(f'a frame {gap:.0f} s after the one before, expected at most {float(longest):.0f} s')
        return ticks

    def _length(self, lasts: Fraction | float | None) -> int:
        """The ticks that a last frame is shown."""
        if lasts is None or not math.isfinite(lasts) or lasts <= 0:
            lasts = 1 / self.fps
        return max(1, round(min(Fraction(lasts), longest_gap(self._ticks)) * self._ticks))

    def _open(self, codec: str) -> _Encoder:
        reasons = []
        for name, encoder in _ENCODERS:
            if codec not in ('auto', name):
                continue
            try:
                opened = _Encoder(self._partial, self.fps, self._even, name, encoder)
            except (ValueError, OSError, av.FFmpegError) as error:
                reasons.append(f'{name}: {error}')
            else:
                for reason in reasons:
                    log.info('writing %s as %s, because %s', self.path, opened.name, reason)
                return opened
            self._partial.unlink(missing_ok=True)
        raise ValueError(f'no encoder for {self.path}: {"; ".join(reasons)}')

    def _keep(self) -> Path:
        """Give the finished file that may not have its name another one that is free."""
        names = (f'{self.path.name}{f".{k}" if k else ""}.partial' for k in range(1000))
        kept = next(path for name in names if not os.path.lexists(path := self.path.with_name(name)))
        os.replace(self._partial, kept)
        return kept

    def _discard(self) -> None:
        encoder, self._encoder = self._encoder, None
        try:
            if encoder is not None:
                encoder.close()
        except (OSError, av.FFmpegError) as error:
            log.debug('closing the unfinished %s: %s', self._partial, error)
        finally:
            self._partial.unlink(missing_ok=True)

    def _failure(self, error: Exception, kept: Path | None = None) -> VideoWriteError:
        reason = (isinstance(error, OSError) and error.strerror) or error
        told = f'what was written is kept as {kept}' if kept else 'nothing was kept'
        return VideoWriteError(f'cannot write {self.path} after {self.frames} frames: {reason}; {told}')


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


def check_free(path: Path, overwrite: bool) -> None:
    """Check that nobody else's file has that name.

    Raises:
        FileExistsError: there is one, and it may not be overwritten; or it is no plain file.
    """
    if not os.path.lexists(path):
        return
    if path.exists() and not path.is_file():
        raise FileExistsError(f'{path} is no plain file: choose another name')
    if not overwrite:
        raise FileExistsError(f'{path} exists: choose another name, or give --overwrite to replace it')


def check_playable(path: Path, frames: int) -> None:
    """Read the file's header, first and last frame back; ``ValueError`` when it does not hold ``frames`` frames."""
    count, decoded = 0, []
    try:
        with av.open(str(path)) as container:
            stream: Any = container.streams.best('video')
            if stream is not None:
                count = stream.frames
                decoded.append(next(container.decode(stream), None))
                container.seek(max(0, (stream.duration or 0) - 1), stream=stream)
                decoded += list(container.decode(stream))[-1:]
    except av.FFmpegError as error:
        raise ValueError(f'the result does not play ({error.strerror})') from error
    if count != frames or len(decoded) < 2 or decoded[0] is None:
        raise ValueError(f'the result does not play (holds {count} of {frames} frames)')
