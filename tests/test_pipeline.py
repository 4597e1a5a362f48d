"""predictor.py and pipeline.py: results against the model's own forward, figures on a known clock, threads."""

from __future__ import annotations

import gc
import json
import math
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from fake_camera import FakeCamera
from fake_clock import SAFETY_S, FakeClock, ThreadClock, wait_until
from torch import nn

import norton_timm
from detection.demo.pipeline import Handover, Report, run_pipeline
from detection.demo.predictor import ModelFacts, Predictor
from detection.demo.video import Frame, FrameSource, LiveSource
from detection.rcnn.build import build_detector

NAMES = ['__background__', 'thing']
TIMED = [f'detection.{name}' for name in ('demo.pipeline', 'demo.predictor', 'visual.latency')]


class Still(FrameSource):
    """Frames that carry their number; ``before`` is called with it before each."""

    def __init__(self, count: int, before=lambda index: None, size=(48, 64)):
        self.name, self.fps, self.count = 'still', Fraction(30), count
        self.before, self.image_size, self.closed = before, size, False

    def __iter__(self):
        for index in range(self.count or 0):
            self.before(index)
            yield Frame(np.full((*self.image_size, 3), index % 200, np.uint8), index, 0.0)

    def close(self) -> None:
        self.closed = True


class Mean(nn.Module):
    """A detector of one box: its score is the picture's red mean, its x2 the green, its y2 the blue one (x 100)."""

    def __init__(self, before=lambda call: None):
        super().__init__()
        self.before, self.calls = before, 0  # ``before`` is called with the number of the call

    def forward(self, images):
        self.before(self.calls)
        self.calls += 1
        red, green, blue = images[0].mean((1, 2))
        boxes = torch.stack([torch.zeros(()), torch.zeros(()), 100 * green, 100 * blue])[None]
        return [{'boxes': boxes, 'labels': torch.ones(1, dtype=torch.long), 'scores': red[None]}]


def mean_predictor(before=lambda call: None, name: str = 'mean', warmup: int = 2, **options) -> Predictor:
    return Predictor(Mean(before), ModelFacts(name, 'box', NAMES), warmup=warmup, **options)


def small_detector(task: str) -> nn.Module:
    heads = {'mask_layers': (16,), 'keypoint_layers': (16,), 'box_head': 32, 'fpn_channels': 16}
    return build_detector(task, 'resnet18', num_classes=2, min_size=96, box_detections_per_img=5, **heads).eval()


# predictor


@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
def test_the_stages_together_give_what_the_model_gives(task):
    model = small_detector(task)
    image = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = model([torch.from_numpy(image).permute(2, 0, 1) / 255])[0]
    predictor = Predictor(model, ModelFacts('small', task, NAMES), score=0.0, warmup=0)
    found = predictor(image)
    assert found.keys() == expected.keys() and len(found['boxes']) > 0
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-4)
    assert {n for n, s in predictor.recorder.summary().items() if s.count == 1} == {
        'preprocess', 'network', 'postprocess', 'total',
    }  # fmt: skip


def test_a_higher_threshold_gives_the_same_detections_above_it():
    model = small_detector('keypoint')
    image = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    predictor = Predictor(model, ModelFacts('small', 'keypoint', NAMES), score=0.0)
    all_of_them = predictor(image)
    middle = float(all_of_them['scores'][1:3].mean())
    predictor.score = middle
    above = predictor(image)
    keep = all_of_them['scores'] >= middle
    assert 0 < keep.sum() < len(keep)
    torch.testing.assert_close(above['boxes'], all_of_them['boxes'][keep])
    torch.testing.assert_close(above['keypoints'], all_of_them['keypoints'][keep])
    assert predictor.found == len(keep) + int(keep.sum())  # the keypoint head saw no more


def test_the_network_sees_rgb():
    image = np.zeros((10, 10, 3), np.uint8)
    image[:] = (255, 51, 102)
    found = mean_predictor()(image)
    assert found['scores'].tolist() == [1.0]
    torch.testing.assert_close(found['boxes'], torch.tensor([[0, 0, 20.0, 40.0]]))


def test_imgsz_and_half_reach_the_network():
    model = small_detector('box')
    sizes, dtypes = [], []
    model.backbone.register_forward_pre_hook(lambda _, x: sizes.append(tuple(x[0].shape[-2:])))
    model.backbone.register_forward_hook(lambda _, x, y: dtypes.append(y['0'].dtype))
    predictor = Predictor(model, ModelFacts('small', 'box', NAMES), imgsz=64, half=True)
    predictor(np.zeros((100, 150, 3), np.uint8))
    assert sizes == [(64, 96)]
    assert dtypes == [torch.bfloat16] and predictor.precision == 'bf16 autocast'


def test_deployed_at_the_first_picture_it_finds_the_same():
    model = small_detector('box')
    image = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    expected = Predictor(model, ModelFacts('small', 'box', NAMES), score=0.0)(image)
    predictor = Predictor(model, ModelFacts('small', 'box', NAMES), score=0.0, deploy=True)
    assert predictor.model is model
    found = predictor(image)
    deployed = predictor.model
    assert deployed is not model and norton_timm.deployment_report(deployed).folded
    torch.testing.assert_close(found['boxes'], expected['boxes'], rtol=0, atol=0.5)
    torch.testing.assert_close(found['scores'], expected['scores'], rtol=0, atol=1e-3)
    predictor(image)
    assert predictor.model is deployed, 'tuned once'


@pytest.mark.parametrize(
    ('options', 'message'),
    [({'score': 1.5}, 'score 1.5'), ({'imgsz': 8}, 'imgsz 8'), ({'imgsz': 64}, 'cannot be set for Mean'),
     ({'compile': True}, 'compile needs a torchvision R-CNN')],
)  # fmt: skip
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mean_predictor(**options)


# pipeline


def test_every_frame_arrives_once_and_in_order():
    source, seen = Still(20), []
    report = run_pipeline(source, [mean_predictor()], lambda image, frame: seen.append(frame.index), warmup=2)
    assert seen == list(range(20)) and report.frames == 20
    assert source.closed and report.stopped is None
    assert {name: s.count for name, s in report.recorder.summary().items()} == {'read': 18, 'draw': 18, 'write': 18}
    seen.clear()
    assert (
        run_pipeline(Still(20), [mean_predictor()], lambda image, frame: seen.append(frame.index), max_frames=7).frames
        == 7
    )
    assert seen == list(range(7))


def test_figures_are_those_of_the_clock(monkeypatch):
    clock = ThreadClock().install(monkeypatch, *TIMED)  # what a thread measures is its own
    predictor = mean_predictor(lambda call: clock.sleep(9 if call < 2 else 0.04 if call % 2 else 0.02))
    source = Still(40, lambda index: clock.sleep(9 if index < 2 else 0.003))

    def show(image, frame):
        clock.sleep(9 if frame.index < 2 else 0.05 if frame.index == 20 else 0.012)

    report = run_pipeline(source, [predictor], show, warmup=2)
    figures = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    network, write = figures['models']['mean']['stages']['network'], figures['stages']['write']
    assert (network['count'], network['mean_ms'], network['p50_ms']) == (38, 30, 30)
    assert (write['count'], write['p50_ms'], write['mean_ms']) == (38, 12, pytest.approx((37 * 12 + 50) / 38, abs=1e-3))
    assert figures['stages']['read']['mean_ms'] == 3
    assert figures['fps'] == pytest.approx(37 / (36 * 0.012 + 0.05))
    assert figures['network_fps'] == pytest.approx(1000 / 30)


def test_reading_network_and_writing_go_on_at_the_same_time():
    """While a frame is written the next is in the network and the one after that is read: they wait for each other."""
    count, meeting = 20, threading.Barrier(3, timeout=SAFETY_S)
    met = []

    def meet(number: int) -> None:
        if 0 <= number < count - 2:
            met.append(number)
            meeting.wait()

    source = Still(count, lambda index: meet(index - 2))
    report = run_pipeline(source, [mean_predictor(lambda call: meet(call - 1))], lambda _, frame: meet(frame.index))
    assert report.frames == count
    assert met == sorted(met) and len(met) == 3 * (count - 2)


def test_two_models_see_the_same_frames_and_are_timed_apart(monkeypatch):
    clock, shapes = ThreadClock().install(monkeypatch, *TIMED), []
    slow = mean_predictor(lambda call: clock.sleep(0.02 + 0.5 * (call in (1, 7))), 'dense')
    fast = mean_predictor(lambda call: clock.sleep(0.005), 'norton')
    report = run_pipeline(Still(15), [slow, fast], lambda image, frame: shapes.append(image.shape), warmup=2)
    assert shapes == [(48, 130, 3)] * 15
    assert slow.total() == pytest.approx([20] * 5 + [520] + [20] * 7) and fast.total() == pytest.approx([5] * 13)
    assert report.to_dict()['speed_up'] == pytest.approx(4)
    assert 'norton is 4.00x as fast as dense' in str(report)
    with pytest.raises(ValueError, match='both models are called'):
        run_pipeline(Still(3), [mean_predictor(), mean_predictor()], lambda *_: None)


@pytest.mark.parametrize('where', ['read', 'network', 'write'])
def test_an_error_in_any_thread_arrives_and_ends_all_of_them(where):
    class Broken(Still):
        def __iter__(self):
            yield from super().__iter__()
            raise ValueError('broken read')

    class Failing(Mean):
        def forward(self, images):
            raise ValueError('broken network')

    def show(image, frame):
        if where == 'write':
            raise ValueError('broken write')

    source = Broken(3) if where == 'read' else Still(100)
    model = Failing() if where == 'network' else Mean()
    before = threading.active_count()
    with pytest.raises(ValueError, match=f'broken {where}'):
        run_pipeline(source, [Predictor(model, ModelFacts('m', 'box', NAMES))], show)
    assert threading.active_count() == before and source.closed


@pytest.mark.parametrize('live', [False, True])
def test_ctrl_c_and_a_closed_window_end_the_run_and_release_the_source(live):
    for reason, expected in ((KeyboardInterrupt, 'interrupted'), (None, 'closed by the user')):
        camera = FakeCamera(FakeClock())

        def show(image, frame, reason=reason, camera=camera):
            if live and frame.index < 5:
                camera.take()
            if frame.index >= 5:
                camera.unplug()  # its reader would wait for a picture
                if reason is not None:
                    raise reason
                return False
            return True

        source = LiveSource(lambda camera=camera: camera, 'camera') if live else Still(1000)
        before = threading.active_count() - live
        if live:
            camera.take()
        report = run_pipeline(source, [mean_predictor()], show)
        assert report.stopped == expected and report.frames >= 3
        assert threading.active_count() == before and camera.released == live


def test_live_frames_are_never_older_than_two_network_times_when_shown(monkeypatch):
    clock, shown, seen = FakeClock(), [], []
    clock.install(monkeypatch, 'detection.demo.video')
    camera = FakeCamera(clock, fps=60)

    def network(call: int) -> None:
        """Takes 0.05 s, three pictures of the camera."""
        seen.append(camera.taken)
        wait_until(lambda: len(shown) >= call - 1)  # the frame before the last one has been shown
        camera.take(3)

    def show(image, frame):
        shown.append((frame.index, clock.now - frame.time))
        if len(shown) == 25:
            camera.unplug()
        return len(shown) < 25

    source = LiveSource(lambda: camera, 'camera')
    camera.take()
    report = run_pipeline(source, [mean_predictor(network)], show, warmup=2)
    assert max(age for _, age in shown) <= 2 * 0.05 + 1e-9
    # each time the newest picture went into the network
    assert [index for index, _ in shown] == [taken - 1 for taken in seen[:25]] == list(range(0, 75, 3))
    assert report.dropped >= 2 * 24
    assert report.to_dict()['dropped'] == report.dropped


def test_memory_stays_flat_over_2000_frames():
    import tracemalloc

    sizes = []

    def show(image, frame):
        if frame.index % 500 == 400:
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        run_pipeline(Still(2000, size=(120, 160)), [mean_predictor()], show)
    finally:
        tracemalloc.stop()
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) < 15 * 120 * 160 * 3  # no more than what the queues may hold; 2000 were seen


def test_random_weights_are_written_into_the_picture():
    def lower_edge(random: bool) -> np.ndarray:
        pictures = []
        predictor = Predictor(Mean(), ModelFacts('m', 'box', NAMES, random=random))
        run_pipeline(Still(2, size=(240, 320)), [predictor], lambda image, frame: pictures.append(image))
        return pictures[-1][-2]

    assert (lower_edge(False) == 1).all()
    assert (lower_edge(True) == (200, 20, 20)).all()


def test_a_run_shorter_than_the_warmup_still_reports():
    report = run_pipeline(Still(2), [mean_predictor(warmup=5)], lambda *_: None, warmup=5)
    assert isinstance(report, Report) and math.isnan(report.fps)
    figures = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert figures['fps'] is None and figures['models']['mean']['total'] is None
    assert '2 frames' in str(report)


def test_channel_hands_over_what_is_left_before_the_error():
    channel: Handover[int] = Handover(3)
    channel.put(1)
    channel.put(2)
    channel.close(ValueError('late'))
    received = []
    with pytest.raises(ValueError, match='late'):
        for item in channel:
            received.append(item)
    assert received == [1, 2]
    assert not channel.put(3)
