"""A compression report as one self-contained HTML page."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from norton_timm.compression.report import CompressionReport
from norton_timm.utils import replacing

_TEMPLATE = Path(__file__).with_name('report.html.j2')


def to_html(
    report: CompressionReport, title: str = 'Compression report', latency_ms: tuple[float, float] | None = None
) -> str:
    """The page as text: totals, a row of bars for every layer, what was left alone and why, and the recipe.

    Args:
        report: what ``compress`` returned.
        title: heading of the page.
        latency_ms: measured milliseconds before and after. Without them the page says that nothing was measured,
            because fewer MACs do not always take less time.

    Example:
        >>> small, report = norton_timm.compress(model, spec)
        >>> page = to_html(report)
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.untouched.items():
        by_reason.setdefault(reason, []).append(name)
    return _template().render(
        report=report,
        title=title,
        totals=_totals(report, latency_ms),
        most=max([layer.macs for layer in report.layers] + [1]),
        left_alone=sorted(by_reason.items(), key=lambda item: -len(item[1])),
        recipe=yaml.safe_dump(report.spec, sort_keys=False),
    )


def write_html(
    report: CompressionReport,
    path: str | os.PathLike[str],
    title: str = 'Compression report',
    latency_ms: tuple[float, float] | None = None,
) -> Path:
    """Write :func:`to_html` to a file, which appears whole or not at all.

    Raises:
        ValueError: the file cannot be written.

    Example:
        >>> small, report = norton_timm.compress(model, spec)
        >>> path = write_html(report, 'report.html')
    """
    path = Path(path)
    try:
        with replacing(path) as temporary:
            temporary.write_text(to_html(report, title, latency_ms), encoding='utf-8')
    except OSError as error:
        raise ValueError(f'{path}: cannot write the report: {error.strerror}') from None
    return path


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined  # a slow import, which only a page needs

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text(encoding='utf-8'))


def _totals(report: CompressionReport, latency_ms: tuple[float, float] | None) -> list[tuple[str, str, str]]:
    before, after = report.before, report.after
    decomposed = sum(layer.rank > 0 for layer in report.layers)
    pruned = sum(layer.kept < layer.channels for layer in report.layers)
    nmse = '-' if report.nmse is None else f'{report.nmse:.4f}'
    return [
        ('MACs', f'{after.macs / 1e6:,.1f} M', f'of {before.macs / 1e6:,.1f} M ({_change(before.macs, after.macs)})'),
        ('parameters', f'{after.params:,}', f'of {before.params:,} ({_change(before.params, after.params)})'),
        ('latency', *_latency(latency_ms)),
        ('mean NMSE', nmse, f'of {decomposed} decomposed layers'),
        ('layers', str(len(report.layers)), f'{decomposed} decomposed, {pruned} pruned'),
    ]


def _latency(latency_ms: tuple[float, float] | None) -> tuple[str, str]:
    if latency_ms is None:
        return '-', 'not measured'
    before, after = latency_ms
    return f'{after:.2f} ms', f'of {before:.2f} ms ({_change(before, after)})'


def _change(before: float, after: float) -> str:
    return f'{100 * (after / before - 1):+.1f} %' if before else 'n/a'
