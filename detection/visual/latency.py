"""Timing of a frame's stages: warm-up left out, accelerators synchronised, percentiles beside means."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from norton_timm.profiling import synchronise
from norton_timm.utils import new_figure, write_png

# In the order in which a frame passes through them; total is the model's time, pre- to post-process.
FRAME_STAGES = ('read', 'preprocess', 'network', 'postprocess', 'total', 'draw', 'write')


@dataclass(frozen=True)
class Summary:
    """Latency of one stage over ``count`` frames, in ms."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            'count': self.count,
            'mean_ms': round(self.mean, 4),
            'p50_ms': round(self.p50, 4),
            'p95_ms': round(self.p95, 4),
            'p99_ms': round(self.p99, 4),
        }


def summarize(milliseconds: Sequence[float]) -> Summary:
    """Mean and percentiles (linear interpolation, as NumPy's default) of a non-empty series."""
    if not len(milliseconds):
        raise ValueError('no timings to summarise, expected at least one (was every frame a warm-up frame?)')
    values = np.asarray(milliseconds, np.float64)
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return Summary(len(values), float(values.mean()), float(p50), float(p95), float(p99))


@dataclass
class LatencyRecorder:
    """Collects the stages' durations of every frame after the first ``warmup`` frames.

    Each stage counts its own frames, because reading, inference and writing run in different threads and are at
    different frames at one moment. Safe to use from several threads.

    Args:
        warmup: first frames per stage that do not count (first-use allocations, cuDNN's search, compilation).
        device: what to synchronise around a stage that asks for it.
        window: number of newest frames that ``recent`` looks at.
        limit: number of newest timings kept per stage: bounds the memory of a camera that runs for days.
    """

    warmup: int = 0
    device: torch.device | str | None = None
    window: int = 30
    limit: int = 100_000
    _times: dict[str, deque[float]] = field(default_factory=dict, repr=False)
    _seen: dict[str, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def stage(self, name: str, *, sync: bool = False) -> Iterator[None]:
        """Time the block as one frame's ``name``; ``sync`` waits for the device before and after.

        A block left by an exception is not counted.
        """
        if sync:
            synchronise(self.device or 'cpu')
        start = time.perf_counter()
        yield
        if sync:
            synchronise(self.device or 'cpu')
        self.add(name, (time.perf_counter() - start) * 1e3)

    def add(self, name: str, milliseconds: float) -> None:
        """Record one duration, unless the stage is still warming up."""
        with self._lock:
            self._seen[name] = self._seen.get(name, 0) + 1
            if self._seen[name] > self.warmup:
                self._times.setdefault(name, deque(maxlen=self.limit)).append(milliseconds)

    def times(self, name: str) -> list[float]:
        """The recorded durations of a stage in ms, oldest first."""
        with self._lock:
            return list(self._times.get(name, ()))

    def summary(self) -> dict[str, Summary]:
        """Summary of every stage that has timings, in the order of ``FRAME_STAGES``."""
        with self._lock:
            names = [*(s for s in FRAME_STAGES if s in self._times), *(s for s in self._times if s not in FRAME_STAGES)]
            copies = {name: list(self._times[name]) for name in names}
        return {name: summarize(values) for name, values in copies.items()}

    def recent(self, name: str, count: int | None = None) -> Summary | None:
        """Summary of the newest ``count`` (``window``) frames, for a live display; ``None`` before the first."""
        with self._lock:
            newest = islice(reversed(self._times.get(name, deque())), count or self.window)
            values = list(newest)
        return summarize(values) if values else None


@dataclass
class RateMeter:
    """Frames per second over the wall clock, from the end of the warm-up to the newest frame.

    Call ``tick()`` once per finished frame. The first frame after the warm-up only starts the clock.
    """

    warmup: int = 0
    window: int = 30
    count: int = 0
    _first: float = 0.0
    _recent: deque[float] = field(default_factory=deque, repr=False)

    def tick(self, now: float | None = None) -> None:
        """Count one finished frame (``now``: seconds on ``time.perf_counter``)."""
        now = time.perf_counter() if now is None else now
        self.count += 1
        if self.count == self.warmup + 1:
            self._first = now
        self._recent.append(now)
        while len(self._recent) > self.window:
            self._recent.popleft()

    @property
    def fps(self) -> float:
        """Rate over all counted frames; NaN with fewer than two."""
        frames = self.count - self.warmup - 1
        span = self._recent[-1] - self._first if frames > 0 else 0.0
        return frames / span if span > 0 else float('nan')

    @property
    def recent_fps(self) -> float:
        """Rate over the newest ``window`` frames; NaN with fewer than two."""
        if len(self._recent) < 2 or self._recent[-1] == self._recent[0]:
            return float('nan')
        return (len(self._recent) - 1) / (self._recent[-1] - self._recent[0])


def plot_histogram(series: Mapping[str, Sequence[float]], path: str | Path, *, title: str = 'Network latency') -> None:
    """Write a PNG with one latency histogram per model, p50 and p95 marked.

    Args:
        series: model name -> durations in ms.
        path: file to write.
        title: heading of the picture.
    """
    if not any(len(v) for v in series.values()):
        raise ValueError('no timings to plot, expected at least one (was every frame a warm-up frame?)')
    figure = new_figure(8, 4.5)
    axes: Any = figure.add_subplot()
    everything = np.concatenate([np.asarray(v, float) for v in series.values()])
    # one outlier (a page fault, another process) must not squeeze all else into one bar
    low, high = everything.min(), np.percentile(everything, 99.5)
    bins = np.linspace(low, max(high, low * 1.02 + 1e-6), 41)
    for k, (name, values) in enumerate(series.items()):
        if not len(values):
            continue
        s = summarize(values)
        label = f'{name}: p50 {s.p50:.1f} ms, p95 {s.p95:.1f} ms, {s.count} frames'
        axes.hist(np.clip(values, bins[0], bins[-1]), bins=bins, alpha=0.6, color=f'C{k}', label=label)
        axes.axvline(s.p50, color=f'C{k}')
        axes.axvline(s.p95, color=f'C{k}', linestyle='--')
    axes.set(title=title, xlabel='ms per frame', ylabel='frames')
    axes.legend()
    write_png(figure, Path(path))
