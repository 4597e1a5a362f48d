"""times.py and decoder.py: when frames are shown, from containers that count in other ways, and into the .mp4."""

from __future__ import annotations

import itertools
import json
import os
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from detection.demo.times import FrameTimes, exact_rate, longest_gap, timescale
from detection.demo.video import FileSource, open_source
from detection.demo.video_writer import VideoWriteError, VideoWriter

NTSC = Fraction(30000, 1001)
MS = Fraction(1, 1000)


def grey(index: int) -> np.ndarray:
    return np.full((48, 64, 3), 20 + 5 * index, np.uint8)


def write(path: Path, encoder: str, times, base: Fraction, rate=Fraction(30), options=None, rotation=0) -> Path:
    """A video whose frames have the times given, in seconds, as PyAV writes them."""
    with av.open(str(path), 'w', options=options or {}) as container:
        stream = container.add_stream(encoder, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        stream.codec_context.time_base = base
        if rotation:
            stream.set_display_rotation(rotation)
        for index, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(grey(index), format='rgb24')
            frame.pts, frame.time_base = round(at / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def times_in(path: Path) -> list[float]:
    """Seconds after the first frame, from another reader than ours."""
    with av.open(str(path)) as container:
        found = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    return [t - found[0] for t in found]


# rates and timestamps


@pytest.mark.parametrize('rate', [NTSC, Fraction(24), Fraction(60000, 1001), Fraction(25, 2), Fraction(1, 20)])
def test_a_constant_rate_that_was_rounded_to_milliseconds_is_exact_again(rate):
    times = FrameTimes(rate, MS)
    assert [times(Fraction(round(1000 * k / rate), 1000)) for k in range(500)] == [k / rate for k in range(500)]


@pytest.mark.parametrize(
    ('stamps', 'expected'),
    [
        ([5, 5.5, 7, 7.25], [0, 0.5, 2, 2.25]),
        ([-0.5, 0, 100], [0, 0.5, 100.5]),
        ([None, None, None], [0, 0.1, 0.2]),
        ([None, 3, 3.1], [0, 0.1, 0.2]),
        ([0, None, 0.2], [0, 0.1, 0.2]),
        ([0, float('nan'), 0.2], [0, 0.1, 0.2]),
        ([0, float('inf'), 0.2], [0, 0.1, 0.2]),
        ([0, 0, 0.1, 0.1, 0.2], [0, 0.001, 0.1, 0.101, 0.2]),
        ([0, 0.2, 0.1, 0.3], [0, 0.2, 0.201, 0.3]),
        ([0, 10, 20, 0, 0.5, 30], [0, 10, 20, 20.1, 20.6, 30]),  # a clock that is set back, and again to what it was
        ([0, 0.1, 1e9, 1e9 + 0.5, 0.9], [0, 0.1, 0.2, 0.7, 0.9]),
    ],
)
def test_times_start_at_0_and_increase(stamps, expected):
    times = FrameTimes(Fraction(10))
    found = [times(None if stamp is None else stamp) for stamp in stamps]
    assert [float(t) for t in found] == pytest.approx(expected, abs=1e-6)
    assert all(a < b for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ('header', 'expected'),
    [(0.05, Fraction(1, 20)), (1 / 3600, Fraction(1, 3600)), (0.4, Fraction(2, 5)), (1e-9, Fraction(30))],
)
def test_slow_rates(header, expected):
    assert exact_rate(header) == expected


def test_a_frame_starts_at_a_whole_tick_and_fits_into_an_mp4():
    for rate in (NTSC, Fraction(25), Fraction(1, 20), Fraction(1, 86400), Fraction(120000, 1001)):
        ticks = timescale(rate)
        assert (ticks / rate).denominator == 1 and longest_gap(ticks) >= 1 / rate
    assert longest_gap(timescale(NTSC)) > 9 * 3600


# reading


@pytest.mark.parametrize(
    ('name', 'encoder', 'base', 'options'),
    [
        ('a.webm', 'libvpx', MS, {}),
        ('live.webm', 'libvpx', MS, {'live': '1'}),  # as a browser's MediaRecorder writes it: no length, no rate
        ('a.mkv', 'libx264', MS, {}),
        ('a.mp4', 'libx264', Fraction(1, 90000), {}),
    ],
)
def test_variable_frame_rates_are_read(tmp_path, name, encoder, base, options):
    if encoder not in av.codecs_available:
        pytest.skip(f'no {encoder}')
    gaps = np.random.default_rng(1).choice([33, 34, 50, 67, 900, 3000], 24)
    stamps = [Fraction(int(t), 1000) for t in np.cumsum(gaps)]
    path = write(tmp_path / name, encoder, stamps, base, Fraction(1000) if 'webm' in name else NTSC, options)
    with FileSource(path) as source:
        frames = list(source)
    assert [float(f.at) for f in frames] == pytest.approx([float(t - stamps[0]) for t in stamps], abs=0.0011)
    assert [round((float(f.image.mean()) - 20) / 5) for f in frames] == list(range(24))
    assert source.fps < 1000


@pytest.mark.parametrize('rate', [Fraction(1, 20), Fraction(1, 3), NTSC])
@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_constant_rates_are_read_exactly(tmp_path, rate, suffix):
    base = 1 / rate if suffix == '.mp4' else MS
    path = write(tmp_path / f'a{suffix}', 'mpeg4', [k / rate for k in range(6)], base, rate)
    with FileSource(path) as source:
        assert source.fps == rate and source.count == 6
        assert [f.at for f in source] == [k / rate for k in range(6)]


def test_av1_is_decoded(tmp_path):
    encoder = next((e for e in ('libsvtav1', 'libaom-av1') if e in av.codecs_available), None)
    if encoder is None:
        pytest.skip('no AV1 encoder')
    path = write(tmp_path / 'a.mp4', encoder, [k / Fraction(25) for k in range(5)], Fraction(1, 25), Fraction(25))
    with open_source(str(path)) as source:
        assert [round((float(f.image.mean()) - 20) / 5) for f in source] == list(range(5))
        assert source.fps == 25


def test_a_codec_that_nobody_decodes_is_named(tmp_path):
    path = write(tmp_path / 'a.avi', 'mpeg4', [0, 0.04], Fraction(1, 25), Fraction(25))
    path.write_bytes(path.read_bytes().replace(b'FMP4', b'ZZZZ'))
    with pytest.raises(ValueError, match=r'a\.avi is not a video that can be decoded: no decoder for it'):
        FileSource(path)


@pytest.mark.parametrize('angle', [90, 180, 270])
def test_a_video_of_a_turned_phone_is_upright(tmp_path, angle):
    path = write(tmp_path / 'a.mp4', 'libx264', [0], Fraction(1, 25), Fraction(25), rotation=angle)
    with FileSource(path) as source:
        ours = next(iter(source)).image
    theirs = cv2.VideoCapture(str(path)).read()[1]
    assert ours.shape == theirs.shape == ((48, 64, 3) if angle == 180 else (64, 48, 3))


# writing


@pytest.mark.parametrize('codec', ['h264', 'mp4v', 'vp9'])
def test_times_are_written(tmp_path, codec):
    stamps = [0, 0.04, 0.05, 2, 2.0001, 1000, 1000.04, 20000]
    with VideoWriter(tmp_path / 'a.mp4', Fraction(25), (64, 48), codec) as writer:
        for index, at in enumerate(stamps):
            writer.write(grey(index), at)
    assert times_in(tmp_path / 'a.mp4') == pytest.approx(stamps, abs=1e-5)


@pytest.mark.parametrize('codec', ['h264', 'mp4v', 'vp9'])
@pytest.mark.parametrize('rate', [Fraction(1, 20), Fraction(1, 86400), Fraction(240)])
def test_slow_and_quick_rates_are_written_exactly(tmp_path, codec, rate):
    with VideoWriter(tmp_path / 'a.mp4', rate, (64, 48), codec) as writer:
        for index in range(5):
            writer.write(grey(index))
    with av.open(str(tmp_path / 'a.mp4')) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == rate
        assert stream.duration * stream.time_base == 5 / rate
    with FileSource(tmp_path / 'a.mp4') as source:
        assert source.fps == rate and [f.at for f in source] == [k / rate for k in range(5)]


@pytest.mark.parametrize('at', [0.5, -1, float('nan'), float('inf'), 1e6])
def test_times_that_no_video_has_are_refused(tmp_path, at):
    with VideoWriter(tmp_path / 'a.mp4', Fraction(25), (64, 48)) as writer:
        writer.write(grey(0))
        writer.write(grey(1), 1)
        with pytest.raises(ValueError, match='a frame'):
            writer.write(grey(2), at)
        writer.write(grey(2), 1)  # within one tick
    assert times_in(tmp_path / 'a.mp4') == pytest.approx([0, 1, 1], abs=1e-4)


@pytest.mark.parametrize('lasts', [Fraction(1, 2), 3, None])
def test_the_last_frame_lasts_as_long_as_told(tmp_path, lasts):
    with VideoWriter(tmp_path / 'a.mp4', Fraction(25), (64, 48)) as writer:
        for index in range(3):
            writer.write(grey(index), index, lasts)
    with av.open(str(tmp_path / 'a.mp4')) as container:
        assert container.duration / 1e6 == pytest.approx(2 + float(lasts or 1 / 25), abs=1e-4)
    with FileSource(tmp_path / 'a.mp4') as source:
        assert float(list(source)[-1].lasts or 1 / 25) == pytest.approx(float(lasts or 1 / 25), abs=1e-4)


@pytest.mark.parametrize(('suffix', 'rate'), [('mkv', NTSC), ('webm', Fraction(24000, 1001)), ('avi', Fraction(30))])
def test_a_constant_rate_goes_through_the_tool_exactly(tool, tmp_path, suffix, rate):
    path = write(
        tmp_path / f'in.{suffix}',
        'mpeg4' if suffix == 'avi' else 'libvpx',
        [k / rate for k in range(7)],
        1 / rate,
        rate,
    )
    options = ['--random-weights', '--backbone', 'resnet18', '--imgsz', 64, '--device', 'cpu', '--warmup', 0]
    code, _, err = tool('demo_video.py', *options, '--input', path, '--output', tmp_path / 'out.mp4')
    assert code == 0, err
    with av.open(str(tmp_path / 'out.mp4')) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == stream.guessed_rate == rate and stream.duration * stream.time_base == 7 / rate


def test_a_variable_rate_goes_through_the_tool(tool, tmp_path):
    stamps = [Fraction(t, 1000) for t in (0, 40, 700, 740, 3000, 3033, 9000)]
    path = write(tmp_path / 'in.webm', 'libvpx', stamps, MS, Fraction(1000), {'live': '1'})
    options = ['--random-weights', '--backbone', 'resnet18', '--imgsz', 64, '--device', 'cpu', '--warmup', 0]
    code, _, err = tool('demo_video.py', *options, '--input', path, '--output', tmp_path / 'out.mp4')
    assert code == 0, err
    assert times_in(tmp_path / 'out.mp4') == pytest.approx([float(t) for t in stamps], abs=0.002)
    assert json.loads((tmp_path / 'out.json').read_text())['frames'] == 7


# what is kept


def test_a_file_that_does_not_play_is_kept_and_named(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise ValueError('the result does not play (holds 2 of 3 frames)')

    for kept in ('a.mp4.partial', 'a.mp4.1.partial'):
        with monkeypatch.context() as patch:
            patch.setattr('detection.demo.video_writer.check_playable', fails)
            told = rf'after 3 frames: the result does not play .*; what was written is kept as .*{kept}$'
            with pytest.raises(VideoWriteError, match=told), VideoWriter(tmp_path / 'a.mp4', NTSC, (64, 48)) as writer:
                for index in range(3):
                    writer.write(grey(index))
        assert len(times_in(tmp_path / kept)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.mp4.1.partial', 'a.mp4.partial']


def test_a_file_of_others_that_appears_meanwhile_stays(tmp_path):
    path = tmp_path / 'a.mp4'
    with (
        pytest.raises(VideoWriteError, match=r'exists.*is kept as'),
        VideoWriter(path, NTSC, (64, 48), overwrite=False) as writer,
    ):
        writer.write(grey(0))
        path.write_bytes(b'mine')
    assert path.read_bytes() == b'mine' and len(times_in(tmp_path / 'a.mp4.partial')) == 1
    with pytest.raises(FileExistsError, match='exists: choose another name, or give --overwrite'):
        VideoWriter(path, NTSC, (64, 48), overwrite=False)
    assert not [name for name in os.listdir(tmp_path) if name.startswith('.')]
