"""The subcommand `kernels` of benchmark.py: the tensor core and CPDConv2d's forms against their baselines."""

from __future__ import annotations

import argparse
from pathlib import Path

from _cli import Parser

from _network_benchmarks import positive

from norton_timm.studies import benchmark_training, kernels


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser('kernels', description='Decomposition, distances, selection and training steps.')
    parser.add_argument('--only', nargs='+', choices=kernels.SECTIONS, default=list(kernels.SECTIONS), help='sections')
    parser.add_argument('--ranks', nargs='+', type=positive, default=[1, 2, 4, 8], help='CPD ranks')
    parser.add_argument(
        '--sample', type=positive, default=6, help="filters per layer for TensorLy's loop, extrapolated"
    )
    parser.add_argument('--full', action='store_true', help="run TensorLy's loop on all filters (minutes per rank)")
    parser.add_argument('--rounds', type=positive, default=3, help='timed training steps')
    parser.add_argument('--seed', type=int, default=0, help='of the random weights')
    parser.add_argument('--threads', type=positive, help="torch's threads; default: torch's own choice")
    parser.add_argument('--output', type=Path, help='JSON file to write')
    parser.set_defaults(call=_kernels)


def _kernels(args: argparse.Namespace) -> dict[str, object]:
    sample = None if args.full else args.sample
    note = 'all filters' if args.full else f'{sample} filters per layer, time extrapolated linearly'
    calls = {
        'cpd': lambda: kernels.benchmark_cpd(args.ranks, sample, args.seed),
        'r078': lambda: kernels.benchmark_r078(sample, args.seed),
        'pabs': kernels.benchmark_pabs,
        'training': lambda: benchmark_training(args.rounds, args.seed),
    }
    results = {}
    for name in dict.fromkeys(args.only):
        results[name] = calls[name]()
        print(f'\n{name}' + (f" (TensorLy's parafac on {note})" if name in ('cpd', 'r078') else ''))
        print(kernels.format_rows(results[name]), flush=True)
    goals = [dict(zip(('goal', 'measured', 'limit', 'met'), g)) for g in kernels.goals(results)]
    print('\n' + kernels.format_rows(goals))
    return {'parafac_sample': note, **results, 'goals': goals}
