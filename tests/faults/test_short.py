"""Short forms of the fuzzers and of the kill harness; in full: `python -m tests.faults fuzz`, `kill`, `disk`."""

from __future__ import annotations

import json

import pytest
from tool_runner import ROOT, Done, run_python

pytestmark = pytest.mark.timeout(900)  # they judge no speed, and machines that test are often busy

CHEAP = {
    'rates grammar': 200,
    'recipe YAML': 100,
    'detection configuration': 100,
    'classification configuration': 100,
    'page settings': 100,
    'COCO annotations': 150,
    'label maps': 60,
    'layouts': 100,
    'pictures': 150,
    'archives of images': 60,
    'videos': 40,
    'frame times': 40,
    'safetensors files': 60,
    'recipes in safetensors': 40,
    'pickled checkpoints': 100,
    'detector checkpoints': 12,
    'tool arguments': 60,
}


def harness(*arguments: object) -> Done:
    """The harness as its command line starts it, without a word in the report."""
    return run_python('-m', 'tests.faults', *arguments, '--no-report', cwd=ROOT, limit_s=850)


def test_every_surface_handles_or_refuses_what_it_is_fed() -> None:
    done = harness('fuzz', '--counts', json.dumps(CHEAP), '--seed', 1_000_000)
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert {row['surface'] for row in rows} == set(CHEAP), done.err
    assert all(row['inputs'] >= CHEAP[row['surface']] * 0.8 for row in rows)
    assert [row['defects'] for row in rows if row['defects']] == []
    assert done.code == 0


def test_killed_tools_go_on_from_the_last_complete_state() -> None:
    done = harness('kill', '--kills', 8, '--seed', 7)
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    assert done.out.count('problems=[]') == 5


def test_a_full_disk_and_damaged_files_are_told() -> None:
    done = harness('disk', '--times', 2, '--only', 'full disk: compression', 'damaged')
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    assert done.out.count("'problems': []") == 3
