"""The report: what was fed and killed, and what came of it, written from the results of the runs themselves."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fuzz import Tally
    from .kills import Campaign

HERE = Path(__file__).parent
RESULTS, REPORT = HERE / 'results.json', HERE / 'REPORT.md'


def write_fuzz(tallies: list[Tally]) -> None:
    """Take the tallies of a run; those of surfaces that it did not feed stay."""
    from .fuzz import to_json

    _update('fuzz', {tally.name: json.loads(to_json(tally)) for tally in tallies})


def write_kills(campaigns: list[Campaign]) -> None:
    """Likewise for campaigns."""
    _update('kills', {c.name: {**vars(c), 'kills': dict(c.kills), 'lost': dict(c.lost)} for c in campaigns})


def write_faults(rows: dict[str, dict[str, Any]]) -> None:
    """Likewise for the other faults: full disks, damaged files, data that go away."""
    _update('faults', rows)


def _update(part: str, rows: dict[str, Any]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results.setdefault(part, {}).update(rows)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + '\n')
    REPORT.write_text(text(results))


def text(results: dict[str, Any]) -> str:
    """The report in Markdown."""
    import torch

    lines = [
        '# Faults, bad input and hostile files',
        '',
        'Written by `python -m tests.faults fuzz`, `kill` and `disk`; `--only NAME` runs a part and updates its rows. '
        f'Python {platform.python_version()}, PyTorch {torch.__version__}.',
        '',
    ]
    fed = results.get('fuzz', {})
    if fed:
        total, bad = sum(r['inputs'] for r in fed.values()), sum(_bad(r) for r in fed.values())
        lines += [
            '## Fuzzed inputs',
            '',
            f'{total:,} inputs; {bad} ended otherwise than handled or refused with one line (traceback, over 10 s, '
            'more than 2 GiB, a write outside the output folder, a connection, code run).',
            '',
            '| surface | inputs | handled | refused | defects | slowest, s |',
            '|---|---:|---:|---:|---:|---:|',
        ]
        for name, row in fed.items():
            done = row['outcomes']
            lines.append(
                f'| {name} | {row["inputs"]:,} | {done.get("handled", 0):,} | {done.get("refused", 0):,} | '
                f'{_bad(row)} | {row["slowest_s"]} |'
            )
        lines.append('')
        for name, row in fed.items():
            lines += [f'- {name}: {kind}: `{detail[0][:160]}`' for kind, detail in row['defects'].items()]
    killed = results.get('kills', {})
    if killed:
        total = sum(sum(r['kills'].values()) for r in killed.values())
        bad = sum(len(r['problems']) for r in killed.values())
        lines += [
            '',
            '## Kills',
            '',
            f'{total} kills at random moments; {bad} left something wrong (a file under its final name that is not '
            'whole, a state older than before, another exit code than 143 or 130, another result than in peace).',
            '',
            '| tool | SIGKILL | SIGTERM | SIGINT | restarts | runs ended and compared | problems |',
            '|---|---:|---:|---:|---:|---:|---:|',
        ]
        for name, row in killed.items():
            counts = ' | '.join(str(row['kills'].get(s, 0)) for s in ('SIGKILL', 'SIGTERM', 'SIGINT'))
            lines.append(f'| {name} | {counts} | {row["restarts"]} | {row["finished"]} | {len(row["problems"])} |')
        lines.append('')
        lines += [f'- {name}: {problem[:300]}' for name, row in killed.items() for problem in row['problems']]
    other = results.get('faults', {})
    if other:
        lines += [
            '',
            '## Other faults',
            '',
            '| fault | times | told with one line | came through | problems |',
            '|---|---:|---:|---:|---:|',
        ]
        for name, row in other.items():
            lines.append(f'| {name} | {row["times"]} | {row["told"]} | {row["well"]} | {len(row["problems"])} |')
        lines.append('')
        lines += [f'- {name}: {problem[:300]}' for name, row in other.items() for problem in row['problems']]
    return '\n'.join(lines).rstrip() + '\n'


def _bad(row: dict[str, Any]) -> int:
    return sum(n for outcome, n in row['outcomes'].items() if outcome not in ('handled', 'refused'))
