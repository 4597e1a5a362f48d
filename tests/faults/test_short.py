"""Short forms of the fuzzers and of the kill harness; in full: `python -m tests.faults fuzz`, `kill`, `disk`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from .guard import ROOT

pytestmark = pytest.mark.timeout(900)  # they judge no speed, and machines that test are often busy

CHEAP = {
    'rates grammar': 200,
    'recipe YAML': 100,
    'detection configuration': 100,
    'classification configuration': 100,
    'page settings': 100,
    'COCO annotations': 150,
    'pictures': 150,
    'archives of images': 60,
    'videos': 40,
    'safetensors files': 60,
    'recipes in safetensors': 40,
    'pickled checkpoints': 100,
    'detector checkpoints': 12,
    'tool arguments': 60,
}


def harness(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The harness as its command line starts it, without a word in the report."""
    command = [sys.executable, '-m', 'tests.faults', *map(str, arguments), '--no-report']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def test_every_surface_handles_or_refuses_what_it_is_fed() -> None:
    done = harness('fuzz', '--counts', json.dumps(CHEAP), '--seed', 1_000_000)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row['surface'] for row in rows} == set(CHEAP), done.stderr
    assert all(row['inputs'] >= CHEAP[row['surface']] * 0.8 for row in rows)
    assert [row['defects'] for row in rows if row['defects']] == []
    assert done.returncode == 0


def test_killed_tools_go_on_from_the_last_complete_state() -> None:
    done = harness('kill', '--kills', 8, '--seed', 7)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count('problems=[]') == 5


def test_a_full_disk_and_damaged_files_are_told() -> None:
    done = harness('disk', '--times', 2, '--only', 'full disk: compression', 'damaged')
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("'problems': []") == 3
