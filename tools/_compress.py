"""The two ways of compress.py, with images to a budget and by weights alone, and what it writes and says at its end."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm import CompressionSpec, find_spec, save, to_html, tune_forms
from norton_timm.compression import CompressionReport, compress
from norton_timm.profiling import channels_last, compare_latency, default_input, ready_to_run
from norton_timm.training import LabelledAccuracy, Shrunk, calibration_images, shrink, shrink_html
from norton_timm.utils import write_text

_IMAGES, _QUICK_IMAGES = 1000, 144
_QUICK_HELD = 2 / 3  # share of them to measure on; the time goes with the others
_AIM = 0.7  # of the dense network's milliseconds: the target that is proposed where the result is slower
_LABELLED = 'LABELLED'  # stands for the user's labelled images where they are not known
_RANDOM = 'the weights are random; --pretrained or --checkpoint gives others'


@dataclass
class Outcome:
    """A compressed network and what is said of it.

    Attributes:
        model, spec, report: the network, its recipe, what was done to each layer.
        times: milliseconds by name.
        table: the figures of the whole network, as text.
        notes: what the user should know before it is relied on.
        result: of ``shrink``; None without images and a budget.
    """

    model: nn.Module
    spec: CompressionSpec
    report: CompressionReport
    times: dict[str, float]
    table: str
    notes: list[str]
    result: Shrunk | None = None


def run_search(
    args: argparse.Namespace, dense: nn.Module, budget: Mapping[str, float], tuning: Mapping[str, Any]
) -> Outcome:
    """Search, repair, tune and measure with images."""
    image = default_input(dense, args.input_size)
    accuracy = _accuracy(args, dense, image)
    began = time.perf_counter()
    images = torch.cat(_images(args, dense, image))
    seconds = {'images': time.perf_counter() - began}
    less: dict[str, Any] = {'held_share': _QUICK_HELD, 'deployed': False} if args.quick else {}
    result = shrink(
        dense.eval(), images, budget, example_input=image, seed=args.seed or 0, method=args.method or 'norton',
        accuracy=accuracy, allow_resolution=args.allow_resolution, progress=True, **less, **tuning,
    )  # fmt: skip
    result.seconds = {**seconds, **result.seconds}
    notes = [_RANDOM] if _is_random(args) else []
    if args.quick:
        notes.append(f'a quick look: {len(images)} images, no tuning, milliseconds of networks as they are; without '
                     '--quick the result is better')  # fmt: skip
    how = 'as they are' if args.quick else 'each in its fastest form'
    return Outcome(
        result.model, result.spec, result.report, {row.name: row.ms for row in result.rows[:2] if row.ms is not None},
        f'{result}\nmilliseconds of {_where(image)}, {how}', [*notes, *result.warnings], result,
    )  # fmt: skip


def run_spec(
    args: argparse.Namespace, dense: nn.Module, spec: CompressionSpec | None, budget: Mapping[str, Any]
) -> Outcome:
    """Compress by a recipe or to a budget; images, if there are any, repair only."""
    image = default_input(dense, args.input_size)
    accuracy = _accuracy(args, dense, image)
    batches = _images(args, dense, image) if args.images else None
    method = {} if args.method is None else {'method': args.method}
    spec = spec or find_spec(dense, **budget, **method, example_input=image)
    model, report = compress(dense, spec, image, calibration=batches)
    tuned = ready_to_run(model)  # a copy: the file does not keep what is fastest on this machine
    tune_forms(tuned, channels_last(image))
    times = compare_latency({'dense': dense, 'compressed': model, 'tuned': tuned}, image)
    before, after, best = times.values()
    speed = f'{before / after:.2f} times as fast; {best:.1f} ms with forms tuned here'
    table = f'measured: {before:.1f} -> {after:.1f} ms ({speed}) for {_where(image)}'
    notes = [_RANDOM] if _is_random(args) else []
    if accuracy is None:
        notes.append(
            'nothing measured the accuracy; tools/eval_cls.py does, and a budget with --images compares outputs'
        )
    else:
        table += f'\ntop-1: {accuracy(dense):.1f} -> {accuracy(model):.1f} % on {accuracy.images:,} labelled images'
    if min(after, best) > before:
        target = f'--latency-ms {_AIM * before:.3g}'
        notes.append(f'the compressed network is slower here than the dense one; {target} makes time the target')
    return Outcome(model, spec, report, times, table, notes)


def write(args: argparse.Namespace, outcome: Outcome, commands: list[tuple[str, str]]) -> str:
    """Write the network, the page and the report; the words that say so."""
    result, latency = outcome.result, (outcome.times['dense'], outcome.times['compressed'])
    found = None if result is None else result.to_dict()
    save(outcome.model, args.output, spec=outcome.spec, latency_ms=outcome.times, label_free=found)
    told = f'wrote {args.output}: {args.output.stat().st_size / 1e6:.1f} MB'
    as_html = args.report is not None and args.report.suffix == '.html'
    if args.report is not None and not as_html:
        write_text(args.report, outcome.report.to_json())
    if result is not None:
        page = args.report if as_html else args.output.with_suffix('.html')
        write_text(page, shrink_html(result, args.model, notes=outcome.notes, commands=commands))
        return f'{told}, and {page}'
    if as_html:
        write_text(args.report, to_html(outcome.report, args.model, latency))
    return told


def next_commands(args: argparse.Namespace) -> list[tuple[str, str]]:
    """How to go on with the file: (words, command), to be run from the same folder.

    Where no labelled images are known that the command can use, ``LABELLED`` stands for them.
    """
    out, data, images = str(args.output), args.labelled, args.images
    trains = data is not None and (not Path(data).is_dir() or any(
        (Path(data) / name).is_dir() for name in ('train', 'cifar-10-batches-py')
    ))  # fmt: skip
    weights = ['--pretrained'] if args.pretrained else ['--weights', str(args.checkpoint)] if args.checkpoint else []
    settings = [f'start={out}', 'optim.lr=0.01', *([] if weights else ['distill.weight=0'])]
    for name in ('mean', 'std'):
        if getattr(args, name):
            settings.append(f'data.{name}=[{",".join(f"{v:g}" for v in getattr(args, name))}]')
    return [
        (
            'measure the accuracy' + ('' if data else f' ({_LABELLED}: a folder with a folder for each class)'),
            _command('eval_cls.py', out, '--data', data or _LABELLED),
        ),
        (
            'export it' + ('' if images else ' (PICTURES: a folder of some)'),
            _command(
                'export.py', '--weights', out, '--images', images or 'PICTURES',
                '--output', args.output.with_suffix('.onnx'),
            ),
        ),
        (
            'train it further, with labels' + ('' if trains else f' ({_LABELLED}: a folder with train/ and val/)'),
            _command(
                'train_cls.py', args.model, *weights, '--recipe', out, '--data', data if trains else _LABELLED,
                '--output', args.output.with_name(f'{args.output.stem}_trained'), '--set', *settings,
            ),
        ),
    ]  # fmt: skip


def _command(tool: str, *arguments: object) -> str:
    return shlex.join(['python', str(Path(sys.argv[0]).with_name(tool)), *map(str, arguments)])


def _accuracy(args: argparse.Namespace, dense: nn.Module, image: Tensor) -> LabelledAccuracy | None:
    if args.labelled is None:
        return None
    return LabelledAccuracy(args.labelled, dense, (image.shape[2], image.shape[3]), progress=True)


def _images(args: argparse.Namespace, dense: nn.Module, image: Tensor) -> list[Tensor]:
    wanted = args.calibration_images
    if wanted is None:
        wanted = _QUICK_IMAGES if args.quick else _IMAGES
    return calibration_images(args.images, dense, wanted, image.shape[2:], progress=True)


def _is_random(args: argparse.Namespace) -> bool:
    return not args.pretrained and args.checkpoint is None


def _where(image: Tensor) -> str:
    return f'one image of {tuple(image.shape[1:])} on {image.device.type}, {torch.get_num_threads()} threads'
