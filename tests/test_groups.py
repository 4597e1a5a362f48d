"""The channel graph and the surgery on it.

The whole sweep: ``pytest tests/test_groups.py -m "slow or not slow"``.
"""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from families import FAMILIES, build, images, relative_error, silence
from torch import nn
from torch.nn import functional as F
from torchvision.models import detection

from norton_timm import CPDConv2d
from norton_timm.graph.groups import ChannelGraph
from norton_timm.graph.surgery import remove_channels
from norton_timm.layers.channel_map import ChannelMap
from norton_timm.utils.modules import replace_module


def some_channels(graph: ChannelGraph, share: float = 0.3) -> set[int]:
    """A random share of every group's channels that may go."""
    rng, gone = np.random.default_rng(0), set()
    for group in graph.groups:
        free = [int(c) for k, c in enumerate(group.classes) if k not in group.frozen]
        gone.update(rng.permutation(free)[: int(len(group.classes) * share)].tolist())
    return gone


@pytest.mark.parametrize('name', FAMILIES)
def test_removing_silent_channels_changes_nothing(name, record_property):
    model, x = build(name), images(name)
    graph = ChannelGraph(model, x)
    gone = some_channels(graph)
    assert gone or name in ('nf_resnet50',)  # weight standardisation couples all input channels: all stay
    silence(graph, gone)
    with torch.no_grad():
        before = model(x)
        remove_channels(graph, gone)
        after = model(x)
    error = relative_error(after, before)
    record_property('tested model', {'model': name, 'error of exact pruning': f'{error:.0e}'})
    assert error < 1e-5


@pytest.mark.parametrize('builder', ['fasterrcnn', 'maskrcnn', 'keypointrcnn'])
def test_whole_detectors(builder):
    options = dict(min_size=96, max_size=128, weights=None, weights_backbone=None)
    if builder != 'keypointrcnn':
        options['num_classes'] = 5
    model = getattr(detection, f'{builder}_resnet50_fpn')(**options).eval()
    image = [torch.rand(3, 96, 128)]
    graph = ChannelGraph(model, image)
    fpn = graph.group_of('backbone.fpn.layer_blocks.0.0')
    assert fpn is not None and not fpn.frozen and len(fpn.members) == 4  # one set of channels for all levels
    gone = some_channels(graph)
    silence(graph, gone)
    with torch.no_grad():
        before = model(image)[0]
        remove_channels(graph, gone)
        after = model(image)[0]
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-4)


def test_decomposed_layers_are_sliced_with_all_their_components():
    model = build('resnet18')
    for name, module in list(model.named_modules()):
        if type(module) is nn.Conv2d and module.kernel_size == (3, 3):
            replace_module(model, name, CPDConv2d.from_conv(module, 2))
    x = images('resnet18')
    graph = ChannelGraph(model, x)
    gone = some_channels(graph)
    silence(graph, gone)
    with torch.no_grad():
        before = model(x)
        remove_channels(graph, gone)
        assert relative_error(model(x), before) < 1e-5
    layer = model.layer1[0].conv1
    assert layer.pointwise.shape[0] == 2 * layer.out_channels < 128


def test_groups_of_a_residual_network():
    model = timm.create_model('resnet50')
    graph = ChannelGraph(model, torch.randn(1, 3, 64, 64))
    names = [g.names for g in graph.groups]
    assert ['conv1'] in names and ['layer1.0.conv1'] in names and ['layer1.0.conv2'] in names
    assert ['layer1.0.conv3', 'layer1.0.downsample.0', 'layer1.1.conv3', 'layer1.2.conv3'] in names
    assert graph.group_of('fc').why_frozen == 'output of the model'
    assert not graph.unknown


def test_agrees_with_torch_pruning():
    """The same layers must lose the same number of channels when one channel of conv1 goes, says torch-pruning."""
    tp = pytest.importorskip('torch_pruning')
    for name in ('resnet18', 'densenet121', 'mobilenetv2_100'):
        model, x = build(name), images(name)
        graph = ChannelGraph(model, x)
        other = tp.DependencyGraph().build_dependency(model, example_inputs=x)
        for group in graph.groups:
            layer = group.members[0].module
            if group.frozen or not isinstance(layer, nn.Conv2d) or layer.groups > 1:
                continue
            theirs = other.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=[0])
            targets = [(d.target.module, d.handler.__name__) for d, _ in theirs]
            members = {m for m, what in targets if type(m) is nn.Conv2d and what == 'prune_out_channels'}
            ours = {s.module for s in group.members if int(group.classes[0]) in s.labels}
            assert {m for m in members if m.groups == 1} == ours, (name, group.names)


class Net(nn.Module):
    """A convolution, a function, a convolution."""

    def __init__(self, function, width_in: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 8, 1), nn.Conv2d(width_in, 4, 1), function

    def forward(self, x):
        return self.b(self.function(self.a(x))).mean((2, 3))


def frozen_a(function, width_in: int = 8) -> str | None:
    graph = ChannelGraph(Net(function, width_in), torch.randn(2, 3, 6, 6))
    return graph.group_of('a').why_frozen


@pytest.mark.parametrize(
    ('function', 'width_in'),
    [
        (F.relu, 8),
        (lambda x: x.mul(2).add_(1), 8),
        (lambda x: torch.cat([x, x], 1), 16),
        (lambda x: x[:, :8], 8),
        (lambda x: x[:, :, ::2, 1:], 8),
        (lambda x: F.pad(x, (1, 1, 1, 1)), 8),
        (lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 8),
        (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), 8),
        (lambda x: F.interpolate(x, scale_factor=2), 8),
        (lambda x: x.flatten(2).view(2, -1, 6, 6), 8),
    ],
)
def test_operations_that_channels_pass(function, width_in):
    assert frozen_a(function, width_in) is None


@pytest.mark.parametrize(
    ('function', 'width_in', 'why'),
    [
        (lambda x: torch.cumsum(x, 1), 8, 'cumsum'),
        (lambda x: x.softmax(1), 8, 'softmax'),
        (lambda x: x[:, :4], 4, 'sliced'),
        (lambda x: x.chunk(2, 1)[0], 4, 'split'),
        (lambda x: x + torch.arange(8.0).view(1, 8, 1, 1), 8, 'add'),
        (lambda x: x.view(2, 2, 4, 6, 6).transpose(1, 2).reshape(2, 8, 6, 6), 8, 'view'),
        (lambda x: F.layer_norm(x, x.shape[1:]), 8, 'layer_norm'),
        (lambda x: torch.stack([x, x]).sum(0), 8, 'stack'),
    ],
)
def test_operations_that_freeze(function, width_in, why):
    assert why in frozen_a(function, width_in)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return torch.cumsum(x, 1)


def test_code_that_cannot_be_traced_freezes_what_came_before():
    assert frozen_a(lambda x: scripted(x)) is not None


def test_hard_coded_zero_padding_keeps_the_channels_that_meet_zeros():
    class Pad(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

        def forward(self, x):
            return self.head((self.b(x) + F.pad(self.a(x), (0, 0, 0, 0, 2, 2))).mean((2, 3)))

    model, x = Pad(), torch.randn(2, 3, 5, 5)
    graph = ChannelGraph(model, x)
    group = graph.group_of('b')
    assert group.names == ['b', 'a'] and len(group.frozen) == 4
    gone = [int(c) for k, c in enumerate(group.classes) if k not in group.frozen][:1]
    silence(graph, gone)
    before = model(x)
    remove_channels(graph, gone)
    torch.testing.assert_close(model(x), before)
    assert (model.a.out_channels, model.b.out_channels) == (3, 7)


def test_channel_map_decouples_both_sides():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
            self.map, self.head = ChannelMap(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)
            return self.head((self.b(x) + self.map(x)).mean((2, 3)))

    model, x = Mapped(), torch.randn(2, 3, 5, 5)
    graph = ChannelGraph(model, x)
    assert [g.names for g in graph.groups[:2]] == [['a'], ['b']]
    gone = [int(graph.groups[0].classes[1]), int(graph.groups[1].classes[4])]
    with torch.no_grad():
        model.a.weight[1] = model.a.bias[1] = 0  # the map reads channel 1 of a: silence it at its source
    silence(graph, gone)
    before = model(x)
    remove_channels(graph, gone)
    torch.testing.assert_close(model(x), before)
    assert model.map.index.tolist() == [-1, -1, 0, -1, 2, -1, -1]


def test_what_a_parameter_was_survives_surgery():
    model = build('resnet18').double().to(memory_format=torch.channels_last).train()
    model.layer1[0].conv1.weight.requires_grad_(False)
    graph = ChannelGraph(model, images('resnet18').double())
    remove_channels(graph, some_channels(graph))
    conv = model.layer1[0].conv1
    assert model.training and conv.weight.dtype == torch.float64 and not conv.weight.requires_grad
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.layer1[0].conv2.weight.requires_grad
    model(images('resnet18').double()).sum().backward()


def test_refuses_frozen_channels_and_empty_layers():
    model = build('resnet18')
    graph = ChannelGraph(model, images('resnet18'))
    before = {k: v.shape for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match='output of the model'):
        remove_channels(graph, [int(graph.group_of('fc').classes[0])])
    with pytest.raises(ValueError, match=r'every channel of layer1\.0\.conv1'):
        remove_channels(graph, graph.group_of('layer1.0.conv1').classes)
    assert before == {k: v.shape for k, v in model.state_dict().items()}
