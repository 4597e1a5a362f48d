"""Layers of low rank: numpy's SVD is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

import norton_timm
from norton_timm import CompressionSpec, CPDConv2d, count, reshape
from norton_timm.compression import compress
from norton_timm.layers import has_computed_weight
from norton_timm.layers.dropped import DroppedBlock, drop_blocks
from norton_timm.layers.low_rank import LowRankConv2d, LowRankLinear, factor_layers


@pytest.mark.parametrize('rank', [1, 5, 12])
def test_is_the_best_approximation_of_its_rank(rank: int) -> None:
    linear = nn.Linear(20, 12)
    layer = LowRankLinear.from_linear(linear, rank)
    weight = linear.weight.detach().double().numpy()
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    best = torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank]).float()
    torch.testing.assert_close(layer.weight_product(), best, rtol=1e-4, atol=1e-6)
    x = torch.randn(3, 20)
    torch.testing.assert_close(layer(x), x @ best.T + linear.bias)
    model = nn.Sequential(linear)
    assert factor_layers(model, {'0': rank})['0'] == pytest.approx((s[rank:] ** 2).sum() / (s**2).sum(), abs=1e-6)
    assert (model[0].in_features, model[0].rank, model[0].out_features) == (20, rank, 12)


def test_a_fresh_layer_starts_with_the_variance_of_a_linear_one() -> None:
    x = torch.randn(64, 512)
    plain, low = nn.Linear(512, 512, bias=False), LowRankLinear(512, 512, 64, bias=False)
    assert float(low(x).var()) == pytest.approx(float(plain(x).var()), rel=0.1)


def test_keeps_type_mode_and_what_is_trained() -> None:
    linear = nn.Linear(6, 4, bias=False).double().eval()
    linear.weight.requires_grad_(False)
    layer = LowRankLinear.from_linear(linear, 2)
    assert layer[0].weight.dtype == torch.float64 and not layer.training and layer[1].bias is None
    assert not any(p.requires_grad for p in layer.parameters())


def test_pruned_first_then_factored() -> None:
    """The factors are the SVD of what pruning left, not of the dense layer."""
    model = timm.create_model('vgg16_bn_cifar').eval()
    spec = CompressionSpec(rank=0, rates={'features.conv16': 0.5}, low_rank={'classifier.linear1': 16})
    pruned, _ = compress(model, CompressionSpec(rank=0, rates=spec.rates))
    both, report = compress(model, spec)
    layer, before = both.classifier.linear1, pruned.classifier.linear1
    assert (layer.in_features, layer.rank, layer.out_features) == (before.in_features, 16, before.out_features)
    u, s, v = torch.linalg.svd(before.weight.detach().double(), full_matrices=False)
    best = (u[:, :16] * s[:16]) @ v[:16]
    torch.testing.assert_close(layer.weight_product().double(), best, rtol=1e-4, atol=1e-6)
    row = next(r for r in report.layers if r.name == 'classifier.linear1')
    assert (row.kind, row.rank, row.kept) == ('LowRankLinear', 16, 512)
    assert row.params_after == sum(p.numel() for p in layer.parameters())
    assert row.macs_after == 16 * (before.in_features + 512)
    assert row.nmse == pytest.approx(float(s[16:].square().sum() / s.square().sum()), rel=1e-3)
    assert sum(r.macs_after for r in report.layers) == report.after.macs == count(both).macs


def test_pattern_share_and_reshape_agree() -> None:
    spec = CompressionSpec(rank=0, rates=0.0, low_rank={'*.linear1': 0.25, '*.linear?': 3})
    model = timm.create_model('vgg16_bn_cifar')
    compressed, _ = compress(model, spec)
    assert (compressed.classifier.linear1.rank, compressed.classifier.linear2.rank) == (128, 3)
    shaped = reshape(timm.create_model('vgg16_bn_cifar'), spec)
    assert {n: p.shape for n, p in shaped.named_parameters()} == {n: p.shape for n, p in compressed.named_parameters()}
    shaped(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in shaped.parameters())


def test_saved_and_loaded_bit_for_bit(tmp_path) -> None:
    spec = CompressionSpec(rank={'layer*': 1}, rates=0.3, low_rank={'fc': 0.125})
    model, _ = compress(timm.create_model('resnet18'), spec)
    loaded = norton_timm.load(norton_timm.save(model, tmp_path / 'net.safetensors', spec=spec))
    assert isinstance(loaded.fc, LowRankLinear) and loaded.fc.rank == 64
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), loaded(x))
    again, _ = compress(loaded, CompressionSpec(rank=0, rates={'layer4.*.conv2': 0.5}))  # and pruned once more
    assert again.fc.in_features < loaded.fc.in_features


@pytest.mark.parametrize(
    'conv',
    [
        nn.Conv2d(4, 8, 3, padding=1, padding_mode='circular'),
        nn.Conv2d(4, 8, (3, 5), padding=(1, 2), padding_mode='reflect'),
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, padding_mode='replicate'),
        nn.Conv2d(4, 8, 4, padding='same'),
        Conv2dSame(4, 8, 3, stride=2),
    ],
    ids=lambda conv: f'{type(conv).__name__}-{conv.padding_mode}',
)
def test_a_convolution_of_full_rank_is_the_dense_one_whatever_its_padding(conv: nn.Conv2d) -> None:
    x = torch.randn(2, 4, 9, 9)
    layer = LowRankConv2d.from_conv(conv, 8)
    torch.testing.assert_close(layer(x), conv(x), atol=1e-5, rtol=1e-4)


class Reads(nn.Module):
    """Code that looks at the weights of its layers, as timm's EdgeNeXt and users' networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        x = self.b(self.a(x.to(self.a.weight.dtype)).relu() * torch.ones(1, device=self.b.weight.device))
        return self.head(x.mean((2, 3)).to(self.head.weight.device)) + float(self.b.weight.dim())


@pytest.mark.parametrize(
    'spec',
    [
        CompressionSpec(rank={'*': 1}),
        CompressionSpec(rank=0, rates=0.5, low_rank={'*': 3}, protect=()),
        CompressionSpec(rank={'b': 2}, low_rank={'a': 4, 'head': 2}),
    ],
    ids=['decomposed', 'low rank', 'both'],
)
def test_code_that_reads_weights_of_its_layers_goes_on(spec: CompressionSpec) -> None:
    model, x = Reads().eval(), torch.randn(2, 3, 9, 9)
    small, _ = compress(model, spec, x)
    layers = {n: m for n, m in small.named_modules() if isinstance(m, (CPDConv2d, LowRankConv2d, LowRankLinear))}
    for name, layer in layers.items():
        dense = model.get_submodule(name).weight
        assert layer.weight.dtype == dense.dtype and layer.weight.dim() == dense.dim()
        assert not has_computed_weight(layer)
    assert layers and small(x).shape == (2, 4)
    conv = small.get_submodule(next(iter(layers)))
    torch.testing.assert_close(nn.functional.conv2d(x, conv.weight, conv.bias), conv(x)) if conv is small.a else None


def test_torchscript_takes_a_layer_of_low_rank() -> None:
    for layer, x in (
        (LowRankConv2d.from_conv(nn.Conv2d(3, 4, 3), 2), torch.randn(1, 3, 8, 8)),
        (LowRankLinear(6, 4, 2), torch.randn(2, 6)),
    ):
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize('names', [('layer1.1', 'layer1.1.conv2'), ('layer2.1.bn1', 'layer3.2', 'layer2.1')])
def test_a_part_of_a_block_that_is_left_out_is_not_left_out_again(names: tuple[str, ...]) -> None:
    model = timm.create_model('resnet20_cifar')
    with pytest.raises(ValueError, match='to leave out, which is a part of'):
        drop_blocks(model, names)
    assert not any(isinstance(m, DroppedBlock) for m in model.modules())
    drop_blocks(model, [names[0], names[0]])  # a name given twice is one block
    assert isinstance(model.get_submodule(names[0]), DroppedBlock)


@pytest.mark.parametrize('rates', [0.0, 0.3])
def test_what_is_of_low_rank_is_not_factored_again(rates: float, tmp_path) -> None:
    """A compressed network is compressed once more, saved and loaded."""
    x = torch.randn(1, 3, 32, 32)
    first = CompressionSpec(rank=0, rates=rates, low_rank={'layer2.1.*': 0.5, 'fc': 0.5})
    once, _ = compress(timm.create_model('resnet20_cifar').eval(), first)
    twice, report = compress(once, CompressionSpec(rank=1, rates=0.25), x)
    row = next(r for r in report.layers if r.name == 'layer2.1.conv1.0')
    assert type(twice.layer2[1].conv1[0]) is nn.Conv2d and 'of low rank already' in row.dense_because
    loaded = norton_timm.load(norton_timm.save(twice, tmp_path / 'net.safetensors'))
    with torch.no_grad():
        assert torch.equal(twice(x), loaded(x))
    for low_rank in ({'layer2.1.conv1.0': 2}, {'fc.1': 1}):
        with pytest.raises(ValueError, match=r'low_rank: pattern .* matches no layer'):
            compress(once, CompressionSpec(rank=0, low_rank=low_rank), x)


@pytest.mark.parametrize(
    ('low_rank', 'told'),
    [
        ({'nothing': 4}, "low_rank: pattern 'nothing' matches no layer, expected names such as conv1, layer1.0.conv1"),
        ({'bn1': 4}, "low_rank: pattern 'bn1' matches no layer"),
        ({'fc': 513}, 'low_rank: got 513 for fc, expected at most 512, its full rank'),
    ],
)
def test_what_does_not_fit_is_named(low_rank: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        compress(timm.create_model('resnet18'), CompressionSpec(rank=0, low_rank=low_rank), torch.randn(1, 3, 64, 64))
