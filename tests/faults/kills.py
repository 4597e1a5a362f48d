"""Kills tools at random moments of their runs, starts them again, and looks at what is left."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fake_clock import happens

from . import processes
from .scenarios import Scenario, check_files, prepare, scenarios

SENT = {'SIGKILL': signal.SIGKILL, 'SIGTERM': signal.SIGTERM, 'SIGINT': signal.SIGINT}
CODES = {'SIGKILL': -9, 'SIGTERM': 143, 'SIGINT': 130}
_UNHANDLED = {'SIGTERM': -15, 'SIGINT': 70}  # before the tool itself runs


@dataclass
class Campaign:
    """What was done to one tool.

    Attributes:
        name: of the scenario.
        kills: by signal; those that came after the end of a run are not counted.
        restarts: starts after a kill.
        finished: runs that came to their end, and whose result was compared.
        lost: steps that had to be repeated, by signal.
        problems: what should not have been.
    """

    name: str
    kills: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    finished: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def campaign(
    scenario: Scenario, kills: int, place: Path, seed: int = 0, names: tuple[str, ...] = tuple(SENT)
) -> Campaign:
    """Kill a tool so many times; every run is started again until it ends, and compared with one in peace."""
    chance, found, began = random.Random(f'{seed} {scenario.name}'), Campaign(scenario.name), time.monotonic()
    peace = place / f'peace-{scenario.tool}'
    peace.mkdir()
    tool = processes.start(scenario.tool, scenario.command(peace), peace / 'log')
    if tool.wait() != 0:
        raise AssertionError(f'{scenario.name} fails undisturbed: {tool.text()[-2000:]}')
    whole, expected = time.monotonic() - tool.began, scenario.result(peace)
    if scenario.keeps:
        shutil.copyfile(peace / 'run' / 'checkpoint.pt', place / 'trained.pt') if 'det' in scenario.tool else None
    number = 0
    while sum(found.kills.values()) < kills:
        folder = place / f'{scenario.tool}-{number}'
        folder.mkdir()
        number += 1
        while True:
            left = kills - sum(found.kills.values())
            before = scenario.steps(folder)
            tool = processes.start(scenario.tool, scenario.command(folder), folder / 'log')
            if left > 0:
                _kill(tool, scenario, folder, before, chance.uniform(0.02, whole), chance.choice(names), found)
            else:
                tool.wait()
            if _ended(tool, scenario, folder, expected, found):
                break
            found.restarts += 1
        shutil.rmtree(folder)
    found.seconds = time.monotonic() - began
    return found


_codes: dict[int, int] = {}


def _kill(
    tool: processes.Tool, scenario: Scenario, folder: Path, before: int, after: float, name: str, found: Campaign
) -> None:
    """One kill; notes what is wrong with what it left."""
    running = not happens(tool.ended, after)
    if running:
        tool.send(SENT[name])
    code = tool.wait()
    _codes[tool.pid] = code
    if not running or code == 0:
        return
    found.kills[name] += 1
    text = tool.text()
    where = f'{name} after {after:.2f} s'
    early = code == _UNHANDLED.get(name) and ('run(main)' not in text or scenario.steps(folder) <= before)
    if code != CODES[name] and not early:
        found.problems.append(f'{where}: exit code {code}, expected {CODES[name]}: {text[-600:]}')
    elif 'Traceback' in text and not early:
        found.problems.append(f'{where}: a traceback: {text[-600:]}')
    found.problems += [f'{where}: {problem}' for problem in check_files(folder)]
    now = scenario.steps(folder)
    if now < before:
        found.problems.append(f'{where}: the state fell from step {before} to {now}')
    if scenario.keeps and name != 'SIGKILL' and not early and 'stopped after' not in text and now <= before:
        began = (folder / 'run' / 'metrics.jsonl').exists() and now >= 0
        found.lost[name] += int(began)


def _ended(tool: processes.Tool, scenario: Scenario, folder: Path, expected: object, found: Campaign) -> bool:
    """Whether the run came to its end; if so its result is compared."""
    code = _codes.pop(tool.pid, None)
    if code is None:
        code = 0 if 'error' not in tool.error() and 'Traceback' not in tool.text() else 1
    if code != 0:
        if code in (1, 2):
            found.problems.append(f'a restart failed: {tool.text()[-600:]}')
            return True
        return False
    found.finished += 1
    found.problems += [f'after the end: {problem}' for problem in check_files(folder)]
    result = scenario.result(folder)
    if result != expected:
        found.problems.append(
            f'the result differs from that of a run in peace: {str(result)[:300]} {str(expected)[:300]}'
        )
    return True


def run(kills: int, seed: int = 0, only: tuple[str, ...] = ('',)) -> list[Campaign]:
    """Kill all tools, an equal number of times each."""
    processes.preload()
    place = Path(tempfile.mkdtemp(prefix='kills-'))
    prepare(place)
    found = []
    try:
        every = scenarios(place)
        chosen = [s for s in every if any(part in s.name for part in only)]
        if any(s.name == 'evaluation' for s in chosen) and every[0] not in chosen:
            campaign(every[0], 0, place)
        for k, scenario in enumerate(chosen):
            share = kills // len(chosen) + (k < kills % len(chosen))
            found.append(campaign(scenario, share, place, seed))
            print(found[-1], flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return found
