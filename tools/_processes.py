"""Repeat a benchmark in fresh processes, because the place of a network in memory changes its time."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def rows_of_processes(count: int, ratios: Sequence[str]) -> list[Row]:
    """Run this command ``count`` times, one after the other, and return the medians of the runs' rows.

    Args:
        count: number of processes.
        ratios: keys of figures to keep for every run too, in a list under the key with ``_runs`` appended.

    Raises:
        ValueError: a run failed; it has printed the reason on stderr.
    """
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            path = Path(folder) / f'{number}.json'
            # an option that is given twice keeps its last value
            command = [sys.executable, *sys.argv, '--processes', '1', '--output', str(path)]
            print(f'process {number + 1} of {count}', flush=True)
            if code := subprocess.run(command).returncode:
                raise ValueError(f'process {number + 1} of {count} ended with exit code {code}')
            runs.append(json.loads(path.read_text(encoding='utf-8'))['rows'])
    return median_rows(runs, ratios)


def median_rows(runs: Sequence[Sequence[Row]], ratios: Sequence[str]) -> list[Row]:
    """Rows with each number's median over the runs, which measured the same cases in the same order.

    Other values are those of the first run.
    """
    merged = []
    for rows in zip(*runs, strict=True):
        row = {key: _median([r[key] for r in rows]) for key in rows[0]}
        merged.append(row | {f'{key}_runs': [r[key] for r in rows] for key in ratios})
    return merged


def _median(values: list[Any]) -> Any:
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    return statistics.median(values) if numbers else values[0]
