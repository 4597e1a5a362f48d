"""predictor.py and pipeline.py: results against the model's own forward, figures against a stop-watch, threads."""

from __future__ import annotations

import gc
import json
import math
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import norton_timm
from detection.demo.pipeline import Handover, Report, real_time_repeats, run_pipeline
from detection.demo.predictor import ModelFacts, Predictor
from detection.demo.video import Frame, FrameSource, LiveSource
from detection.rcnn.build import build_detector
from detection.visual.latency import summarize

NAMES = ['__background__', 'thing']


class Still(FrameSource):
    """Frames that carry their number; each takes ``delay`` seconds to read."""

    def __init__(self, count: int, delay: float = 0.0, size=(48, 64)):
        self.name, self.fps, self.count = 'still', Fraction(30), count
        self.delay, self.image_size, self.closed = delay, size, False

    def __iter__(self):
        for index in range(self.count or 0):
            time.sleep(self.delay)
            yield Frame(np.full((*self.image_size, 3), index % 200, np.uint8), index, time.perf_counter())

    def close(self) -> None:
        self.closed = True


class Clock:
    """A camera at a fixed rate."""

    def __init__(self, fps: float):
        self.fps, self.next, self.index = fps, time.perf_counter(), 0

    def isOpened(self) -> bool:
        return True

    def read(self):
        self.next += 1 / self.fps
        time.sleep(max(0.0, self.next - time.perf_counter()))
        self.index += 1
        return True, np.full((48, 64, 3), self.index % 256, np.uint8)

    def get(self, _: int) -> float:
        return self.fps

    def release(self) -> None: ...


class Mean(nn.Module):
    """A detector of one box: its score is the picture's red mean, its x2 the green, its y2 the blue one (x 100)."""

    def __init__(self, seconds: float = 0.0):
        super().__init__()
        self.seconds = seconds

    def forward(self, images):
        time.sleep(self.seconds)
        red, green, blue = images[0].mean((1, 2))
        boxes = torch.stack([torch.zeros(()), torch.zeros(()), 100 * green, 100 * blue])[None]
        return [{'boxes': boxes, 'labels': torch.ones(1, dtype=torch.long), 'scores': red[None]}]


def mean_predictor(seconds: float = 0.0, name: str = 'mean', warmup: int = 2, **options) -> Predictor:
    return Predictor(Mean(seconds), ModelFacts(name, 'box', NAMES), warmup=warmup, **options)


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


class Timed(Mean):
    """Keeps the seconds of its calls, by a stop-watch of its own."""

    def __init__(self, seconds: float):
        super().__init__(seconds)
        self.spent: list[float] = []

    def forward(self, images):
        start = time.perf_counter()
        found = super().forward(images)
        self.spent.append(1000 * (time.perf_counter() - start))
        return found


def figures_beside_a_stop_watch():
    stamps, writes, model = [], [], Timed(0.02)

    def show(image, frame):
        start = time.perf_counter()
        time.sleep(0.012)
        stamps.append(time.perf_counter())
        writes.append(1000 * (stamps[-1] - start))

    predictor = Predictor(model, ModelFacts('mean', 'box', NAMES), warmup=2)
    report = run_pipeline(Still(40, delay=0.012), [predictor], show, warmup=2)
    own = {'fps': 37 / (stamps[-1] - stamps[2]), 'write': np.median(writes[2:]), 'network': np.mean(model.spent[-38:])}
    return json.loads(json.dumps(report.to_dict(), allow_nan=False)), own


def test_figures_agree_with_a_stop_watch_and_the_threads_overlap():
    for _ in range(8):  # the overlap is that of a machine with a core to spare; the agreement holds on any
        figures, own = figures_beside_a_stop_watch()
        assert figures['fps'] == pytest.approx(own['fps'], rel=0.05)
        assert figures['models']['mean']['stages']['network']['mean_ms'] == pytest.approx(own['network'], rel=0.05)
        assert figures['stages']['write']['p50_ms'] == pytest.approx(own['write'], rel=0.05)
        if figures['fps'] >= 0.95 * figures['network_fps']:
            break
    assert figures['fps'] >= 0.8 * figures['network_fps']  # one after the other it would be 0.45


@pytest.mark.slow
def test_the_threads_overlap_almost_wholly_on_an_idle_machine():
    """Measured alone: ``pytest tests/test_pipeline.py -m slow``."""
    runs = [figures_beside_a_stop_watch()[0] for _ in range(5)]
    assert max(figures['fps'] / figures['network_fps'] for figures in runs) >= 0.95


def test_two_models_see_the_same_frames_and_are_timed_apart():
    shapes = []
    slow, fast = mean_predictor(0.02, 'dense'), mean_predictor(0.005, 'norton')
    report = run_pipeline(Still(15), [slow, fast], lambda image, frame: shapes.append(image.shape), warmup=2)
    assert shapes == [(48, 130, 3)] * 15
    assert report.speed_up() == pytest.approx(summarize(slow.total()).p50 / summarize(fast.total()).p50)
    assert 2.5 < report.to_dict()['speed_up'] < 4.2
    assert 'norton is' in str(report)
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

        def show(image, frame, reason=reason):
            if frame.index >= 5:
                if reason is not None:
                    raise reason
                return False
            return True

        source = LiveSource(lambda: Clock(200), 'camera') if live else Still(1000)
        before = threading.active_count() - live
        report = run_pipeline(source, [mean_predictor()], show)
        assert report.stopped == expected and report.frames >= 3
        assert threading.active_count() == before


def test_live_frames_are_never_older_than_two_network_times_when_shown():
    ages = []

    def show(image, frame):
        ages.append(time.perf_counter() - frame.time)
        return len(ages) < 25

    report = run_pipeline(LiveSource(lambda: Clock(60), 'camera'), [mean_predictor(0.05)], show, warmup=2)
    assert max(ages[2:]) < 0.1
    assert report.dropped > 25  # 60 FPS in, 20 FPS out
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


def test_a_live_file_plays_in_real_time():
    arrivals = [0.0, 0.12, 0.13, 0.51]  # seconds; a 20 FPS file has a frame every 0.05 s
    written, repeats = 0, []
    for index, at in enumerate(arrivals):
        repeats.append(real_time_repeats(Frame(np.zeros((1, 1, 3), np.uint8), index, 7 + at), 7.0, 20, written))
        written += repeats[-1]
    assert repeats == [1, 2, 0, 8]
