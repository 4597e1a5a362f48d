"""compress.py with unlabelled images as users run it: what it prints and writes, odd folders, the commands it gives."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_sets import write_archive, write_folder
from PIL import Image
from safetensors.torch import save_file
from tool_runner import TOOLS, run_tool

from norton_timm.checkpoints.file import load, read_metadata, save
from norton_timm.models.dense import dense_model
from norton_timm.training.data import Preprocessing
from norton_timm.training.loop import evaluate
from norton_timm.training.sources import open_data

SHRINK = importlib.import_module('norton_timm.training.shrink')  # a function has the same name
SMALL = ('test_resnet', '--num-classes', 4, '--input-size', 32, '--method', 'coring', '--macs', 0.5)


@pytest.fixture
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], None]:
    """Sets the milliseconds that networks take; nothing is timed, and no deployed copy is looked for."""

    def set_times(times: dict[str, float]) -> None:
        monkeypatch.setattr(SHRINK, 'compare_latency', lambda models, *_, **__: {name: times[name] for name in models})
        turns = [times['dense'], times['compressed'], 7.0]
        monkeypatch.setattr(
            SHRINK, 'take_turns', lambda calls, *_, **__: SimpleNamespace(milliseconds=lambda: turns[: len(calls)])
        )
        monkeypatch.setattr(SHRINK, 'deploy', lambda model, x: model)

    set_times({'dense': 10.0, 'compressed': 5.0})
    return set_times


@pytest.fixture(scope='module')
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/CLASS` of 60 and `val/CLASS` of 16 pictures in 4 classes."""
    return write_folder(tmp_path_factory.mktemp('photographs'), train=60, val=16)


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """Weights of the small network with its last layer fitted to the classes."""
    torch.manual_seed(0)
    model = dense_model('test_resnet', num_classes=4)
    data = open_data(str(photographs), prepared(model), torch.device('cpu'), workers=0)
    images, labels = data.calibration_batches(60)[0]
    with torch.no_grad():
        found = torch.cat([model.forward_head(model.forward_features(images), pre_logits=True), torch.ones(60, 1)], 1)
        fit = torch.linalg.lstsq(found, torch.nn.functional.one_hot(labels).float(), driver='gelsd').solution
        model.get_classifier().weight.copy_(10 * fit[:-1].T)
        model.get_classifier().bias.copy_(10 * fit[-1])
    path = tmp_path_factory.mktemp('trained') / 'dense.safetensors'
    save_file(model.state_dict(), path)
    return path


def prepared(model: torch.nn.Module, size: int = 32) -> Preprocessing:
    plain = Preprocessing.from_cfg(model.pretrained_cfg)
    return Preprocessing((size, size), plain.mean, plain.std, plain.interpolation, plain.crop_pct)


class Texts(HTMLParser):
    """The cells of the first table, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text, self.tables, self.inside = '', 0, False
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tables += tag == 'table'
        self.inside = self.tables == 1 and tag in ('td', 'th')
        if self.tables == 1 and tag == 'tr':
            self.rows.append([])
        if self.inside:
            self.rows[-1].append('')

    def handle_endtag(self, tag) -> None:
        self.inside = False

    def handle_data(self, data) -> None:
        self.text += data
        if self.inside:
            self.rows[-1][-1] += data


def printed_table(out: str) -> dict[str, list[str]]:
    """Figures of each network of the printed table, by its name."""
    lines = out.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith('network '))
    rows = {}
    for line in lines[start + 1 :]:
        if line.startswith('milliseconds'):
            break
        rows[line[:28].strip()] = line[28:].split()
    return rows


def test_real_accuracy_of_every_row_stands_beside_the_expected_loss(
    photographs: Path, trained: Path, tmp_path: Path, quick_clock: Callable
) -> None:
    out = tmp_path / 'out.safetensors'
    options = ['--checkpoint', trained, '--images', photographs / 'train', '--labelled', photographs / 'val']
    done = run_tool('compress.py', *SMALL, *options, '--steps', 2, '--output', out)
    assert done.code == 0, done.err
    rows = printed_table(done.out)
    names = ['dense', 'compressed', 'compressed and tuned', 'dense, lower resolution']
    assert list(rows) == names
    # the same images, read and judged by the evaluation that eval_cls.py uses
    dense, small = dense_model('test_resnet', checkpoint=trained, num_classes=4), load(out)
    data = open_data(str(photographs), prepared(dense), torch.device('cpu'), workers=0)
    wanted = {'dense': dense, 'compressed and tuned': small}
    found = {row['name']: row for row in read_metadata(out)['label_free']['rows']}
    for name, network in wanted.items():
        assert found[name]['top1'] == pytest.approx(evaluate(network, data, torch.device('cpu'))['top1'])
    assert found['dense']['top1'] > 50, 'the network knows the classes'
    images, labels = next(iter(data.test_batches(16)))
    lower = found['dense, lower resolution']
    resized = torch.nn.functional.interpolate(images, lower['size'], mode='bicubic', antialias=True)
    with torch.no_grad():
        assert lower['top1'] == pytest.approx(100 * float((dense(resized).argmax(1) == labels).double().mean()))
    # printed and on the page
    page = Texts(out.with_suffix('.html').read_text())
    assert page.rows[0] == [
        'network', 'pixels', 'MMACs', 'parameters', 'ms', 'agreement', 'expected loss, points', 'top-1'
    ]  # fmt: skip
    assert [row[0] for row in page.rows[1:]] == names
    for name, cells in zip(names, page.rows[1:]):
        assert f'{found[name]["top1"]:.1f}' in rows[name] and cells[-1].startswith(f'{found[name]["top1"]:.1f} %')
    assert not [line for line in done.out.splitlines() if line.startswith('note: the weights are random')]
    # words for every step, and a bar for those that take long
    for step in ('search', 'repair', 'tuning', 'latency'):
        assert f'{step}: ' in done.err
    for step in ('reading images', 'sensitivity', 'tuning', 'accuracy', 'latency'):
        assert f'{step}:   0%' in done.err


def test_labels_change_nothing_but_the_column(
    photographs: Path, trained: Path, tmp_path: Path, quick_clock: Callable
) -> None:
    files = [tmp_path / 'a.safetensors', tmp_path / 'b.safetensors']
    options = [*SMALL, '--checkpoint', trained, '--images', photographs / 'train', '--quick']
    for file, more in zip(files, ([], ['--labelled', photographs / 'val'])):
        assert run_tool('compress.py', *options, *more, '--output', file).code == 0
    first, second = (load(file).state_dict() for file in files)
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (read_metadata(file)['label_free'] for file in files)
    for row in second['rows']:
        assert row.pop('top1') is not None
    for row in first['rows']:
        assert row.pop('top1') is None
    assert first['rows'] == second['rows'] and first['warnings'] == second['warnings']


def test_a_quick_look_says_so_and_does_less(
    photographs: Path, tmp_path: Path, quick_clock: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError('a quick look neither tunes nor deploys')

    monkeypatch.setattr(SHRINK, 'deploy', refuse)
    monkeypatch.setattr(SHRINK, 'tune_without_labels', refuse)
    out = tmp_path / 'out.safetensors'
    done = run_tool('compress.py', *SMALL, '--images', photographs, '--quick', '--output', out)
    assert done.code == 0, done.err
    assert 'note: a quick look: 60 images, no tuning' in done.out
    rows = read_metadata(out)['label_free']['rows']
    assert rows[1]['agreement']['images'] == 40, 'most of few images are there to measure on'
    assert 'note: the weights are random' in done.out
    page = Texts(out.with_suffix('.html').read_text())
    assert 'A quick look: 60 images' in page.text and 'The weights are random' in page.text
    assert list(printed_table(done.out)) == [row[0] for row in page.rows[1:]]
    assert '10.0' in printed_table(done.out)['dense'] and '5.0' in printed_table(done.out)['compressed']


def test_the_file_says_which_size_was_chosen(
    photographs: Path, tmp_path: Path, quick_clock: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SHRINK, 'sizes_for', lambda *_: [(24, 24)])
    out = tmp_path / 'out.safetensors'
    done = run_tool('compress.py', *SMALL, '--images', photographs, '--allow-resolution', '--output', out)
    assert done.code == 0, done.err
    rows = read_metadata(out)['label_free']['rows']
    assert [row['size'] for row in rows[:2]] == [32, 24] and rows[1]['macs'] <= 0.51 * rows[0]['macs']
    assert load(out).pretrained_cfg['input_size'] == (3, 24, 24)
    done = run_tool('compress.py', *SMALL[:5], '--allow-resolution', '--output', out)
    assert done.code == 2 and 'got --allow-resolution, expected a budget and --images with it' in done.err


def test_a_slower_network_is_told_with_a_target_in_milliseconds(
    photographs: Path, tmp_path: Path, quick_clock: Callable
) -> None:
    quick_clock({'dense': 10.0, 'compressed': 12.0})
    options = [*SMALL, '--images', photographs, '--calibration-images', 50, '--output', tmp_path / 'out.safetensors']
    done = run_tool('compress.py', *options)
    assert done.code == 0, done.err
    told = 'slower here than the dense one, both in their fastest form: 12.00 against 10.00 ms; --latency-ms 7 '
    assert told in done.out and told in Texts((tmp_path / 'out.html').read_text()).text


def test_a_slower_network_of_a_recipe_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    module = importlib.import_module('_compress')
    options = [*SMALL[:5], '--rates', 0.3, '--output', tmp_path / 'out.safetensors']
    for times, slower in (((10.0, 12.0, 11.0), True), ((10.0, 12.0, 9.0), False)):
        named = dict(zip(('dense', 'compressed', 'tuned'), times))
        monkeypatch.setattr(module, 'compare_latency', lambda *_, named=named: named)
        done = run_tool('compress.py', *options)
        assert ('slower here than the dense one; --latency-ms 7 makes time the target' in done.out) == slower
        assert 'note: nothing measured the accuracy' in done.out and 'note: the weights are random' in done.out
        assert not (tmp_path / 'out.html').exists()


def test_a_recipe_is_judged_by_labelled_images_too(photographs: Path, trained: Path, tmp_path: Path) -> None:
    options = [*SMALL[:5], '--checkpoint', trained, '--rates', 0.3, '--labelled', photographs]
    done = run_tool('compress.py', *options, '--output', tmp_path / 'out.safetensors')
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith('top-1: '))
    dense, small = dense_model('test_resnet', checkpoint=trained, num_classes=4), load(tmp_path / 'out.safetensors')
    data = open_data(str(photographs), prepared(dense), torch.device('cpu'), workers=0)
    before, after = (evaluate(network, data, torch.device('cpu'))['top1'] for network in (dense, small))
    assert line == f'top-1: {before:.1f} -> {after:.1f} % on 16 labelled images'
    assert 'nothing measured the accuracy' not in done.out


@pytest.mark.parametrize(
    ('options', 'told'),
    [
        (['--rates', 0.5, '--quick'], 'got --quick, expected a budget and --images with it'),
        (['--rates', 0.5, '--steps', 3], 'got --steps, expected a budget and --images with it'),
        (
            ['--macs', 0.5, '--images', '.', '--quick', '--minutes', 1],
            'got --quick and --minutes, expected one of them',
        ),
        (['--macs', 0.5, '--seed', 1], 'got a budget (macs) and a recipe'),
        (['--spec', 'plain.safetensors'], 'holds no recipe'),
    ],
)
def test_options_that_do_not_go_together(
    options: list, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(dense_model('test_resnet', num_classes=4), 'plain.safetensors')
    done = run_tool('compress.py', *SMALL[:5], *options, '--output', 'out.safetensors')
    assert done.code == 2 and len(done.error_lines()) == 1 and told in done.err


# the commands at the end


def commands_in(out: str) -> list[list[str]]:
    """The commands after `next:`, each as tool and arguments."""
    lines = out[out.index('\nnext:\n') :].splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith('    ')]
    assert all(command[0] == 'python' for command in commands)
    return [[Path(tool).name, *rest] for _, tool, *rest in commands]


def test_the_commands_that_follow_run_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my data').mkdir()
    archive = write_archive(tmp_path / 'my data' / 'small.tar.xz', train=130, test=24)
    torch.manual_seed(0)
    save_file(dense_model('resnet20_cifar', num_classes=4).state_dict(), 'dense.safetensors')
    source = archive.relative_to(tmp_path)
    options = ['--checkpoint', 'dense.safetensors', '--mean', *[0.4] * 3, '--std', *[0.3] * 3, '--num-classes', 4]
    data = ['--images', source, '--labelled', source, '--calibration-images', 40]
    done = run_tool(
        'compress.py', 'resnet20_cifar', *options, *data, '--macs', 0.6, '--quick', '--output', 'small.safetensors'
    )
    assert done.code == 0, done.err
    commands = commands_in(done.out)
    assert [tool for tool, *_ in commands] == ['eval_cls.py', 'export.py', 'train_cls.py']
    for tool, *arguments in commands:
        ran = run_tool(tool, *arguments)
        assert ran.code == 0, f'{tool}: {ran.err}'
        if tool == 'eval_cls.py':  # the figure of the table
            top1 = read_metadata('small.safetensors')['label_free']['rows'][1]['top1']
            assert f'top-1 {top1:.2f} %' in ran.out
    assert Path('small.onnx').is_file()
    trained = load('small_trained/model.safetensors')
    small = load('small.safetensors')
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (trained, small)]
    assert shapes[0] == shapes[1], 'the compressed network was trained, not another one'
    page = Texts(Path('small.html').read_text()).text
    assert all(line.strip() in page for line in done.out.splitlines() if line.startswith('    python'))


def test_commands_name_what_is_not_known(
    photographs: Path, tmp_path: Path, quick_clock: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_tool('compress.py', *SMALL, '--images', photographs, '--quick', '--output', 'out.safetensors')
    measure, export, train = commands_in(done.out)
    assert measure == ['eval_cls.py', 'out.safetensors', '--data', 'LABELLED']
    assert export[1:5] == ['--weights', 'out.safetensors', '--images', str(photographs)]
    assert 'LABELLED' in train and 'distill.weight=0' in train
    assert done.out.count('(LABELLED: ') == 2
    for tool, *arguments in (measure, train):  # one line says that the name is to be replaced
        ran = run_tool(tool, *arguments)
        assert ran.code == 2 and "no data set 'LABELLED'" in ran.err and len(ran.error_lines()) == 1
    # a folder of classes alone is measured on, and the size is that of the run
    ran = run_tool('eval_cls.py', 'out.safetensors', '--data', photographs / 'val', '--workers', 0)
    assert ran.code == 0 and 'on 16 images' in ran.out
    assert load('out.safetensors').pretrained_cfg['input_size'][1:] in ((32, 32), [32, 32])


def test_a_page_that_cannot_be_written_is_told_before_any_work(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / 'out.html').mkdir()
    done = run_tool('compress.py', *SMALL, '--images', photographs, '--output', tmp_path / 'out.safetensors')
    assert done.code == 2 and len(done.error_lines()) == 1 and 'out.html' in done.err
    assert 'search' not in done.err and [path.name for path in tmp_path.iterdir()] == ['out.html']


# odd folders


def picture(k: int, size: tuple[int, int], grey: bool) -> Image.Image:
    height, width = size[1], size[0]
    pixels = np.random.default_rng(k).integers(0, 256, (height, width) if grey else (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make(folder: Path, kind: str) -> Path:
    """A folder of pictures, odd in one way."""
    folder.mkdir()
    for k in range({'few': 12, 'too few': 5}.get(kind, 52)):
        size = (64, 36) if kind == 'two sizes' and k % 2 else (40, 40)
        file = folder / f'{k:02d}.png'
        picture(k, size, grey=kind == 'grey').save(file)
        if kind == 'all broken' or (kind == 'one broken' and k == 7):
            file.write_bytes(file.read_bytes()[:200])
    return folder


@pytest.mark.parametrize(
    ('kind', 'told'),
    [
        ('two sizes', None),
        ('grey', None),
        ('few', 'note: 12 images are few'),
        ('one broken', '07.png: not an image that can be read'),
    ],
)
def test_odd_folders_work(kind: str, told: str | None, tmp_path: Path, quick_clock: Callable) -> None:
    out = tmp_path / 'out.safetensors'
    done = run_tool('compress.py', *SMALL, '--images', make(tmp_path / 'in', kind), '--quick', '--output', out)
    assert done.code == 0, done.err
    assert load(out) is not None and out.with_suffix('.html').is_file()
    assert told is None or told in done.out + done.err
    assert ('left out, 1: ' in done.err) == (kind == 'one broken')
    assert ('images are few' in done.out) == (kind == 'few')


@pytest.mark.parametrize(
    ('kind', 'told'),
    [('too few', 'got 5 images, expected at least 8'), ('all broken', 'no images that can be read')],
)
def test_folders_that_do_not_do_are_one_line(kind: str, told: str, tmp_path: Path) -> None:
    out = tmp_path / 'out.safetensors'
    done = run_tool('compress.py', *SMALL, '--images', make(tmp_path / 'in', kind), '--quick', '--output', out)
    assert done.code == 2 and len(done.error_lines()) == 1 and told in done.err
    assert 'Traceback' not in done.err and not out.exists()


def spoil(folder: Path, how: str) -> Path:
    """A small labelled folder, wrong in one way."""
    write_folder(folder, train=4, val=8, classes=3 if how == 'three classes' else 4)
    if how == 'no classes':
        for k, file in enumerate(sorted((folder / 'val').rglob('*.png'))):
            file.rename(folder / 'val' / f'{k}.png')
    if how == 'a broken picture':
        next((folder / 'val').rglob('*.png')).write_bytes(b'no picture')
    return folder / 'val'


@pytest.mark.parametrize(
    ('how', 'told'),
    [
        ('three classes', 'got 3 classes (apple, bird, cat), expected 4'),
        ('no classes', 'images outside of class folders'),
        ('a broken picture', 'not an image that can be read'),
        ('nothing', 'nowhere'),
    ],
)
def test_labelled_images_that_do_not_do_are_one_line(how: str, told: str, tmp_path: Path) -> None:
    labelled = tmp_path / 'nowhere' if how == 'nothing' else spoil(tmp_path / 'in', how)
    out = tmp_path / 'out.safetensors'
    done = run_tool('compress.py', *SMALL[:5], '--rates', 0.3, '--labelled', labelled, '--output', out)
    assert done.code == 2 and len(done.error_lines()) == 1 and told in done.err
    assert 'Traceback' not in done.err and not out.exists()
