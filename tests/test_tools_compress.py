"""The compression tool as users run it, the recipes in configs/recipes, and the latency comparison."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from norton_timm import CompressionSpec, CPDConv2d, count
from norton_timm.checkpoint import load, read_metadata
from norton_timm.dense import dense_model
from norton_timm.latency import compare_latency
from norton_timm.models import spec_of, tags

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / 'configs' / 'recipes'
PUBLISHED = {'resnet50', 'vgg16_bn_cifar', 'resnet56_cifar', 'resnet110_cifar', 'densenet40_cifar', 'googlenet_cifar',
             'mobilenetv2_cifar'}  # fmt: skip


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'compress.py'), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip


def test_one_recipe_for_every_published_tag():
    names = {f'{m}_{b}.{t}' for m, bases in tags().items() for b, rows in bases.items() if b in PUBLISHED for t in rows}
    assert len(names) == 39
    assert {p.stem for p in RECIPES.glob('*.yaml')} == names
    for name in names:
        assert CompressionSpec.from_yaml(RECIPES / f'{name}.yaml') == spec_of(name)


def test_recipes_say_what_the_authors_printed():
    file = ROOT.parent / 'shared' / 'seeds' / 'published.yaml'
    if not file.is_file():
        pytest.skip('needs the table of published figures')
    table = yaml.safe_load(file.read_text())
    criteria = {'C': 'cosine', 'E': 'euclidean', 'V': 'vbd'}
    for method in ('norton', 'coring'):
        for base, rows in table[method].items():
            for tag, row in rows.items():
                spec = CompressionSpec.from_yaml(RECIPES / f'{method}_{base}.{tag}.yaml')
                assert spec.method == method and spec.rates == row['rates']
                if method == 'norton':
                    assert list(spec.rank.values()) == [row['rank']]
                else:
                    kind, _, shots = row['variant'].partition('-')
                    assert spec.distance == criteria[kind] and spec.shots == int(shots or 1)


def test_compress_a_recipe(tmp_path):
    out, report = tmp_path / 'out.safetensors', tmp_path / 'report.json'
    recipe = RECIPES / 'norton_resnet56_cifar.r071.yaml'
    done = tool('resnet56_cifar', '--spec', recipe, '--output', out, '--report', report)
    assert done.returncode == 0, done.stderr
    assert 'MACs' in done.stdout and 'measured:' in done.stdout and ' ms ' in done.stdout
    figures = json.loads(report.read_text())
    assert figures['after']['params'] == 217_610
    model = load(out)
    assert count(model, 32).params == 217_610 and count(model, 32).macs == figures['after']['macs']
    metadata = read_metadata(out)
    assert CompressionSpec.from_dict(metadata['spec']) == CompressionSpec.from_yaml(recipe)
    assert metadata['latency_ms']['compressed'] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out.safetensors', 'report.json']


def test_options_and_weights_from_a_file(tmp_path):
    torch.manual_seed(1)
    dense = timm.create_model('resnet20_cifar', num_classes=4)
    save_file(dense.state_dict(), tmp_path / 'a.safetensors')
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'b.pt')
    out = tmp_path / 'out.safetensors'
    options = ['--rank', 1, '--rates', 0.3, '--criterion', 'cosine', '--num-classes', 4]
    done = tool('resnet20_cifar', *options, '--checkpoint', tmp_path / 'b.pt', '--output', out)
    assert done.returncode == 0, done.stderr
    model = load(out)
    for source in ('a.safetensors', 'b.pt'):
        read = dense_model('resnet20_cifar', checkpoint=tmp_path / source, num_classes=4)
        assert all(torch.equal(t, dense.state_dict()[name]) for name, t in read.state_dict().items())
    assert torch.equal(model.conv1.weight, dense.conv1.weight)  # the protected stem shows whose weights these are
    assert any(isinstance(m, CPDConv2d) for m in model.modules())


def test_compress_to_a_budget(tmp_path):
    out, report = tmp_path / 'out.safetensors', tmp_path / 'report.html'
    done = tool('resnet20_cifar', '--macs', 0.5, '--method', 'coring', '--output', out, '--report', report)
    assert done.returncode == 0, done.stderr
    dense = count(timm.create_model('resnet20_cifar'), 32)
    assert count(load(out), 32).macs == pytest.approx(0.5 * dense.macs, rel=0.01)
    assert report.read_text().startswith('<!DOCTYPE html>') and 'layer3.2.conv1' in report.read_text()


BAD = {
    'unknown model': (['resnet5', '--rank', 1], 'resnet5'),
    'hub': (['hf-hub:timm/resnet18', '--rank', 1], 'timm name'),
    'no recipe': (['resnet18'], '--spec'),
    'missing recipe': (['resnet18', '--spec', 'missing.yaml'], 'missing.yaml'),
    'unknown tag': (['resnet50', '--spec', 'norton_resnet50.r999'], 'r999'),
    'bad rate': (['resnet18', '--rates', 1.5], '0 <= rate < 1'),
    'bad rates': (['resnet18', '--rates', '[0.1]*x'], 'rates'),
    'rates that are no number': (['resnet18', '--rates', 'half'], 'half'),
    'bad criterion': (['resnet18', '--rank', 1, '--criterion', 'best'], 'best'),
    'bad method': (['resnet18', '--method', 'magic'], 'norton'),
    'wrong length': (['resnet20_cifar', '--rates', '[0.1]*3'], '3 entries'),
    'budget and recipe': (['resnet18', '--macs', 0.5, '--rank', 1], 'macs'),
    'bad budget': (['resnet20_cifar', '--macs', 2], 'macs'),
    'missing weights': (['resnet18', '--rank', 1, '--checkpoint', 'none.pt'], 'none.pt'),
    'no published weights': (['resnet20_cifar', '--rank', 1, '--pretrained'], 'weights'),
    'input size': (['resnet20_cifar', '--rank', 1, '--input-size', 0], 'input size'),
}


@pytest.fixture
def here(monkeypatch, capsys):
    """The tool run within this process, which saves the seconds of a start: exit code and what went to stderr."""
    monkeypatch.syspath_prepend(ROOT / 'tools')

    def run(*arguments: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, 'argv', ['compress.py', *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / 'tools' / 'compress.py'), run_name='__main__')
        return caught.value.code, capsys.readouterr().err

    return run


def test_one_error_in_a_process_of_its_own(tmp_path):
    done = tool('resnet5', '--rank', 1, '--output', tmp_path / 'out.safetensors')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'resnet5' in done.stderr


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line_and_code_2(name, tmp_path, here):
    arguments, expected = BAD[name]
    code, told = here(*arguments, '--output', tmp_path / 'out.safetensors')
    assert code == 2 and told.count('\n') == 1 and expected in told
    assert not list(tmp_path.iterdir())


def test_bad_outputs(tmp_path, here):
    for output in ('out.pt', 'missing/out.safetensors'):
        code, told = here('resnet20_cifar', '--rank', 1, '--output', tmp_path / output)
        assert code == 2 and told.count('\n') == 1 and 'expected' in told
    report = tmp_path / 'report.xml'
    code, told = here('resnet20_cifar', '--rank', 1, '--output', tmp_path / 'o.safetensors', '--report', report)
    assert code == 2 and '.json or .html' in told
    assert not list(tmp_path.iterdir())


class Sleep(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        time.sleep(self.seconds)
        return x


def test_latency_by_name():
    times = compare_latency({'slow': Sleep(0.02), 'fast': Sleep(0.002)}, torch.zeros(1), repeats=3, seconds=0.1)
    assert list(times) == ['slow', 'fast']
    assert 20 <= times['slow'] < 40 and 2 <= times['fast'] < 15
    with pytest.raises(ValueError, match='repeats=0'):
        compare_latency({'slow': Sleep(0)}, torch.zeros(1), repeats=0)
    with pytest.raises(ValueError, match='0 networks'):
        compare_latency({}, torch.zeros(1))
