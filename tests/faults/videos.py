"""Surfaces of videos: damaged files, playlists that name other files, and the times that containers give frames."""

from __future__ import annotations

import itertools
import tempfile
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .surface import NUMBERS, Surface, mutations


@lru_cache
def videos() -> tuple[bytes, ...]:
    """Short videos in several containers; one has a variable rate and no length, as browsers record it."""
    import av
    import cv2

    from detection.demo.video_writer import VideoWriter

    pixels = np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3), np.uint8)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, code in (('a.avi', 'MJPG'), ('b.mp4', 'mp4v')):
            writer = cv2.VideoWriter(f'{folder}/{name}', cv2.VideoWriter.fourcc(*code), 10.0, (48, 32))
            for frame in pixels:
                writer.write(frame)
            writer.release()
            found.append((Path(folder) / name).read_bytes())
        with VideoWriter(f'{folder}/c.mp4', Fraction(10), (48, 32)) as better:
            for frame in pixels:
                better.write(frame)
        found.append((Path(folder) / 'c.mp4').read_bytes())
        with av.open(f'{folder}/d.webm', 'w', options={'live': '1'}) as container:
            stream: Any = container.add_stream('libvpx', rate=Fraction(1000))
            stream.width, stream.height, stream.pix_fmt = 48, 32, 'yuv420p'
            for image, at in zip(pixels, (0, 40, 900, 7000)):
                one = av.VideoFrame.from_ndarray(image, format='rgb24')
                one.pts, one.time_base = at, Fraction(1, 1000)
                container.mux(stream.encode(one))
            container.mux(stream.encode(None))
        found.append((Path(folder) / 'd.webm').read_bytes())
    return tuple(found)


PLAYLISTS = (
    b'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n',
    b'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n',
    b'ffconcat version 1.0\nfile /etc/passwd\n',
    b'ffconcat version 1.0\nfile ' + b'a.mp4\n',
    b'RIFF\xff\xff\xff\xffAVI LIST' + b'\xff' * 64,
    b'\x00\x00\x00\x18ftypmp42' + b'\xff' * 64,
    b'FLV\x01\x05' + b'\xff' * 32,
    b'YUV4MPEG2 W99999 H99999 F25:1 Ip\nFRAME\n',
    b'\x1aE\xdf\xa3' + b'\xff' * 64,
)


def _video(data: bytes, folder: Path) -> None:
    from detection.demo.video import open_source

    path = folder / 'a.mp4'
    path.write_bytes(data)
    with open_source(str(path)) as source:
        before = Fraction(-1)
        for number, frame in enumerate(source):
            assert frame.image.ndim == 3
            assert frame.at is not None and frame.at > before
            before = frame.at
            if number > 20:
                break


# timestamps as clocks give them, and with what damaged files and broken recorders make of them
_GAPS = st.one_of(
    st.sampled_from([0, 0.001, 0.033, 0.04, 1 / 30, 1, 20, 3600, 86400]),
    st.sampled_from([-1e-9, -0.04, -0.9, -1.1, -20, -1e6, 1e-9, 1e6, 1e12, -1e300, 1e300]),
)
_CLOCKS = st.lists(_GAPS, max_size=12).map(lambda gaps: [sum(gaps[: k + 1]) for k in range(len(gaps))])
_STAMPS = st.one_of(_CLOCKS, st.lists(st.one_of(st.none(), NUMBERS, _GAPS), max_size=12))
_RATES = st.one_of(
    st.sampled_from([30, 29.97, 25, 1000, 240, 0.05, 1 / 3600, 1e-5, 0.99e-5, 1e-300, 0, -1, 90000, 1e300]),
    st.sampled_from([float('nan'), float('inf')]),
    st.floats(),
)
_TICKS = st.sampled_from(
    [Fraction(0), Fraction(1, 1000), Fraction(1, 90000), Fraction(1, 25), Fraction(1), Fraction(100)]
)


def _times(value: tuple[list[Any], float, Fraction, str], folder: Path) -> None:
    """Make the timestamps usable, write frames at these times, and read the same times back."""
    from detection.demo.times import FrameTimes, exact_rate
    from detection.demo.video import FileSource
    from detection.demo.video_writer import VideoWriter

    stamps, header, tick, codec = value
    rate = exact_rate(header)
    clock = FrameTimes(rate, tick)
    times = [clock(stamp) for stamp in stamps]
    assert times[:1] in ([], [0])
    assert all(a < b for a, b in itertools.pairwise(times)), 'times increase'
    path = folder / 'a.mp4'
    with VideoWriter(path, rate, (16, 16), codec) as writer:
        for at in times:
            writer.write(np.zeros((16, 16, 3), np.uint8), at)
    if not times:
        return
    with FileSource(path) as source:
        read = [frame.at for frame in source]
    # several in one tick of the file move on to the next ones
    assert len(read) == len(times) and all(
        abs(a - b) <= Fraction(len(times) + 1, 5000) for a, b in zip(read, times, strict=True)
    ), f'{times} became {read}'


SURFACES = [
    Surface(
        'videos',
        st.one_of(st.deferred(lambda: mutations(*videos(), most=4)), st.sampled_from(PLAYLISTS)),
        _video,
        1500,
        videos,
    ),
    Surface('frame times', st.tuples(_STAMPS, _RATES, _TICKS, st.sampled_from(['h264', 'mp4v'])), _times, 1500, videos),
]
