"""video.py and video_writer.py: frames in, frames out, and everything that breaks on the way."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import threading
import tracemalloc
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from fake_camera import FakeCamera
from fake_clock import FakeClock
from tool_runner import run_python

from detection.demo import video_writer
from detection.demo.times import exact_rate
from detection.demo.video import DrawnSource, FileSource, ImageSource, LiveSource, fit_image, open_source
from detection.demo.video_writer import VideoWriteError, VideoWriter

NTSC = Fraction(30000, 1001)
COLORS = {'red': (220, 30, 30), 'green': (30, 200, 40), 'blue': (40, 50, 220), 'skin': (230, 180, 150)}


def has_codec(codec: str, tmp_path: Path) -> bool:
    try:
        with VideoWriter(tmp_path / 'probe.mp4', Fraction(10), (64, 64), codec):
            return True
    except ValueError:
        return False


def numbered(index: int, size=(64, 48)) -> np.ndarray:
    """A frame whose grey level tells its number."""
    return np.full((size[1], size[0], 3), 20 + 8 * index, np.uint8)


def write_clip(path: Path, count: int = 12, fps: Fraction = Fraction(25), codec: str = 'auto') -> Path:
    with VideoWriter(path, fps, (64, 48), codec) as writer:
        for index in range(count):
            writer.write(numbered(index))
    return path


@pytest.mark.parametrize('codec', ['h264', 'mp4v', 'vp9'])
@pytest.mark.parametrize('fps', [NTSC, Fraction(25), Fraction(24000, 1001), Fraction(15, 2)])
def test_frames_order_count_and_exact_rate_survive(tmp_path, codec, fps):
    if not has_codec(codec, tmp_path):
        pytest.skip(f'no {codec} encoder here')
    path = write_clip(tmp_path / 'clip.mp4', fps=fps, codec=codec)
    with open_source(str(path)) as source:
        assert source.fps == fps
        assert source.count == 12
        frames = list(source)
    assert [f.index for f in frames] == list(range(12))
    assert [round((float(f.image.mean()) - 20) / 8) for f in frames] == list(range(12))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['clip.mp4']


@pytest.mark.parametrize('codec', ['h264', 'mp4v', 'vp9'])
def test_known_colours_come_back_as_rgb(tmp_path, codec):
    if not has_codec(codec, tmp_path):
        pytest.skip(f'no {codec} encoder here')
    image = np.repeat(np.repeat(np.array([list(COLORS.values())], np.uint8), 96, 0), 48, 1)
    path = tmp_path / 'colours.mp4'
    with VideoWriter(path, NTSC, (192, 96), codec) as writer:
        for _ in range(3):
            writer.write(image)
    with FileSource(path) as source:
        seen = next(iter(source)).image
    for k, colour in enumerate(COLORS.values()):
        assert np.abs(seen[48, 48 * k + 24].astype(int) - colour).max() <= 16, list(COLORS)[k]


def test_pictures_are_read_as_rgb(tmp_path):
    for name, colour in COLORS.items():
        cv2.imwrite(str(tmp_path / f'{name}.png'), np.full((10, 20, 3), colour[::-1], np.uint8))
    frames = list(open_source(str(tmp_path)))
    assert [tuple(f.image[0, 0]) for f in frames] == [COLORS[n] for n in sorted(COLORS)]
    assert len(list(open_source(str(tmp_path / 'red.png')))) == 1


def test_pictures_keep_their_own_sizes(tmp_path):
    sizes = {'a': (20, 40), 'b': (40, 30), 'c': (7, 9)}
    for name, size in sizes.items():
        cv2.imwrite(str(tmp_path / f'{name}.png'), np.full((*size, 3), 100, np.uint8))
    assert [f.image.shape[:2] for f in open_source(str(tmp_path))] == list(sizes.values())


def test_a_picture_is_fitted_on_black():
    fitted = fit_image(np.full((40, 40, 3), 100, np.uint8), (40, 20))
    assert fitted.shape == (20, 40, 3)
    assert (fitted[:, 10:30] == 100).all() and (fitted[:, :10] == 0).all() and (fitted[:, 30:] == 0).all()
    assert fit_image(fitted, (40, 20)) is fitted


@pytest.mark.parametrize('name', ['2024', '0', '3.png'])
def test_a_folder_or_file_called_like_a_number_is_what_is_meant(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    picture = Path(name)
    if not picture.suffix:
        picture.mkdir()
        picture = picture / 'a.png'
    cv2.imwrite(str(picture), np.full((20, 40, 3), 100, np.uint8))
    with open_source(name) as source:
        assert not source.live and source.name == name
        assert len(list(source)) == 1


def test_odd_sizes_are_padded_and_no_sound_track_is_written(tmp_path):
    av = pytest.importorskip('av', reason='PyAV reads the list of streams')
    with VideoWriter(tmp_path / 'odd.mp4', NTSC, (63, 47)) as writer:
        for _ in range(5):
            writer.write(np.full((47, 63, 3), 99, np.uint8))
    with av.open(str(tmp_path / 'odd.mp4')) as container:
        assert [s.type for s in container.streams] == ['video']
        assert (container.streams.video[0].width, container.streams.video[0].height) == (64, 48)
        assert container.streams.video[0].average_rate in (NTSC, Fraction(2997, 100))


@pytest.mark.parametrize(
    ('header', 'expected'),
    [
        (29.97, NTSC),
        (29.97002997, NTSC),
        (30, Fraction(30)),
        (23.976, Fraction(24000, 1001)),
        (59.94, NTSC * 2),
        (12.5, Fraction(25, 2)),
        (0, Fraction(30)),
        (float('nan'), Fraction(30)),
        (90000, Fraction(30)),
    ],
)
def test_rates_of_file_headers(header, expected):
    assert exact_rate(header) == expected


def test_drawn_clip_is_there_without_any_file():
    frames = list(DrawnSource(4, (96, 64)))
    assert [f.image.shape for f in frames] == [(64, 96, 3)] * 4
    assert (frames[0].image != frames[3].image).any()
    assert isinstance(open_source(None), DrawnSource)


# what cannot be opened


def test_bad_inputs_are_named(tmp_path):
    (tmp_path / 'noise.mp4').write_bytes(b'this is not a video' * 100)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match=r'noise\.mp4 is not a video'):
        open_source(str(tmp_path / 'noise.mp4'))
    with pytest.raises(FileNotFoundError, match=r'no input .*missing\.mp4'):
        open_source(str(tmp_path / 'missing.mp4'))
    with pytest.raises(ValueError, match='has no pictures'):
        open_source(str(tmp_path / 'empty'))
    with pytest.raises(ValueError, match=r'cannot read image .*bad\.png'):
        list(open_source(str(tmp_path / 'bad.png')))
    with pytest.raises(ValueError, match='cannot open webcam 97'):
        open_source('97')
    with pytest.raises(ValueError, match='cannot open webcam 9999999999999, expected an index up to'):
        open_source('9999999999999')


def test_a_truncated_file_gives_its_frames_and_a_warning(tmp_path, caplog):
    if not has_codec('h264', tmp_path):
        pytest.skip('needs the index at the front of the file')
    import av

    rng = np.random.default_rng(0)
    source = tmp_path / 'whole.mp4'
    with VideoWriter(source, NTSC, (160, 120), 'h264') as writer:
        for _ in range(60):
            writer.write(rng.integers(0, 255, (120, 160, 3), dtype=np.uint8))
    path = tmp_path / 'front.mp4'
    with av.open(str(source)) as a, av.open(str(path), 'w', options={'movflags': 'faststart'}) as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                b.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 7 // 10])
    with FileSource(path) as damaged:
        assert 10 < len(list(damaged)) < 50
    assert 'is damaged' in caplog.text


def test_capture_is_released_when_the_loop_stops_early(tmp_path):
    path = write_clip(tmp_path / 'clip.mp4')

    def opened() -> bool:
        return str(path) in (os.path.realpath(link) for link in Path('/proc/self/fd').glob('*'))

    if not Path('/proc/self/fd').exists():
        pytest.skip('tells no open files')
    source = FileSource(path)
    assert opened()
    with source:
        for _ in source:
            break
    assert not opened()


# what cannot be written


@pytest.mark.parametrize(
    ('name', 'codec', 'message'),
    [
        ('clip.avi', 'auto', r"ends in '\.avi', expected \.mp4"),
        ('clip.mp4', 'divx', "codec 'divx', expected one of auto, h264, mp4v, vp9"),
        ('none/clip.mp4', 'auto', 'folder .*none does not exist'),
    ],
)
def test_bad_outputs_are_named(tmp_path, name, codec, message):
    with pytest.raises(ValueError, match=message):
        VideoWriter(tmp_path / name, NTSC, (64, 48), codec)


def test_a_missing_encoder_falls_back_and_a_demanded_one_is_an_error(tmp_path, monkeypatch, caplog):
    encoders = [('h264', 'none_such'), *video_writer._ENCODERS[-2:]]
    monkeypatch.setattr(video_writer, '_ENCODERS', encoders)
    with pytest.raises(ValueError, match=r'no encoder for .*h264: this PyAV has no none_such'):
        VideoWriter(tmp_path / 'clip.mp4', NTSC, (64, 48), 'h264')
    with caplog.at_level('INFO'), VideoWriter(tmp_path / 'clip.mp4', NTSC, (64, 48)) as writer:
        writer.write(numbered(1))
    assert writer.codec == 'mp4v (mpeg4)' and 'this PyAV has no none_such' in caplog.text
    assert len(list(FileSource(tmp_path / 'clip.mp4'))) == 1


def test_an_encoder_that_does_not_open_falls_back(tmp_path, monkeypatch):
    # the GIF encoder takes no yuv420p
    monkeypatch.setattr(video_writer, '_ENCODERS', [('h264', 'gif'), *video_writer._ENCODERS])
    with VideoWriter(tmp_path / 'clip.mp4', NTSC, (64, 48)) as writer:
        writer.write(numbered(1))
    assert writer.codec != 'h264 (gif)'
    assert [p.name for p in tmp_path.iterdir()] == ['clip.mp4']


def test_an_interrupted_run_leaves_a_valid_partial_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / 'clip.mp4', NTSC, (64, 48)) as writer:
        for index in range(7):
            writer.write(numbered(index))
        raise KeyboardInterrupt
    assert len(list(FileSource(tmp_path / 'clip.mp4'))) == 7


def test_without_frames_there_is_no_file_and_an_old_one_stays(tmp_path):
    (tmp_path / 'clip.mp4').write_bytes(b'old')
    with VideoWriter(tmp_path / 'clip.mp4', NTSC, (64, 48)):
        pass
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b'old']


FULL_DISK = """
import resource, sys
from fractions import Fraction
import numpy as np
from detection.demo.video_writer import VideoWriter, VideoWriteError
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
rng = np.random.default_rng(0)
try:
    with VideoWriter(sys.argv[1], Fraction(25), (320, 240), sys.argv[2]) as writer:
        for _ in range(120):
            writer.write(rng.integers(0, 255, (240, 320, 3), dtype=np.uint8))
except VideoWriteError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize('codec', ['h264', 'mp4v'])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, codec):
    """The limit on file size makes the operating system refuse the write, as a full disk does."""
    if not has_codec(codec, tmp_path):
        pytest.skip(f'no {codec} encoder here')
    code, out, err = run_python('-c', FULL_DISK, tmp_path / 'clip.mp4', codec)
    assert code == 3, err
    assert out.startswith('cannot write') and 'nothing was kept' in out
    assert list(tmp_path.iterdir()) == []


def test_low_free_space_stops_before_the_index_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(video_writer.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 1000}))
    with pytest.raises(VideoWriteError, match='No space left'), VideoWriter(tmp_path / 'a.mp4', NTSC, (64, 48)) as w:
        w.write(numbered(0))
    assert list(tmp_path.iterdir()) == []


def test_frames_of_another_size_are_refused(tmp_path):
    with VideoWriter(tmp_path / 'clip.mp4', NTSC, (64, 48)) as writer, pytest.raises(ValueError, match='64 x 48'):
        writer.write(np.zeros((48, 65, 3), np.uint8))


# live sources


class Camera:
    """A camera that is quicker than any reader; breaks after ``frames`` pictures."""

    released = 0

    def __init__(self, frames: int | None = None, opens: bool = True):
        self.frames, self.opens, self.index = frames, opens, 0

    def isOpened(self) -> bool:
        return self.opens

    def read(self):
        if self.frames is not None and self.index >= self.frames:
            return False, None
        self.index += 1
        return True, np.full((240, 320, 3), self.index % 256, np.uint8)

    def get(self, _: int) -> float:
        return 100

    def release(self) -> None:
        Camera.released += 1


def test_a_slow_reader_gets_the_newest_frame_and_the_others_are_counted(monkeypatch):
    clock = FakeClock().install(monkeypatch, 'detection.demo.video')
    camera = FakeCamera(clock, fps=100)
    with LiveSource(lambda: camera, 'camera') as source:
        frames, ages = [], []
        camera.take()
        for frame in source:
            ages.append(clock.now - frame.time)
            frames.append(frame)
            if len(frames) == 10:
                camera.unplug()
                break
            camera.take(5)  # while the reader is busy
    assert source.fps == 100
    assert ages == [0] * 10, 'the newest picture'
    assert [f.index for f in frames] == list(range(0, 50, 5))
    assert [f.image[0, 0, 0] for f in frames] == list(range(1, 51, 5))
    assert source.dropped == 9 * 4


def test_memory_stays_flat_over_2000_frames():
    camera = FakeCamera(FakeClock(), size=(240, 320))
    with LiveSource(lambda: camera, 'camera') as source:
        tracemalloc.start()
        sizes = []
        camera.take()
        for frame in source:
            if frame.index // 400 > len(sizes):
                sizes.append(tracemalloc.get_traced_memory()[0])
            if frame.index >= 2000:
                camera.unplug()
                break
            camera.take(4)
        tracemalloc.stop()
    assert len(sizes) == 5
    assert max(sizes) - min(sizes) < 2**20, sizes  # a frame has 230 KB


def test_a_source_that_dies_twice_is_reconnected():
    cameras = iter([Camera(5), Camera(5), Camera(opens=False), Camera(5), *[Camera(opens=False)] * 9])
    source = LiveSource(lambda: next(cameras), 'phone', attempts=3, first_wait=0.01)
    seen = []
    with pytest.raises(ConnectionError, match='phone was lost and 3 attempts'), source:
        for frame in source:
            seen.append(frame.index)
    assert source.reconnects == 2
    assert seen[-1] == 14 and len(seen) + source.dropped == 15


def test_waits_grow_up_to_a_limit(caplog):
    cameras = iter([Camera(1), *[Camera(opens=False)] * 9])
    with (
        pytest.raises(ConnectionError),
        LiveSource(lambda: next(cameras), 'phone', attempts=4, first_wait=0.01, max_wait=0.03) as source,
    ):
        list(source)
    assert [r.args[3] for r in caplog.records] == [0.01, 0.02, 0.03, 0.03]


def test_closing_ends_the_thread_and_releases_the_camera():
    before, threads = Camera.released, threading.active_count()
    with LiveSource(lambda: Camera(), 'camera') as source:
        next(iter(source))
    assert Camera.released == before + 1
    assert threading.active_count() == threads


def test_image_source_refuses_an_empty_list():
    with pytest.raises(ValueError, match='no pictures'):
        ImageSource([], 'folder')


class Phone(http.server.BaseHTTPRequestHandler):
    """What camera apps of phones serve: JPEGs in one endless multipart answer; it breaks after 20 pictures."""

    visits = 0

    def do_GET(self):
        type(self).visits += 1
        self.send_response(200)
        self.send_header('Content-Type', 'multipart/x-mixed-replace; boundary=frame')
        self.end_headers()
        colour = (255, 40, 20)  # as RGB
        jpeg = cv2.imencode('.jpg', np.full((48, 64, 3), colour[::-1], np.uint8))[1].tobytes()
        head = f'--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n'
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                self.wfile.write(head.encode() + jpeg + b'\r\n')

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def serving(handler):
    """The address of a server on a thread."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()


def test_a_phones_http_stream_is_read_and_reconnected():
    with serving(Phone) as address, open_source(f'{address}/video') as source:
        assert source.live
        frames = []
        for frame in source:
            frames.append(frame)
            if source.reconnects == 2:
                break
    assert np.abs(frames[-1].image[20, 20].astype(int) - (255, 40, 20)).max() < 12
    assert Phone.visits >= 3
    assert [f.time for f in frames] == sorted(f.time for f in frames)
    since = frames[0].time - float(frames[0].at)
    assert [float(f.at) for f in frames] == pytest.approx([f.time - since for f in frames])


class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


class Unsized(Files):
    """Does not say how long a file is."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != 'Content-Length':
            super().send_header(keyword, value)


@pytest.fixture
def media(tmp_path) -> Path:
    """A video, also under a name with a space, and pictures."""
    write_clip(tmp_path / 'clip.mp4', 12)
    (tmp_path / 'a b.mp4').write_bytes((tmp_path / 'clip.mp4').read_bytes())
    cv2.imwrite(str(tmp_path / 'a.jpg'), np.full((48, 64, 3), (20, 40, 255), np.uint8))
    cv2.imwrite(str(tmp_path / 'a.png'), np.full((48, 64, 3), (20, 40, 255), np.uint8))
    return tmp_path


@pytest.mark.parametrize(('name', 'frames'), [('clip.mp4', 12), ('a%20b.mp4', 12), ('a.jpg', 1), ('a.png', 1)])
def test_addresses_with_a_length_end(media, name, frames):
    with serving(functools.partial(Files, directory=media)) as address:
        for url in (f'{address}/{name}', f'file://{media}/{name}', f'FILE://localhost{media}/{name}'):
            with open_source(url) as source:
                assert not source.live
                found = list(source)
                assert len(found) == frames
                if frames == 1:
                    assert np.abs(found[0].image[20, 20].astype(int) - (255, 40, 20)).max() < 12


def test_a_single_picture_ends_also_where_the_server_does_not_tell_its_length(media):
    with serving(functools.partial(Unsized, directory=media)) as address:
        for name in ('a.jpg', 'a.png'):
            with open_source(f'{address}/{name}') as source:
                assert not source.live and len(list(source)) == 1


def test_a_dead_address_is_named():
    with pytest.raises(ValueError, match=r'cannot open http://127\.0\.0\.1:9/video: it does not answer'):
        open_source('http://127.0.0.1:9/video')


def test_addresses_without_a_video_are_named(media):
    (media / 'a.txt').write_text('text' * 100)
    with serving(functools.partial(Files, directory=media)) as address:
        for name, told in (('none.mp4', '404'), ('a.txt', 'Invalid data')):
            with pytest.raises(ValueError, match=f'cannot open {address}/{name}: .*{told}'):
                open_source(f'{address}/{name}')
