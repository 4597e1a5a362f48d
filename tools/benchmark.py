"""Measure this machine: `benchmark.py kernels` times the tensor core and CPDConv2d's forms against their baselines."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from _cli import Parser, run

from norton_timm import kernel_benchmark as kernels


def main() -> None:
    parser = Parser(__doc__)
    make: Any = _subparser  # any callable will do, whatever argparse's type says
    commands = parser.add_subparsers(dest='command', required=True, metavar='kernels', parser_class=make)
    _add_kernels(commands)
    args = parser.parse_args()
    if args.output is not None and not args.output.parent.is_dir():
        parser.error(f'--output: the folder {args.output.parent} does not exist')
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results = args.call(args)
    if args.output is not None:
        machine = {'processor': platform.processor(), 'cpus': os.cpu_count(), 'threads': torch.get_num_threads()}
        versions = {'python': platform.python_version(), 'torch': torch.__version__}
        _write(args.output, {'command': args.command, 'machine': machine, 'versions': versions, **results})


def _subparser(**settings: Any) -> Parser:
    parser = Parser(settings['description'])
    parser.prog = settings['prog']
    return parser


def _add_kernels(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser('kernels', description='Decomposition, distances, selection and training steps.')
    parser.add_argument('--only', nargs='+', choices=kernels.SECTIONS, default=list(kernels.SECTIONS), help='sections')
    parser.add_argument('--ranks', nargs='+', type=_positive, default=[1, 2, 4, 8], help='CPD ranks')
    parser.add_argument(
        '--sample', type=_positive, default=6, help="filters per layer for TensorLy's loop, extrapolated"
    )
    parser.add_argument('--full', action='store_true', help="run TensorLy's loop on all filters (minutes per rank)")
    parser.add_argument('--rounds', type=_positive, default=3, help='timed training steps')
    parser.add_argument('--seed', type=int, default=0, help='of the random weights')
    parser.add_argument('--threads', type=_positive, help="torch's threads; default: torch's own choice")
    parser.add_argument('--output', type=Path, help='JSON file to write')
    parser.set_defaults(call=_kernels)


def _kernels(args: argparse.Namespace) -> dict[str, object]:
    sample = None if args.full else args.sample
    note = 'all filters' if args.full else f'{sample} filters per layer, time extrapolated linearly'
    calls = {
        'cpd': lambda: kernels.benchmark_cpd(args.ranks, sample, args.seed),
        'r078': lambda: kernels.benchmark_r078(sample, args.seed),
        'pabs': kernels.benchmark_pabs,
        'training': lambda: kernels.benchmark_training(args.rounds, args.seed),
    }
    results = {}
    for name in dict.fromkeys(args.only):
        results[name] = calls[name]()
        print(f'\n{name}' + (f" (TensorLy's parafac on {note})" if name in ('cpd', 'r078') else ''))
        print(kernels.format_table(results[name]), flush=True)
    goals = [dict(zip(('goal', 'measured', 'limit', 'met'), g)) for g in kernels.goals(results)]
    print('\n' + kernels.format_table(goals))
    return {'parafac_sample': note, **results, 'goals': goals}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected an integer of at least 1, got {text!r}')
    return int(text)


def _write(path: Path, content: object) -> None:
    part = path.with_name(path.name + '.part')
    part.write_text(json.dumps(content, indent=2) + '\n')
    os.replace(part, path)


if __name__ == '__main__':
    run(main)
