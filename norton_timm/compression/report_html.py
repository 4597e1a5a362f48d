"""A compression report as one self-contained HTML page: no script, no external file, light and dark."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

import yaml

from norton_timm.compression.report import CompressionReport, LayerReport
from norton_timm.utils import replacing

_BAR = 120  # width of a bar, in SVG units

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --page: #ffffff; --card: #f4f6f9; --line: #dde2e9;
  --track: #e3e8ef; --kept: #2563eb; --error: #c2410c; --work: #0f766e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --page: #12161c; --card: #1b2129;
  --line: #2c3541; --track: #2a323d; --kept: #60a5fa; --error: #fb923c; --work: #2dd4bf; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 24px; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 16px; } h2 { font-size: 16px; margin: 32px 0 8px; }
.totals { display: flex; flex-wrap: wrap; gap: 12px; }
.totals div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.totals b { display: block; font-size: 20px; } .totals span, .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px 4px 0; text-align: left; vertical-align: middle; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; position: sticky; top: 0; background: var(--page); }
td.reason { white-space: normal; min-width: 180px; color: var(--soft); }
td.name, code, pre { font-family: ui-monospace, monospace; font-size: 12.5px; }
td.number { text-align: right; }
svg { display: block; width: 120px; height: 10px; } svg .track { fill: var(--track); }
svg .kept { fill: var(--kept); } svg .error { fill: var(--error); } svg .work { fill: var(--work); }
svg .before { fill: var(--track); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto; }
@media print { body { max-width: none; } th { position: static; } }
"""


def to_html(
    report: CompressionReport, title: str = 'Compression report', latency_ms: tuple[float, float] | None = None
) -> str:
    """The page as text: totals, a row of bars for every layer, what was left alone and why, and the recipe.

    Args:
        report: what ``compress`` returned.
        title: heading of the page.
        latency_ms: measured milliseconds before and after; the page says where they were not measured, because
            fewer MACs are not always less time.
    """
    most = max((layer.macs for layer in report.layers), default=0)
    rows = '\n'.join(_row(layer, most) for layer in report.layers)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<div class="totals">
{_totals(report, latency_ms)}
</div>
<h2>Layers</h2>
<div class="scroll"><table>
<thead><tr><th>layer</th><th>type</th><th colspan="2">channels kept</th><th>rank</th><th colspan="2">NMSE</th>
<th colspan="2">MMACs</th><th>parameters</th><th>left alone because</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>
<h2>Left alone</h2>
{_left_alone(report)}
{_refitted(report)}
<h2>Recipe</h2>
<pre>{escape(yaml.safe_dump(report.spec, sort_keys=False))}</pre>
</body>
</html>
"""


def write_html(
    report: CompressionReport,
    path: str | os.PathLike[str],
    title: str = 'Compression report',
    latency_ms: tuple[float, float] | None = None,
) -> Path:
    """Write :func:`to_html` to a file, which appears whole or not at all.

    Raises:
        ValueError: the file cannot be written.
    """
    path = Path(path)
    try:
        with replacing(path) as temporary:
            temporary.write_text(to_html(report, title, latency_ms), encoding='utf-8')
    except OSError as error:
        raise ValueError(f'{path}: cannot write the report: {error.strerror}') from None
    return path


def _totals(report: CompressionReport, latency_ms: tuple[float, float] | None) -> str:
    before, after = report.before, report.after
    decomposed = sum(layer.rank > 0 for layer in report.layers)
    pruned = sum(layer.kept < layer.channels for layer in report.layers)
    nmse = '-' if report.nmse is None else f'{report.nmse:.4f}'
    cards = [
        ('MACs', f'{after.macs / 1e6:,.1f} M', f'of {before.macs / 1e6:,.1f} M ({_change(before.macs, after.macs)})'),
        ('parameters', f'{after.params:,}', f'of {before.params:,} ({_change(before.params, after.params)})'),
        ('latency', *_latency(latency_ms)),
        ('mean NMSE', nmse, f'of {decomposed} decomposed layers'),
        ('layers', str(len(report.layers)), f'{decomposed} decomposed, {pruned} pruned'),
    ]
    return '\n'.join(f'<div><span>{name}</span><b>{value}</b><span>{note}</span></div>' for name, value, note in cards)


def _latency(latency_ms: tuple[float, float] | None) -> tuple[str, str]:
    if latency_ms is None:
        return '-', 'not measured'
    before, after = latency_ms
    return f'{after:.2f} ms', f'of {before:.2f} ms ({_change(before, after)})'


def _change(before: float, after: float) -> str:
    return f'{100 * (after / before - 1):+.1f} %' if before else 'n/a'


def _bar(parts: Iterable[tuple[str, float]], told: str) -> str:
    """One bar: (class, share of the full width) drawn over the track in this order."""
    rects = ''.join(
        f'<rect class="{kind}" width="{_BAR * min(max(share, 0.0), 1.0):.1f}" height="10" rx="2"/>'
        for kind, share in parts
    )
    track = f'<rect class="track" width="{_BAR}" height="10" rx="2" opacity="0.45"/>'
    return (
        f'<svg viewBox="0 0 {_BAR} 10" preserveAspectRatio="none" role="img" aria-label="{escape(told)}">'
        f'<title>{escape(told)}</title>{track}{rects}</svg>'
    )


def _row(layer: LayerReport, most_macs: int) -> str:
    kept = layer.kept / layer.channels if layer.channels else 0.0
    kept_bar = _bar([('kept', kept)], f'{layer.kept} of {layer.channels} channels kept')
    if layer.nmse is None:
        nmse, nmse_bar = '-', ''
    else:
        nmse, nmse_bar = f'{layer.nmse:.4f}', _bar([('error', layer.nmse)], f'NMSE {layer.nmse:.4f}')
    scale = max(most_macs, 1)
    told = f'{layer.macs / 1e6:.2f} million MACs before, {layer.macs_after / 1e6:.2f} after'
    macs_bar = _bar([('before', layer.macs / scale), ('work', layer.macs_after / scale)], told)
    because = '; '.join(r for r in (layer.dense_because if not layer.rank else '', layer.unpruned_because) if r)
    return (
        f'<tr><td class="name">{escape(layer.name)}</td><td>{escape(layer.kind)}</td>'
        f'<td>{kept_bar}</td><td class="number">{layer.kept} / {layer.channels}</td>'
        f'<td class="number">{layer.rank or "-"}</td><td>{nmse_bar}</td><td class="number">{nmse}</td>'
        f'<td>{macs_bar}</td><td class="number">{layer.macs_after / 1e6:,.2f} / {layer.macs / 1e6:,.2f}</td>'
        f'<td class="number">{layer.params_after:,} / {layer.params:,}</td>'
        f'<td class="reason">{escape(because)}</td></tr>'
    )


def _left_alone(report: CompressionReport) -> str:
    """Layers that nothing was done to, by reason, and operations that the channel tracer does not know."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.untouched.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [
        f'<p><b>{escape(reason)}</b> ({len(names)}): <code>{escape(", ".join(names))}</code></p>'
        for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    if report.unknown_operations:
        told = ', '.join(f'{name} ({n})' for name, n in sorted(report.unknown_operations.items()))
        lines.append(
            '<p><b>Operations without a rule</b>; the channels that enter them were kept: '
            f'<code>{escape(told)}</code></p>'
        )
    return '\n'.join(lines) or '<p class="soft">Every layer was decomposed or pruned.</p>'


def _refitted(report: CompressionReport) -> str:
    """Layers that were refitted on calibration images, if any."""
    if not report.refitted:
        return ''
    told = escape(', '.join(report.refitted))
    return f'<h2>Refitted on calibration images</h2>\n<p>{len(report.refitted)} layers: <code>{told}</code></p>'
