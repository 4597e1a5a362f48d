"""layers: what every registered layer type promises, and how a new one is added."""

from __future__ import annotations

import copy

import pytest
import torch
from families import relative_error, silence
from torch import nn

from norton_timm import CompressionSpec, CPDConv2d, compress, count
from norton_timm.graph import ChannelGraph, remove_channels
from norton_timm.layers import ChannelMap, LayerHandler, Positions, filters_of, handler_of
from norton_timm.layers.handler_base import _HANDLERS, PASSES, is_counted, nearest_handler, register, take


class Scale(nn.Module):
    """A factor for each channel; no handler knows it at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor[None, :, None, None].clone().expand(len(x), len(self.factor), 1, 1)


def network(middle: nn.Module, dims: int = 2) -> nn.Module:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(conv(3, 8, 3), middle, nn.ReLU(), conv(8, 6, 1), nn.Flatten(), nn.LazyLinear(4))


def prepared(middle: nn.Module, dims: int = 2) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = network(middle, dims), torch.randn(2, 3, *[7] * dims)
    model(x)
    return model.eval(), x


def exact_error(model: nn.Module, x: torch.Tensor) -> float:
    """Remove some silent channels of every group that may lose any; the relative change of the outputs."""
    graph = ChannelGraph(model, x)
    free = [g for g in graph.groups if not g.why_frozen]
    assert free, 'nothing can be pruned'
    gone = {int(c) for g in free for c in g.classes[1::2] if int(c) not in graph.frozen}
    silence(graph, gone)
    with torch.no_grad():
        before = model(x)
        remove_channels(graph, gone)
        return relative_error(model(x), before)


def test_a_new_layer_type_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = prepared(Scale(8))
    assert not [g for g in ChannelGraph(model, x).groups if '0' in g.names and not g.why_frozen], 'not known yet'
    monkeypatch.setattr('norton_timm.layers.handler_base._HANDLERS', _HANDLERS | {})

    @register
    class ScaleHandler(LayerHandler):
        types = (Scale,)
        role = PASSES

        def put(self, module, kind, keep):
            take(module, 'factor', keep, 0)

    assert exact_error(copy.deepcopy(model), x) < 1e-6
    small, report = compress(model, CompressionSpec(rank=0, rates={'0': 0.5}), x)
    assert small[0].out_channels == len(small[1].factor) == 4 and report.layers[0].kept == 4
    with pytest.raises(ValueError, match='Scale has a handler already'):
        register(ScaleHandler)


@pytest.mark.parametrize(
    ('middle', 'dims'),
    [
        (nn.ConvTranspose1d(8, 8, 3), 1),
        (nn.ConvTranspose2d(8, 8, 3, groups=2), 2),
        (nn.ConvTranspose3d(8, 8, 3, groups=8), 3),
        (nn.InstanceNorm1d(8, affine=True), 1),
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), 2),
        (nn.InstanceNorm3d(8), 3),
        (nn.BatchNorm3d(8), 3),
        (nn.PReLU(8), 2),
        (nn.PReLU(), 2),
        (nn.Conv2d(8, 8, 3, groups=8), 2),
        (nn.Conv2d(8, 16, 1, groups=8), 2),
        (CPDConv2d(8, 8, 3, rank=2, groups=2), 2),
        (ChannelMap(8, 8, index=[7, 6, 5, 4, 3, 2, 1, 0]), 2),
    ],
    ids=lambda value: str(value)[:40],
)
def test_layers_lose_silent_channels_exactly(middle: nn.Module, dims: int) -> None:
    if middle.__class__ is nn.Conv2d and middle.out_channels == 16:
        middle = nn.Sequential(middle, nn.Conv2d(16, 8, 1))
    model, x = prepared(middle, dims)
    assert exact_error(model, x) < 1e-5


@pytest.mark.parametrize('kind', sorted(_HANDLERS, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_a_handler_tells_the_type_and_its_heirs(kind: type[nn.Module]) -> None:
    heir = type('Heir', (kind,), {})
    module = heir.__new__(heir)
    nn.Module.__init__(module)
    assert handler_of(module) is None, 'an heir may use its weights in another way'
    assert nearest_handler(module) is _HANDLERS[kind]
    assert _HANDLERS[kind].counted == is_counted(module)


@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv2d(6, 4, 3, groups=2),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.Conv1d(6, 4, 3),
        nn.Conv3d(6, 4, (1, 2, 3)),
        nn.Linear(6, 4),
        CPDConv2d(6, 4, 3, rank=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_filters_are_four_dimensional_and_complete(layer: nn.Module) -> None:
    filters = filters_of(layer)
    assert filters.dim() == 4 and filters.shape[:2] == (4, 6 // getattr(layer, 'groups', 1))
    if not isinstance(layer, CPDConv2d):
        torch.testing.assert_close(filters.square().sum(), layer.weight.square().sum())


def test_costs_are_what_the_counter_counts() -> None:
    for layer, shape in ((nn.ConvTranspose1d(6, 4, 3), (2, 6, 9)), (nn.Conv2d(6, 4, 3, groups=2), (2, 6, 9, 9)),
                         (CPDConv2d(6, 4, 3, rank=2), (2, 6, 9, 9)), (nn.Linear(6, 4), (2, 5, 6))):  # fmt: skip
        x, handler, places = torch.randn(shape), handler_of(layer), Positions()
        handler.note_positions(places, x, layer(x))
        per_input, rest = handler.filter_cost(layer, places, 0)
        n_in, n_out = handler.widths(layer)
        assert n_out * (per_input * n_in / handler.groups(layer) + rest) == count(layer, x).macs, layer


def test_tensors_that_do_not_fit_together_are_named() -> None:
    conv = nn.Conv2d(6, 4, 3, groups=2)
    conv.weight = nn.Parameter(torch.zeros(3, 3, 3, 3))
    with pytest.raises(ValueError, match=r'got part\.weight of shape \(3, 3, 3, 3\)'):
        handler_of(conv).read_widths(conv, 'part')
    layer = CPDConv2d(6, 4, 3, rank=2)
    layer.vertical = nn.Parameter(torch.zeros(6, 1, 3, 1))
    with pytest.raises(ValueError, match='do not fit rank 2 and 4 filters'):
        handler_of(layer).read_widths(layer, 'part')
