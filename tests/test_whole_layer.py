"""Layer CP, reshaped CP and Tucker-2 as modules, against the dense convolution and the exact decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from norton_timm.layers.whole_layer import WHOLE_LAYER_METHODS, WholeLayerConv2d

SETTINGS = [
    {'kernel_size': 3, 'padding': 1},
    {'kernel_size': (3, 5), 'stride': (2, 1), 'padding': (1, 2), 'dilation': (1, 2)},
    {'kernel_size': 1, 'bias': False},
    {'kernel_size': 3, 'padding': 'same', 'dilation': 2},
]


@pytest.mark.parametrize('settings', SETTINGS)
@pytest.mark.parametrize('method', WHOLE_LAYER_METHODS)
def test_chain_computes_what_its_kernel_does(method: str, settings: dict) -> None:
    conv = nn.Conv2d(6, 8, dtype=torch.float64, **settings)
    layer = WholeLayerConv2d.from_conv(conv, method, 3, n_iter=5)
    assert len(layer) == (4 if method == 'cp' else 3)
    x = torch.randn(2, 6, 15, 17, dtype=torch.float64)
    dense = layer.to_conv()
    assert dense.weight.shape == conv.weight.shape and (dense.bias is None) == (conv.bias is None)
    torch.testing.assert_close(layer(x), dense(x))
    assert layer(x).shape == conv(x).shape


@pytest.mark.parametrize('method', WHOLE_LAYER_METHODS)
def test_weights_of_the_right_rank_are_recovered(method: str) -> None:
    conv = nn.Conv2d(5, 6, 3, padding=1, stride=2, dtype=torch.float64)
    o, i = torch.randn(6, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    h, w = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    conv.weight.data = torch.einsum('or,ir,hr,wr->oihw', o, i, h, w)
    layer = WholeLayerConv2d.from_conv(conv, method, 2, n_iter=1000)
    x = torch.randn(2, 5, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-3, atol=1e-3)


def test_full_tucker_is_exact_and_error_falls_with_rank() -> None:
    conv = nn.Conv2d(6, 8, 3, dtype=torch.float64)
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(WholeLayerConv2d.from_conv(conv, 'tucker2', (8, 6))(x), conv(x))
    for method in WHOLE_LAYER_METHODS:
        kernels = [WholeLayerConv2d.from_conv(conv, method, r).kernel() for r in (1, 3, 6)]
        errors = [(k - conv.weight).square().sum().item() for k in kernels]
        assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize('method', WHOLE_LAYER_METHODS)
def test_state_of_the_layer_is_carried_over(method: str) -> None:
    conv = nn.Conv2d(4, 4, 3).eval()
    conv.weight.requires_grad_(False)
    conv.weight.data *= 1e20
    layer = WholeLayerConv2d.from_conv(conv, method, 4)
    assert not layer.training and not any(p.requires_grad for p in layer.parameters())
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in layer.parameters())
    error = (layer.kernel().double() - conv.weight.double()).norm() / conv.weight.double().norm()
    assert error < 0.9
    again = WholeLayerConv2d.from_conv(conv, method, 4)
    assert torch.equal(again.kernel(), layer.kernel())


@pytest.mark.parametrize(
    ('conv', 'method', 'rank', 'message'),
    [
        (nn.Conv2d(4, 4, 3), 'tt', 1, "method.*'tt'.*cp, reshaped_cp, tucker2"),
        (nn.Conv2d(4, 4, 3), 'cp', 0, 'rank'),
        (nn.Conv2d(4, 4, 3), 'cp', (1, 1), 'rank'),
        (nn.Conv2d(4, 4, 3), 'tucker2', (5, 1), 'rank'),
        (nn.Conv2d(4, 4, 3, groups=2), 'cp', 1, 'groups'),
        (nn.Conv2d(4, 4, 3, padding_mode='reflect'), 'cp', 1, 'padding_mode'),
    ],
)
def test_bad_arguments(conv: nn.Conv2d, method: str, rank, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        WholeLayerConv2d.from_conv(conv, method, rank)
    assert '\n' not in str(error.value)


def test_nan_is_refused() -> None:
    conv = nn.Conv2d(2, 2, 3)
    conv.weight.data[0, 0, 0, 0] = float('nan')
    with pytest.raises(ValueError, match='NaN'):
        WholeLayerConv2d.from_conv(conv, 'cp', 1)
