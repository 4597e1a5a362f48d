"""The subcommand `detection-loop` of benchmark.py: our training loop against torchvision's."""

from __future__ import annotations

import argparse
from pathlib import Path

from _cli import Parser

from _network_benchmarks import positive

from norton_timm.studies import format_rows


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser('detection-loop', description="Our training loop and torchvision's, side by side.")
    parser.add_argument('--config', default='configs/detection/sample_box.yaml', help='YAML file of a run')
    parser.add_argument('--data', help='folder in COCO layout, by default data/coco or the sample set')
    parser.add_argument('--images', type=positive, help='images of an epoch; default: all')
    parser.add_argument('--rounds', type=positive, default=6, help='epochs of each loop that count')
    parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', help='e.g. data.workers=2')
    parser.add_argument('--threads', type=positive, help="torch's threads; default: torch's own choice")
    parser.add_argument('--output', type=Path, help='JSON file to write')
    parser.set_defaults(call=_detection_loop)


def _detection_loop(args: argparse.Namespace) -> dict[str, object]:
    from detection.data import find_data
    from detection.studies import benchmark_loop
    from detection.training import load_config
    from norton_timm.utils import choose_device

    config = load_config(args.config, args.set, {'data.limit': args.images})
    source = find_data(args.data or config.data.root)
    results = benchmark_loop(config, source.root, device=choose_device(config.device), rounds=args.rounds)
    print(format_rows(results['rounds']))
    print(f"images a second, medians: {results['ours']:.3f} ours, {results['reference']:.3f} torchvision's reference "
          f'loop; ratio {results["ratio"]:.3f}')  # fmt: skip
    return results
