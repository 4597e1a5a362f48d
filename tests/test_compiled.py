"""compiled.py: what is compiled computes the same, with its weights packed inside."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
from families import relative_error
from torch._dynamo.utils import counters

from norton_timm import deploy
from norton_timm.compiled import compiled, compiled_ahead

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
