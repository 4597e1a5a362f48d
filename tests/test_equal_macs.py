"""The study of compression without labels: controls at equal MACs, rows that are measured once, and the picture."""

from __future__ import annotations

import copy
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from test_choices import network, pictures
from torch import nn

from norton_timm import CompressionSpec, count
from norton_timm.compression import channel_graph, compress, refit, reshape
from norton_timm.graph import remove_channels
from norton_timm.studies import controls, equal_macs
from norton_timm.studies.controls import UNIFORM, LeftOut, uniform_spec
from norton_timm.studies.equal_macs import ENTRANTS, AtSize, Limit, run_cells, study_cells
from norton_timm.studies.equal_macs_plot import plot_equal_macs
from norton_timm.studies.reproduce import read_rows, row_key
from norton_timm.studies.trained import TrainedNetworks
from norton_timm.training import resized, shrink

NAME = 'resnet20_cifar'
IMAGES = 64


@pytest.fixture(scope='session')
def few(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 12 training and 8 test images of each class of the JPEG copies of CIFAR-10."""
    source = data_dir / 'cifar10-jpeg.tar.xz'
    for path in (source, data_dir / 'resnet20_cifar10.th'):
        if not path.is_file():
            pytest.skip(f'{path} is missing')
    found: Counter[str] = Counter()
    path = tmp_path_factory.mktemp('few') / 'few.tar'
    with tarfile.open(source) as whole, tarfile.open(path, 'w') as part:
        for member in whole:
            folder = str(Path(member.name).parent)
            if member.isfile() and found[folder] < (12 if 'train' in folder else 8):
                found[folder] += 1
                part.addfile(member, whole.extractfile(member))
    return path


@pytest.fixture
def networks(few: Path, data_dir: Path) -> TrainedNetworks:
    return TrainedNetworks(data_dir / 'imagenet', data_dir, str(few), IMAGES)


@pytest.fixture(scope='module')
def dense() -> nn.Module:
    return network()


# controls


@pytest.mark.parametrize('method', UNIFORM)
def test_a_control_has_one_rate_and_the_macs_asked(dense: nn.Module, method: str) -> None:
    images, before = pictures(32), count(dense, 32).macs
    spec = uniform_spec(dense, 0.5, UNIFORM[method], images[:1])
    small, report = compress(dense, spec, images[:1], calibration=[images])
    assert 0.49 * before < count(small, 32).macs <= 0.505 * before
    assert not any(layer.rank for layer in report.layers) and spec.distance == UNIFORM[method]
    kept = {n: m.out_channels for n, m in small.named_modules() if isinstance(m, nn.Conv2d)}
    full = {n: m.out_channels for n, m in dense.named_modules() if isinstance(m, nn.Conv2d)}
    assert kept['conv1'] == 16 and kept['layer3.2.conv2'] == 64  # the ends stay
    pruned = [n for n in full if kept[n] < full[n]]
    assert len(pruned) >= 9
    ranges = [((kept[n] - 1) / full[n], (kept[n] + 1) / full[n]) for n in pruned]  # of the share kept
    assert max(low for low, _ in ranges) < min(high for _, high in ranges)


def test_the_rate_is_the_one_next_to_the_budget(dense: nn.Module) -> None:
    """Beside all rates at which a width of 16, 32 or 64 changes."""
    image = pictures(1)
    budget = 1.01 * 0.7 * count(dense, 32).macs

    def macs(rates: float | dict) -> int:
        spec = CompressionSpec(method='coring', rates=rates, criterion='l1')
        return count(reshape(copy.deepcopy(dense), spec, image), 32).macs

    least = next(k for k in range(64) if macs(k / 64) <= budget)
    found = macs(uniform_spec(dense, 0.7, 'l1', image).rates)  # type: ignore[arg-type]
    assert macs(least / 64) <= found <= budget < macs((least - 1) / 64)


def test_macs_that_one_rate_cannot_reach(dense: nn.Module) -> None:
    with pytest.raises(LeftOut, match=r'l1 at one rate: got 0.0 million MACs, expected at least 0.'):
        uniform_spec(dense, 0.0005, 'l1', pictures(1))


def test_torch_pruning_removes_what_our_own_surgery_removes(dense: nn.Module) -> None:
    images = pictures(16, 3)
    small, kept = controls.prune_by_torch_pruning(dense, 0.25, images[:1])
    ours = copy.deepcopy(dense)
    graph = channel_graph(ours, images[:1])
    made = {slot.name: slot.labels.tolist() for slot in graph.slots if slot.kind == 'out' and slot.name in kept}
    remove_channels(graph, {made[n][k] for n in made for k in set(range(len(made[n]))) - set(kept[n].tolist())})
    assert len(made) == 19 and {len(k) for k in kept.values()} == {12, 24, 48}
    with torch.no_grad():
        torch.testing.assert_close(small(images), ours(images), rtol=1e-4, atol=1e-4)
        wanted = dense(images)
        before = float((small(images) - wanted).norm())
    assert [entry['num_chs'] for entry in small.feature_info] == [12, 12, 24, 48]
    assert [entry['num_chs'] for entry in dense.feature_info] == [16, 16, 32, 64]
    assert len(refit(small, dense, kept, [pictures(64)])) == 20
    with torch.no_grad():
        assert float((small(images) - wanted).norm()) < 0.5 * before


def test_torch_pruning_meets_the_macs(dense: nn.Module) -> None:
    ratio = controls.torch_pruning_ratio(dense, 0.6, pictures(1))
    small, _ = controls.prune_by_torch_pruning(dense, ratio, pictures(1))
    assert 0.56 < count(small, 32).macs / count(dense, 32).macs <= 0.606


def test_where_torch_pruning_fails_its_error_is_told() -> None:
    with pytest.raises(LeftOut, match=r'torch_pruning: fails on ResNet: RuntimeError: Given groups=64'):
        controls.prune_by_torch_pruning(timm.create_model('resnetblur18').eval(), 0.25, torch.rand(1, 3, 64, 64))


# cells


def test_cells_of_the_table() -> None:
    cells = study_cells(['resnet18', NAME])
    assert len(cells) == len(set(cells)) == 2 * 2 * 3 * (len(ENTRANTS) + 1)
    assert {c.macs for c in cells if c.network == 'resnet18'} == {0.7, 0.5}
    assert {c.macs for c in cells if c.network == NAME} == {0.5, 0.3}
    assert {c.resolution for c in cells if c.method == 'ours'} == {'fixed', 'free'}
    assert {c.resolution for c in cells if c.method in UNIFORM} == {'fixed'}
    assert len(study_cells([NAME], [0.5], ['ours'], [0, 0], ['fixed'])) == 1


@pytest.mark.parametrize(('arguments', 'told'), [
    ({'macs': [1.5]}, r'macs: got 1.5, expected shares'),
    ({'methods': ['l3']}, r"methods: got 'l3', expected some of ours, l1"),
    ({'resolutions': ['low']}, r"resolutions: got 'low', expected some of fixed, free"),
])  # fmt: skip
def test_cells_that_are_none(arguments: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        study_cells([NAME], **arguments)


# rows


def test_rows_are_measured_once(networks: TrainedNetworks, tmp_path: Path) -> None:
    path, cells = tmp_path / 'new' / 'rows.csv', study_cells([NAME], [0.6], ['resolution'], [0, 1])
    first = list(run_cells(cells, networks, path, Limit(steps=0)))
    assert [row['seed'] for row in first] == [0, 1]
    content = path.read_text()
    assert not list(run_cells(cells, networks, path, Limit(steps=0))) and path.read_text() == content
    path.write_text(''.join(content.splitlines(keepends=True)[::2]))  # as if stopped before the other row
    (again,) = run_cells(cells, networks, path, Limit(steps=0))
    assert {**again, 'memory_gb': 0} == {**first[0], 'memory_gb': 0}
    assert not list(run_cells(cells, networks, path, Limit(steps=3)))  # without tuning, its limit does not matter
    more = study_cells([NAME], [0.6], ['resolution'], [1, 2])
    assert [row['seed'] for row in run_cells(more, networks, path, Limit(steps=0))] == [2]
    assert len(read_rows(path)) == 3 and [p.name for p in path.parent.iterdir()] == ['rows.csv']


def test_other_limits_and_images_have_rows_of_their_own(networks: TrainedNetworks) -> None:
    (cell,) = study_cells([NAME], [0.6], ['l1'], [0])
    keys = set()
    for images, limit in ((64, Limit(steps=3)), (64, Limit(steps=4)), (64, Limit(minutes=3)), (65, Limit(steps=3))):
        networks.images = images
        keys.add(row_key(equal_macs._facts(cell, networks, limit), equal_macs.CELL_KEYS))
    assert len(keys) == 4 and {key[-1] for key in keys} == {'3 steps', '4 steps', '3 minutes'}


def test_the_figures_of_a_lower_resolution(networks: TrainedNetworks, tmp_path: Path) -> None:
    cells = study_cells([NAME], [0.5], ['resolution'], [0])
    (row,) = run_cells(cells, networks, tmp_path / 'rows.csv', Limit(steps=5))
    found = networks.open(NAME)
    with torch.no_grad():
        right = [
            float((found.model(x).argmax(1) == found.test_labels).double().mean())
            for x in (found.test_images, resized(found.test_images, (24, 24)))
        ]
    assert (row['top1_dense'], row['top1']) == (pytest.approx(100 * right[0], abs=0.01),
                                                pytest.approx(100 * right[1], abs=0.01))  # fmt: skip
    assert row['points_lost'] == pytest.approx(100 * (right[0] - right[1]), abs=0.01)
    assert (row['pixels'], row['repair'], row['steps'], row['limit'], row['tuning_s']) == (24, 'none', 0, 'none', 0)
    assert row['macs_got'] == pytest.approx((24 / 32) ** 2, abs=1e-3) and row['macs_dense'] == 40_551_040
    assert row['expected_low'] < row['expected_loss'] < row['expected_high'] and 0 < row['agreement'] <= 100
    assert (row['images'], row['test_images'], row['data']) == (IMAGES, 80, 'few.tar')
    assert 0 < row['memory_gb'] < 20 and row['threads'] == torch.get_num_threads()


def test_every_method_has_a_row(networks: TrainedNetworks, tmp_path: Path) -> None:
    rows = list(run_cells(study_cells([NAME], [0.5], seeds=[0]), networks, tmp_path / 'rows.csv', Limit(steps=2)))
    assert [row['method'] for row in rows] == ['ours', *ENTRANTS]
    for row in rows:
        lower = row['method'] == 'resolution'
        assert row['macs_got'] <= 0.505 or lower, row
        assert row['macs_got'] > 0.45 and row['steps'] == 2 * (not lower)
        assert row['repair'] == ('none' if lower else 'refit') and (row['repair_s'] > 0) == (not lower)
        assert row['pixels'] == 32 or row['resolution'] == 'free'
    loss = {(row['method'], row['resolution']): row['expected_loss'] for row in rows}
    assert loss['ours', 'fixed'] < min(loss['random', 'fixed'], loss['l1', 'fixed'])
    assert plot_equal_macs(read_rows(tmp_path / 'rows.csv'), tmp_path / 'rows.png').stat().st_size > 10_000


def test_ours_is_what_shrink_makes(networks: TrainedNetworks, tmp_path: Path) -> None:
    cells = study_cells([NAME], [0.6], ['ours'], [1], ['fixed'])
    (row,) = run_cells(cells, networks, tmp_path / 'rows.csv', Limit(steps=2))
    found = networks.open(NAME)
    told = shrink(found.model, found.images, {'macs': 0.6}, steps=2, seed=1, latency=False)
    (tuned,) = (r for r in told.rows if r.name == 'compressed and tuned')
    assert row['macs'] == tuned.macs and tuned.agreement is not None
    assert row['expected_loss'] == round(100 * tuned.agreement.expected_loss, 2)
    assert row['agreement'] == round(100 * tuned.agreement.top1, 2)
    assert row['top1'] == round(found.top1(told.model), 2)


def test_a_network_at_a_lower_resolution_learns_from_the_dense_one_at_its_own(dense: nn.Module) -> None:
    x = pictures(4)
    with torch.no_grad():
        assert torch.equal(AtSize(dense, (24, 24))(x), dense(resized(x, (24, 24))))
    assert count(AtSize(dense, (24, 24)), 32).macs == pytest.approx((24 / 32) ** 2 * count(dense, 32).macs, rel=1e-3)


def test_without_torch_pruning_its_rows_are_left_out(
    networks: TrainedNetworks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(controls, 'find_package', lambda name: None)
    cells = study_cells([NAME], [0.5, 0.6], ['torch_pruning', 'resolution'], [0])
    rows = list(run_cells(cells, networks, tmp_path / 'rows.csv', Limit(steps=0)))
    assert [row['method'] for row in rows] == ['resolution'] * 2
    assert [r.getMessage() for r in caplog.records if 'torch_pruning' in r.getMessage()] == [
        'torch_pruning is left out: torch-pruning is not installed: pip install -e ".[controls]"'
    ]
    with pytest.raises(LeftOut, match='not installed'):
        controls.prune_by_torch_pruning(network(), 0.3, pictures(1))


def test_what_cannot_be_had_is_told_and_the_study_goes_on(
    networks: TrainedNetworks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells = study_cells([NAME], [0.0005, 0.6], ['l1', 'resolution'], [0])
    rows = list(run_cells(cells, networks, tmp_path / 'rows.csv', Limit(steps=0)))
    assert [(row['method'], row['macs_asked']) for row in rows] == [('resolution', 0.0005), ('l1', 0.6),
                                                                  ('resolution', 0.6)]  # fmt: skip
    (told,) = (r.getMessage() for r in caplog.records if 'left out' in r.getMessage())
    assert told.startswith(f'{NAME} at 0.0005, l1, seed 0 is left out: l1 at one rate: got 0.0 million MACs')


@pytest.mark.parametrize('limit', [Limit(), Limit(3, 1.0), Limit(steps=-1), Limit(minutes=0.0)])
def test_limits_that_are_none(networks: TrainedNetworks, limit: Limit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'expected one of them|expected 0 steps or more'):
        list(run_cells(study_cells([NAME]), networks, tmp_path / 'rows.csv', limit))


def test_rows_that_are_there_need_no_data(networks: TrainedNetworks, tmp_path: Path) -> None:
    path, cells = tmp_path / 'rows.csv', study_cells([NAME], [0.6], ['resolution'], [0])
    assert len(list(run_cells(cells, networks, path, Limit(steps=0)))) == 1
    empty = TrainedNetworks(tmp_path, tmp_path, 'gone/few.tar', IMAGES)
    assert not list(run_cells(cells, empty, path, Limit(steps=0)))
    with pytest.raises(ValueError, match=f'{NAME}: no file'):
        list(run_cells(study_cells([NAME], [0.5], ['resolution'], [0]), empty, path, Limit(steps=0)))


def test_a_few_images_are_too_few(few: Path, data_dir: Path, tmp_path: Path) -> None:
    networks = TrainedNetworks(data_dir, data_dir, str(few), 5)
    with pytest.raises(ValueError, match=f'{NAME}: got 5 images, expected at least 8'):
        list(run_cells(study_cells([NAME], [0.6], ['l1'], [0]), networks, tmp_path / 'rows.csv', Limit(steps=0)))
    assert not (tmp_path / 'rows.csv').exists()


# networks of a folder


LOADER = """
import timm, torch
def network(name):
    if name == 'resnet50':
        raise ImportError('pip install something')
    return timm.create_model(name, num_classes=7), {'size': 64}
def images(name, size, count=None):
    return torch.rand(count if name == 'sample1000' else 5, 3, size, size), torch.arange(count or 5) % 7
"""


def test_networks_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / 'imagenet_nets.py').write_text(LOADER)
    networks = TrainedNetworks(tmp_path, tmp_path, 'nowhere', 9)
    networks.check(['resnet18'])
    found = networks.open('resnet18')
    assert found.images.shape == (9, 3, 64, 64) and len(found.test_images) == 5 and not found.model.training
    assert networks.open('resnet18') is found and found.data == 'nips2017'
    assert found.top1_dense == found.top1(found.model) and 0 <= found.top1_dense <= 100
    with torch.no_grad():
        found.model.get_classifier().bias.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='resnet18: the compressed network answers with NaN'):
        found.top1(found.model)
    with pytest.raises(ValueError, match=r'resnet50: .*imagenet_nets.py: ImportError: pip install something'):
        networks.open('resnet50')


def test_the_default_number_of_images(few: Path, data_dir: Path) -> None:
    networks = TrainedNetworks(data_dir, data_dir, str(few))
    assert (networks.image_count('resnet18'), networks.image_count(NAME)) == (1000, 500)
    with pytest.raises(ValueError, match=f'{NAME}: got 120 unlabelled images, expected 500: --images asks for fewer'):
        networks.open(NAME)


# the tool


@pytest.mark.parametrize(('arguments', 'told'), [
    (['--networks', 'resnet20'], "networks: got 'resnet20', expected some of resnet50, "),
    (['--networks', 'resnet18', '--imagenet', 'nowhere'], 'resnet18: no file nowhere/imagenet_nets.py: --imagenet'),
    (['--networks', NAME, '--dense', 'nowhere'], f'{NAME}: no file nowhere/resnet20_cifar10.th: --dense names'),
    (['--networks', NAME, '--data', 'nowhere.tar'], "no data set 'nowhere.tar'"),
    (['--macs', '2'], 'macs: got 2.0, expected shares'),
    (['--methods', 'l3'], "methods: got 'l3', expected some of ours"),
    (['--images', '0'], 'images: got 0, expected at least 1'),
    (['--steps', '3', '--minutes', '2'], 'expected one of them'),
    (['--control', 'l1'], 'got --control with --study label-free'),
    (['--device', 'cuda'], 'device: got cuda, expected cpu'),
    (['--output', 'rows.json'], 'output: got rows.json, expected a .csv file'),
])  # fmt: skip
def test_bad_arguments(arguments: list[str], told: str, tool, data_dir: Path) -> None:
    source = [] if '--dense' in arguments else ['--dense', data_dir]
    done = tool('reproduce.py', '--study', 'label-free', *source, *arguments)
    assert (done.code, done.out) == (2, '') and told in done.err and done.err.count('\n') == 1


def test_options_of_this_study_belong_to_it(tool) -> None:
    done = tool('reproduce.py', '--study', 'rank', '--dense', 'x', '--networks', NAME)
    assert done.code == 2 and done.err == 'error: got --networks without --study label-free\n'


def test_one_command_makes_rows_and_a_picture(few: Path, data_dir: Path, tool, tmp_path: Path) -> None:
    command = ['--study', 'label-free', '--networks', NAME, '--dense', data_dir, '--data', few, '--images', IMAGES]
    command += ['--macs', 0.5, '--methods', 'l1', 'resolution', '--seeds', 0, '--steps', 0]
    done = tool('reproduce.py', *command)
    assert done.code == 0, done.err
    rows = read_rows(Path('results/label_free.csv'))
    assert [row['method'] for row in rows] == ['l1', 'resolution']
    lines = done.out.splitlines()
    assert len(lines) == 3 and lines[2] == 'wrote results/label_free.png'
    assert lines[1].startswith(f'{NAME} at 0.5625 of the MACs, 24 pixels, resolution, seed 0: ')
    assert str(tmp_path) not in Path('results/label_free.csv').read_text()
    assert Path('results/label_free.png').read_bytes().startswith(b'\x89PNG')
    again = tool('reproduce.py', *command)
    assert (again.code, again.out) == (0, 'wrote results/label_free.png\n')
