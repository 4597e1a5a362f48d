"""Video in, annotated video out: reading, pre-processing, inference and drawing + writing overlap in threads.

The calling thread draws, writes and shows, because windows and Ctrl-C belong to the main thread.
"""

from __future__ import annotations

import logging
import math
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from detection.demo.predictor import Predictor, Prepared
from detection.demo.video import Frame, FrameSource
from detection.visual import (
    Image,
    LatencyRecorder,
    RateMeter,
    Summary,
    draw_caption,
    draw_detections,
    side_by_side,
    summarize,
)

log = logging.getLogger(__name__)

RANDOM_WARNING = 'RANDOM WEIGHTS: timing only'
_T = TypeVar('_T')


class Handover(Generic[_T]):
    """A bounded queue between two threads that either side can close; an error travels to the reader."""

    def __init__(self, size: int):
        self._items: deque[_T] = deque()
        self._size, self._closed = size, False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, item: _T) -> bool:
        """Wait for room; false when the channel was closed, and the sender should stop."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._size or self._closed)
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def close(self, error: BaseException | None = None, *, discard: bool = False) -> None:
        """Accept no more items; those inside can still be read unless they are discarded."""
        with self._changed:
            self._closed = True
            self._error = self._error or error
            if discard:
                self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[_T]:
        while True:
            with self._changed:
                # a wait without a limit would block Ctrl-C on some platforms
                while not self._changed.wait_for(lambda: self._items or self._closed, timeout=0.2):
                    pass
                if not self._items:
                    if self._error is not None:
                        raise self._error
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item


@dataclass
class Report:
    """Timings of a run; ``to_dict`` is what the JSON file holds, ``str()`` the table for the terminal.

    ``size`` is the first frame's, width and height in pixels.
    """

    source: str
    size: tuple[int, int]
    source_fps: float
    predictors: Sequence[Predictor]
    recorder: LatencyRecorder
    frames: int = 0
    dropped: int = 0
    reconnects: int = 0
    other_sizes: bool = False
    fps: float = math.nan
    stopped: str | None = None
    threads: int = field(default_factory=torch.get_num_threads)

    def totals(self) -> dict[str, list[float]]:
        """Model name -> ms from picture to detections of every counted frame."""
        return {p.facts.name: p.total() for p in self.predictors}

    def network_fps(self) -> float:
        """Frames per second of the networks alone, to compare end-to-end FPS with."""
        spent = [s.mean for p in self.predictors if (s := p.recorder.summary().get('network'))]
        return 1000 / sum(spent) if spent else math.nan

    def speed_up(self) -> float | None:
        """Median of the first model over that of the second; ``None`` unless two were compared."""
        medians = [summarize(t).p50 for t in self.totals().values() if t]
        return medians[0] / medians[1] if len(medians) == 2 else None

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, in ms and frames per second."""
        models = {}
        for p in self.predictors:
            total = p.total()
            models[p.facts.name] = {
                'task': p.facts.task,
                'params': p.facts.params,
                'random_weights': p.facts.random,
                'detections_per_frame': round(p.found / self.frames, 3) if self.frames else None,
                'fps': _finite(1000 / summarize(total).mean) if total else None,
                'total': summarize(total).to_dict() if total else None,
                'stages': {name: s.to_dict() for name, s in p.recorder.summary().items() if name != 'total'},
            }
        device = self.predictors[0].device
        return {
            'source': self.source,
            'width': self.size[0],
            'height': self.size[1],
            'source_fps': self.source_fps,
            'frames': self.frames,
            'warmup': self.recorder.warmup,
            'dropped': self.dropped,
            'reconnects': self.reconnects,
            'stopped': self.stopped,
            'fps': _finite(self.fps),
            'network_fps': _finite(self.network_fps()),
            'speed_up': self.speed_up(),
            'models': models,
            'stages': {name: s.to_dict() for name, s in self.recorder.summary().items()},
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else f'cpu ({platform.machine()})',
            'threads': self.threads,
            'precision': self.predictors[0].precision,
            'torch': torch.__version__,
        }

    def __str__(self) -> str:
        facts = self.to_dict()
        rows: list[tuple[str, str, Summary]] = [('', name, s) for name, s in self.recorder.summary().items()]
        for p in self.predictors:
            rows += [(p.facts.name, name, s) for name, s in p.recorder.summary().items()]
        wide = max([5, *(len(r[0]) for r in rows)])
        lines = [f'{"model":{wide}}  {"stage":12} {"frames":>6} {"p50 ms":>9} {"p95 ms":>9} {"p99 ms":>9}']
        for model, stage, s in rows:
            lines.append(f'{model:{wide}}  {stage:12} {s.count:6d} {s.p50:9.2f} {s.p95:9.2f} {s.p99:9.2f}')
        others = ' and other sizes' if self.other_sizes else ''
        lines.append(
            f'{self.frames} frames of {self.size[0]} x {self.size[1]}{others}; {self.fps:.2f} FPS end to end, '
            f'{self.network_fps():.2f} FPS network only; {facts["device"]}, {self.threads} threads, '
            f'{facts["precision"]}; {self.recorder.warmup} warm-up frames not counted'
        )
        for p in self.predictors:
            if p.facts.random and self.frames:
                found = p.found / self.frames
                lines.append(f'{p.facts.name}: random weights; the second stage ran on {found:.1f} detections a frame')
        if self.dropped or self.reconnects:
            lines.append(f'{self.dropped} live frames dropped, {self.reconnects} reconnections')
        if (ratio := self.speed_up()) is not None:
            first, second = self.totals()
            lines.append(f'{second} is {ratio:.2f}x as fast as {first} (median, picture to detections)')
        return '\n'.join(lines)


def annotate(image: Image, predictor: Predictor, output: dict[str, torch.Tensor], fps: float) -> Image:
    """One model's detections and its caption on a copy of the picture."""
    facts = predictor.facts
    drawn = draw_detections(image, output, facts.class_names, score=predictor.score, skeleton=facts.skeleton)
    recent = predictor.recorder.recent('total')
    parts = [facts.name] if image.shape[1] >= 320 else []
    if not math.isnan(fps):
        parts.append(f'{fps:.1f} FPS')
    if recent is not None:
        parts.append(f'p50 {recent.p50:.1f} ms')
        parts.append(f'p95 {recent.p95:.1f} ms')
    return draw_caption(drawn, ['  '.join(parts)] if parts else [], warning=RANDOM_WARNING if facts.random else None)


def run_pipeline(
    source: FrameSource,
    predictors: Sequence[Predictor],
    show: Callable[[Image, Frame], bool | None],
    *,
    warmup: int = 3,
    max_frames: int | None = None,
) -> Report:
    """Run one model, or two side by side, over a source.

    Args:
        source: frames; closed at the end.
        predictors: one or two models. Two see the same frames, one after the other, and are timed apart.
        show: takes the finished RGB picture and its frame: writes it, displays it; returning ``False`` ends the run.
        warmup: first frames that do not count in any figure.
        max_frames: stop after so many.

    Returns:
        The timings. After Ctrl-C those of the frames so far, with ``stopped`` set.
    """
    if not 1 <= len(predictors) <= 2:
        raise ValueError(f'{len(predictors)} models, expected one, or two to compare')
    names = [p.facts.name for p in predictors]
    if len(set(names)) < len(names):
        raise ValueError(f'both models are called {names[0]}, expected different names')
    recorder = LatencyRecorder(warmup=warmup)
    meter = RateMeter(warmup=warmup)
    report = Report(source.name, (0, 0), float(source.fps), predictors, recorder)
    # live frames are not queued: they would be old when their turn comes
    frames: Handover[Frame] = Handover(4)
    prepared: Handover[tuple[Frame, list[Prepared]]] = Handover(1)
    # on an accelerator both would wait for each other at every synchronisation
    ahead = not source.live and all(p.device.type == 'cpu' for p in predictors)
    results: Handover[tuple[Frame, list[dict[str, torch.Tensor]]]] = Handover(1 if source.live else 4)

    def read() -> None:
        _feed(_timed(source, recorder), frames, max_frames)

    def prepare() -> None:
        _feed(((f, [p.prepare(f.image) for p in predictors]) for f in frames), prepared)

    def infer() -> None:
        if ahead:
            _feed(((f, [p.detect(x) for p, x in zip(predictors, inputs)]) for f, inputs in prepared), results)
        else:
            incoming = _limited(source, max_frames) if source.live else frames
            _feed(((f, [p(f.image) for p in predictors]) for f in incoming), results)

    targets = {'inference': infer}
    if not source.live:
        targets['read'] = read
    if ahead:
        targets['prepare'] = prepare
    workers = [threading.Thread(target=target, name=name, daemon=True) for name, target in targets.items()]
    try:
        for worker in workers:
            worker.start()
        for frame, outputs in results:
            with recorder.stage('draw'):
                picture = _compose(frame.image, predictors, outputs, meter.recent_fps)
            size = (frame.image.shape[1], frame.image.shape[0])
            report.other_sizes |= report.frames > 0 and size != report.size
            report.size = report.size if report.frames else size
            with recorder.stage('write'):
                go_on = show(picture, frame)
            meter.tick()
            report.frames += 1
            if go_on is False:
                report.stopped = 'closed by the user'
                break
    except KeyboardInterrupt as stop:
        report.stopped = str(stop) or 'interrupted'
    finally:
        for channel in (frames, prepared, results):
            channel.close(discard=True)
        if source.live:
            source.close()  # wakes the inference thread, which may be waiting for a picture
        for worker in workers:
            worker.join(timeout=60)
        source.close()
    report.fps, report.dropped, report.reconnects = meter.fps, source.dropped, source.reconnects
    return report


def _compose(
    image: Image, predictors: Sequence[Predictor], outputs: Sequence[dict[str, torch.Tensor]], end_to_end: float
) -> Image:
    if len(predictors) == 1:
        return annotate(image, predictors[0], outputs[0], end_to_end)
    pictures = []
    for predictor, output in zip(predictors, outputs):
        recent = predictor.recorder.recent('total')
        pictures.append(annotate(image, predictor, output, 1000 / recent.mean if recent else math.nan))
    return side_by_side(*pictures)


def _feed(items: Iterator[Any], channel: Handover[Any], limit: int | None = None) -> None:
    """Send items until there are no more or the channel is closed; an error goes to the channel's reader."""
    try:
        for count, item in enumerate(items, 1):
            if not channel.put(item) or count == limit:
                break
    except BaseException as error:  # also what a thread would otherwise swallow
        channel.close(error)
    finally:
        channel.close()


def _timed(source: FrameSource, recorder: LatencyRecorder) -> Iterator[Frame]:
    iterator = iter(source)
    while True:
        start = time.perf_counter()
        frame = next(iterator, None)
        if frame is None:
            return
        recorder.add('read', (time.perf_counter() - start) * 1e3)
        yield frame


def _limited(source: FrameSource, limit: int | None) -> Iterator[Frame]:
    for count, frame in enumerate(source, 1):
        yield frame
        if count == limit:
            return


def _finite(value: float) -> float | None:
    """None instead of NaN or infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
