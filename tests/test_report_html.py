"""The report's page is well-formed, self-contained and says what the report says; the trade-off picture."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import cv2
import pytest
from families import build, images

from norton_timm import TradeOffPoint
from norton_timm.compression.compress import compress
from norton_timm.compression.report import CompressionReport, LayerReport
from norton_timm.compression.report_html import to_html, write_html
from norton_timm.compression.spec import CompressionSpec
from norton_timm.profiling.complexity import Complexity
from norton_timm.search.trade_off import plot_trade_off

VOID = {'meta', 'rect', 'br', 'link', 'img'}


class Page(HTMLParser):
    """Checks that tags nest, and collects the table's rows and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.bars: list[dict[str, float]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or '') for k, v in attrs]
        given = dict(attrs)
        if tag == 'tr':
            self.rows.append([])
        elif tag in ('td', 'th'):
            self.rows[-1].append('')
        elif tag == 'svg':
            self.bars.append({})
        elif tag == 'rect':
            self.bars[-1][given['class']] = float(given['width'])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.rows and self.open[-1:] and self.open[-1] in ('td', 'th'):
            self.rows[-1][-1] += data


@pytest.fixture(scope='module')
def report() -> CompressionReport:
    spec = CompressionSpec(rank={'layer*': 2}, rates={'layer2.0.conv1': 0.5}, exclude=('layer3.2*',))
    return compress(build('resnet20_cifar'), spec, images('resnet20_cifar', 1))[1]


def test_every_layer_has_a_row_with_its_figures(report: CompressionReport) -> None:
    rows = {row[0]: row for row in Page(to_html(report)).rows[1:]}
    assert list(rows) == [layer.name for layer in report.layers]
    for layer in report.layers:
        row = rows[layer.name]
        assert row[3] == f'{layer.kept} / {layer.channels}' and row[4] == str(layer.rank or '-')
        assert row[6] == (f'{layer.nmse:.4f}' if layer.nmse is not None else '-')
        assert row[8] == f'{layer.macs_after / 1e6:,.2f} / {layer.macs / 1e6:,.2f}'
    assert 'excluded by the spec' in rows['layer3.2.conv1'][-1]


def test_bars_are_as_long_as_the_figures(report: CompressionReport) -> None:
    bars = Page(to_html(report)).bars
    most = max(layer.macs for layer in report.layers)
    kept = [bar['kept'] for bar in bars if 'kept' in bar]
    work = [(bar['before'], bar['work']) for bar in bars if 'work' in bar]
    errors = [bar['error'] for bar in bars if 'error' in bar]
    assert kept == pytest.approx([120 * layer.kept / layer.channels for layer in report.layers], abs=0.06)
    assert errors == pytest.approx([120 * n.nmse for n in report.layers if n.nmse is not None], abs=0.06)
    for (before, after), layer in zip(work, report.layers, strict=True):
        assert before == pytest.approx(120 * layer.macs / most, abs=0.06)
        assert after == pytest.approx(120 * min(layer.macs_after / most, 1), abs=0.06)


def test_page_needs_nothing_else(report: CompressionReport) -> None:
    text = to_html(report)
    page = Page(text)
    assert not {'script', 'link', 'img', 'iframe'} & set(page.tags)
    assert not [v for k, v in page.attributes if k in ('src', 'href')] and 'http' not in text and 'url(' not in text
    assert 'prefers-color-scheme: dark' in text


def test_totals_recipe_and_reasons_are_told(report: CompressionReport) -> None:
    text = to_html(report, 'resnet20', latency_ms=(10.0, 5.0))
    assert f'{report.after.params:,}' in text and f'of {report.before.params:,}' in text
    assert '5.00 ms' in text and '-50.0 %' in text and '<title>resnet20</title>' in text
    assert 'not measured' in to_html(report)
    assert 'layer2.0.conv1: 0.5' in text
    for name in report.untouched:
        assert name in text.split('<h2>Left alone</h2>')[1]


def test_names_cannot_break_the_page() -> None:
    evil = '<script>alert("1")</script>'
    layer = LayerReport(evil, evil, 8, 4, 10, 5, 100, 50, nmse=None, dense_because=evil, unpruned_because='"\'&')
    whole = CompressionReport({'method': evil}, Complexity(100, 10), Complexity(50, 5), [layer], {evil: 2})
    page = Page(to_html(whole, evil))
    assert 'script' not in page.tags
    assert page.rows[1][0] == evil


def test_empty_report_is_a_page() -> None:
    Page(to_html(CompressionReport({}, Complexity(0, 0), Complexity(0, 0))))


def test_file_appears_whole_or_not_at_all(report: CompressionReport, tmp_path: Path) -> None:
    assert write_html(report, tmp_path / 'r.html').read_text(encoding='utf-8') == to_html(report)
    with pytest.raises(ValueError, match='cannot write the report'):
        write_html(report, tmp_path / 'missing' / 'r.html')
    (tmp_path / 'taken').mkdir()
    with pytest.raises(ValueError, match='cannot write the report'):
        write_html(report, tmp_path / 'taken')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['r.html', 'taken']


POINTS = [TradeOffPoint(f, f, f, 2 * (1 / f - 1), CompressionSpec()) for f in (1.0, 0.5, 0.25)]


def test_curve_is_drawn(tmp_path: Path) -> None:
    one = cv2.imread(str(plot_trade_off(POINTS, tmp_path / 'one.png', title='resnet')))
    two = cv2.imread(str(plot_trade_off({'a': POINTS, 'b': POINTS[:2]}, tmp_path / 'two.png', 'params')))
    assert one.shape == two.shape == (630, 960, 3)
    assert len(set(map(tuple, one.reshape(-1, 3)))) > 10 and (one != two).any()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['one.png', 'two.png']


@pytest.mark.parametrize(
    'curves, name, kind, words',
    [([], 'a.png', 'macs', 'no points'), (POINTS, 'a.jpg', 'macs', '.png'), (POINTS, 'a.png', 'ms', 'macs or params')],
)
def test_bad_pictures_are_refused(curves: list, name: str, kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        plot_trade_off(curves, tmp_path / name, kind)
