"""The web page, run by the tool and looked at with a real headless Chromium; and the server's refusals."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from fake_clock import SAFETY_S, FakeClock, wait_until
from tool_runner import finish, start_tool
from torch import nn

from detection.demo.predictor import ModelFacts, Predictor
from detection.demo.studio import ModelChoice, Studio
from detection.demo.video import DrawnSource, Frame, FrameSource
from detection.visual.latency import RateMeter

pytest.importorskip('starlette', reason='the web page needs the extra `web`')
pytest.importorskip('uvicorn', reason='the web page needs the extra `web`')
websockets = pytest.importorskip('websockets', reason='the web page needs the extra `web`')
from websockets.sync.client import connect  # noqa: E402

from detection.demo.server import is_loopback  # noqa: E402


class Fixed(nn.Module):
    """One detection of a fixed score; ``before`` is called with the number of the call."""

    def __init__(self, before: Callable[[int], object] = lambda call: None) -> None:
        super().__init__()
        self.before, self.calls = before, 0

    def forward(self, images):
        self.before(self.calls)
        self.calls += 1
        return [{'boxes': torch.tensor([[4.0, 4, 40, 30]]), 'labels': torch.ones(1, dtype=torch.long),
                 'scores': torch.tensor([0.7])}]  # fmt: skip


def choice(name: str = 'fixed', task: str = 'box', model: nn.Module | None = None) -> ModelChoice:
    return ModelChoice(task, name, lambda: Predictor(model or Fixed(), ModelFacts(name, task, ['', 'thing'])))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start(*arguments: str) -> tuple[subprocess.Popen, str]:
    """Start the tool and wait for the address that it prints."""
    process = start_tool('demo_video.py', '--random-weights', '--backbone', 'resnet18', '--imgsz', 64,
                         '--device', 'cpu', '--serve', free_port(), *arguments)  # fmt: skip
    line = process.stdout.readline().strip()
    if not line.startswith('http://'):
        raise AssertionError(f'no address: {line!r} {finish(process).err}')
    return process, line


def stop(process: subprocess.Popen) -> str:
    process.send_signal(signal.SIGINT)
    return finish(process).err


@pytest.fixture(scope='module')
def server() -> Iterator[str]:
    process, address = start('--score', '0.1')
    yield address
    errors = stop(process)
    assert 'Traceback' not in errors, errors


@pytest.fixture(scope='module')
def browser() -> Iterator[object]:
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright drives the browser')
    path = shutil.which('chromium') or shutil.which('google-chrome') or shutil.which('chromium-browser')
    if path is None:
        pytest.skip('no Chromium here: the browser test needs one')
    flags = ['--no-sandbox', '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream']
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=path, args=flags)
        yield instance
        instance.close()


def open_page(browser, address: str):
    page = browser.new_page(bypass_csp=True)  # playwright's waiting evaluates text in the page
    page.set_default_timeout(30_000)
    page.problems = []
    page.on('console', lambda m: page.problems.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: page.problems.append(str(e)))
    page.goto(address)
    page.wait_for_function("Number(document.getElementById('fps').textContent) > 0")
    return page


def picture(page) -> str:
    return page.evaluate("document.getElementById('picture').toDataURL()")


def wait_for_change(page) -> None:
    page.evaluate("window.before = document.getElementById('picture').toDataURL()")
    page.wait_for_function("document.getElementById('picture').toDataURL() !== window.before")


def test_page_shows_moving_pictures_figures_and_switches_models(server, browser, tmp_path):
    page = open_page(browser, server)
    wait_for_change(page)
    page.wait_for_function("Number(document.getElementById('p95').textContent) > 0")
    assert page.locator('#task option').all_inner_texts() == ['box', 'mask', 'keypoint']
    assert page.locator('#model option').all_inner_texts() == ['resnet18', 'resnet50']
    facts = page.locator('#facts')
    assert 'box: resnet18' in facts.inner_text() and 'RANDOM WEIGHTS' in facts.inner_text()

    page.select_option('#model', label='resnet50')
    page.wait_for_function("document.getElementById('facts').textContent.includes('box: resnet50')")
    wait_for_change(page)
    page.select_option('#task', 'mask')
    page.wait_for_function("document.getElementById('facts').textContent.includes('mask: resnet18')")
    wait_for_change(page)
    page.locator('#score').fill('0.9')
    page.wait_for_function("document.getElementById('detections').textContent === '0'")
    assert page.locator('#shown').inner_text() == '0.90'
    drawn = page.evaluate(
        "['fpsChart', 'latencyChart'].map(i => { const c = document.getElementById(i);"
        ' return c.getContext("2d").getImageData(0, 0, c.width, c.height).data.some(v => v) })'
    )
    assert drawn == [True, True]
    page.screenshot(path=str(tmp_path / 'page.png'))
    page.select_option('#task', 'box')
    page.wait_for_function("document.getElementById('facts').textContent.includes('box: resnet18')")
    assert page.problems == []
    page.close()


def test_two_viewers_at_once(server, browser):
    pages = [open_page(browser, server) for _ in range(2)]
    for page in pages:
        wait_for_change(page)
    pages[0].close()
    wait_for_change(pages[1])
    assert pages[1].problems == []
    pages[1].close()


def test_the_browsers_own_camera_goes_through_the_model(server, browser):
    page = open_page(browser, server)
    page.click('#camera')
    page.wait_for_function("document.getElementById('facts').textContent.includes(\"this browser's camera\")")
    wait_for_change(page)
    assert page.evaluate("document.getElementById('picture').width") == 640
    # Chromium's fake camera is mostly green
    middle = "Array.from(document.getElementById('picture').getContext('2d').getImageData(600, 240, 1, 1).data)"
    red, green, blue, _ = page.evaluate(middle)
    assert green > red + 40 and green > blue + 40
    page.click('#camera')
    page.wait_for_function("document.getElementById('facts').textContent.includes('drawn clip')")
    wait_for_change(page)
    assert page.problems == []
    page.close()


def test_other_machines_need_the_token(browser):
    process, address = start('--host', '0.0.0.0')
    try:
        token = re.fullmatch(r'http://0\.0\.0\.0:(\d+)/\?token=([\w-]{20,})', address)
        assert token
        base = f'http://127.0.0.1:{token[1]}/'
        for wrong in (base, f'{base}?token=wrong', f'{base}?token=%C3%A9'):
            with pytest.raises(urllib.error.HTTPError, match='403'):
                urllib.request.urlopen(wrong)
        with pytest.raises(websockets.ConnectionClosed) as refused:
            first_message(base.replace('http', 'ws') + 'watch')
        assert refused.value.rcvd.code == 4403
        page = open_page(browser, f'{base}?token={token[2]}')
        wait_for_change(page)
        assert page.problems == []
        page.close()
    finally:
        errors = stop(process)
    assert 'Traceback' not in errors, errors


def first_message(address: str, **options) -> str:
    with connect(address, **options) as connection:
        return connection.recv(timeout=20)


def test_foreign_pages_and_names_are_refused(server):
    request = urllib.request.Request(server, headers={'Host': 'evil.example'})
    with pytest.raises(urllib.error.HTTPError, match='403'):
        urllib.request.urlopen(request)
    watch = server.replace('http', 'ws') + 'watch'
    with pytest.raises(websockets.ConnectionClosed) as refused:
        first_message(watch, origin='http://evil.example')
    assert refused.value.rcvd.code == 4403
    assert 'choices' in json.loads(first_message(watch))


def test_wrong_settings_and_pictures_get_an_answer_and_break_nothing(server):
    def talk(path: str, *messages) -> list[str]:
        errors = []
        with connect(server.replace('http', 'ws') + path) as connection:
            for message in messages:
                connection.send(message)
                while True:
                    answer = connection.recv(timeout=20)
                    if isinstance(answer, str) and 'error' in json.loads(answer):
                        errors.append(json.loads(answer)['error'])
                        break
        return errors

    errors = talk('watch', '{"model": "yolo"}', '{"score": 2}', '{"speed": 1}', '[]', 'no json')
    assert 'expected one of box: resnet18' in errors[0]
    assert errors[1:4] == [
        'score 2, expected a number from 0 to 1',
        "setting 'speed', expected model or score",
        '[], expected an object',
    ]
    assert 'no picture' in talk('camera', b'no picture')[0]


def test_a_taken_port_is_named(tool):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = tool('demo_video.py', '--random-weights', '--backbone', 'resnet18', '--serve', port)
    assert code == 2 and 'cannot serve at 127.0.0.1 port' in err


@pytest.mark.parametrize(
    ('host', 'expected'),
    [
        ('127.0.0.1', True),
        ('127.8.8.8', True),
        ('::1', True),
        ('localhost', True),
        ('0.0.0.0', False),
        ('', False),
        ('192.168.1.2', False),
        ('localhost.evil.example', False),
    ],
)
def test_loopback_addresses(host, expected):
    assert is_loopback(host) is expected


# the studio without a server


class Bench(threading.Condition):
    """A condition that tells when the studio's thread rests on it."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        if threading.current_thread().name == 'studio':
            self.taken.set()
        return super().wait(timeout)


def test_studio_rests_without_viewers_and_repeats_a_clip():
    model = Fixed()
    studio = Studio(lambda: DrawnSource(3, (64, 48)), [choice(model=model)])
    studio._changed = bench = Bench()
    studio.start()
    assert bench.taken.wait(SAFETY_S)
    assert studio.wait(0, timeout=0) is None and model.calls == 0
    studio.watch(+1)
    number = 0
    while number < 8:  # more than the clip has
        snapshot = studio.wait(number, SAFETY_S)
        number = snapshot.number
    image = cv2.imdecode(np.frombuffer(snapshot.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (48, 64, 3) and snapshot.stats['detections'] == 1
    studio.close()


def test_studio_plays_a_file_at_its_own_rate(monkeypatch):
    clock, began = FakeClock().install(monkeypatch, 'detection.demo.studio'), []

    def network(call: int) -> None:
        began.append(clock.now)
        clock.sleep(0.1 if call == 20 else 0.01)  # quicker than the clip but once

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            clock.sleep(timeout or 0)
            return self.is_set()

    studio = Studio(lambda: DrawnSource(50, (64, 48)), [choice(model=Fixed(network))])  # 25 FPS
    studio._stop = Stop()
    studio.watch(+1)
    studio.start()
    wait_until(lambda: len(began) >= 50)
    studio.close()
    # behind a slow network the clock starts anew: no frame hurries after it
    assert np.diff(began[:50]) == pytest.approx([0.04] * 20 + [0.1] + [0.04] * 28)


def test_studio_applies_the_threshold_and_shows_rgb():
    studio = Studio(lambda: DrawnSource(1, (64, 48)), [choice(), choice(task='mask')], score=0.5)
    picture = np.zeros((48, 200, 3), np.uint8)
    picture[:, 100:] = (250, 10, 10)
    meter = RateMeter()
    assert studio.process(picture, meter).stats['detections'] == 1
    studio.choose({'score': 0.8, 'model': 'mask: fixed'})
    snapshot = studio.process(picture, meter)
    assert snapshot.stats['detections'] == 0 and snapshot.stats['model'] == 'mask: fixed'
    b, g, r = cv2.imdecode(np.frombuffer(snapshot.jpeg, np.uint8), cv2.IMREAD_COLOR)[40, 180]
    assert r > 220 and g < 40 and b < 40
    studio.close()


def test_studio_tells_viewers_why_the_picture_stopped():
    class Dying(FrameSource):
        name, fps = 'camera', Fraction(100)

        def __iter__(self):
            yield Frame(np.zeros((8, 8, 3), np.uint8), 0, 0.0)
            raise ConnectionError('camera was lost')

    studio = Studio(Dying, [choice()])
    studio.watch(+1)
    studio.start()
    with pytest.raises(RuntimeError, match='the picture stopped: camera was lost'):
        for number in range(3):
            studio.wait(number, SAFETY_S)
    studio.close()


def test_studio_refuses_nothing_and_doubles():
    with pytest.raises(ValueError, match='no models'):
        Studio(DrawnSource, [])
    with pytest.raises(ValueError, match='expected different names'):
        Studio(DrawnSource, [choice(), choice()])
