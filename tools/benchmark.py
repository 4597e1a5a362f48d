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
from pathlib import Path
from typing import Any

import _kernel_benchmarks
import _loop_benchmark
import _network_benchmarks
import torch
from _cli import Parser, run

from norton_timm.network_benchmark import allocator, cpu_name


def main() -> None:
    parser = Parser(__doc__)
    make: Any = _subparser  # any callable will do, whatever argparse's type says
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=make)
    for module in (_kernel_benchmarks, _loop_benchmark, _network_benchmarks):
        module.add(commands)
    args = parser.parse_args()
    if args.output is not None and not args.output.parent.is_dir():
        parser.error(f'--output: the folder {args.output.parent} does not exist')
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results = args.call(args)
    if args.output is not None:
        machine: dict[str, Any] = {'processor': cpu_name(), 'cpus': os.cpu_count(), 'threads': torch.get_num_threads()}
        machine['allocator'] = allocator()
        versions = {'python': platform.python_version(), 'torch': torch.__version__}
        given = [word for word in sys.argv[1:] if word not in ('--output', str(args.output))]
        content = {'command': args.command, 'arguments': given, 'machine': machine, 'versions': versions, **results}
        _write(args.output, content)


def _subparser(**settings: Any) -> Parser:
    parser = Parser(settings['description'])
    parser.prog = settings['prog']
    return parser


def _write(path: Path, content: object) -> None:
    part = path.with_name(path.name + '.part')
    part.write_text(json.dumps(content, indent=2) + '\n')
    os.replace(part, path)


if __name__ == '__main__':
    run(main)
