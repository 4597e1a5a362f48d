"""Budgets: targets met on the compressed network itself, errors against hand counts, better than uniform settings."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import timm
import torch
from families import build
from torch import nn

from norton_timm.compression.compress import compress
from norton_timm.compression.plan import make_plan
from norton_timm.compression.spec import CompressionSpec
from norton_timm.graph.groups import ChannelGraph
from norton_timm.layers.cpd_conv import CPDConv2d
from norton_timm.models.resnet_cifar import ResNetCifar
from norton_timm.profiling.complexity import count
from norton_timm.profiling.memory import MEGABYTE, peak_memory
from norton_timm.profiling.timing import latencies
from norton_timm.search import sensitivity
from norton_timm.search.budget import Budget, find_spec, rate_for
from norton_timm.search.cost import CostModel
from norton_timm.search.loss_weights import loss_weights
from norton_timm.search.sensitivity import layer_errors, measure_sensitivity, weighted_nmse
from norton_timm.search.trade_off import trade_off, trade_off_of

SIZE = {'mobilenetv2_050': 64, 'regnety_002': 64, 'densenet40_cifar': 32, 'resnet20_cifar': 32}


def small() -> nn.Module:
    """Six 3x3 convolutions in three stages, with batch norms that matter."""
    torch.manual_seed(0)
    model = ResNetCifar(depth=8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_var.uniform_(0.5, 1.5)
    return model


def pictures(n: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def uniform_settings(budget: Budget, macs: float, ranks: range) -> list[CompressionSpec]:
    """For each rank the smallest one rate of all layers with which the MACs are at most ``macs``."""
    model, found = budget.model, []

    def cost(rank: int, rate: float) -> float:
        spec = CompressionSpec(rank=rank, rates=rate)
        plan = make_plan(model, budget.graph, spec)
        return budget.costs.total('macs', np.array(plan.keep, dtype=float), plan.ranks) / budget.costs.dense['macs']

    for rank in ranks:
        low, high = 0.0, 0.99
        if not cost(rank, high) < macs < cost(rank, low):
            continue
        for _ in range(14):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(rank, middle) > macs else (low, middle)
        if cost(rank, high) > 0.97 * macs:
            found.append(CompressionSpec(rank=rank, rates=high))
    return found


@pytest.fixture(scope='module')
def resnet() -> Budget:
    return Budget(small(), example_input=pictures())


@pytest.mark.parametrize('name', list(SIZE))
def test_cost_model_agrees_with_counting_the_network(name: str) -> None:
    model, x = build(name), torch.randn(1, 3, SIZE[name], SIZE[name])
    costs = CostModel(model, graph := ChannelGraph(model, x), x)
    for spec in (CompressionSpec(rank=2, rates=0.3), CompressionSpec(rank={'*': 3}, rates={'*': 0.0})):
        plan = make_plan(model, graph, spec)
        keep, ranks = np.array(plan.keep, dtype=float), plan.ranks
        compressed, _ = compress(model, spec, x)
        counted = count(compressed, x)
        assert costs.total('macs', keep, ranks) == pytest.approx(counted.macs, rel=1e-9)
        assert costs.total('params', keep, ranks) == pytest.approx(counted.params, rel=1e-9)


@pytest.mark.parametrize('method', ['norton', 'coring'])
@pytest.mark.parametrize('kind, target', [('macs', 0.4), ('params', 0.6)])
def test_fraction_is_met_by_the_compressed_network(method: str, kind: str, target: float) -> None:
    model, x = small(), pictures()
    spec = find_spec(model, method=method, example_input=x, **{kind: target})
    compressed, _ = compress(model, spec, x)
    before, after = count(model, x), count(compressed, x)
    assert getattr(after, kind) / getattr(before, kind) == pytest.approx(target, rel=0.01)
    assert spec.method == method
    assert any(isinstance(m, CPDConv2d) for m in compressed.modules()) == bool(spec.rank)


def test_mobilenet_meets_its_macs() -> None:
    model, x = build('mobilenetv2_050'), torch.randn(1, 3, 64, 64)
    compressed, _ = compress(model, find_spec(model, macs=0.3, example_input=x), x)
    assert count(compressed, x).macs / count(model, x).macs == pytest.approx(0.3, rel=0.01)


def test_memory_is_met_by_the_compressed_network(resnet: Budget) -> None:
    x = resnet.example_input
    target = 0.7 * peak_memory(resnet.model, x) / MEGABYTE
    compressed, _ = compress(resnet.model, resnet.find('memory_mb', target), x)
    assert peak_memory(compressed, x) / MEGABYTE == pytest.approx(target, rel=0.01)


def test_peak_memory_of_a_chain_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 2, 1))
    weights = (3 * 8 + 8) + (8 * 16 + 16) + (16 * 2 + 2)
    # at the second layer: the input (the caller holds it), 8 and 16 channels of 10 x 10
    assert peak_memory(model, torch.randn(1, 3, 10, 10)) == 4 * (weights + (3 + 8 + 16) * 100)


def test_peak_memory_sees_tensors_held_for_later() -> None:
    class Residual(nn.Module):
        def forward(self, x):
            held = x + 1
            return held + (x * 2) * 3

    # x, held, x * 2 and its triple are alive together
    assert peak_memory(Residual(), torch.randn(1, 1, 5, 5)) == 4 * 4 * 25


def test_weighted_nmse_of_ranks_against_the_kernels(resnet: Budget) -> None:
    spec = CompressionSpec(rank={'layer1.0.conv1': 2, 'layer3.0.conv2': 5}, rates={})
    compressed, _ = compress(resnet.model, spec, resnet.example_input)
    total = 0.0
    for name in spec.rank:
        old, new = resnet.model.get_submodule(name).weight.detach(), compressed.get_submodule(name).kernel().detach()
        nmse = float(((old - new) ** 2).sum() / (old**2).sum())
        assert layer_errors(resnet.model, spec, resnet.example_input)[name] == pytest.approx(nmse, rel=1e-4)
        total += nmse / (1 - nmse)
    assert weighted_nmse(resnet.model, spec, resnet.example_input) == pytest.approx(total, rel=1e-4)


def test_weighted_nmse_of_pruning_against_the_filters_that_left(resnet: Budget) -> None:
    name, spec = 'layer2.0.conv1', CompressionSpec(rank={}, rates={'layer2.0.conv1': 0.25})
    compressed, _ = compress(resnet.model, spec, resnet.example_input)
    old, new = (m.get_submodule(name).weight.detach().flatten(1) for m in (resnet.model, compressed))
    stayed = (new[:, None] == old[None]).all(2).any(0)
    assert int(stayed.sum()) == len(new) == 24
    nmse = float(1 - old[stayed].square().sum() / old.square().sum())
    errors = layer_errors(resnet.model, spec, resnet.example_input)
    assert errors == {name: pytest.approx(nmse, rel=1e-5)}
    weights = {name: 3.0}
    expected = 3 * nmse / (1 - nmse)
    assert weighted_nmse(resnet.model, spec, resnet.example_input, weights) == pytest.approx(expected, rel=1e-5)


def test_table_holds_the_errors_that_compression_makes(resnet: Budget) -> None:
    nmse = resnet.table.nmse()
    assert 'conv1' not in nmse
    for row in nmse.values():
        values = [row[r] for r in sorted(row)]
        assert all(a > b for a, b in itertools.pairwise(values)), 'a higher rank must lose less'
    spec = CompressionSpec(rank={'layer2.0.conv2': 3}, rates={})
    exact = layer_errors(resnet.model, spec, resnet.example_input)['layer2.0.conv2']
    assert nmse['layer2.0.conv2'][3] == pytest.approx(exact, rel=0.02)
    for names, curves in resnet.table.left_at_keep.values():
        assert len(names) == len(curves) and np.allclose(curves[:, -1], 1)
        assert (np.diff(curves, axis=1) >= -1e-12).all(), 'more channels must not leave less'


def test_what_a_uniform_setting_protects_stays_as_it_is(resnet: Budget) -> None:
    def told(spec: CompressionSpec) -> dict:
        return {layer.name: layer for layer in compress(resnet.model, spec, resnet.example_input)[1].layers}

    uniform, ours = told(CompressionSpec(rank=1, rates=0.5)), told(resnet.find('macs', 0.5))
    protected = [name for name, layer in uniform.items() if 'protected' in layer.unpruned_because]
    assert 'conv1' in protected and len(protected) > 1
    for name in protected:
        assert ours[name].kept == ours[name].channels
    assert ours['conv1'].rank == 0


def test_trade_off_is_monotone_and_meets_its_fractions(resnet: Budget) -> None:
    points = trade_off_of(resnet, 'macs', [1.0, 0.8, 0.5, 0.2])
    assert [p.target for p in points] == [1.0, 0.8, 0.5, 0.2]
    assert points[0].error == 0
    for larger, smaller in itertools.pairwise(points):
        assert larger.error < smaller.error and larger.macs > smaller.macs
    for p in points:
        assert p.macs == pytest.approx(p.target, rel=0.01)
    exact = weighted_nmse(resnet.model, points[2].spec, resnet.example_input)
    assert points[2].error == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize('target', [0.5, *[pytest.param(t, marks=pytest.mark.slow) for t in (0.3, 0.7)]])
def test_no_uniform_setting_loses_less(resnet: Budget, target: float) -> None:
    ours = weighted_nmse(resnet.model, resnet.find('macs', target), resnet.example_input)
    settings = uniform_settings(resnet, target, range(7))
    assert settings
    for spec in settings:
        assert weighted_nmse(resnet.model, spec, resnet.example_input) >= ours


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('target', [0.3, 0.5, 0.7])
@pytest.mark.parametrize('name', ['resnet50', 'mobilenetv2_100', 'densenet121'])
def test_no_uniform_setting_loses_less_at_full_size(name: str, target: float) -> None:
    """Nine cells, a minute or two each: ``pytest tests/test_budget.py -m slow -k full_size -s``."""
    torch.manual_seed(0)
    budget = Budget(timm.create_model(name).eval())
    spec = budget.find('macs', target)
    _, report = compress(budget.model, spec, budget.example_input)
    assert report.after.macs / report.before.macs == pytest.approx(target, rel=0.01)
    ours = layer_errors(budget.model, spec, budget.example_input)
    ours_total = sum(e / (1 - e) for e in ours.values())
    print(f'\n{name} {target}: macs {report.after.macs / report.before.macs:.4f}, total {ours_total:.3f}, ', end='')
    print(f'sum of NMSE {sum(ours.values()):.3f}')
    settings = uniform_settings(budget, target, range(9))
    assert settings
    for uniform in settings:
        errors = layer_errors(budget.model, uniform, budget.example_input)
        total = sum(e / (1 - e) for e in errors.values())
        print(f'  rank {uniform.rank}, rate {uniform.rates:.3f}: {total:.3f}, sum of NMSE {sum(errors.values()):.3f}')
        assert total >= ours_total


@pytest.mark.slow
@pytest.mark.parametrize('share', [0.4, 0.6])
@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'mobilenetv2_100', 'densenet121'])
def test_latency_is_met_on_this_device(name: str, share: float) -> None:
    """Needs an idle machine: ``pytest tests/test_budget.py -m slow -k latency -s``.

    The milliseconds are checked as a share of the dense network's, both measured in turns.
    """
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 160, 160)
    (dense,) = latencies([model], x)
    spec = find_spec(model, latency_ms=share * dense, example_input=x)
    before, after = latencies([model, compress(model, spec, x)[0]], x, seconds=4)
    print(f'\n{name}: dense {dense:.2f} ms, wanted a share of {share}, got {after / before:.3f}')
    assert after / before == pytest.approx(share, rel=0.05)


def test_latency_target_makes_the_network_faster() -> None:
    """The machine may be busy: only that the compressed network takes clearly less time, side by side."""
    model, x = small(), torch.randn(16, 3, 32, 32)
    budget = Budget(model, example_input=x)
    budget.measure_seconds = 0.3
    (dense,) = latencies([model], x, seconds=0.5)
    try:
        spec = budget.find('latency_ms', 0.6 * dense)
    except ValueError as error:
        pytest.skip(f'timings too unsteady here: {error}')
    before, after = latencies([model, compress(model, spec, x)[0]], x, seconds=1)
    assert after < 0.85 * before


def test_calibration_spares_what_the_outputs_depend_on() -> None:
    model, x = small(), pictures(8)
    with torch.no_grad():
        block = model.get_submodule('layer2.0')
        block.bn2.weight.zero_()  # the block now adds a constant: its filters do not matter
    budget = Budget(model, calibration=[x], example_input=x[:1])
    assert budget.choices is not None
    errors = {name: max(table.values()) for name, table in budget.choices.low_rank.items()}
    assert errors['layer2.0.conv1'] < 0.01 * errors['layer1.0.conv1']
    weights = loss_weights(model, budget.graph, measure_sensitivity(model, budget.graph), [x])
    assert sum(weights.values()) / len(weights) == pytest.approx(1, rel=0.05)
    assert weights['layer2.0.conv1'] < 0.01 * weights['layer1.0.conv1']

    def spent(spec: CompressionSpec) -> int:
        _, report = compress(model, spec, x[:1], calibration=[x])
        return next(r.macs_after for r in report.layers if r.name == 'layer2.0.conv1')

    assert spent(budget.find('macs', 0.6)) < spent(find_spec(model, macs=0.6, example_input=x[:1]))


@pytest.mark.parametrize('pack', [lambda x, y: (x, y), lambda x, y: [x, y]], ids=['tuple', 'list'])
def test_labels_beside_calibration_images_change_nothing(pack, resnet: Budget) -> None:
    x = pictures(4)
    bare, labelled = (Budget(resnet.model, calibration=[b], example_input=x[:1]) for b in (x, pack(x, torch.ones(4))))
    assert bare.choices is not None and bare.choices.low_rank and labelled.choices == bare.choices


def test_table_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, calls = small(), pictures(), []
    real = sensitivity.cp_decompose
    monkeypatch.setattr(sensitivity, 'cp_decompose', lambda *a, **k: calls.append(1) or real(*a, **k))
    with torch.no_grad():
        model.get_submodule('layer1.0.conv1').weight.mul_(1.5)  # weights that no test has used yet
    first = Budget(model, example_input=x).table
    assert calls
    calls.clear()
    again = Budget(model, example_input=x).table
    assert not calls and again.nmse() == first.nmse()
    with torch.no_grad():
        model.get_submodule('layer2.0.conv1').weight.add_(0.1)
    Budget(model, example_input=x)
    assert calls, 'new weights must not meet an old table'


def test_input_model_is_untouched() -> None:
    model, x = small().train(), pictures(2)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    find_spec(model, macs=0.5, calibration=[x], example_input=x[:1])
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_same_model_same_spec(resnet: Budget) -> None:
    x = pictures()
    assert find_spec(small(), macs=0.5, example_input=x) == resnet.find('macs', 0.5)


@pytest.mark.parametrize('filters', [1, 2, 3, 7, 16, 64, 96, 2048])
def test_rate_gives_exactly_the_number_kept(filters: int) -> None:
    for keep in range(1, filters + 1):
        rate = rate_for(filters, keep) if keep < filters else 0.0
        assert max(1, int(filters * (1 - rate))) == keep


def test_whole_model_needs_no_change(resnet: Budget) -> None:
    spec = resnet.find('macs', 1.0)
    assert not spec.rank and not spec.rates


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({}, 'exactly one of'),
        ({'macs': 0.5, 'params': 0.5}, 'exactly one of'),
        ({'macs': 0.0}, 'above 0 and at most 1'),
        ({'macs': 1.5}, 'above 0 and at most 1'),
        ({'params': True}, 'above 0 and at most 1'),
        ({'macs': '0.5'}, 'above 0 and at most 1'),
        ({'memory_mb': math.nan}, 'a positive number'),
        ({'latency_ms': -3}, 'a positive number'),
        ({'macs': 0.5, 'method': 'magic'}, 'norton, coring'),
        ({'macs': 0.5, 'calibration': []}, 'at least one'),
        ({'macs': 0.5, 'calibration': torch.zeros(1, 3, 32, 32)}, 'a list of input batches'),
        ({'macs': 0.5, 'calibration': 3}, 'iterable'),
        ({'macs': 1e-6}, 'the least that can be attained is'),
        ({'params': 1e-6}, 'the least that can be attained is'),
        ({'memory_mb': 1e-3}, 'the least that can be attained is'),
        ({'memory_mb': 1e4}, 'already needs only'),
        ({'latency_ms': 1e6}, 'already needs only'),
    ],
)
def test_bad_arguments_name_what_is_allowed(arguments: dict, words: str) -> None:
    model = small()
    with pytest.raises(ValueError, match=words):
        find_spec(model, example_input=pictures(), **arguments)


def test_least_attainable_can_be_attained() -> None:
    model, x = small(), pictures()
    with pytest.raises(ValueError) as caught:
        find_spec(model, macs=1e-6, example_input=x)
    least = float(str(caught.value).split()[-1])
    compressed, _ = compress(model, find_spec(model, macs=least, example_input=x), x)
    assert count(compressed, x).macs / count(model, x).macs == pytest.approx(least, rel=0.01)


def test_curve_function_stops_at_what_is_attainable() -> None:
    with pytest.raises(ValueError, match='the least that can be attained'):
        trade_off(small(), fractions=[0.5, 1e-5], example_input=pictures())
