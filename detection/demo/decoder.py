"""Decodes video files and streams with PyAV, whose FFmpeg knows AV1, and gives each picture with its timestamp."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from detection.demo.times import FASTEST, SLOWEST, exact_rate
from detection.visual import Image
from norton_timm.utils import MOST_PIXELS

log = logging.getLogger(__name__)

_TIMEOUT_S = 5.0  # a stream that is silent for longer counts as broken
_PLAYLISTS = ('hls', 'dash', 'rtsp', 'sdp')  # the length of the list says nothing about the video's


class Decoded(NamedTuple):
    """A picture ``uint8 (H, W, 3)``, its timestamp, and how long it lasts, in seconds where the container tells."""

    image: Image
    stamp: Fraction | None
    lasts: Fraction | None


class VideoReader:
    """The pictures of the best video stream, decoded one after the other; closed by `close`.

    Args:
        name: a path as ``file:PATH``, or an address.
        pixels: ``rgb24`` or ``bgr24``.
        threads: decode in several threads, which delays the pictures; not for live streams.

    Attributes:
        rate: nominal frames per second.
        tick: seconds to which timestamps are rounded.
        count: frames that the header tells, or duration times a constant rate; ``None`` where neither is known.
        finite: the source has a length; a source without one is live.
        broken: why reading ended before the end, if it did.

    Raises:
        ValueError: it does not open, or has no video.
    """

    def __init__(self, name: str, *, pixels: str = 'rgb24', threads: bool = True):
        self.pixels, self.broken = pixels, ''
        scheme = name.partition(':')[0].lower()
        options = {'rtsp_transport': 'tcp'} if scheme.startswith('rtsp') else {}
        try:
            self._container: Any = av.open(name, options=options, timeout=None if scheme == 'file' else _TIMEOUT_S)
        except av.FFmpegError as error:
            raise ValueError(_told(error)) from error
        stream: Any = self._container.streams.best('video')
        if stream is None or stream.codec_context is None:
            self.close()
            raise ValueError('no video in it' if stream is None else 'no decoder for it')
        stream.codec_context.options = {'max_pixels': str(MOST_PIXELS)}
        stream.thread_type = 'AUTO' if threads else 'SLICE'
        self._stream = stream
        rates = [r for r in (stream.guessed_rate, stream.average_rate) if r and SLOWEST <= r < FASTEST]
        self.rate = exact_rate(float(rates[0])) if rates else Fraction(30)
        self.tick = Fraction(stream.time_base or 0)
        self.count: int | None = stream.frames or self._estimate()
        self._converter: Any = VideoReformatter()  # to make one for every frame takes longer than to decode it

    @property
    def finite(self) -> bool:
        container = self._container
        kind = container.format.name
        known = (container.duration or 0) > 0 or kind.endswith('_pipe')  # such a pipe is a single picture
        return known or (container.size > 0 and not any(name in kind for name in _PLAYLISTS))

    def frames(self) -> Iterator[Decoded]:
        """The pictures, upright; damaged ones are left out."""
        try:
            for packet in self._container.demux(self._stream):
                yield from self._decoded(packet)
        except av.FFmpegError as error:
            self.broken = str(error.strerror)
            yield from self._decoded(None)

    def close(self) -> None:
        """Release the file or connection; more than once is fine."""
        self._container.close()

    def _decoded(self, packet: Any) -> Iterator[Decoded]:
        try:
            found = [(self._picture(frame), frame) for frame in self._stream.decode(packet)]
        except av.FFmpegError as error:  # one damaged frame; the next one may be whole
            log.debug('a frame was left out: %s', error)
            return
        for image, frame in found:
            base = frame.time_base or 0
            stamp = frame.pts * base if frame.pts is not None and base else None
            yield Decoded(image, stamp, frame.duration * base if frame.duration and frame.duration > 0 else None)

    def _picture(self, frame: Any) -> Image:
        image = self._converter.reformat(frame, format=self.pixels).to_ndarray()
        turns = round(frame.rotation / 90) % 4  # how a phone was held
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image

    def _estimate(self) -> int | None:
        # a variable rate says nothing about the number
        if not self._container.duration or self._stream.average_rate != self._stream.guessed_rate:
            return None
        return round(self._container.duration / av.time_base * self.rate) or None


class StreamCapture:
    """A stream without a length, with the interface of ``cv2.VideoCapture``; see `detection.demo.video.Capture`.

    Args:
        name: the address.
        reader: it, when it is open already.
    """

    def __init__(self, name: str, reader: VideoReader | None = None):
        self._reader = reader
        try:
            self._reader = reader or live_reader(name)
        except ValueError as error:
            log.debug('%s: %s', name, error)
        self._frames: Iterator[Decoded] = self._reader.frames() if self._reader else iter(())

    def isOpened(self) -> bool:
        return self._reader is not None

    def read(self) -> tuple[bool, Image | None]:
        found = next(self._frames, None)
        return (False, None) if found is None else (True, found.image)

    def get(self, prop: int, /) -> float:
        return float(self._reader.rate) if self._reader and prop == cv2.CAP_PROP_FPS else 0.0

    def release(self) -> None:
        if self._reader is not None:
            self._reader.close()


def _told(error: av.FFmpegError) -> str:
    silent = isinstance(error, (ConnectionError, TimeoutError, av.error.ExitError)) or error.errno == errno.EIO
    return f'it does not answer ({error.strerror})' if silent else str(error.strerror)


def live_reader(name: str) -> VideoReader:
    """A reader of an address as `StreamCapture` needs it."""
    return VideoReader(name, pixels='bgr24', threads=False)
