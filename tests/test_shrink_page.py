"""The page of a shrunk network says what its result says, is well-formed and needs nothing else."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from test_report_html import Page

from norton_timm import CompressionSpec
from norton_timm.compression.report import CompressionReport, LayerReport
from norton_timm.compression.report_html import to_html
from norton_timm.profiling.complexity import Complexity
from norton_timm.training import NetworkRow, Shrunk, shrink_html
from norton_timm.training.label_free import ClassAgreement, Tuned
from norton_timm.training.shrink_page import curve


def result(labelled: bool = True, tuned: bool = True, timed: bool = True) -> Shrunk:
    """A result with figures that are all different."""
    before = ClassAgreement(0.901, 0.2, 128, 0.041, (0.012, 0.07))
    after = ClassAgreement(0.934, 0.1, 128, 0.023, (-0.004, 0.05))
    lower = ClassAgreement(0.917, 0.15, 128, 0.031, (0.002, 0.06))
    rows = [
        NetworkRow('dense', 224, 2_000_000_000, 11_000_000, 21.25),
        NetworkRow('compressed', 224, 1_000_000_000, 6_000_000, 12.5, before),
        NetworkRow('compressed and tuned', 224, 1_000_000_000, 6_000_000, 12.5, after),
        NetworkRow('dense, lower resolution', 160, 1_020_000_000, 11_000_000, 11.75, lower),
    ]
    for row, top1 in zip(rows, (79.8, 74.1, 77.2, 75.6)):
        row.top1 = top1 if labelled else None
        row.ms = row.ms if timed else None
    if not tuned:
        del rows[2]
    layer = LayerReport('layer1.0.conv1', 'Conv2d', 8, 4, 10, 5, 100, 50)
    report = CompressionReport({'method': 'norton'}, Complexity(100, 10), Complexity(50, 5), [layer])
    history = [(0, 0.041), (10, 0.03), (20, 0.023), (30, 0.025)]
    told = Tuned(30, 12.3, 20, before, after, history) if tuned else None
    seconds = {'tuning': 12.4, 'search': 30.5, 'repair': 10.2}
    return Shrunk(None, CompressionSpec(), (32, 32), report, rows, told, seconds, ['few images', 'slow <here>'])  # type: ignore[arg-type]


def test_every_figure_of_the_table_is_on_the_page() -> None:
    rows = Page(shrink_html(result(), 'resnet18')).rows
    assert rows[0] == [
        'network', 'pixels', 'MMACs', 'parameters', 'ms', 'agreement', 'expected loss, points', 'top-1'
    ]  # fmt: skip
    assert rows[1] == ['dense', '224', '2,000.0 (100 %)', '11,000,000 (100 %)', '21.25', '-', '-', '79.8 %']
    assert rows[3] == [
        'compressed and tuned', '224', '1,000.0 (50 %)', '6,000,000 (55 %)', '12.50', '93.4 %', '2.3 (-0.4 to 5.0)',
        '77.2 % (-2.6)',
    ]  # fmt: skip
    assert rows[4][-1] == '75.6 % (-4.2)' and rows[4][1] == '160'
    # on a phone the headings stand in each cell
    page = Page(shrink_html(result(), 'resnet18'))
    assert [v for k, v in page.attributes if k == 'data-heading'] == 4 * rows[0]


def test_the_table_stands_above_the_report_which_is_the_one_that_exists() -> None:
    made = result()
    text, plain = shrink_html(made, 'resnet18'), to_html(made.report, 'resnet18', (21.25, 12.5))
    assert text.index('class="networks"') < text.index('<h2>Layers</h2>') and text.count('<h1>') == 1
    assert text.endswith(plain[plain.index('<div class="totals">') :])
    assert text.startswith(plain[: plain.index('</style>')])


def test_the_page_needs_nothing_else_and_follows_the_colour_scheme() -> None:
    text = shrink_html(result(), 'resnet18')
    page = Page(text)
    assert not {'script', 'link', 'img', 'iframe'} & set(page.tags)
    assert not [v for k, v in page.attributes if k in ('src', 'href')] and 'http' not in text and 'url(' not in text
    assert 'prefers-color-scheme: dark' in text and 'width=device-width' in text
    style = text[: text.index('</style>')]
    assert set(re.findall(r'var\((--\w+)\)', style)) <= set(re.findall(r'(--\w+):', style)), 'every colour is known'


def test_warnings_steps_and_commands_are_told() -> None:
    text = shrink_html(result(), 'net', commands=[('export it', 'python export.py --weights "a b"')])
    assert '<li>Few images.</li>' in text and '<li>Slow &lt;here&gt;.</li>' in text
    assert [text.index(step) for step in ('search for', 'repair of', 'tuning without')] == sorted(
        text.index(step) for step in ('search for', 'repair of', 'tuning without')
    )
    assert 'search for the best choices: 30.5 s' in text
    assert 'Export it:' in text and 'python export.py --weights &#34;a b&#34;' in text
    other = shrink_html(result(), 'net', notes=['only this'])
    assert 'Only this.' in other and 'Few images' not in other
    assert 'The state of step 20 is kept' in text and '30 steps in 12 s' in text


def test_what_was_not_measured_is_not_claimed() -> None:
    text = shrink_html(result(labelled=False, tuned=False, timed=False), 'net')
    rows = Page(text).rows
    assert 'top-1' not in rows[0] and [row[4] for row in rows[1:4]] == ['-', '-', '-']
    assert '<h2>Tuning</h2>' not in text and 'not measured' in text and 'On labelled images' not in text
    assert 'What to do next' not in text
    lead = text[text.index('class="lead"') :].split('</p>')[0]
    assert '50 % of the MACs.' in lead and '4.1 points (1.2 to 7.0' in lead and ' ms ' not in lead
    lead = shrink_html(result(), 'net').split('class="lead"')[1].split('</p>')[0]
    assert 'takes 12.5 ms instead of 21.2' in lead and '2.3 points (-0.4 to 5.0' in lead
    assert 'its accuracy is 77.2 % instead of 79.8 %' in lead


@pytest.mark.parametrize('losses', [[0.04, 0.03, 0.05], [0.0, 0.0], [-0.01, 0.02], [0.01]])
def test_the_curve_is_drawn_to_scale(losses: list[float]) -> None:
    drawn = curve([(10 * k, loss) for k, loss in enumerate(losses)], best=0)
    (y0, low), *_, (y1, high) = drawn['ticks']
    assert low <= 0 <= high and y0 > y1
    for k, (x, y, step, loss, best) in enumerate(drawn['points']):
        assert (step, loss, best) == (10 * k, pytest.approx(100 * losses[k]), k == 0)
        assert (y0 - y) / (y0 - y1) == pytest.approx((loss - low) / (high - low))
        assert drawn['left'] <= x <= drawn['right'] and 0 <= y <= drawn['bottom']
    xs = [point[0] for point in drawn['points']]
    assert xs == sorted(xs) and len(set(xs)) == len(xs)


@pytest.mark.parametrize('width', [1280, 390])
def test_a_browser_shows_it_without_scrolling_sideways(width: int, tmp_path: Path) -> None:
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright drives the browser')
    path = shutil.which('chromium') or shutil.which('google-chrome') or shutil.which('chromium-browser')
    if path is None:
        pytest.skip('needs a Chromium')
    file = tmp_path / 'page.html'
    command = 'python tools/export.py --images ' + 40 * 'long'
    file.write_text(shrink_html(result(), 'net', commands=[('export it', command)]), encoding='utf-8')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': width, 'height': 800})
        page.goto(file.as_uri())
        assert page.evaluate('document.documentElement.scrollWidth') == width
        cells = page.locator('.networks td')
        lines = {cells.nth(k).bounding_box()['y'] for k in range(8)}
        assert len(lines) == (1 if width == 1280 else 8), 'a row on a wide screen, a card on a phone'
        browser.close()
