"""The live part of the web page: runs the chosen model over a source and keeps the newest annotated picture."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from detection.data import decode_rgb
from detection.demo.pipeline import annotate
from detection.demo.predictor import Predictor
from detection.demo.video import Frame, FrameSource
from detection.visual import Image, RateMeter

log = logging.getLogger(__name__)

_MOST_PIXELS = 4096 * 4096  # of a picture sent by a browser


@dataclass(frozen=True)
class ModelChoice:
    """A model that the page offers; it is built when it is first chosen."""

    task: str
    name: str
    build: Callable[[], Predictor]

    @property
    def key(self) -> str:
        """Identifies the choice in the page's requests."""
        return f'{self.task}: {self.name}'


@dataclass(frozen=True)
class Snapshot:
    """The newest result: a JPEG and what the page shows beside it. ``number`` grows with every one."""

    number: int
    jpeg: bytes
    stats: dict[str, Any]


class Studio:
    """Runs in its own thread from ``start`` to ``close``; it rests while nobody watches.

    Files and the drawn clip are repeated for ever, at most at their own frame rate.

    Args:
        open_source: opens the source, again for every repetition.
        choices: the models; the first is chosen.
        score: threshold to begin with.
    """

    def __init__(self, open_source: Callable[[], FrameSource], choices: Sequence[ModelChoice], score: float = 0.5):
        if not choices:
            raise ValueError('no models to choose from, expected at least one')
        self.choices = {c.key: c for c in choices}
        if len(self.choices) < len(choices):
            raise ValueError(f'models of one task and name: {[c.key for c in choices]}, expected different names')
        self._open = open_source
        self._source = open_source()  # a source that does not open fails here, not in the thread
        self._predictors: dict[str, Predictor] = {}
        self._running = threading.Lock()  # one picture at a time, from the source or from a browser
        self._changed = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._error: str | None = None
        self._stop = threading.Event()
        self._viewers = 0
        self._meter = RateMeter(window=20)
        self._thread = threading.Thread(target=self._work, name='studio', daemon=True)
        self.key, self.score = choices[0].key, score
        self._predictor(self.key)

    def start(self) -> None:
        """Begin to run."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and release the source."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._source.live:
            self._source.close()
        if self._thread.is_alive():
            self._thread.join(timeout=60)
        self._source.close()

    def choose(self, settings: dict[str, Any]) -> None:
        """Change the model (``model``: a choice's key) or the threshold (``score``); ``ValueError`` for others."""
        unknown = set(settings) - {'model', 'score'}
        if unknown:
            raise ValueError(f'setting {sorted(unknown)[0][:80]!r}, expected model or score')
        key, score = settings.get('model', self.key), settings.get('score', self.score)
        if not isinstance(key, str) or key not in self.choices:
            raise ValueError(f'model {str(key)[:80]!r}, expected one of {", ".join(self.choices)}')
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1:
            raise ValueError(f'score {str(score)[:80]}, expected a number from 0 to 1')
        self._predictor(key)
        if key != self.key:
            self._meter = RateMeter(window=20)
        self.key, self.score = key, float(score)

    def facts(self) -> dict[str, Any]:
        """Facts that the page needs once: the models, the settings and the source."""
        choices = [{'key': c.key, 'task': c.task, 'name': c.name} for c in self.choices.values()]
        return {'choices': choices, 'model': self.key, 'score': self.score, 'source': self._source.name}

    def wait(self, after: int, timeout: float = 1.0) -> Snapshot | None:
        """The newest result with a number above ``after``; ``None`` when there is none in time."""
        with self._changed:
            ready = self._changed.wait_for(
                lambda: self._error is not None or (self._snapshot is not None and self._snapshot.number > after),
                timeout,
            )
            if self._error is not None:
                raise RuntimeError(self._error)
            return self._snapshot if ready else None

    def watch(self, change: int) -> None:
        """A viewer comes (+1) or goes (-1)."""
        with self._changed:
            self._viewers += change
            self._changed.notify_all()

    def process(self, image: Image, meter: RateMeter) -> Snapshot:
        """Detect and draw in one RGB picture with the present settings; ``meter`` is that of the picture's sender."""
        key, score = self.key, self.score
        predictor = self._predictor(key)
        with self._running:
            predictor.score = score
            output = predictor(image)
        picture = annotate(image, predictor, output, meter.recent_fps)
        meter.tick()
        ok, jpeg = cv2.imencode('.jpg', cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
        if not ok:
            raise ValueError(f'a picture of shape {picture.shape} cannot be encoded')
        fps = meter.recent_fps
        facts = predictor.facts
        stats = {
            'model': key,
            'score': score,
            'task': facts.task,
            'params': facts.params,
            'random': facts.random,
            'device': str(predictor.device),
            'precision': predictor.precision,
            'detections': len(output['boxes']),
            'fps': fps if np.isfinite(fps) else None,
            'dropped': self._source.dropped,
            'stages': {
                name: {'last': predictor.recorder.recent(name, 1).p50, **summary.to_dict()}  # type: ignore[union-attr]
                for name in ('preprocess', 'network', 'postprocess', 'total')
                if (summary := predictor.recorder.recent(name)) is not None
            },
        }
        return Snapshot(meter.count, jpeg.tobytes(), stats)

    def process_jpeg(self, data: bytes, meter: RateMeter) -> Snapshot:
        """`process` for an encoded picture from a browser; ``ValueError`` when it is none."""
        return self.process(decode_rgb(data, 'camera: no picture', oriented=True, most_pixels=_MOST_PIXELS), meter)

    def _predictor(self, key: str) -> Predictor:
        with self._running:
            if key not in self._predictors:
                self._predictors[key] = self.choices[key].build()
            return self._predictors[key]

    def _work(self) -> None:
        number = 0
        try:
            while not self._stop.is_set():
                start, first = time.perf_counter(), None
                for frame in self._source:
                    if not self._watched():
                        return
                    first = frame.index if first is None else first
                    if not self._source.live:
                        start = self._pace(frame, start)
                    snapshot = self.process(frame.image, self._meter)
                    number += 1
                    with self._changed:
                        self._snapshot = Snapshot(number, snapshot.jpeg, snapshot.stats)
                        self._changed.notify_all()
                    if self._stop.is_set():
                        return
                if first is None:
                    raise ValueError(f'{self._source.name} has no frames')
                self._source.close()
                if not self._stop.is_set():
                    self._source = self._open()
        except Exception as error:  # shown to the viewers; the server goes on
            log.exception('the picture stopped')
            with self._changed:
                self._error = f'the picture stopped: {error}'
                self._changed.notify_all()

    def _watched(self) -> bool:
        """Wait for a viewer; false when the studio closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._viewers > 0 or self._stop.is_set())
        return not self._stop.is_set()

    def _pace(self, frame: Frame, start: float) -> float:
        """Wait until a file's frame is due; after a pause or behind a slow network the clock starts anew."""
        due = start + float(self._source.time_of(frame))
        late = time.perf_counter() - due
        if late < 0:
            self._stop.wait(-late)
            return start
        return start + late
