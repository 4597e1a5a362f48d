"""The row beside: ready timm networks of equal MACs, or of equal published accuracy."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import timm

from norton_timm.profiling.complexity import count
from norton_timm.studies.beside import beside, beside_rows, ready_networks


@pytest.mark.parametrize('row', ready_networks(), ids=lambda row: row.name)
def test_the_table_counts_right_and_names_networks_with_weights(row) -> None:
    assert timm.is_model_pretrained(row.name) and 70 < row.top1 < 85 and row.source
    assert count(timm.create_model(row.name).eval(), row.px) == (row.macs, row.params)


def test_what_stands_beside() -> None:
    found = beside(899_619_808, 73.65)
    macs = [row for why, row in found if why == 'no more MACs']
    top1 = [row for why, row in found if why == 'no less top-1']
    assert len(macs) == len(top1) == 3
    assert 'mobilenetv4_conv_medium.e500_r224_in1k' in [row.name for row in macs]
    better = [r for r in ready_networks() if r.macs <= 899_619_808 * 1.05 and r not in macs]
    assert min(r.top1 for r in macs) >= max(r.top1 for r in better)
    smaller = [r for r in ready_networks() if r.top1 >= 73.45 and r not in top1]
    assert max(r.macs for r in top1) <= min(r.macs for r in smaller)
    assert beside(1000, None) == [] and {why for why, _ in beside(10**9, None)} == {'no more MACs'}


def test_the_tool(tool, tmp_path: Path) -> None:
    done = tool('model_zoo.py', 'norton_resnet50.r078', 'coring_mobilenetv2_100.r047', '--beside', '--no-latency',
                '--csv', tmp_path / 'a.csv', '--markdown', tmp_path / 'a.md')  # fmt: skip
    assert done.code == 0, done.err
    rows = list(csv.DictReader((tmp_path / 'a.csv').open()))
    assert [row['why'] for row in rows] == ['compressed'] + ['no more MACs'] * 3 + ['no less top-1'] * 3 + [
        'compressed', 'no more MACs'
    ]  # fmt: skip
    assert rows[0]['macs'] == '899619808' and float(rows[0]['top1']) == 73.65
    assert '| `norton_resnet50.r078` | compressed | 224 | 5.89 M | 899.62 M | 73.65 |' in done.out
    assert (tmp_path / 'a.md').read_text() in done.out
    for bad in (['resnet50'], ['norton_resnet56_cifar.r071'], [], ['norton_resnet50.r078', '--columns', 'name']):
        done = tool('model_zoo.py', '--beside', '--no-latency', *bad)
        assert done.code == 2 and len(done.error_lines()) == 1, done.err


def test_latency_is_measured_for_every_row() -> None:
    rows = list(beside_rows(['coring_mobilenetv2_100.r047']))
    assert len(rows) == 2 and all(row.ms > 0 for row in rows)
