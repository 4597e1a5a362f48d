"""Layouts: which layers an entry of a rates list prunes, against what the papers say of each family."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import norton_timm.models  # noqa: F401
from norton_timm.compression.compress import compress
from norton_timm.compression.rates import exact_rates, layout_of, widths_of
from norton_timm.compression.spec import CompressionSpec, parse_rates
from norton_timm.layers.channel_map import ChannelMap, padding_index

ENTRIES = {
    'vgg16_bn_cifar': 13,
    'vgg19_bn_cifar': 16,
    'resnet20_cifar': 12,
    'resnet56_cifar': 30,
    'resnet110_cifar': 57,
    'densenet40_cifar': 39,
    'googlenet_cifar': 10,
    'mobilenetv2_cifar': 8,
    'resnet50': 20,
    'resnet101': 37,
    'resnet50d': 20,
    'resnet18': 3 + 8,  # stage 1 shares the stem's channels
    'resnet34': 3 + 16,
}


@pytest.mark.parametrize('name', ENTRIES)
def test_entries_name_real_layers_once(name: str) -> None:
    model = timm.create_model(name)
    layout = layout_of(model)
    assert layout is not None and len(layout) == ENTRIES[name]
    names = [n for entry in layout for n in entry]
    assert len(set(names)) == len(names)
    modules = dict(model.named_modules())
    assert all(isinstance(modules[n], nn.Conv2d) for n in names)


def test_resnet50_entries() -> None:
    layout = layout_of(timm.create_model('resnet50'))
    assert layout is not None
    assert layout[0] == ['conv1']
    assert layout[1] == ['layer1.0.conv3', 'layer1.1.conv3', 'layer1.2.conv3', 'layer1.0.downsample.0']
    assert layout[4] == ['layer1.0.conv1', 'layer1.0.conv2']
    assert layout[19] == ['layer4.2.conv1', 'layer4.2.conv2']
    assert not any(n.startswith('layer4') and 'conv3' in n for entry in layout for n in entry)


def test_stem_of_basic_resnets_is_coupled_with_stage_1() -> None:
    layout = layout_of(timm.create_model('resnet18'))
    assert layout is not None and layout[0] == ['conv1', 'layer1.0.conv2', 'layer1.1.conv2']


def test_networks_without_a_published_list() -> None:
    assert layout_of(timm.create_model('efficientnet_b0')) is None
    assert layout_of(timm.create_model('resnext50_32x4d')) is None
    with pytest.raises(ValueError, match='EfficientNet'):
        widths_of(timm.create_model('efficientnet_b0'), [0.5])


def test_transitions_and_expansions_follow_what_reaches_them() -> None:
    dense = timm.create_model('densenet40_cifar')
    widths = widths_of(dense, parse_rates('[0.]+[0.3]*12+[0.1]+[0.3]*12+[0.1]+[0.3]*12'))
    assert widths['dense1.0.conv1'] == 8
    first = int((24 + 12 * 8) * 0.9)
    assert widths['trans1.conv1'] == first and widths['trans2.conv1'] == int((first + 12 * 8) * 0.9)
    mobile = timm.create_model('mobilenetv2_cifar')
    widths = widths_of(mobile, parse_rates('[0.]+[0.2]+[0.3]*2+[0.4]*2+[0.5]*2'))
    assert widths['features.1.conv.3'] == 12 and widths['features.2.conv.0'] == 6 * 12


@pytest.mark.parametrize('name', ['densenet40_cifar', 'mobilenetv2_cifar', 'resnet56_cifar'])
def test_exact_rates_give_the_widths(name: str) -> None:
    model = timm.create_model(name)
    rates = [0.37] * (len(layout_of(model) or []) - 1)
    modules = dict(model.named_modules())
    for layer, rate in exact_rates(model, rates).items():
        assert int(modules[layer].out_channels * (1 - rate)) == widths_of(model, rates)[layer]


def test_too_many_rates() -> None:
    with pytest.raises(ValueError, match='14 rates given, expected at most 13'):
        widths_of(timm.create_model('vgg16_bn_cifar'), [0.1] * 14)


@pytest.mark.parametrize('name', ['resnet20_cifar', 'densenet40_cifar', 'mobilenetv2_cifar', 'googlenet_cifar'])
def test_compressing_by_a_list_gives_the_tags_shapes(name: str) -> None:
    """The pipeline on a dense network and the zoo's wrapper must agree on what a list of rates means."""
    model = timm.create_model(name)
    rates = [0.0] + [0.3] * (len(layout_of(model) or []) - 1)
    spec = CompressionSpec(method='coring', rank=0, rates=rates, criterion='l1')
    small, _ = compress(model, spec, torch.randn(1, 3, 32, 32))
    widths = widths_of(model, rates)
    assert {n: small.get_submodule(n).out_channels for n in widths} == widths


def test_channel_map_pads_like_option_a() -> None:
    x = torch.randn(2, 16, 9, 7)
    expected = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    assert torch.equal(ChannelMap(16, 32, stride=2)(x), expected)
    assert ChannelMap(16, 16)(x) is x
    cropped = nn.functional.pad(x, (0, 0, 0, 0, -2, -1))
    assert torch.equal(ChannelMap(16, 13)(x), cropped) and padding_index(16, 13)[0] == 2


def test_channel_map_gathers_any_index() -> None:
    index = [3, -1, 0, 3, -1]
    x = torch.randn(2, 4, 5, 5)
    expected = torch.stack([x[:, i] if i >= 0 else torch.zeros_like(x[:, 0]) for i in index], 1)
    found = ChannelMap(4, 5, index=index)
    assert torch.equal(found(x), expected)
    other = ChannelMap(4, 5)
    other.load_state_dict(found.state_dict())
    assert torch.equal(other(x), expected)
    with pytest.raises(ValueError, match='out of range'):
        ChannelMap(4, 2, index=[0, 4])
    with pytest.raises(ValueError, match='expected one per output channel'):
        ChannelMap(4, 2, index=[0])
