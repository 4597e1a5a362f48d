"""The subcommands `classification`, `forms` and `detection` of benchmark.py: whole networks, timed in turns."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _cli import Parser

from _processes import rows_of_processes

from norton_timm.inference import read_images
from norton_timm.studies import format_rows, networks
from norton_timm.studies import forms as forms_benchmark

COLUMNS = (
    'model', 'network', 'runtime', 'batch', 'gmacs', 'ms', 'p95_ms', 'images_per_s', 'peak_mb', 'speedup',
    'speedup_p10',
)  # fmt: skip


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected an integer of at least 1, got {text!r}')
    return int(text)


def _common(parser: Parser, call: Any, seconds: float, choices: Sequence[str], runtimes: Sequence[str]) -> None:
    parser.add_argument('--runtimes', nargs='+', choices=choices, default=list(runtimes), help='some')
    parser.add_argument('--seconds', type=float, default=seconds, help='about how long to measure each case')
    parser.add_argument('--threads', type=positive, help="torch's threads; default: torch's own choice")
    parser.add_argument('--output', type=Path, help='JSON file to write; the picture gets the same name in .png')
    parser.set_defaults(call=call)


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser('classification', description='Dense against compressed classifiers.')
    parser.add_argument(
        'models', nargs='*', default=['norton_resnet50.r078'], help="tags, patterns such as 'norton_*', or .safetensors"
    )
    parser.add_argument('--batches', nargs='+', type=positive, default=[1, 8], help='images at a time')
    _common(parser, _classification, 4.0, networks.RUNTIMES, networks.RUNTIMES)
    _add_processes(parser)
    parser = commands.add_parser('forms', description='What deploy chooses against every layer in one form.')
    parser.add_argument('models', nargs='*', default=list(forms_benchmark.MODELS), help='dense timm models')
    parser.add_argument('--batch', type=positive, default=1, help='images at a time')
    parser.add_argument('--rank', type=positive, default=1, help='of the decomposed layers')
    parser.add_argument('--seconds', type=float, default=3.0, help='about how long to measure each network')
    parser.add_argument('--threads', type=positive, help="torch's threads; default: torch's own choice")
    parser.add_argument('--output', type=Path, help='JSON file to write')
    _add_processes(parser)
    parser.set_defaults(call=_forms)
    parser = commands.add_parser('detection', description='Dense against compressed R-CNNs, stage by stage.')
    parser.add_argument('--checkpoint', type=Path, help='your own detector: .pt of train_det.py, or of torchvision')
    parser.add_argument('--task', choices=('box', 'mask', 'keypoint'), help='kind of detector; box if none')
    parser.add_argument('--backbone', help='of the compressed detector; norton_resnet50.r078 if none')
    parser.add_argument('--recipe', help="what is compressed, see build_detector's recipes; backbone if none")
    parser.add_argument('--size', nargs=2, type=positive, default=[800, 1066], metavar=('H', 'W'), help='of the image')
    parser.add_argument('--image', type=Path, help='picture to run on, resized; default: random pixels')
    _common(parser, _detection, 20.0, networks.RUNTIMES_OF_DETECTORS, ('eager', 'deployed'))


def _add_processes(parser: Parser) -> None:
    parser.add_argument('--processes', type=positive, default=1, help='measure in so many fresh ones; medians of them')


def _classification(args: argparse.Namespace) -> dict[str, Any]:
    from norton_timm.studies import zoo_names

    files = [name for name in args.models if networks.is_file_name(name)]
    tags = [name for name in args.models if name not in files]
    found_names = zoo_names(tags) if tags else []
    names = [*files, *(name for name in found_names if name.startswith(('norton_', 'coring_')))]
    if not names:
        raise ValueError(f'{", ".join(args.models)}: got no compressed network, expected norton_* or coring_*')
    rows: list[dict[str, Any]] = []
    if args.processes > 1:
        rows = rows_of_processes(args.processes, ['speedup', 'speedup_p10'])
        print(f'medians of {args.processes} processes\n{format_rows([{k: row[k] for k in COLUMNS} for row in rows])}')
        return _finish(args, rows)
    cache: dict[Any, Any] = {}
    for name in names:
        found = networks.benchmark_classifier(name, args.batches, args.runtimes, args.seconds, cache)
        print(format_rows([{k: row[k] for k in COLUMNS} for row in found]), flush=True)
        rows += found
    return _finish(args, rows)


def _forms(args: argparse.Namespace) -> dict[str, Any]:
    from timm import is_model

    unknown = [name for name in args.models if not is_model(name)]
    if unknown:
        raise ValueError(f'{", ".join(unknown)}: no such model')
    rows = []
    if args.processes > 1:
        rows = rows_of_processes(args.processes, ['over_slowest', 'over_fastest'])
    for name in args.models if not rows else []:
        row = forms_benchmark.benchmark_forms(name, args.rank, batch=args.batch, seconds=args.seconds)
        print(format_rows([{k: v for k, v in row.items() if k != 'layers'}]), flush=True)
        rows.append(row)
    slowest, fastest = (max(row[f'over_{end}'] for row in rows) for end in ('slowest', 'fastest'))
    print(f'at most {slowest:.3f} of the slowest fixed form and {fastest:.3f} of the fastest')
    return {'rows': rows}


def _detection(args: argparse.Namespace) -> dict[str, Any]:
    from detection.studies import DETECTOR_STAGES, benchmark_detector

    size = (args.size[0], args.size[1])
    image = read_images([args.image], size)[0] if args.image is not None else None
    made = {k: v for k in ('task', 'backbone', 'recipe') if (v := getattr(args, k)) is not None}
    if args.checkpoint is not None and made.keys() - {'task'}:
        raise ValueError('--checkpoint excludes --backbone and --recipe: the file says what is in it')
    rows = benchmark_detector(
        **made, size=size, runtimes=args.runtimes, seconds=args.seconds, image=image, checkpoint=args.checkpoint
    )
    columns = [c for c in COLUMNS if c not in ('model', 'batch')]
    print(format_rows([{k: row[k] for k in columns} for row in rows]))
    staged = [{**{k: row[k] for k in ('network', 'runtime')}, **row['stages']} for row in rows if row['stages']]
    if staged:
        print(f'\nms of {", ".join(DETECTOR_STAGES)}\n{format_rows(staged)}')
    return _finish(args, rows)


def _finish(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if args.output is not None:
        networks.plot_speedup(rows, args.output.with_suffix('.png'))
    return {'rows': rows}
