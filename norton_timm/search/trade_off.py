"""The trade-off curve of a network, which is the least error at each budget, and its picture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from norton_timm.compression import CompressionSpec
from norton_timm.search.allocate import Choice
from norton_timm.search.budget import Budget, check_target
from norton_timm.utils import new_figure, write_png


@dataclass(frozen=True)
class TradeOffPoint:
    """One point of a trade-off curve.

    Attributes:
        target: the fraction asked for.
        macs, params: fractions kept, counted.
        error: total weighted NMSE, or with images the sum of the choices' measured errors.
        spec: the recipe.
    """

    target: float
    macs: float
    params: float
    error: float
    spec: CompressionSpec


def trade_off_of(budget: Budget, kind: str = 'macs', fractions: Sequence[float] | None = None) -> list[TradeOffPoint]:
    """Least error found at each budget, from large budgets to small ones.

    The curve is monotone: where a smaller budget did better, the larger one takes over its choice.

    Args:
        budget: the search on one model.
        kind: ``macs`` or ``params``.
        fractions: budgets in (0, 1]; by default 1.0, 0.95, ... down to what is attainable.

    Raises:
        ValueError: an unknown kind, or a fraction that is out of range or cannot be attained.
    """
    if kind not in ('macs', 'params'):
        raise ValueError(f'kind: got {kind!r}, expected macs or params')
    allocator = budget.allocator(kind)
    dense = allocator.cost(allocator.dense())
    floor = allocator.cost(allocator.least()) / dense
    if fractions is None:
        fractions = [f / 20 for f in range(20, 0, -1) if f / 20 > floor]
    for fraction in fractions:
        check_target(kind, fraction)
        if fraction < floor:
            raise ValueError(f'{kind}: got {fraction:g}, but the least that can be attained is {floor:.4g}')
    points: list[TradeOffPoint] = []
    best: Choice | None = None
    for fraction in sorted(set(fractions)):
        choice = allocator.dense() if fraction == 1 else budget.solve(allocator, fraction * dense, settle=False)
        if best is not None and budget.error(best, allocator) < budget.error(choice, allocator):
            choice = best
        best = choice
        spec, error = budget.spec(choice, allocator), budget.error(choice, allocator)
        made, whole = budget.complexity(budget.build(spec)), budget.complexity(budget.model)
        shares = {'macs': made.macs / whole.macs, 'params': made.params / whole.params}
        points.append(TradeOffPoint(fraction, **shares, error=error, spec=spec))
    return points[::-1]


def trade_off(
    model: nn.Module,
    kind: str = 'macs',
    fractions: Sequence[float] | None = None,
    *,
    method: str = 'norton',
    calibration: Iterable[Any] | None = None,
    example_input: Any = None,
) -> list[TradeOffPoint]:
    """The trade-off curve of a model, see :func:`trade_off_of`; arguments as for :func:`norton_timm.find_spec`.

    Example:
        >>> points = trade_off(model, 'macs', [0.3, 0.5, 0.7])
        >>> [(point.macs, point.error) for point in points]
    """
    return trade_off_of(Budget(model, method, calibration, example_input), kind, fractions)


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

    Example:
        >>> curves = {method: trade_off(model, method=method) for method in ('norton', 'coring')}
        >>> plot_trade_off(curves, 'trade_off.png')
    """
    named = dict(curves) if isinstance(curves, Mapping) else {'': curves}
    path = Path(path)
    if kind not in ('macs', 'params'):
        raise ValueError(f'kind: got {kind!r}, expected macs or params')
    if path.suffix.lower() != '.png':
        raise ValueError(f'path: got {path.name!r}, expected a name that ends in .png')
    if not named or not all(named.values()):
        raise ValueError('curves: got no points, expected at least one')
    figure = new_figure(6.4, 4.2, dpi=150)
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
    return write_png(figure, path)
