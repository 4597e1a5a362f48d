"""The study `label-free` of reproduce.py: compression without labels beside its controls."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from _cli import Parser, when_stopped

SHARED = Path(os.environ.get('NORTON_TEST_DATA', Path(__file__).resolve().parents[2] / 'shared' / 'data'))
IMAGENET = '$NORTON_TEST_DATA/imagenet'
STUDIES = ('rank', 'tag', 'criterion', 'label-free')
STEPS = 300
OTHERS = ('config', 'control', 'epochs', 'no_tuning', 'set', 'plot')  # options of the other studies
NAMES = {
    'networks': 'networks; by default the four of ImageNet and the four of CIFAR-10',
    'methods': 'ours, l1, random, geometric_median, uniform, torch_pruning, resolution; by default all',
    'resolutions': 'fixed, free: whether ours may lower the resolution; by default both',
}


def add(parser: Parser) -> None:
    """Add the options that choose what is measured."""
    group = parser.add_argument_group('options of --study label-free')
    for name, told in NAMES.items():
        group.add_argument(f'--{name}', nargs='+', help=told)
    group.add_argument('--macs', nargs='+', type=float, help='shares to keep; by default 0.7 0.5, for CIFAR-10 0.5 0.3')
    group.add_argument('--seeds', nargs='+', type=int, help='by default 0 1 2')
    group.add_argument('--images', type=int, help='unlabelled images; by default 1000 of ImageNet, 500 of CIFAR-10')
    group.add_argument('--steps', type=int, help=f'of tuning; by default {STEPS}')
    group.add_argument('--minutes', type=float, help='of tuning, instead of steps')
    group.add_argument('--imagenet', type=Path, help=f'folder with imagenet_nets.py; by default {IMAGENET}')


def is_asked(args: argparse.Namespace) -> bool:
    """Whether this study is asked for; options that do not belong together are refused."""
    asked = args.study == 'label-free'
    for name in OTHERS if asked else (*NAMES, 'macs', 'seeds', 'images', 'steps', 'minutes', 'imagenet'):
        value = getattr(args, name)
        if value is not None and value is not False and value != []:
            option = f'--{name.replace("_", "-")}'
            raise ValueError(f'got {option} {"with" if asked else "without"} --study label-free')
    return asked


def measure(args: argparse.Namespace) -> None:
    """Measure what is missing, print each row, and draw all of them."""
    from norton_timm import studies

    if args.device not in ('auto', 'cpu'):
        raise ValueError(f'device: got {args.device}, expected cpu: the study is measured on processors')
    output = args.output or Path('results') / 'label_free.csv'
    if output.suffix != '.csv':
        raise ValueError(f'output: got {output}, expected a .csv file; the picture stands beside it')
    networks = studies.TrainedNetworks(
        args.imagenet or SHARED / 'imagenet', args.dense or SHARED, args.data, args.images
    )
    cells = studies.study_cells(
        args.networks or (*studies.IMAGENET, *studies.CIFAR), args.macs, args.methods or studies.ENTRANTS,
        args.seeds or (0, 1, 2), args.resolutions or (studies.FIXED, studies.FREE),
    )  # fmt: skip
    limit = studies.Limit(STEPS if args.steps is None and args.minutes is None else args.steps, args.minutes)
    with when_stopped(lambda: f'the rows so far are in {output}; the same command goes on'):
        for row in studies.run_cells(cells, networks, output, limit, progress=True):
            print(f'{row["network"]} at {row["macs_got"]} of the MACs, {row["pixels"]} pixels, {row["method"]}, '
                  f'seed {row["seed"]}: {row["top1_dense"]:.2f} -> {row["top1"]:.2f} %, expected loss '
                  f'{row["expected_loss"]:.1f} ({row["expected_low"]:.1f} to {row["expected_high"]:.1f}) points',
                  flush=True)  # fmt: skip
    print(f'wrote {studies.plot_equal_macs(studies.read_rows(output), output.with_suffix(".png"))}')
