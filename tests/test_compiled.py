"""compiled.py: what is compiled computes the same, with its weights packed inside."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
from families import relative_error
from torch import nn
from torch._dynamo.utils import counters

from norton_timm.inference import deploy, fuse
from norton_timm.inference.compiled import _with_products, compiled, compiled_ahead

pytestmark = [
    pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler'),
    pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::UserWarning'),
]


@pytest.fixture
def network():
    torch.manual_seed(0)
    model, x = timm.create_model('norton_resnet18.r050').eval(), torch.randn(1, 3, 64, 64)
    torch.compiler.reset()
    return model, deploy(model, x, autotune=False), x


@torch.no_grad()
def test_weights_are_packed_when_a_network_is_compiled(network):
    model, deployed, x = network
    before = counters['inductor']['mkldnn_conv_weight_pack_matcher_count']
    result = compiled(deployed, x)
    assert relative_error(result(x), model(x)) < 1e-4
    if torch.backends.mkldnn.is_available():
        convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in deployed.modules())
        assert counters['inductor']['mkldnn_conv_weight_pack_matcher_count'] - before == convolutions


@torch.no_grad()
def test_ahead_of_time(network, tmp_path):
    model, deployed, x = network
    program = compiled_ahead(deployed, x, tmp_path)
    assert relative_error(program(x), model(x)) < 1e-4
    assert {p.name for p in tmp_path.glob('*.pt2')} == {'convolutions.pt2', 'products.pt2'}


@pytest.mark.parametrize('fused', [False, True])
@torch.no_grad()
def test_matrix_products_compute_what_the_convolutions_do(fused):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1, bias=False), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return (self.c(x) + self.b(self.a(x).relu())).relu()

    torch.manual_seed(0)
    for model in (Block().eval(), nn.Sequential(nn.Conv2d(8, 4, 1, 2), nn.ReLU()).eval()):
        x = torch.randn(2, 8, 5, 6)
        network = fuse.fuse_network(model)[0] if fused else model
        products = _with_products(network)
        assert not any(isinstance(m, nn.Conv2d) for m in products.modules())
        torch.testing.assert_close(products(x), model(x), rtol=1e-4, atol=1e-5)
