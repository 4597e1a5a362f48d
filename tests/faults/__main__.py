"""Command line of the fault harness."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    fuzz = commands.add_parser('fuzz', help='feed every surface with hostile input')
    fuzz.add_argument('--only', nargs='+', default=[''], help='surfaces whose name holds one of these')
    fuzz.add_argument('--count', type=int, help='inputs of each surface; default: those of a full run')
    fuzz.add_argument('--counts', type=json.loads, default={}, help='JSON, inputs by surface')
    fuzz.add_argument('--seed', type=int, default=0, help='of the first batch')
    fuzz.add_argument('--keep', type=Path, help='folder for the inputs of defects')
    kill = commands.add_parser('kill', help='kill the real tools at random moments')
    kill.add_argument('--kills', type=int, default=100)
    kill.add_argument('--seed', type=int, default=0)
    kill.add_argument('--only', nargs='+', default=[''], help='tools whose name holds one of these')
    disk = commands.add_parser('disk', help='full disks, damaged files, data that go away, a lost process')
    disk.add_argument('--times', type=int, default=10)
    disk.add_argument('--seed', type=int, default=0)
    disk.add_argument('--only', nargs='+', default=[''], help='faults whose name holds one of these')
    for command in (fuzz, kill, disk):
        command.add_argument('--no-report', action='store_true', help='leave REPORT.md as it is')
    args = parser.parse_args()

    if args.command == 'disk':
        from .disk import run as spoil
        from .report import write_faults

        rows = spoil(args.times, args.seed, tuple(args.only))
        if not args.no_report:
            write_faults(rows)
        return int(any(row['problems'] for row in rows.values()))
    if args.command == 'kill':
        from .kills import run
        from .report import write_kills

        campaigns = run(args.kills, args.seed, tuple(args.only))
        if not args.no_report:
            write_kills(campaigns)
        return int(any(c.problems for c in campaigns))

    from .fuzz import fuzz as feed
    from .fuzz import to_json
    from .report import write_fuzz
    from .surfaces import SURFACES

    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
        args.keep = args.keep.resolve()
    tallies = []
    for surface in SURFACES:
        if any(part in surface.name for part in args.only):
            tallies.append(feed(surface, args.counts.get(surface.name, args.count), args.seed, args.keep))
            print(to_json(tallies[-1]), flush=True)
    if not args.no_report:
        write_fuzz(tallies)
    return int(any(tally.defects for tally in tallies))


if __name__ == '__main__':
    sys.exit(main())
