"""Second moments of what layers read, and weights fitted to them, against direct computations."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
from families import relative_error
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from norton_timm import CPDConv2d, cp_decompose
from norton_timm.compression.gradients import each_gradient, output_importance
from norton_timm.compression.moments import Moments, outputs_at, samples_of
from norton_timm.compression.observe import observe
from norton_timm.compression.reconstruct import OutputAxes, Reader, WhiteFilters, least_squares, removals
from norton_timm.tensors import cp_reconstruct


def moments_of(x: Tensor, y: Tensor | None = None, parts: int = 3) -> Moments:
    moments = Moments()
    for k, some in enumerate(x.chunk(parts)):
        moments.add(some, None if y is None else y.chunk(parts)[k])
    return moments


def mixed(samples: int, inputs: int, seed: int = 0) -> Tensor:
    """Samples (M, P) whose entries depend on each other, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    return torch.randn(samples, inputs, generator=generator) @ mix + 3


@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode='circular'),
        nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode='reflect'),
        nn.Conv2d(4, 6, 4, padding='same'),
        Conv2dSame(4, 6, 3, stride=2),
        Conv2dSame(4, 6, 5, stride=2, dilation=2),
        nn.Linear(9, 6),
    ],
)
def test_samples_are_what_the_filters_see(layer: nn.Module) -> None:
    x = torch.randn(5, 4, 9, 9)
    linear = isinstance(layer, nn.Linear)
    with torch.no_grad():
        out = layer(x)
    positions = out[0].numel() // 6
    places = torch.randperm(positions)[:7]
    seen = samples_of(layer, x, places)
    made = seen @ layer.weight.detach().flatten(1).mT + layer.bias.detach()
    torch.testing.assert_close(made, outputs_at(out, places, linear).flatten(0, 1), atol=1e-5, rtol=1e-4)


def test_moments_of_parts_add_up() -> None:
    x, y = mixed(90, 5), mixed(90, 3, 1)
    both = moments_of(x[:50], y[:50]) + moments_of(x[50:], y[50:])
    for moments in (both, moments_of(x, y)):
        centred = x - x.mean(0)
        torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.mean_output, y.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.gram(True), centred.mT @ centred / 90, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(moments.gram(False), x.mT @ x / 90, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(moments.cross(True), centred.mT @ (y - y.mean(0)) / 90, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(moments.cross(False), x.mT @ y / 90, rtol=1e-3, atol=1e-3)


def test_least_squares_finds_weights_and_resists_noise() -> None:
    truth = torch.randn(4, 6)
    x = mixed(4000, 6)
    first, second = (moments_of(part, part @ truth.mT + 5) for part in x.chunk(2))
    found = least_squares(first, second, torch.zeros(4, 6), centred=True)
    assert relative_error(found @ (x - x.mean(0)).mT, truth @ (x - x.mean(0)).mT) < 0.02
    # ten samples for six inputs, and outputs that are mostly noise: the ridge that holds on the other half is strong
    x = mixed(20, 6, 2)
    old = torch.randn(4, 6)
    noisy = x @ old.mT + 50 * torch.randn(20, 4)
    halves = [moments_of(x[k : k + 10], noisy[k : k + 10], 1) for k in (0, 10)]
    found = least_squares(*halves, old, centred=True)
    plain = torch.linalg.lstsq(x - x.mean(0), noisy - noisy.mean(0)).solution.mT
    assert (found - old).norm() < 0.8 * (plain - old).norm()


def test_low_rank_keeps_the_principal_axes_of_the_weighted_outputs() -> None:
    weight, x = torch.randn(7, 5), mixed(500, 5)
    importance = torch.rand(7) + 0.1
    gram = moments_of(x).gram(True)
    second, first = OutputAxes(weight, gram, importance).factors(2)
    outputs = importance[:, None] * weight @ (x - x.mean(0)).mT / 500**0.5
    best = torch.linalg.svdvals(outputs)[2:].square().sum()
    lost = importance[:, None] * (weight - second @ first)
    assert float((lost @ gram * lost).sum()) == pytest.approx(float(best), rel=1e-2)


def test_cpd_is_that_of_the_weights_for_white_inputs_and_better_for_others() -> None:
    weight = torch.randn(6, 8, 3, 3)
    white = WhiteFilters(weight, torch.eye(72)).factors(2)
    plain = cp_decompose(weight, 2)
    torch.testing.assert_close(cp_reconstruct(white), cp_reconstruct(plain), atol=2e-2, rtol=2e-2)
    x = F.avg_pool2d(torch.randn(64, 8, 12, 12), 3, 1)  # neighbours are alike
    x = torch.einsum('nchw,cd->ndhw', x, torch.randn(8, 8))
    conv = nn.Conv2d(8, 6, 3, bias=False)
    seen = samples_of(conv, x, torch.arange(64))
    gram = moments_of(seen).gram(True)
    errors = []
    for factors in (plain, WhiteFilters(weight, gram).factors(2)):
        lost = (weight - cp_reconstruct(factors)).flatten(1)
        errors.append(float((lost @ gram * lost).sum()))
    assert errors[1] < 0.9 * errors[0]


def test_the_classes_that_leave_are_those_that_brute_force_finds() -> None:
    """Each reader's error after the best refit, for every pair of classes that could leave."""
    x = mixed(400, 12)
    x[:, 4:6] = x[:, 0:2] + 0.3 * x[:, 6:8]  # class 2 can nearly stand in for class 0
    grams = [moments_of(x).gram(True), moments_of(x.flip(1)).gram(True)]
    weights = [torch.randn(5, 12), 0.1 * torch.randn(3, 12)]
    columns = torch.arange(12).view(6, 2)
    readers = [Reader(w, g, columns) for w, g in zip(weights, grams)]

    def error(kept: tuple[int, ...]) -> float:
        total = 0.0
        for weight, gram in zip(weights, grams):
            at = columns[list(kept)].flatten()
            fitted = torch.linalg.solve(gram[at][:, at], gram[at] @ weight.mT).mT
            lost = weight.clone()
            lost[:, at] -= fitted
            total += float((lost.double() @ gram.double() * lost).sum())
        return total

    found = removals(readers, torch.arange(1, 6), [5, 4])
    assert all(0 in kept.tolist() for kept, _ in found.values())  # class 0 may not leave
    for keep in (5, 4):
        kept, changed = found[keep]
        best = min(error((0, *rest)) for rest in itertools.combinations(range(1, 6), keep - 1))
        assert error(tuple(kept.tolist())) <= 1.05 * best + 1e-3
        for weight, now, gram in zip(weights, changed, grams):
            gone = sorted(set(range(6)) - set(kept.tolist()))
            assert not now[:, columns[gone].flatten()].any()
            lost = weight - now
            reached = float((lost @ gram * lost).sum())
            assert reached <= 1.1 * error(tuple(kept.tolist())) + 1e-3


def test_gradients_tell_the_divergence_of_small_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    images = torch.randn(200, 3, 8, 8)
    change = 0.02 * torch.randn_like(model[0].weight)
    shift = 0.02 * torch.randn(8)
    dots: list[float] = []

    def see(gradients: dict[str, tuple[Tensor, Tensor]]) -> None:
        weight, bias = gradients['0']
        dots.append(float((change * weight).sum() + (shift * bias).sum()))

    for _ in range(1):
        each_gradient(model, {'0': model[0]}, images, see)
    expected = 0.5 * sum(d * d for d in dots) / len(dots)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight += change
        changed[0].bias += shift
        logits, wanted = changed(images).log_softmax(1), model(images).log_softmax(1)
    real = float(F.kl_div(logits, wanted, log_target=True, reduction='batchmean'))
    assert expected == pytest.approx(real, rel=0.3)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_importance_is_larger_where_the_outputs_depend_more() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
    with torch.no_grad():
        model[3].weight[:, 2] *= 20
    found = output_importance(model, {'0': model[0]}, torch.rand(16, 3, 4, 4))['0']
    assert found.argmax() == 2 and found[2] > 5 * found[0] and (found > 0).all()


@pytest.mark.parametrize(
    ('name', 'norm', 'join', 'block'),
    [
        ('resnet18', ('layer1.0.conv1', 'layer1.0.bn1'), ('layer2.0.downsample.0', 'layer2.0.bn2'), 'layer2.1'),
        ('mobilenetv2_035', ('conv_stem', 'bn1'), ('blocks.1.1.conv_pwl', 'blocks.1.0.bn3'), 'blocks.1.1'),
        ('resnet20_cifar', ('conv1', 'bn1'), ('layer1.1.conv2', 'layer1.0'), 'layer1.1'),
    ],
)
def test_one_pass_tells_norms_sums_and_blocks(name: str, norm: tuple, join: tuple, block: str) -> None:
    model = timm.create_model(name)
    order = observe(model, torch.rand(2, 3, 64, 64))
    assert order.norms[norm[0]] is model.get_submodule(norm[1])
    assert join[0] in order.joins and order.joins[join[0]].startswith(join[1])
    assert block in order.blocks and all(order.calls[n] == 1 for n in order.layers)
    assert next(iter(order.layers)) == next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))


def test_layers_that_are_decomposed_already_are_seen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CPDConv2d.from_conv(nn.Conv2d(4, 5, 3), 1), nn.Conv2d(5, 2, 1))
    assert list(observe(model, torch.rand(1, 3, 8, 8)).layers) == ['0', '1', '2']
