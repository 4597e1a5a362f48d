"""fixed.py: every form of a decomposed layer as plain convolutions computes the layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from norton_timm.inference.forms import FIXED_FORMS, fixed
from norton_timm.layers.cpd_conv import CPDConv2d, set_form


@torch.no_grad()
@pytest.mark.parametrize('form', FIXED_FORMS)
@pytest.mark.parametrize(
    'layer',
    [CPDConv2d(6, 8, 3, 2, stride=2, padding=1), CPDConv2d(6, 8, (1, 5), 3, stride=(2, 1), padding=(0, 2), groups=2),
     CPDConv2d(6, 4, 3, 1, dilation=(2, 1), bias=False)],
)  # fmt: skip
def test_fixed_forms_compute_the_layer(layer, form):
    x, plain = torch.randn(2, 6, 11, 12), fixed(layer, form)
    convs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == {'factored': 3, 'merged': 2, 'separable': 2 * layer.rank, 'dense': 1}[form]
    torch.testing.assert_close(plain(x), set_form(layer, 'dense')(x), rtol=1e-4, atol=1e-6)
    owned = {q.data_ptr() for q in layer.parameters()}
    assert all(p.data_ptr() not in owned for p in plain.parameters())


def test_components_are_depthwise_and_keep_the_mode():
    layer = CPDConv2d(6, 8, 3, 3, padding=1).requires_grad_(False).eval()
    result = fixed(layer, 'separable')
    assert [b.spatial.groups for b in result.branches] == [8, 8, 8]
    assert [b.spatial.bias is None for b in result.branches] == [False, True, True]
    assert not result.training and not any(p.requires_grad for p in result.parameters())


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="got form 'auto', expected one of factored, merged, separable, dense"):
        fixed(CPDConv2d(6, 8, 3, 3), 'auto')
