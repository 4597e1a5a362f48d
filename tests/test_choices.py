"""Budgets by measured errors: choices, the mix of them, and the compressed network that comes of it."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import norton_timm
from norton_timm import CompressionSpec, count
from norton_timm.compression import TEMPERATURE, Activations, OutputAxes, channel_graph, compress
from norton_timm.models.dense import dense_model
from norton_timm.search import find_spec, trade_off
from norton_timm.search.budget import Budget
from norton_timm.search.choices import Choices, measure_choices
from norton_timm.search.cost import CostModel
from norton_timm.search.mixture import Mix, Mixture
from norton_timm.training.data import ArrayData, Preprocessing
from norton_timm.training.sources import read_archive


def pictures(n: int, seed: int = 0, size: int = 32) -> Tensor:
    """Images whose neighbouring pixels are alike, as in photographs."""
    noise = torch.randn(n, 3, size + 4, size + 4, generator=torch.Generator().manual_seed(seed))
    return 3 * F.avg_pool2d(noise, 5, 1)


def network(name: str = 'resnet20_cifar') -> nn.Module:
    """A network with batch norms of real statistics, and class scores that differ."""
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(6):
            model(pictures(64, 1))
        head = model.get_classifier()
        head.weight *= 8 / model.eval()(pictures(64, 1)).std()
    return model.eval()


def measured(model: nn.Module, images: Tensor) -> tuple[Choices, Activations, CostModel]:
    graph = channel_graph(model, images[:1])
    activations = Activations(model, images[:1], list(images.split(16)))
    choices = measure_choices(model, graph, activations, [images])
    return choices, activations, CostModel(model, graph, images[:1])


@pytest.fixture(scope='module')
def trained() -> nn.Module:
    return network()


@pytest.fixture(scope='module')
def found(trained: nn.Module) -> tuple[Choices, Activations, CostModel]:
    return measured(trained, pictures(64))


def divergence(model: nn.Module, dense: nn.Module, images: Tensor, temperature: float = 1.0) -> float:
    with torch.no_grad():
        ours, wanted = ((m(images) / temperature).log_softmax(1) for m in (model, dense))
    return temperature**2 * float(F.kl_div(ours, wanted, log_target=True, reduction='batchmean'))


def test_errors_fall_with_the_rank_and_with_the_channels_kept(found: tuple) -> None:
    choices, _, _ = found
    assert choices.low_rank and choices.channels and choices.cpd and choices.blocks
    assert 'conv1' not in choices.low_rank and 'conv1' in choices.reasons
    for table in [*choices.low_rank.values(), *choices.channels.values()]:
        keys = sorted(table)
        assert table[keys[-1]] < 0.2 * table[keys[0]] + 1e-6
        assert all(error >= 0 for error in table.values())


def test_the_error_of_a_choice_is_the_divergence_that_it_causes(trained: nn.Module, found: tuple) -> None:
    """Small errors, of one layer at a time, against the network with that one change."""
    choices, _, _ = found
    images = pictures(64)
    pairs = []
    for name in list(choices.low_rank)[2:12:3]:
        rank = max(choices.low_rank[name])
        spec = CompressionSpec(rank=0, low_rank={name: rank})
        _, activations, _ = found
        layer = trained.get_submodule(name)
        weight = layer.weight.detach().flatten(1)
        second, first = OutputAxes(weight, activations.gram(name), activations.importance[name]).factors(rank)
        changed = copy.deepcopy(trained)
        target = changed.get_submodule(name)
        target.weight.data = (second @ first).view_as(target.weight)
        norm = next(n for n, m in trained.named_modules() if m is activations.order.norms[name])
        changed.get_submodule(norm).running_mean -= activations.mean_shift(name, second @ first - weight)
        pairs.append((choices.low_rank[name][rank], divergence(changed, trained, images, TEMPERATURE)))
        assert spec.low_rank == {name: rank}
    for expected, real in pairs:
        assert real / 2.5 < expected < 2.5 * real


def test_the_mix_is_the_best_of_all_for_a_few_choices() -> None:
    """Every combination of the options of a small network, against what the price and the descent find."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                          nn.Conv2d(32, 16, 3, padding=1)).eval()  # fmt: skip
    image = torch.rand(1, 3, 8, 8)
    graph = channel_graph(model, image)
    costs = CostModel(model, graph, image)
    choices = Choices(
        low_rank={'2': {4: 0.5, 12: 0.1}, '4': {3: 0.8, 8: 0.2}}, cpd={'2': {1: 0.9, 3: 0.3}},
        channels={0: {4: 1.0, 8: 0.4, 12: 0.1}, 1: {8: 0.9, 16: 0.35, 24: 0.05}},
    )  # fmt: skip
    mixture = Mixture(costs, choices)
    dense = mixture.cost(mixture.dense())
    assert dense == count(model, 8).macs
    every = []
    for k0, k1 in itertools.product(range(4, 17), range(8, 33)):
        for options in itertools.product(*(range(len(mixture.options[k])) for k in mixture.ranked)):
            mix = mixture.dense()
            mix.keep[0], mix.keep[1] = k0, k1
            mix.option[mixture.ranked] = options
            every.append((mixture.cost(mix), mixture.error(mix)))
    for share in (0.9, 0.7, 0.5, 0.35):
        mix = mixture.solve(share * dense)
        best = min(error for cost, error in every if cost <= share * dense)
        assert mixture.cost(mix) <= share * dense
        assert mixture.error(mix) <= 1.25 * best + 1e-9
    assert mixture.cost(mixture.least()) == min(cost for cost, _ in every)


def test_blocks_that_are_left_out_cost_nothing_and_hide_their_choices() -> None:
    model = timm.create_model('resnet20_cifar').eval()
    image = torch.rand(1, 3, 32, 32)
    costs = CostModel(model, channel_graph(model, image), image)
    inside = [n for n, _ in model.named_modules() if n.startswith('layer2.1.')]
    choices = Choices(
        low_rank={'layer2.1.conv1': {4: 0.2}}, blocks={'layer2.1': 0.5}, inside={'layer2.1': inside},
    )  # fmt: skip
    mixture = Mixture(costs, choices)
    mix = mixture.dense()
    mix.option[mixture.ranked] = 1
    assert mixture.error(mix) == pytest.approx(0.2) and mixture.chosen(mix, 'low_rank') == {'layer2.1.conv1': 4}
    left = Mix(mix.keep, mix.option, frozenset({'layer2.1'}))
    assert mixture.error(left) == 0.5 and mixture.chosen(left, 'low_rank') == {}
    small, _ = compress(model, CompressionSpec(rank=0, drop=('layer2.1',)), image)
    assert mixture.cost(left) == count(small, 32).macs


@pytest.mark.parametrize(('method', 'macs'), [('norton', 0.6), ('norton', 0.35), ('coring', 0.6)])
def test_a_budget_is_met(trained: nn.Module, method: str, macs: float, tmp_path) -> None:
    images, test = pictures(64), pictures(128, 7)
    batches = list(images.split(32))
    spec = find_spec(trained, macs=macs, method=method, calibration=batches)
    small, report = compress(trained, spec, images[:1], calibration=batches)
    assert report.after.macs / report.before.macs == pytest.approx(macs, rel=0.011)
    if method == 'coring':
        assert not spec.low_rank and not any(isinstance(m, norton_timm.CPDConv2d) for m in small.modules())
    norton_timm.save(small, tmp_path / 'a.safetensors')
    again = norton_timm.load(tmp_path / 'a.safetensors')
    with torch.no_grad():
        assert torch.equal(again(test), small(test))
    assert CompressionSpec.from_yaml(spec.to_yaml()) == spec


@pytest.mark.parametrize(('method', 'macs'), [('norton', 0.3), ('coring', 0.6)])
def test_budgets_do_better_by_images_than_by_weights_alone(method: str, macs: float, data_dir) -> None:
    """On a network that was trained, and photographs: 256 to measure and repair with, 512 others to judge by."""
    archive, weights = data_dir / 'cifar10-jpeg.tar.xz', data_dir / 'resnet20_cifar10.th'
    for path in (archive, weights):
        if not path.is_file():
            pytest.skip(f'{path} is missing')
    wanted = Preprocessing((32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    data = ArrayData(*read_archive(archive), wanted, torch.device('cpu'))
    test = torch.cat([x for x, _ in itertools.islice(data.test_batches(128), 4)])
    batches = data.calibration_batches(256)
    dense = dense_model('resnet20_cifar', checkpoint=weights)

    def distance(calibration: list[tuple[Tensor, Tensor]] | None) -> float:
        spec = find_spec(dense, macs=macs, method=method, calibration=calibration)
        return divergence(compress(dense, spec, test[:1], calibration=batches)[0], dense, test)

    by_images, by_weights = distance(batches), distance(None)
    print(f'\n{method} {macs}: divergence {by_images:.3f} by images, {by_weights:.3f} by weights')
    assert by_images < 0.9 * by_weights


def test_the_curve_falls_with_the_budget(trained: nn.Module) -> None:
    points = trade_off(trained, fractions=[0.5, 0.8], calibration=[pictures(32)], method='coring')
    large, low = points
    assert low.macs < 0.51 and large.macs < 0.81 and low.error > large.error
    small = norton_timm.reshape(copy.deepcopy(trained), low.spec, pictures(1))
    assert count(small, 32).macs / count(trained, 32).macs == pytest.approx(low.macs)


def test_the_same_images_give_the_same_spec(trained: nn.Module) -> None:
    batches = [pictures(32)]
    specs = [find_spec(trained, macs=0.5, calibration=batches, kinds=('channels', 'low_rank')) for _ in range(2)]
    assert specs[0] == specs[1] and not specs[0].drop and not specs[0].rank


@pytest.mark.parametrize('kinds', ['channels', ('nothing',), ('cpd',)])
def test_kinds_that_a_method_does_not_have(kinds) -> None:
    with pytest.raises(ValueError, match='kinds: got'):
        Budget(timm.create_model('resnet20_cifar'), 'coring', [pictures(4)], kinds=kinds)


def test_channels_that_leave_need_images() -> None:
    model = timm.create_model('resnet20_cifar').eval()
    spec = CompressionSpec(method='coring', rates=0.3, criterion='output_error')
    with pytest.raises(ValueError, match='output_error without images'):
        compress(model, spec, pictures(1))
    shaped = norton_timm.reshape(model, spec, pictures(1))
    assert min(m.out_channels for m in shaped.modules() if isinstance(m, nn.Conv2d)) < 16
