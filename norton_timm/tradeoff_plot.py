"""The picture of a trade-off curve."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from norton_timm.tradeoff import TradeOffPoint


def plot_trade_off(
    curves: Sequence[TradeOffPoint] | Mapping[str, Sequence[TradeOffPoint]],
    path: str | os.PathLike[str],
    kind: str = 'macs',
    title: str = '',
) -> Path:
    """Draw error against budget and write a PNG, which appears whole or not at all.

    Args:
        curves: points from :func:`norton_timm.trade_off`, or several such lists by name.
        path: where to write; the name ends in ``.png``.
        kind: horizontal axis, ``macs`` or ``params``.
        title: heading of the picture.

    Raises:
        ValueError: no points, an unknown kind, another file type, or a file that cannot be written.
    """
    named = dict(curves) if isinstance(curves, Mapping) else {'': curves}
    path = Path(path)
    if kind not in ('macs', 'params'):
        raise ValueError(f'kind: got {kind!r}, expected macs or params')
    if path.suffix.lower() != '.png':
        raise ValueError(f'path: got {path.name!r}, expected a name that ends in .png')
    if not named or not all(named.values()):
        raise ValueError('curves: got no points, expected at least one')
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)  # no global state, no display
    axes = figure.add_subplot()
    for name, points in named.items():
        axes.plot([100 * getattr(p, kind) for p in points], [p.error for p in points], 'o-', ms=4, label=name or None)
    axes.set_xlabel({'macs': 'MACs kept (%)', 'params': 'Parameters kept (%)'}[kind])
    axes.set_ylabel('Total weighted NMSE')
    axes.grid(alpha=0.3)
    if title:
        axes.set_title(title)
    if any(named):
        axes.legend()
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        figure.savefig(part, format='png')
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(f'{path}: cannot write the picture: {error.strerror}') from None
    return path
