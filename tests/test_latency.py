"""latency.py: percentiles against hand-made series, warm-up, rates on a clock that is known."""

from __future__ import annotations

import threading

import cv2
import numpy as np
import pytest
from fake_clock import FakeClock

from detection.visual.latency import LatencyRecorder, RateMeter, plot_histogram, summarize


def test_percentiles_of_a_known_series():
    s = summarize(list(range(1, 102)))  # 1..101: the k-th percentile is k + 1
    assert (s.count, s.mean, s.p50, s.p95, s.p99) == (101, 51, 51, 96, 100)
    assert s.to_dict()['p95_ms'] == 96


def test_nothing_to_summarise_is_an_error():
    with pytest.raises(ValueError, match='warm-up'):
        summarize([])


def test_warmup_is_counted_per_stage():
    recorder = LatencyRecorder(warmup=2)
    for ms in (1000, 1000, 3, 4):
        recorder.add('network', ms)
    recorder.add('read', 7)
    assert recorder.times('network') == [3, 4]
    assert list(recorder.summary()) == ['network']
    assert recorder.recent('read') is None


def test_stages_are_timed_with_what_the_device_still_does(monkeypatch):
    clock, recorder = FakeClock().install(monkeypatch, 'detection.visual.latency'), LatencyRecorder(device='meta')
    queued = [5.0]  # seconds: what was queued before the stage is not the stage's

    def synchronise(device):
        assert device == 'meta'
        clock.sleep(queued.pop())

    monkeypatch.setattr('detection.visual.latency.synchronise', synchronise)
    for k in range(1, 4):
        with recorder.stage('network', sync=True):
            clock.sleep(0.01 * k)
            queued.append(0.5)
        with recorder.stage('draw'):
            clock.sleep(0.002)
        clock.sleep(1)
        queued.append(5.0)
    assert recorder.times('network') == pytest.approx([510, 520, 530])
    assert recorder.times('draw') == pytest.approx([2, 2, 2])


def test_a_failed_stage_is_not_counted():
    recorder = LatencyRecorder()
    with pytest.raises(RuntimeError), recorder.stage('network'):
        raise RuntimeError('out of memory')
    assert recorder.times('network') == []


def test_stages_come_in_pipeline_order_and_memory_is_bounded():
    recorder = LatencyRecorder(limit=5)
    for name in ('write', 'network', 'read'):
        for ms in range(10):
            recorder.add(name, ms)
    assert list(recorder.summary()) == ['read', 'network', 'write']
    assert recorder.times('read') == [5, 6, 7, 8, 9]


def test_threads_lose_no_timing():
    recorder = LatencyRecorder()
    threads = [threading.Thread(target=lambda: [recorder.add('read', 1) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder.times('read')) == 2000


def test_rate_leaves_the_warmup_out():
    meter = RateMeter(warmup=2, window=3)
    assert np.isnan(meter.fps)
    for now in (0, 10, 20, 20.5, 21, 21.5):  # two slow frames, then 2 per second
        meter.tick(now)
    assert meter.fps == 2
    assert meter.recent_fps == 2


def test_histogram_is_a_readable_picture(tmp_path):
    path = tmp_path / 'latency.png'
    rng = np.random.default_rng(0)
    plot_histogram({'dense': rng.normal(80, 4, 200), 'norton': rng.normal(50, 2, 200)}, path)
    image = cv2.imread(str(path))
    assert image.shape[1] == 960 and image.std() > 10
    with pytest.raises(ValueError, match='no timings'):
        plot_histogram({'dense': []}, path)
