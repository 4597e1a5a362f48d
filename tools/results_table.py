"""Print the README's tables of measurements, from the benchmarks' files in results/.

python tools/results_table.py
python tools/results_table.py --accuracy
"""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _cli import Parser, run

Row = tuple[str, str, str]  # what, measured, command

RESULTS = Path(__file__).resolve().parents[1] / 'results'


def read(folder: Path, name: str) -> Any:
    """A benchmark's file."""
    return json.loads((folder / f'{name}.json').read_text(encoding='utf-8'))


def command_of(measured: Any) -> str:
    """The command that wrote a benchmark's file."""
    allocator = measured.get('machine', {}).get('allocator', '')
    preload = f'LD_PRELOAD={allocator} ' if allocator.startswith('lib') else ''
    return f'{preload}python tools/benchmark.py {shlex.join(measured["arguments"])}'


def kernel_rows(folder: Path) -> Iterator[Row]:
    kernels = read(folder, 'kernels')
    ranks = ' / '.join(str(row['rank']) for row in kernels['cpd'])
    times = ' / '.join(f'{row["speedup"]:.0f}' for row in kernels['cpd'])
    sample = kernels['parafac_sample'].partition(' ')[0]
    worst = math.ceil(1000 * max(row['ours_nmse'] / row['parafac_nmse'] for row in kernels['cpd'])) / 1000
    yield (
        f"CPD of ResNet-50's sixteen 3x3 layers at rank {ranks}",
        f"{times} times as fast as a loop over TensorLy's `parafac` ({sample} filters a layer, extrapolated), "
        f'at no more than {worst:.3f} of its error',
        command_of(kernels),
    )
    seconds = kernels['r078'][0]['ours_s']
    yield 'decomposition + PABS + selection, ResNet-50 r078', f'{seconds:.1f} s', 'the same'
    pabs = kernels['pabs'][-1]
    yield (
        f'PABS of all pairs of {pabs["filters"]:,} filters of 512x3x3, rank 1',
        f'{pabs["ours_s"]:.2f} s, {pabs["peak_mb"] / 1000:.1f} GB in all',
        'the same',
    )


def training_rows(folder: Path) -> Iterator[Row]:
    steps = read(folder, 'training_steps')
    for row in steps['training']:
        yield (
            f"a training step of `{row['model']}` over the uncompressed network's, {row['precision']}",
            f"{row['dense_over_uncompressed']:.2f}; the authors' block takes "
            f'{row["authors_block_over_dense"]:.1f} times our step, our factored form {row["factored_over_dense"]:.1f}',
            command_of(steps),
        )


def latency_rows(folder: Path) -> Iterator[Row]:
    """Each compressed network beside the dense one in the same runtime and the dense one with fewer pixels."""
    for name in ('classification', 'exported', 'exported_one_core', 'box', 'mask', 'keypoint'):
        measured = read(folder, f'latency_{name}')
        cores = ', one core' * (measured['machine']['threads'] == 1)
        cases: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
        for row in measured['rows']:
            kind = 'control' if ' at ' in row['network'] else row['network']
            cases.setdefault((row['model'], row['runtime'], row['batch']), {})[kind] = row
        for (model, runtime, batch), case in cases.items():
            ours, control = case['compressed'], case['control']
            yield (
                f'{model}, {runtime}, batch {batch}{cores}',
                f'{case["dense"]["ms"]:.0f} -> {ours["ms"]:.0f} ms: {ours["speedup"]:.1f} times as fast '
                f'({control["network"]}: {control["speedup"]:.1f}), {case["dense"]["gmacs"]:.1f} -> '
                f'{ours["gmacs"]:.1f} GMACs',
                command_of(measured),
            )


def zoo_rows(folder: Path) -> Iterator[Row]:
    """All networks of the zoo beside their dense ones, in short."""
    for data in ('CIFAR', 'ImageNet'):
        measured = read(folder, f'latency_zoo_{data.lower()}')
        for batch in sorted({row['batch'] for row in measured['rows']}):
            ours = [row for row in measured['rows'] if row['network'] == 'compressed' and row['batch'] == batch]
            least, most = (choose(ours, key=lambda row: row['speedup']) for choose in (min, max))
            yield (
                f'the {len(ours)} compressed {data} networks, deployed, batch {batch}',
                f'{least["speedup"]:.2f} (`{least["model"]}`) to {most["speedup"]:.1f} (`{most["model"]}`) times as '
                'fast as their dense networks',
                command_of(measured),
            )


def close_rows(folder: Path) -> Iterator[Row]:
    """Networks that were about as fast as their dense ones in the zoo's run, measured again in fresh processes."""
    measured = read(folder, 'latency_zoo_close')
    for row in measured['rows']:
        if row['network'] == 'compressed':
            runs = row['speedup_runs']
            yield (
                f'`{row["model"]}`, deployed, batch {row["batch"]}, {len(runs)} processes',
                f'{min(runs):.2f} to {max(runs):.2f} times as fast as its dense network, {row["speedup"]:.2f} in the '
                'median process',
                command_of(measured),
            )


def forms_rows(folder: Path) -> Iterator[Row]:
    for rank in (1, 2):
        measured = read(folder, f'deploy_forms_rank{rank}')
        slowest, fastest = (max(row[f'over_{end}'] for row in measured['rows']) for end in ('slowest', 'fastest'))
        processes = len(measured['rows'][0].get('over_fastest_runs', ['one']))
        repeated = f', medians of {processes} processes' * (processes > 1)
        yield (
            f'`deploy` against each form for all layers, rank {rank}, {len(measured["rows"])} architectures{repeated}',
            f'at most {slowest:.2f} of the time of the slowest form and {fastest:.2f} of that of the fastest',
            command_of(measured),
        )


def loop_rows(folder: Path) -> Iterator[Row]:
    loop = read(folder, 'detection_loop')
    yield (
        "images per second of the detectors' training loop, torchvision's reference loop beside it",
        f'{loop["ratio"]:.2f} times as many',
        command_of(loop),
    )


def accuracy_table(folder: Path) -> str:
    """Top-1 of the trained networks, as Markdown; those with a control are left out."""
    lines = ['| tag | top-1 % repaired | trained | dense | difference | epochs |', '|---|--:|--:|--:|--:|--:|']
    with (folder / 'cifar10.csv').open(encoding='utf-8') as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row['model'])
    for row in rows:
        if not row['control']:
            figures = ' | '.join(f'{float(row[key]):.2f}' for key in ('top1_repaired', 'top1', 'top1_dense'))
            epochs = int(row['epochs']) + int(row['epochs_before'])
            lines.append(f'| `{row["model"]}` | {figures} | {float(row["difference"]):+.2f} | {epochs} |')
    return '\n'.join(lines)


def table(folder: Path) -> str:
    """Speed and memory, as Markdown."""
    lines, before = ['| what | measured | command |', '|---|---|---|'], ''
    for rows in (kernel_rows, training_rows, latency_rows, zoo_rows, close_rows, forms_rows, loop_rows):
        for what, measured, command in rows(folder):
            shown = 'the same' if command in (before, 'the same') else f'`{command}`'
            before = before if command == 'the same' else command
            lines.append(f'| {what} | {measured} | {shown} |')
    return '\n'.join(lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the measurements')
    parser.add_argument('--accuracy', action='store_true', help='the accuracy of trained networks instead')
    args = parser.parse_args()
    print((accuracy_table if args.accuracy else table)(args.results))


if __name__ == '__main__':
    run(main)
