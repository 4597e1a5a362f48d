"""inference/onednn.py: layers compute what plain ones do, and notice new weights, gradients and odd inputs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import norton_timm
from norton_timm.inference import onednn as packed
from norton_timm.inference.fuse import fuse_network
from norton_timm.inference.onednn import FusedConv2d, FusedLinear, GlobalAverage, onednn_available, packed_bytes

pytestmark = pytest.mark.skipif(not onednn_available(), reason='this PyTorch has no oneDNN')


@torch.no_grad()
def test_new_weights_are_packed_again():
    conv, x = FusedConv2d.from_conv(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8)
    before = conv(x)
    conv.weight.mul_(2)
    conv.bias.mul_(2)
    torch.testing.assert_close(conv(x), 2 * before)
    torch.testing.assert_close(copy.deepcopy(conv)(x), 2 * before)
    torch.testing.assert_close(conv(torch.cat([x, x, x]))[2:], 2 * before)  # packed for one image, used for three


@torch.no_grad()
def test_a_head_without_boxes_and_one_image_without_a_batch():
    conv = FusedConv2d.from_conv(nn.Conv2d(3, 4, 3))
    assert conv(torch.zeros(0, 3, 8, 8)).shape == (0, 4, 6, 6)
    x = torch.randn(3, 8, 8)
    torch.testing.assert_close(conv(x), conv(x[None])[0])
    assert packed_bytes(conv) == 4 * 4 * 3 * 9 and packed_bytes(copy.deepcopy(conv)) == 0


def test_gradients_flow_through_plain_operations():
    conv, plain = FusedConv2d.from_conv(nn.Conv2d(3, 4, 3)), nn.Conv2d(3, 4, 3)
    conv.relu = True
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    found = torch.autograd.grad(conv(x).sum(), [x, *conv.parameters()])
    expected = torch.autograd.grad(plain(x).relu().sum(), [x, *plain.parameters()])
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize('pixels, product', [(16, True), (300, False)])
@torch.no_grad()
def test_small_pointwise_layers_are_matrix_products(pixels, product, monkeypatch):
    made = []
    monkeypatch.setattr(packed, '_product', lambda *a, keep=packed._product: made.append(1) or keep(*a))
    conv = nn.Conv2d(40, 33, 1)
    fused, x = FusedConv2d.from_conv(conv), torch.randn(1, 40, pixels, pixels)
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.testing.assert_close(fused(x.contiguous(memory_format=layout)), conv(x), rtol=1e-4, atol=1e-5)
    assert bool(made) == product


@pytest.mark.parametrize('shape', [(1, 12), (7, 12), (2, 5, 12), (0, 12), (12,)])
@pytest.mark.parametrize('relu', [False, True])
@torch.no_grad()
def test_linear_layers_of_any_number_of_rows(shape, relu):
    plain = nn.Linear(12, 5)
    linear, x = FusedLinear.from_linear(plain), torch.randn(shape)
    linear.relu = relu
    expected = plain(x).relu() if relu else plain(x)
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(linear(x.expand(3, *shape)), expected.expand(3, *expected.shape))


@torch.no_grad()
def test_a_linear_layer_notices_new_weights_and_biases():
    linear, x = FusedLinear.from_linear(nn.Linear(12, 5)), torch.randn(3, 12)
    linear(x)
    assert packed_bytes(linear) == 4 * 5 * 12
    for change in (
        lambda: linear.weight.mul_(2),
        lambda: linear.bias.add_(1),
        lambda: setattr(linear, 'bias', nn.Parameter(torch.ones(5))),
        lambda: setattr(linear.bias, 'data', torch.full((5,), 7.0)),
        lambda: setattr(linear, 'bias', None),
        lambda: setattr(linear.weight, 'data', torch.zeros(5, 12)),
    ):
        change()
        torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize('layer', [FusedConv2d.from_conv(nn.Conv2d(3, 4, 1)), FusedLinear.from_linear(nn.Linear(8, 4))])
def test_a_bias_alone_may_ask_for_its_gradient(layer):
    layer.weight.requires_grad_(False)
    layer(torch.randn(1, 3, 8, 8)).sum().backward()
    assert layer.bias.grad.abs().min() > 0


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::UserWarning')
def test_a_traced_global_average_has_no_window_of_the_traced_size():
    traced = torch.jit.trace(GlobalAverage(), torch.randn(1, 3, 8, 8))
    x = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(traced(x), x.mean((2, 3), keepdim=True))
    assert 'aten::adaptive_avg_pool2d' in str(traced.graph)


@pytest.mark.parametrize(
    'break_it',
    [
        lambda patch: patch.setattr(torch.ops, 'mkldnn', SimpleNamespace()),
        lambda patch: patch.delattr(torch._C, '_AutoDispatchBelowAutograd'),
        lambda patch: patch.delattr(torch._C, '_len_torch_dispatch_stack'),
        lambda patch: patch.setattr(packed, '_product', lambda weight, bias, relu, rows: lambda x: x @ weight.T),
    ],
)
def test_without_an_operator_layers_run_as_plain_pytorch_and_the_log_says_so(break_it, monkeypatch, caplog):
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    network = nn.Sequential(conv, nn.ReLU()).eval().requires_grad_(False)
    fused, _ = fuse_network(network)
    with monkeypatch.context() as patch:
        break_it(patch)
        onednn_available.cache_clear()
        try:
            assert not onednn_available() and not onednn_available()
            torch.testing.assert_close(fused(x), network(x))
            assert not any(isinstance(m, packed.Fused) for m in norton_timm.deploy(network, x).modules())
        finally:
            onednn_available.cache_clear()
    assert len([r for r in caplog.records if 'plain PyTorch' in r.message]) == 1
    assert onednn_available()
