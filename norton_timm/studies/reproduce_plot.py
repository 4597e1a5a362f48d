"""Pictures of the ablations that `norton_timm.studies.reproduce` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from norton_timm.utils import new_figure, write_png

Rows = Sequence[Mapping[str, str]]


def plot_studies(rows: Rows, folder: Path) -> list[Path]:
    """Draw each study that the rows hold, as PNG files.

    Args:
        rows: of `results/cifar10_repair.csv`.
        folder: where the pictures go.

    Raises:
        ValueError: no row of any study.
    """
    draw = {'rank': _rank, 'criterion': _criterion, 'tag': _macs}
    studies = {name: [row for row in rows if row.get('study') == name] for name in draw}
    if not any(studies.values()):
        raise ValueError(f'got no rows to draw, expected rows of the studies {", ".join(draw)}')
    written = []
    for name, found in studies.items():
        if found:
            figure = draw[name](found if name != 'tag' else [*found, *studies['rank']])
            written.append(folder / f'repair_{name}.png')
            folder.mkdir(parents=True, exist_ok=True)
            write_png(figure, written[-1])
    return written


def _axes(columns: int = 1, height: float = 4.0) -> tuple[Any, list[Any]]:
    figure = new_figure(6.4 if columns == 1 else 4.8 * columns, height)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, list(axes)


def _dense(axis: Any, rows: Rows, horizontal: bool = True) -> None:
    value = float(rows[0]['top1_dense'])
    line = axis.axhline if horizontal else axis.axvline
    line(value, color='black', ls=':', label=f'dense, {value:.2f} %')


def _rank(rows: Rows) -> Any:
    """NMSE, and accuracy before and after the repair, against the rank."""
    figure, (left, right) = _axes(2)
    rows = sorted(rows, key=lambda row: int(row['rank']))
    ranks = [int(row['rank']) for row in rows]
    left.semilogy(ranks, [float(row['nmse']) for row in rows], 'o-', label='ours')
    other = [row for row in rows if row['nmse_tensorly']]
    if other:
        left.semilogy([int(r['rank']) for r in other], [float(r['nmse_tensorly']) for r in other], 'x', ms=9,
                      color='tab:red', label='TensorLy, filter by filter')  # fmt: skip
    left.set_ylabel('NMSE, mean of the layers')
    for key, told in (('top1_repaired', 'repaired without labels'), ('top1_compressed', 'decomposed')):
        right.plot(ranks, [float(row[key]) for row in rows], 'o-', label=told)
    _dense(right, rows)
    right.set_ylabel('Top-1 (%)')
    for axis in (left, right):
        axis.set_xlabel('CPD rank')
        axis.legend()
    return figure


def _macs(rows: Rows) -> Any:
    """Accuracy after the repair against MACs: the published settings, and the decomposition alone."""
    figure, (axis,) = _axes()
    ablation = sorted((row for row in rows if row['study'] == 'rank'), key=lambda row: int(row['macs']))
    if ablation:
        axis.plot(*_points(ablation), '.--', color='tab:gray', label='CPD of rank 1 to 8, no pruning')
    for method, mark in (('norton', 'o'), ('coring', 's')):
        found = [row for row in rows if row['study'] == 'tag' and row['model'].startswith(method)]
        if found:
            xs, ys = _points(found)
            axis.plot(xs, ys, mark, ms=7, label=method.upper())
            for row, x, y in zip(found, xs, ys):
                axis.annotate(row['model'].partition('.')[2], (x, y), (6, -11), textcoords='offset points', fontsize=8)
    dense = float(rows[0]['macs_dense']) / 1e6
    axis.plot([dense], [float(rows[0]['top1_dense'])], 'k*', ms=11, label='dense')
    axis.set_xlabel('MACs (millions)')
    axis.set_ylabel('Top-1 after the repair without labels (%)')
    axis.legend(loc='lower right')
    return figure


def _points(rows: Rows) -> tuple[list[float], list[float]]:
    return [int(row['macs']) / 1e6 for row in rows], [float(row['top1_repaired']) for row in rows]


def _criterion(rows: Rows) -> Any:
    """Accuracy after the repair by criterion, for each network."""
    models = list(dict.fromkeys(row['model'] for row in rows))
    figure, axes = _axes(len(models))
    for axis, model in zip(axes, models):
        found = sorted((row for row in rows if row['model'] == model), key=lambda row: float(row['top1_repaired']))
        places = range(len(found))
        axis.barh(places, [float(row['top1_repaired']) for row in found], 0.6, label='repaired without labels')
        for place, row in zip(places, found):
            axis.text(float(row['top1_repaired']) + 1, place, row['top1_repaired'], va='center', fontsize=8)
        _dense(axis, found, horizontal=False)
        axis.set_yticks(list(places), [row['criterion'].replace('_', ' ') for row in found])
        axis.set_xlim(0, 112)
        axis.set_xlabel('Top-1 (%)')
        axis.set_title(model, fontsize=10)
    axes[0].legend(loc='lower left', fontsize=8)
    return figure
