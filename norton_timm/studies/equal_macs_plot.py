"""Picture of the study of compression without labels: accuracy against MACs, a panel for each network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from norton_timm.studies.equal_macs import FREE, LOWER, OURS
from norton_timm.utils import new_figure, write_png

_LOOKS: dict[tuple[str, str], dict[str, Any]] = {  # by method and resolution
    (OURS, 'fixed'): {'label': 'ours', 'color': 'tab:red', 'marker': 'o', 'lw': 2, 'zorder': 4},
    (OURS, FREE): {
        'label': 'ours, resolution free',
        'color': 'tab:red',
        'marker': 'D',
        'mfc': 'none',
        'ms': 9,
        'ls': '--',
        'zorder': 4,
    },
    (LOWER, FREE): {
        'label': 'dense at a lower resolution',
        'color': 'black',
        'marker': 'x',
        'ms': 7,
        'ls': ':',
        'zorder': 3,
    },
    ('uniform', 'fixed'): {'label': 'one rate, output error', 'color': 'tab:blue', 'marker': 's'},
    ('l1', 'fixed'): {'label': 'one rate, L1', 'color': 'tab:green', 'marker': '^'},
    ('geometric_median', 'fixed'): {'label': 'one rate, geometric median', 'color': 'tab:purple', 'marker': 'v'},
    ('random', 'fixed'): {'label': 'one rate, random', 'color': 'tab:gray', 'marker': 'P'},
    ('torch_pruning', 'fixed'): {'label': 'Torch-Pruning', 'color': 'tab:orange', 'marker': '<'},
}
_COLUMNS = 4


def plot_equal_macs(rows: Sequence[Mapping[str, str]], path: Path) -> Path:
    """Draw accuracy against MACs: a line for each method through the medians of the seeds, with their range.

    Networks that were tuned on other images or for longer get panels of their own.

    Args:
        rows: of :func:`norton_timm.studies.equal_macs.run_cells`, as read from the file.
        path: PNG file.

    Raises:
        ValueError: no rows, or a file that cannot be written.

    Example:
        >>> plot_equal_macs(read_rows(Path('results/label_free.csv')), Path('results/label_free.png'))
    """
    panels = _panels(rows)
    if not panels:
        raise ValueError('got no rows to draw, expected rows of the study label-free')
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(4.2 * columns + (1.2 if columns == 1 else 0), 3.7 * lines + 1.1)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    shown: dict[str, Any] = {}
    for axis, (title, found) in zip(axes, panels.items()):
        _draw(axis, found)
        axis.set_title(title, fontsize=10)
        for handle, label in zip(*axis.get_legend_handles_labels()):
            shown.setdefault(label, handle)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    order = [label for label in ('dense', *(look['label'] for look in _LOOKS.values())) if label in shown]
    figure.legend([shown[o] for o in order], order, loc='outside lower center', ncols=min(3, 1 + columns), fontsize=8)
    return write_png(figure, path)


def _panels(rows: Sequence[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    """Rows by the title of their panel; those without tuning belong to every panel of their network and images."""
    panels: dict[str, list[Mapping[str, str]]] = {}
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    network = ('network', 'data', 'images')
    for row in rows:
        if row['method'] != LOWER:
            title = f'{row["network"]}\n{row["images"]} images of {row["data"]}, {row["limit"]}'
            if title not in panels:
                places[tuple(row[key] for key in network)].append(title)
            panels.setdefault(title, []).append(row)
    for row in rows:
        if row['method'] == LOWER:
            place = tuple(row[key] for key in network)
            for title in places.get(place) or [f'{row["network"]}\n{row["images"]} images of {row["data"]}']:
                panels.setdefault(title, []).append(row)
    return panels


def _draw(axis: Any, rows: Sequence[Mapping[str, str]]) -> None:
    dense = median(float(row['top1_dense']) for row in rows)
    axis.plot([100], [dense], 'k*', ms=11, label='dense', zorder=5)
    for (method, resolution), look in _LOOKS.items():
        points = defaultdict(list)
        for row in rows:
            if (row['method'], row['resolution']) == (method, resolution):
                points[float(row['macs_asked'])].append((100 * float(row['macs_got']), float(row['top1'])))
        if not points:
            continue
        middle = sorted((median(x for x, _ in p), median(y for _, y in p), p) for p in points.values())
        xs, ys = [x for x, _, _ in middle], [y for _, y, _ in middle]
        axis.plot([*xs, 100], [*ys, dense], **{'lw': 1.2, 'ms': 5, 'markevery': list(range(len(xs))), **look})
        for x, _, p in middle:
            low, high = min(y for _, y in p), max(y for _, y in p)
            if high > low:
                axis.vlines(x, low, high, color=look['color'], lw=3, alpha=0.35)
    axis.set_xlabel('MACs (% of the dense network)')
    axis.set_ylabel('Top-1 on the test images (%)')
    axis.grid(alpha=0.3)
