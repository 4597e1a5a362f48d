"""Faults that are no signals: a full disk, data that go away while they are read, damaged files, a lost process."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from fake_clock import happens, wait_until
from tool_runner import finish, run_process, start_tool, torchrun

from . import processes
from .scenarios import Scenario, check_files, prepare, scenarios, train_box

Row = dict[str, Any]


def full_disk(scenario: Scenario, times: int, place: Path, seed: int = 0) -> Row:
    """A tool whose files may not grow beyond a random size; what it had written before must stay."""
    chance, row = random.Random(seed), _row()
    for k in range(times):
        folder = place / f'full-{scenario.tool}-{k}'
        folder.mkdir()
        tool = processes.start(scenario.tool, scenario.command(folder), folder / 'log', int(2 ** chance.uniform(9, 22)))
        _judge(tool.wait(), tool, row)
        row['problems'] += check_files(folder)
        shutil.rmtree(folder)
    return row


def data_removed(scenario: Scenario, times: int, place: Path, seed: int = 0) -> Row:
    """The data set goes away at a random moment; with it back, the run goes on to its end."""
    chance, row = random.Random(seed), _row()
    for k in range(times):
        folder, data, away = place / f'gone-{k}', place / 'sample', place / 'away'
        folder.mkdir()
        tool = processes.start(scenario.tool, scenario.command(folder), folder / 'log')
        happens(tool.ended, within=chance.uniform(0.2, 3))
        data.rename(away)
        _judge(tool.wait(), tool, row)
        away.rename(data)
        again = processes.start(scenario.tool, scenario.command(folder), folder / 'log')
        if again.wait() != 0:
            row['problems'].append(f'the restart failed: {again.text()[-500:]}')
        row['problems'] += check_files(folder)
        shutil.rmtree(folder)
    return row


def damaged(path: Path, read: Any, times: int, seed: int = 0) -> Row:
    """A file of weights with bits flipped or its end cut off is refused, or read as it was."""
    chance, row = random.Random(seed), _row()
    content = path.read_bytes()
    expected = read(path)
    copy = path.with_name(f'damaged{path.suffix}')
    for _ in range(times):
        data = bytearray(content)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        else:
            for _ in range(chance.choice([1, 1, 8])):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        copy.write_bytes(data)
        row['times'] += 1
        try:
            found = read(copy)
        except ValueError:
            row['told'] += 1
        except Exception as error:
            row['problems'].append(f'{type(error).__name__}: {error}')
        else:
            row['well'] += 1
            if found != expected:
                row['problems'].append('read, but not as it was')
    return row


def lost_process(times: int, place: Path, seed: int = 0) -> Row:
    """One of two processes of a torchrun job is killed; the job ends, and a restart goes on to the end."""
    chance, row = random.Random(seed), _row()
    for k in range(times):
        folder = place / f'lost-{k}'
        folder.mkdir()
        command = ['train_det.py', *train_box(place, folder / 'run')]
        with (folder / 'log').open('w') as log:
            job = start_tool(*command, launcher=torchrun(2), stdout=log, stderr=subprocess.STDOUT, cwd=folder)

            def begun(checkpoint: Path = folder / 'run' / 'checkpoint.pt', job: Any = job) -> bool:
                return checkpoint.exists() or job.poll() is not None

            # the file is seen up to so much later, the kill may fall anywhere
            wait_until(begun, every=chance.uniform(0.01, 1))
            children = Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text().split()
            for child in children[k % 2 : k % 2 + 1]:
                os.kill(int(child), signal.SIGKILL)
            code = finish(job).code
        row['times'] += 1
        row['told'] += int(code != 0)
        row['problems'] += check_files(folder)
        again = run_process(*command, '--resume', launcher=torchrun(2), cwd=folder)
        row['well'] += int(again.code == 0)
        if again.code:
            row['problems'].append(f'the restart failed: {again.err[-500:]}')
    return row


def _row() -> Row:
    return {'times': 0, 'told': 0, 'well': 0, 'problems': []}


def _judge(code: int, tool: processes.Tool, row: Row) -> None:
    row['times'] += 1
    row['well'] += int(code == 0)
    row['told'] += int(code in (1, 2) and bool(tool.error()))
    if code not in (0, 1, 2) or (code and not tool.error()) or 'Traceback' in tool.text():
        row['problems'].append(f'exit code {code}: {tool.text()[-700:]}')


def run(times: int, seed: int = 0, only: tuple[str, ...] = ('',)) -> dict[str, Row]:
    """All of these faults, so many times each."""
    from detection.training.checkpoint import load_checkpoint
    from norton_timm import load

    from .scenarios import digest

    processes.preload()
    place = Path(tempfile.mkdtemp(prefix='disk-'))
    found: dict[str, Row] = {}
    try:
        prepare(place)
        every = {s.name: s for s in scenarios(place)}
        made = place / 'made'
        made.mkdir()
        for name in ('training a detector', 'compression'):
            assert processes.start(every[name].tool, every[name].command(made), made / 'log').wait() == 0
        shutil.copyfile(made / 'run' / 'checkpoint.pt', place / 'trained.pt')
        jobs: dict[str, Any] = {
            **{f'full disk: {name}': lambda s=s: full_disk(s, times, place, seed) for name, s in every.items()},
            'data removed: training a detector': lambda: data_removed(every['training a detector'], times, place, seed),
            'damaged checkpoint of a detector': lambda: damaged(
                made / 'run' / 'checkpoint.pt', lambda p: digest(load_checkpoint(p)['model']), 20 * times, seed
            ),
            'damaged compressed network': lambda: damaged(
                made / 'out.safetensors', lambda p: digest(load(p).state_dict()), 20 * times, seed
            ),
            'one of two processes killed': lambda: lost_process(max(1, times // 5), place, seed),
        }
        for name, job in jobs.items():
            if any(part in name for part in only):
                found[name] = job()
                print(name, found[name], flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return found
