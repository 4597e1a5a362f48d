"""The compression tool as users run it, the recipes in configs/recipes, and the latency comparison."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from fake_clock import FakeClock
from PIL import Image
from safetensors.torch import save_file
from tool_runner import ROOT, run_process
from torch import nn

from norton_timm import CompressionSpec, CPDConv2d, count
from norton_timm.checkpoints.file import load, read_metadata
from norton_timm.models import spec_of, tags
from norton_timm.models.dense import dense_model
from norton_timm.profiling.timing import compare_latency
from norton_timm.training.sources import calibration_images

RECIPES = ROOT / 'configs' / 'recipes'


def test_one_recipe_for_every_tag():
    names = {f'{m}_{b}.{t}' for m, bases in tags().items() for b, rows in bases.items() for t in rows}
    assert len(names) == 39 + 20 + 10
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


def test_compress_a_recipe(tool, tmp_path):
    out, report = tmp_path / 'out.safetensors', tmp_path / 'report.json'
    recipe = RECIPES / 'norton_resnet56_cifar.r071.yaml'
    done = tool('compress.py', 'resnet56_cifar', '--spec', recipe, '--output', out, '--report', report)
    assert done.code == 0, done.err
    assert 'MACs' in done.out and 'measured:' in done.out and ' ms ' in done.out
    figures = json.loads(report.read_text())
    assert figures['after']['params'] == 217_610
    model = load(out)
    assert count(model, 32).params == 217_610 and count(model, 32).macs == figures['after']['macs']
    metadata = read_metadata(out)
    assert CompressionSpec.from_dict(metadata['spec']) == CompressionSpec.from_yaml(recipe)
    assert metadata['latency_ms']['compressed'] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out.safetensors', 'report.json']


def test_options_and_weights_from_a_file(tool, tmp_path):
    torch.manual_seed(1)
    dense = timm.create_model('resnet20_cifar', num_classes=4)
    save_file(dense.state_dict(), tmp_path / 'a.safetensors')
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'b.pt')
    out = tmp_path / 'out.safetensors'
    options = ['--rank', 1, '--rates', 0.3, '--criterion', 'cosine', '--num-classes', 4]
    done = tool('compress.py', 'resnet20_cifar', *options, '--checkpoint', tmp_path / 'b.pt', '--output', out)
    assert done.code == 0, done.err
    model = load(out)
    for source in ('a.safetensors', 'b.pt'):
        read = dense_model('resnet20_cifar', checkpoint=tmp_path / source, num_classes=4)
        assert all(torch.equal(t, dense.state_dict()[name]) for name, t in read.state_dict().items())
    assert torch.equal(model.conv1.weight, dense.conv1.weight)  # the protected stem shows whose weights these are
    assert any(isinstance(m, CPDConv2d) for m in model.modules())


def test_compress_to_a_budget(tool, tmp_path):
    out, report = tmp_path / 'out.safetensors', tmp_path / 'report.html'
    done = tool(
        'compress.py', 'resnet20_cifar', '--macs', 0.5, '--method', 'coring', '--output', out, '--report', report
    )
    assert done.code == 0, done.err
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


def test_one_error_in_a_process_of_its_own(tmp_path):
    done = run_process('compress.py', 'resnet5', '--rank', 1, '--output', tmp_path / 'out.safetensors')
    assert done.code == 2 and done.err.count('\n') == 1 and 'resnet5' in done.err


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line_and_code_2(name, tmp_path, tool):
    arguments, expected = BAD[name]
    code, _, told = tool('compress.py', *arguments, '--output', tmp_path / 'out.safetensors')
    assert code == 2 and told.count('\n') == 1 and expected in told
    assert not list(tmp_path.iterdir())


# arguments, of which the last one is read as well
OVERWRITING = {
    'dense weights': ('compress.py', 'resnet20_cifar', '--rates', 0.5, '--checkpoint', 'a', '--output', 'a'),
    'a report of the recipe': ('compress.py', 'resnet20_cifar', '--spec', 'a', '--output', 'b', '--report', 'a'),
    'picture': ('visualize.py', 'x.safetensors', 'y.safetensors', '--image', 'a', '--output', 'a'),
    'network to look at': ('visualize.py', 'x.safetensors', 'a', '--image', 'b.png', '--output', 'a'),
    'classifier': ('eval_cls.py', 'a', '--output', 'a'),
    'detector': ('eval_det.py', 'a', '--output', 'a'),
    'file to import': ('import_checkpoint.py', 'a', '--output', 'a'),
    'agreement': ('export.py', '--weights', 'a', '--images', '.', '--output', 'b.onnx', '--json', 'a'),
    'network to time': ('benchmark.py', 'classification', 'b', 'a', '--output', 'a'),
}


@pytest.mark.parametrize('other', ['itself', 'a link', 'another path'])
@pytest.mark.parametrize('name', OVERWRITING)
def test_no_tool_writes_over_what_it_reads(name, other, tmp_path, tool, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, *arguments = OVERWRITING[name]
    (tmp_path / 'a').write_bytes(b'precious')
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'link').symlink_to('a')
    arguments[-1] = {'itself': 'a', 'a link': 'link', 'another path': 'sub/../a'}[other]
    code, _, told = tool(program, *arguments)
    assert code == 2 and told.count('\n') == 1
    assert f'{arguments[-1]} is read and would be overwritten: choose another {arguments[-2]}' in told
    assert (tmp_path / 'a').read_bytes() == b'precious'


def test_a_picture_beside_figures_is_not_one_that_is_read(tmp_path, tool, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('street.png', 'report'):
        (tmp_path / name).write_bytes(b'precious')
    code, _, told = tool('benchmark.py', 'detection', '--image', 'street.png', '--output', 'street.json')
    assert code == 2 and 'street.png is read and would be overwritten' in told
    twice = ('resnet20_cifar', '--rates', 0.5, '--output', 'b.safetensors', '--report', './b.safetensors')
    code, _, told = tool('compress.py', *twice)
    assert code == 2 and 'b.safetensors would be written twice: choose another --report' in told
    assert (tmp_path / 'street.png').read_bytes() == b'precious'


def test_bad_outputs(tmp_path, tool):
    for output in ('out.pt', 'missing/out.safetensors'):
        code, _, told = tool('compress.py', 'resnet20_cifar', '--rank', 1, '--output', tmp_path / output)
        assert code == 2 and told.count('\n') == 1 and 'expected' in told
    report = tmp_path / 'report.xml'
    code, _, told = tool(
        'compress.py', 'resnet20_cifar', '--rank', 1, '--output', tmp_path / 'o.safetensors', '--report', report
    )
    assert code == 2 and '.json or .html' in told
    assert not list(tmp_path.iterdir())


class Sleep(nn.Module):
    """A network that takes so many seconds of the clock."""

    clock = FakeClock()  # of the class: networks are copied before they are timed

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.clock.sleep(self.seconds)
        return x


def test_latency_by_name(monkeypatch):
    Sleep.clock.install(monkeypatch, 'norton_timm.profiling.timing')
    times = compare_latency({'slow': Sleep(0.2), 'fast': Sleep(0.002)}, torch.zeros(1), repeats=3, seconds=0.1)
    assert list(times) == ['slow', 'fast']
    assert times == pytest.approx({'slow': 200, 'fast': 2})
    began = Sleep.clock.now
    compare_latency({'one': Sleep(0.25)}, torch.zeros(1), repeats=3, seconds=4)
    assert Sleep.clock.now - began == 4, 'as long as was asked for'
    with pytest.raises(ValueError, match='repeats=0'):
        compare_latency({'slow': Sleep(0)}, torch.zeros(1), repeats=0)
    with pytest.raises(ValueError, match='0 networks'):
        compare_latency({}, torch.zeros(1))


@pytest.fixture(scope='module')
def photographs(tmp_path_factory) -> Path:
    """24 smooth colour pictures of 40 pixels in two folders."""
    root = tmp_path_factory.mktemp('photographs')
    noise = torch.randn(24, 3, 44, 44, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.avg_pool2d(noise, 5, 1)
    pixels = (255 * (smooth * 1.5 + 0.5).clamp(0, 1)).byte().permute(0, 2, 3, 1).numpy()
    for k, picture in enumerate(pixels):
        (root / f'class{k % 2}').mkdir(exist_ok=True)
        Image.fromarray(picture).save(root / f'class{k % 2}' / f'{k}.png')
    return root


def test_calibration_images_are_prepared_as_the_model_says(photographs):
    model = timm.create_model('resnet20_cifar')
    (images,) = calibration_images(photographs, model, 16)
    assert images.shape == (16, 3, 32, 32)
    again = calibration_images(photographs, model, 16)[0]
    assert torch.equal(images, again)
    every = torch.cat(calibration_images(photographs, model, 100))
    assert len(every) == 24
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[k])[:, None, None] for k in ('mean', 'std'))
    raw = every * std + mean
    assert -1e-5 < raw.min() < raw.max() < 1 + 1e-5 and raw.std() > 0.1
    assert calibration_images(photographs, model, 4, (20, 24))[0].shape == (4, 3, 20, 24)


def test_calibration_images_of_an_archive(photographs, tmp_path):
    archive = tmp_path / 'small.tar.xz'
    with tarfile.open(archive, 'w:xz') as tar:
        for split in ('train', 'test'):
            for k in range(6):
                picture = tmp_path / 'picture.png'
                Image.new('RGB', (32, 32), (40 * k, 255 if split == 'test' else 0, 0)).save(picture)
                tar.add(picture, f'data/{split}/class{k % 2}/{k}.png')
    model = timm.create_model('resnet20_cifar')
    (images,) = calibration_images(archive, model, 4)
    cfg = model.pretrained_cfg
    green = images[:, 1] * cfg['std'][1] + cfg['mean'][1]
    assert images.shape == (4, 3, 32, 32) and green.abs().max() < 1e-4, 'only the training split may be used'


def test_calibration_repairs_and_is_reported(tool, photographs, tmp_path):
    plain, repaired, report = tmp_path / 'a.safetensors', tmp_path / 'b.safetensors', tmp_path / 'report.json'
    torch.manual_seed(0)
    dense = timm.create_model('resnet20_cifar').eval()
    save_file(dense.state_dict(), tmp_path / 'dense.safetensors')
    options = ['resnet20_cifar', '--checkpoint', tmp_path / 'dense.safetensors', '--rank', 1]
    assert tool('compress.py', *options, '--output', plain).code == 0
    calibration = ['--calibration', photographs, '--calibration-images', 20]
    done = tool('compress.py', *options, *calibration, '--output', repaired, '--report', report)
    assert done.code == 0, done.err
    assert 'refitted on calibration images: 19 layers' in done.out  # all but the protected first, which did not change
    assert json.loads(report.read_text())['refitted'][0] == 'layer1.0.conv1'
    (x,) = calibration_images(photographs, dense, 20)
    with torch.no_grad():
        wanted = dense(x)
        errors = [float((load(path).eval()(x) - wanted).square().mean()) for path in (plain, repaired)]
    assert errors[1] < 0.7 * errors[0]


def test_budget_with_calibration(tool, photographs, tmp_path):
    out = tmp_path / 'out.safetensors'
    options = ['--method', 'coring', '--macs', 0.5, '--calibration', photographs]
    done = tool('compress.py', 'resnet20_cifar', *options, '--output', out)
    assert done.code == 0 and 'refitted' in done.out, done.err
    dense = count(timm.create_model('resnet20_cifar'), 32)
    assert count(load(out), 32).macs == pytest.approx(0.5 * dense.macs, rel=0.01)


@pytest.mark.parametrize(
    ('path', 'number', 'told'),
    [('nothing', 8, 'nothing'), ('.', 8, 'no images'), ('text.tar.xz', 8, 'archive'), ('.', 0, 'at least 1')],
)
def test_bad_calibration_images(path, number, told, tmp_path):
    (tmp_path / 'text.tar.xz').write_text('no archive')
    with pytest.raises(ValueError, match=told):
        calibration_images(tmp_path / path, timm.create_model('resnet20_cifar'), number)
