"""Measure this machine: kernels, whole networks and detectors, and the training loop, each against its baseline.

python tools/benchmark.py kernels --only cpd r078 pabs
python tools/benchmark.py classification norton_resnet50.r078 --runtimes eager deployed
python tools/benchmark.py detection --task box --recipe full
python tools/benchmark.py detection-loop
"""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

from _cli import Parser, run

import _kernel_benchmarks
import _loop_benchmark
import _network_benchmarks
import torch

from norton_timm.studies import allocator, cpu_name
from norton_timm.utils import write_text


def main() -> None:
    parser = Parser(__doc__)
    make: Any = _subparser  # any callable will do, whatever argparse's type says
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=make)
    for module in (_kernel_benchmarks, _loop_benchmark, _network_benchmarks):
        module.add(commands)
    args = parser.parse_args()
    if args.output is not None and (not args.output.parent.is_dir() or args.output.suffix != '.json'):
        parser.error(f'--output: got {args.output}, expected a .json file in a folder that exists')
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results = args.call(args)
    if args.output is not None:
        machine: dict[str, Any] = {'processor': cpu_name(), 'cpus': os.cpu_count(), 'threads': torch.get_num_threads()}
        machine['allocator'] = allocator()
        versions = {'python': platform.python_version(), 'torch': torch.__version__}
        content = {'command': args.command, 'arguments': _without_output(sys.argv[1:]), 'machine': machine}
        write_text(args.output, json.dumps({**content, 'versions': versions, **results}, indent=2) + '\n')


def _subparser(**settings: Any) -> Parser:
    parser = Parser(settings['description'])
    parser.prog = settings['prog']
    return parser


def _without_output(words: list[str]) -> list[str]:
    kept = [word for word in words if not word.startswith('--output=')]
    if '--output' in kept:
        k = kept.index('--output')
        del kept[k : k + 2]
    return kept


if __name__ == '__main__':
    run(main)
