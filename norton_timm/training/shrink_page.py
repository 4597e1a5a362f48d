"""What `shrink` made, as one HTML page: its table on top, the report of every layer below."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from norton_timm.compression import to_html
from norton_timm.training.shrink import NetworkRow, Shrunk

_TEMPLATE = Path(__file__).with_name('shrink.html.j2')
_STEPS = {
    'images': 'reading the images',
    'search': 'search for the best choices',
    'repair': 'repair of the layers',
    'tuning': 'tuning without labels',
    'accuracy': 'accuracy on labelled images',
    'latency': 'latency',
}
_WIDTH, _HEIGHT = 360, 190  # of the curve; as wide as a phone, so that its text is not scaled down there
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 14, 36  # margins


def shrink_html(
    result: Shrunk, title: str, *, notes: Sequence[str] = (), commands: Sequence[tuple[str, str]] = ()
) -> str:
    """The page as text. It needs no other file and no script, and follows the reader's colour scheme.

    Args:
        result: what ``shrink`` returned.
        title: heading of the page.
        notes: what the reader should know first; by default the result's warnings.
        commands: what to do next, as (words, command).

    Example:
        >>> result = shrink(model, images, {'macs': 0.5}, minutes=5)
        >>> Path('half.html').write_text(shrink_html(result, 'resnet18'))
    """
    before, after = result.rows[0], _kept(result)
    times = None if before.ms is None or after.ms is None else (before.ms, after.ms)
    page = to_html(result.report, title, times)
    style, top = _top(result, notes or result.warnings, commands).split('<!-- top -->')
    # the report is a whole page: our part goes behind its heading
    head, rest = page.split('</style>', 1)
    heading, layers = rest.split('</h1>', 1)
    return f'{head}{style.strip()}\n</style>{heading}</h1>\n{top.strip()}{layers}'


def _kept(result: Shrunk) -> NetworkRow:
    """The row of the network that is kept."""
    return [row for row in result.rows if row.name.startswith('compressed')][-1]


def _top(result: Shrunk, notes: Sequence[str], commands: Sequence[tuple[str, str]]) -> str:
    seconds = sorted(result.seconds.items(), key=lambda item: list(_STEPS).index(item[0]) if item[0] in _STEPS else 99)
    return _template().render(
        rows=[_cells(row, result.rows[0], row is _kept(result)) for row in result.rows],
        summary=_summary(result),
        held=next((row.agreement.images for row in result.rows if row.agreement is not None), None),
        labelled=result.rows[0].top1 is not None,
        notes=notes,
        tuned=result.tuned,
        curve=None if result.tuned is None else curve(result.tuned.history, result.tuned.best),
        seconds=[(_STEPS.get(name, name), value) for name, value in seconds],
        longest=max([*result.seconds.values(), 1e-9]),
        commands=commands,
    )


def _summary(result: Shrunk) -> str:
    """The result in one sentence."""
    dense, kept = result.rows[0], _kept(result)
    told = f'The compressed network has {100 * kept.macs / dense.macs:.0f} % of the MACs'
    if dense.ms and kept.ms:
        told += f' and takes {kept.ms:.1f} ms instead of {dense.ms:.1f}'
    if kept.agreement is not None:
        low, high = (100 * bound for bound in kept.agreement.interval)
        told += (
            f'. It names the same class as the dense network for {100 * kept.agreement.top1:.1f} % of '
            f'{kept.agreement.images} images that were held out; the expected loss of accuracy is '
            f'{100 * kept.agreement.expected_loss:.1f} points ({low:.1f} to {high:.1f} with 95 % confidence)'
        )
    if dense.top1 is not None and kept.top1 is not None:
        told += f'. On labelled images its accuracy is {kept.top1:.1f} % instead of {dense.top1:.1f} %'
    return f'{told}.'


def _cells(row: NetworkRow, dense: NetworkRow, kept: bool) -> dict[str, Any]:
    """One row of the table, as texts by heading."""
    found = row.agreement
    cells = {
        'network': row.name,
        'pixels': str(row.size),
        'MMACs': f'{row.macs / 1e6:,.1f} ({100 * row.macs / dense.macs:.0f} %)',
        'parameters': f'{row.params:,} ({100 * row.params / dense.params:.0f} %)',
        'ms': '-' if row.ms is None else f'{row.ms:.2f}',
        'agreement': '-' if found is None else f'{100 * found.top1:.1f} %',
        'expected loss, points': '-',
    }
    if found is not None:
        low, high = (100 * bound for bound in found.interval)
        cells['expected loss, points'] = f'{100 * found.expected_loss:.1f} ({low:.1f} to {high:.1f})'
    if dense.top1 is not None:
        lost = '' if row is dense or row.top1 is None else f' ({row.top1 - dense.top1:+.1f})'
        cells['top-1'] = '-' if row.top1 is None else f'{row.top1:.1f} %{lost}'
    return {'cells': cells, 'kept': kept}


def curve(history: Sequence[tuple[int, float]], best: int) -> dict[str, Any]:
    """Where the marks of the tuning's curve stand, in the units of a drawing of 360 x 190.

    Args:
        history: (step, expected loss as a share) of every look.
        best: step of the state that was kept.

    Returns:
        ``points`` (x, y, step, loss in points, whether it is the best), and the ``ticks`` (y, loss in points).
    """
    losses = [100 * loss for _, loss in history]
    low, high = min(0.0, *losses), max(0.0, *losses)
    high = high if high > low else low + 1.0
    last = max(step for step, _ in history) or 1
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def height(loss: float) -> float:
        return _TOP + tall * (high - loss) / (high - low)

    points = [
        (_LEFT + wide * step / last, height(loss), step, loss, step == best) for (step, _), loss in zip(history, losses)
    ]
    ticks = [(height(value), value) for value in (low, (low + high) / 2, high)]
    return {
        'points': points, 'ticks': ticks, 'last': last, 'width': _WIDTH, 'height': _HEIGHT, 'left': _LEFT,
        'right': _WIDTH - _RIGHT, 'bottom': _HEIGHT - _BOTTOM,
    }  # fmt: skip


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined  # a slow import, which only a page needs

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text(encoding='utf-8'))
