"""The networks that ship with the package: small, told where they come from, and as accurate as the table says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import timm
import torch

import norton_timm
from norton_timm.checkpoints.file import load, read_metadata
from norton_timm.checkpoints.pretrained import SHIPPED
from norton_timm.training.run import evaluate_file

FILES = sorted(SHIPPED.glob('*.safetensors'))
TABLE = Path(__file__).parents[1] / 'results' / 'cifar10.csv'


def row_of(name: str) -> dict[str, str]:
    with TABLE.open(newline='', encoding='utf-8') as file:
        (row,) = [row for row in csv.DictReader(file) if row['model'] == name and not row['control']]
    return row


def test_they_are_small() -> None:
    sizes = [path.stat().st_size for path in FILES]
    assert sizes and max(sizes) < 4e6 and sum(sizes) < 20e6


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_name_is_enough(path: Path) -> None:
    model = timm.create_model(path.stem, pretrained=True).eval()
    kept = load(path).eval()
    assert model.pretrained_cfg['mean'] == kept.pretrained_cfg['mean']
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), kept(images), rtol=1e-4, atol=1e-4)
    row, found = row_of(path.stem), norton_timm.count(model, images[:1])
    assert (found.params, found.macs) == (int(row['params']), int(row['macs']))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_the_file_tells_where_it_comes_from(path: Path) -> None:
    row, provenance = row_of(path.stem), read_metadata(path)['provenance']
    assert provenance['model'] == path.stem
    assert provenance['data'] == row['data'] and provenance['epochs'] == int(row['epochs'])
    assert provenance['top1'] == pytest.approx(float(row['top1']), abs=5e-3)
    assert provenance['top1_dense'] == pytest.approx(float(row['top1_dense']), abs=5e-3)
    assert provenance['config']['model'] == path.stem and '/' not in str(provenance['config']['weights'])


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_the_test_set_gives_the_tables_figure(path: Path, data_dir: Path) -> None:
    archive = data_dir / 'cifar10-jpeg.tar.xz'
    if not archive.is_file():
        pytest.skip(f'{archive} is missing: the accuracy is that on its test set')
    found = evaluate_file(path.stem, str(archive), torch.device('cpu'))
    assert found['test_images'] == 10_000
    # another processor rounds otherwise: a few images of 10,000 may change sides
    assert found['top1'] == pytest.approx(float(row_of(path.stem)['top1']), abs=0.05)
