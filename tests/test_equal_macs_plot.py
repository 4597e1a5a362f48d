"""The picture of the study of compression without labels."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from norton_timm.studies.equal_macs_plot import plot_equal_macs


def rows_of(methods: list[tuple[str, str]], seeds: int = 3) -> list[dict[str, str]]:
    return [
        {'network': name, 'data': 'd', 'images': '9', 'limit': 'none' if method == 'resolution' else '5 steps',
         'method': method, 'resolution': resolution, 'macs_asked': str(share), 'macs_got': str(share),
         'seed': str(seed), 'top1_dense': '90.0', 'top1': str(90 - 20 * (1 - share) * (k + 1) - seed)}
        for name in ('one', 'two')
        for k, (method, resolution) in enumerate(methods)
        for share in (0.7, 0.5)
        for seed in range(seeds)
    ]  # fmt: skip


def test_a_panel_for_each_network_with_medians_and_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr('norton_timm.studies.equal_macs_plot.write_png', lambda figure, path: figures.append(figure))
    methods = [('ours', 'fixed'), ('ours', 'free'), ('l1', 'fixed'), ('resolution', 'free')]
    longer = [{**row, 'limit': '9 steps'} for row in rows_of(methods[:1]) if row['network'] == 'one']
    plot_equal_macs([*rows_of(methods), *longer], tmp_path / 'a.png')
    axes = [axis for axis in figures[0].axes if axis.get_title()]
    assert [axis.get_title() for axis in axes] == [
        'one\n9 images of d, 5 steps', 'two\n9 images of d, 5 steps', 'one\n9 images of d, 9 steps',
    ]  # fmt: skip
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    assert list(lines) == ['dense', 'ours', 'ours, resolution free', 'dense at a lower resolution', 'one rate, L1']
    assert lines['ours'].get_xdata().tolist() == [50, 70, 100]
    assert lines['ours'].get_ydata().tolist() == pytest.approx([79, 83, 90])  # medians, to the dense network
    ranges = [tuple(p[:, 1]) for c in axes[0].collections for p in c.get_segments()]
    assert len(ranges) == 8 and ranges[0] == pytest.approx((78, 80))
    assert {line.get_label() for line in axes[2].get_lines()} == {'dense', 'ours', 'dense at a lower resolution'}
    assert len(figures[0].legends[0].get_texts()) == 5


def test_the_picture_is_a_file_or_an_error(tmp_path: Path) -> None:
    path = plot_equal_macs(rows_of([('ours', 'fixed')], 1), tmp_path / 'a.png')
    assert Image.open(path).size[0] > 800
    with pytest.raises(ValueError, match='no rows to draw, expected rows of the study label-free'):
        plot_equal_macs([], tmp_path / 'b.png')
    assert not (tmp_path / 'b.png').exists()
