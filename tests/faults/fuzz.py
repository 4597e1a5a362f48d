"""Feeds a surface: batches in forked processes, so that a crash or a hang in native code costs one batch only."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from .guard import LIMIT_S, Verdict, judge, limit_memory
from .surface import Surface

BATCH = 250


@dataclass
class Tally:
    """What a surface was given and what came of it."""

    name: str
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    seconds: float = 0.0
    defects: dict[str, tuple[Verdict, str]] = field(default_factory=dict)

    def add(self, verdict: Verdict, shown: str, seconds: float) -> None:
        self.inputs += 1
        self.outcomes[verdict.outcome] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        if verdict.defect:
            key = f'{verdict.outcome} {verdict.where}'
            if key not in self.defects or len(shown) < len(self.defects[key][1]):
                self.defects[key] = (verdict, shown)

    def merge(self, other: Tally) -> None:
        self.inputs += other.inputs
        self.outcomes += other.outcomes
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        for key, (verdict, shown) in other.defects.items():
            if key not in self.defects or len(shown) < len(self.defects[key][1]):
                self.defects[key] = (verdict, shown)


def fuzz(surface: Surface, count: int | None = None, start: int = 0, keep: Path | None = None) -> Tally:
    """Feed a surface.

    Args:
        surface: which.
        count: inputs; None: as many as a full run has.
        start: seed of the first batch.
        keep: folder for the pickled inputs of defects, to look at.

    Returns:
        The tally of all inputs that were run.
    """
    surface.prepare()
    total = Tally(surface.name)
    began = time.perf_counter()
    wanted = surface.count if count is None else count
    number, empty = start, 0
    while total.inputs < wanted and empty < 20:
        found = _batch(surface, min(BATCH, wanted - total.inputs), number, keep)
        empty = 0 if found.inputs else empty + 1
        total.merge(found)
        number += 1
    total.seconds = time.perf_counter() - began
    return total


def _batch(surface: Surface, count: int, number: int, keep: Path | None) -> Tally:
    """One batch in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix='fuzz-'))
    now, done = folder / 'now.pickle', folder / 'done.pickle'
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            _run(surface, count, number, folder, keep)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    status, since = _wait(child, now)
    tally = Tally(surface.name)
    if done.is_file():
        tally = pickle.loads(done.read_bytes())
    if status != 0 and now.is_file():
        shown = now.read_bytes()[:4000].decode('utf-8', 'replace')
        verdict = Verdict('died', surface.name, status if isinstance(status, str) else f'ended with {status}')
        tally.add(verdict, shown, since)
    shutil.rmtree(folder, ignore_errors=True)
    return tally


def _wait(child: int, now: Path) -> tuple[int | str, float]:
    """Wait for a batch; kill it when one input takes far longer than the limit (a hang in native code)."""
    stamp, since = 0, time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return (f'signal {signal.Signals(-code).name}' if code < 0 else code), time.monotonic() - since
        changed = now.stat().st_mtime_ns if now.is_file() else 0
        if changed != stamp:
            stamp, since = changed, time.monotonic()
        elif stamp and time.monotonic() - since > 2 * LIMIT_S + 5:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 'a hang in native code', time.monotonic() - since
        time.sleep(0.02)


def _run(surface: Surface, count: int, number: int, folder: Path, keep: Path | None) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    if 'FAULTS_VERBOSE' not in os.environ:
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)  # decoders chatter
    limit_memory()
    tally = Tally(surface.name)
    now, done, place = folder / 'now.pickle', folder / 'done.pickle', folder / 'place'
    place.mkdir()
    os.chdir(place)

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(surface.inputs)
    def feed(value: object) -> None:
        shown = repr(value)
        now.write_text(shown, encoding='utf-8', errors='backslashreplace')
        began = time.perf_counter()
        verdict = judge(lambda: surface.use(value, place), place)
        tally.add(verdict, shown[:2000], time.perf_counter() - began)
        for child in place.iterdir():
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        if verdict.defect:
            done.write_bytes(pickle.dumps(tally))  # a later crash must not take it along
            if keep is not None:
                name = f'{surface.name}-{verdict.outcome}-{abs(hash(verdict.where)) % 10**6}.pickle'.replace(' ', '_')
                (keep / name).write_bytes(pickle.dumps((verdict, value)))
        elif tally.inputs % 50 == 0:
            done.write_bytes(pickle.dumps(tally))

    feed()
    done.write_bytes(pickle.dumps(tally))


def to_json(tally: Tally) -> str:
    """One line of what a surface was given and what came of it."""
    return json.dumps(
        {
            'surface': tally.name,
            'inputs': tally.inputs,
            'outcomes': dict(tally.outcomes),
            'slowest_s': round(tally.slowest_s, 2),
            'seconds': round(tally.seconds, 1),
            'defects': {k: [v.detail, shown[:300]] for k, (v, shown) in tally.defects.items()},
        }
    )
