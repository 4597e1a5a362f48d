"""Rows of the published results: recipes, controls, the CSV file, the pictures, one command from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tensorly
import timm
import torch
from image_sets import write_archive
from safetensors.torch import save_file
from tensorly.decomposition import parafac

import norton_timm
from norton_timm.models import spec_of
from norton_timm.studies import reproduce
from norton_timm.studies.reproduce_plot import plot_studies

NAME = 'coring_resnet56_cifar.r072'


@pytest.mark.parametrize('control', reproduce.CONTROLS)
def test_controls_keep_as_many_filters_but_others(control: str) -> None:
    model = timm.create_model('resnet20_cifar')
    spec = reproduce.controlled_spec('norton_resnet56_cifar.r089', control)
    published = spec_of('norton_resnet56_cifar.r089')
    assert (spec.rank, spec.rates) == (published.rank, published.rates) and spec != published
    fields = {**published.to_dict(), 'rates': 0.3}
    ours, report = norton_timm.compress(model, norton_timm.CompressionSpec.from_dict(fields))
    fields.update(reproduce.CONTROLS[control])
    other, beside = norton_timm.compress(model, norton_timm.CompressionSpec.from_dict(fields))
    assert report.after == beside.after
    assert any(not torch.equal(a, b) for a, b in zip(ours.state_dict().values(), other.state_dict().values()))


def test_names_that_are_none() -> None:
    for model, control, told in (
        (NAME, 'l3', 'expected one of l1'),
        ('resnet56_cifar', None, 'expected a compressed tag'),
        ('norton_resnet56_cifar.r001', None, 'unknown tag'),
        ('norton_resnet56_cifar.r071', 'l1', 'prunes no filters'),
    ):
        with pytest.raises(ValueError, match=told):
            reproduce.controlled_spec(model, control)
    with pytest.raises(ValueError, match='expected one of rank'):
        reproduce.study_specs('nothing')


def test_studies_are_what_was_asked_for() -> None:
    ranks = reproduce.study_specs('rank')
    assert [(what['rank'], spec.rank) for _, what, spec in ranks] == [(r, {'*': r}) for r in range(1, 9)]
    assert all(not any(spec.rate_list()) for _, _, spec in ranks)
    assert len(reproduce.study_specs('tag')) == 7
    criteria = reproduce.study_specs('criterion')
    assert len(criteria) == 16
    for name, what, spec in criteria:
        assert spec.distance == what['criterion'] and spec.rates == spec_of(name).rates


def test_mean_error_of_tensorly() -> None:
    model = timm.create_model('resnet20_cifar')
    names = ['conv1', 'layer3.2.conv2']
    tensorly.set_backend('numpy')
    means = []
    for name in names:
        errors = []
        for weight in model.get_submodule(name).weight.detach().double().numpy():
            found = tensorly.cp_to_tensor(parafac(weight, 2, init='svd', random_state=0))
            errors.append(((weight - found) ** 2).sum() / (weight**2).sum())
        means.append(sum(errors) / len(errors))
    expected = sum(means) / 2
    assert reproduce.tensorly_nmse(model, names, 2) == pytest.approx(expected, rel=1e-3)
    _, report = norton_timm.compress(model, norton_timm.CompressionSpec(rank={'conv1': 2, 'layer3.2.conv2': 2}))
    assert reproduce.mean_nmse(report) <= expected * 1.001


def test_rows_replace_those_of_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / 'results' / 'rows.csv'
    assert reproduce.read_rows(path) == []
    for row in (
        {'model': 'a', 'control': '', 'epochs': 0, 'seed': 0, 'top1': 1.5},
        {'model': 'a', 'control': 'l1', 'epochs': 0, 'seed': 0, 'top1': 2.5},
        {'model': 'b', 'control': '', 'epochs': 0, 'seed': 0, 'top1': 3.5, 'spec': '{"rates": "a,b"}'},
        {'model': 'a', 'control': '', 'epochs': 0, 'seed': 0, 'top1': 4.5},
    ):
        reproduce.write_row(path, row)
    rows = reproduce.read_rows(path)
    assert [(r['model'], r['control'], r['top1']) for r in rows] == [('a', 'l1', '2.5'), ('b', '', '3.5'),
                                                                    ('a', '', '4.5')]  # fmt: skip
    assert rows[1]['spec'] == '{"rates": "a,b"}' and rows[0]['spec'] == ''
    assert [p.name for p in path.parent.iterdir()] == ['rows.csv']


def test_pictures(tmp_path: Path) -> None:
    rows = []
    for study in reproduce.STUDIES:
        for k, (model, what, _) in enumerate(reproduce.study_specs(study)):
            row = {'study': study, 'model': model, 'rank': '', 'criterion': '', **what, 'top1_dense': 89.4,
                   'top1_compressed': 10 + k, 'top1_repaired': 60 + k, 'nmse': 0.5 / (k + 1), 'nmse_tensorly': '',
                   'macs_dense': 100_000_000, 'macs': 10_000_000 * (k + 1)}  # fmt: skip
            rows.append({key: str(value) for key, value in row.items()})
    written = plot_studies(rows, tmp_path / 'pictures')
    assert {p.name for p in written} == {'repair_rank.png', 'repair_criterion.png', 'repair_tag.png'}
    assert all(p.read_bytes().startswith(b'\x89PNG') and p.stat().st_size > 10_000 for p in written)
    assert len(list((tmp_path / 'pictures').iterdir())) == 3
    with pytest.raises(ValueError, match='no rows to draw'):
        plot_studies([], tmp_path)


@pytest.mark.parametrize(('arguments', 'told'), [
    ([], 'expected a tag'),
    ([NAME, '--study', 'rank', '--dense', 'x'], 'expected a tag'),
    ([NAME], 'expected --dense'),
    ([NAME, '--dense', 'nowhere.safetensors'], 'no file nowhere.safetensors'),
    ([NAME, '--dense', 'x', '--no-tuning', '--epochs', '3'], 'expected one of them'),
    (['--plot', 'pictures', '--output', 'nothing.csv'], 'no rows to draw'),
])  # fmt: skip
def test_bad_arguments(arguments: list[str], told: str, tool, tmp_path: Path) -> None:
    done = tool('reproduce.py', *arguments, *([] if '--runs' in arguments else ['--runs', tmp_path]))
    assert (done.code, done.out) == (2, '') and told in done.err and done.err.count('\n') == 1


@pytest.mark.parametrize('control', [None, 'random'])
def test_one_command_makes_a_row(control: str | None, tool, tmp_path: Path) -> None:
    archive = write_archive(tmp_path / 'images.tar', train=32, test=10)
    torch.manual_seed(0)
    dense = tmp_path / 'dense.safetensors'
    save_file(timm.create_model('resnet56_cifar', num_classes=4).state_dict(), dense)
    output = tmp_path / 'rows.csv'
    command = [NAME, '--dense', dense, '--data', archive, '--runs', tmp_path / 'runs', '--output', output, '--device',
               'cpu', '--set', 'data.calibration=8', 'optim.batch_size=16']  # fmt: skip
    command += ['--no-tuning'] if control is None else ['--control', control, '--epochs', '1']
    done = tool('reproduce.py', *command)
    assert done.code == 0, done.err
    (row,) = reproduce.read_rows(output)
    assert (row['model'], row['control'], row['data']) == (NAME, control or '', 'images.tar')
    assert int(row['macs']) == 34_197_184 - 64 * 6 and int(row['epochs']) == (control is not None)
    assert float(row['published_top1']) == 92.84 and float(row['published_difference']) == -0.42
    assert json.loads(row['spec'])['criterion'] == (control or 'euclidean')
    assert float(row['top1']) - float(row['top1_dense']) == pytest.approx(float(row['difference']))
    assert row['torch'] == torch.__version__.partition('+')[0] and float(row['ms']) > 0
    assert str(tmp_path) not in output.read_text()
    again = tool('reproduce.py', *command)  # the run is over: the same row
    assert again.code == 0, again.err
    figures = [(r['top1_dense'], r['top1_repaired'], r['top1']) for r in (row, *reproduce.read_rows(output))]
    assert len(figures) == 2 and figures[0] == figures[1]
