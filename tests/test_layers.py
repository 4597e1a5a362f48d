"""CPDConv2d against an ordinary convolution with its reconstructed kernel."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from norton_timm import CPDConv2d, count, set_form, tune_forms
from norton_timm.layers.cpd_conv import FORMS, use_form

KERNELS = [(1, 1), (3, 3), (5, 5), (3, 1), (2, 3), (7, 7)]


def random_layer(kernel=(3, 3), rank=2, **kwargs) -> CPDConv2d:
    return CPDConv2d(6, 8, kernel, rank, **kwargs)


def explicit_kernel(layer: CPDConv2d) -> torch.Tensor:
    """The sum over components written out, filter by filter, from the paper's factors."""
    a, b, c = layer.factors()[:3]
    kernel = torch.zeros(layer.out_channels, c.shape[1], *layer.kernel_size)
    for o, r in itertools.product(range(layer.out_channels), range(layer.rank)):
        kernel[o] += torch.einsum('i,h,w->ihw', c[o, :, r], a[o, :, r], b[o, :, r])
    return kernel


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('stride', [1, 2, (2, 1)])
@pytest.mark.parametrize('padding', [0, 1, (2, 1)])
@pytest.mark.parametrize('dilation', [1, 2])
def test_equals_dense_convolution(form, kernel, stride, padding, dilation):
    layer = random_layer(kernel, 3, stride=stride, padding=padding, dilation=dilation, form=form).eval()
    x = torch.randn(2, 6, 17, 19)
    expected = F.conv2d(x, explicit_kernel(layer), layer.bias, stride, padding, dilation)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize('groups', [1, 2])
def test_forms_have_equal_outputs_and_gradients(groups):
    layer = random_layer(rank=3, stride=2, padding=1, groups=groups)
    x = torch.randn(2, 6, 11, 12)
    found = {}
    for form in ('factored', 'merged', 'dense'):
        layer.form = form
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        found[form] = [y.detach(), leaf.grad] + [p.grad.clone() for p in layer.parameters()]
    for form in ('merged', 'dense'):
        for value, reference in zip(found[form], found['factored']):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


def test_from_conv_is_exact_at_full_rank_and_keeps_the_convolution():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1, bias=True).double()
    conv.weight.requires_grad_(False)
    layer = CPDConv2d.from_conv(conv, rank=9)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)
    assert not layer.pointwise.requires_grad
    back = layer.to_conv()
    torch.testing.assert_close(back(x), layer(x))
    assert (back.stride, back.padding, back.bias is not None) == (conv.stride, conv.padding, True)


def test_padding_same_and_unsupported_paddings():
    conv = nn.Conv2d(3, 4, 5, padding='same')
    assert CPDConv2d.from_conv(conv, 1).padding == (2, 2)
    with pytest.raises(ValueError, match='symmetric'):
        CPDConv2d.from_conv(nn.Conv2d(3, 4, 2, padding='same'), 1)
    with pytest.raises(ValueError, match='padding_mode'):
        CPDConv2d.from_conv(nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect'), 1)


@pytest.mark.parametrize('bad', [dict(rank=0), dict(rank=1, form='quick'), dict(rank=1, groups=4)])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match='expected'):
        CPDConv2d(6, 8, 3, **bad)


def test_factors_have_equal_norms_and_the_same_kernel():
    conv = nn.Conv2d(5, 7, 3)
    layer = CPDConv2d.from_conv(conv, 2)
    a, b, c = layer.factors()[:3]
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1))
    torch.testing.assert_close(a.norm(dim=1), c.norm(dim=1))
    torch.testing.assert_close(layer.kernel(), explicit_kernel(layer))


@pytest.mark.parametrize('form', ['factored', 'merged', 'dense'])
def test_a_component_that_contributes_nothing_can_be_revived(form):
    conv = nn.Conv2d(5, 7, 3, bias=False)
    with torch.no_grad():
        conv.weight[2] = 0
    layer = CPDConv2d.from_conv(conv, 2, form=form)
    assert not layer.factors().C[2].any() and not layer.kernel()[2].any()
    x, target = torch.randn(16, 5, 6, 6), torch.randn(5, 3, 3)
    target = F.conv2d(x, target[None] / 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x)[:, 2:3], target)
        loss.backward()
        if not losses:
            assert layer.pointwise.grad.view(7, 2, 5)[2].abs().amin(0).gt(0).all()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and layer.kernel()[2].norm() > 0.1


def test_auto_is_a_rule_until_tuned():
    layer = random_layer(rank=1, padding=1)
    assert layer.train().active_form() == 'dense'
    wide = CPDConv2d(64, 64, 3, 1, padding=1).eval()
    assert wide.active_form() == 'merged'
    assert CPDConv2d(64, 64, 3, 8, padding=1).eval().active_form() == 'dense'
    report = tune_forms(nn.Sequential(wide), torch.randn(1, 64, 16, 16))
    assert set(report['0']) == {'factored', 'merged', 'dense'}
    assert wide.active_form() == min(report['0'], key=report['0'].get)
    assert wide.train().active_form() == 'dense'  # tuned for inference only


def test_tune_for_training_restores_the_model():
    model = nn.Sequential(CPDConv2d(8, 8, 3, 1, padding=1), nn.BatchNorm2d(8)).train()
    before = copy.deepcopy(model.state_dict())
    tune_forms(model, torch.randn(2, 8, 8, 8), training=True)
    assert model.training and True in model[0].tuned
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('form', ['factored', 'merged', 'dense'])
def test_macs_are_those_of_the_factors_whatever_runs(form):
    layer = CPDConv2d(6, 8, 3, 2, stride=2, padding=1, form=form)
    rows, size = 16, 10
    pointwise, vertical, horizontal = rows * 6 * size**2, rows * 3 * 5 * size, rows * 3 * 5 * 5
    assert count(layer, (6, size, size)) == (pointwise + vertical + horizontal, rows * (6 + 3 + 3) + 8)
    assert layer.form == form


def test_use_form_restores_each_layer():
    model = nn.Sequential(random_layer(form='dense'), random_layer(form='merged'))
    with pytest.raises(RuntimeError), use_form(model, 'factored'):
        raise RuntimeError
    assert [m.form for m in model] == ['dense', 'merged']
    assert [m.form for m in set_form(model, 'auto')] == ['auto', 'auto']


@pytest.mark.parametrize('form', ['factored', 'merged', 'dense'])
def test_autocast_and_channels_last(form):
    layer = random_layer(padding=1, form=form)
    x = torch.randn(2, 6, 8, 8)
    expected = layer(x)
    moved = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    torch.testing.assert_close(moved(x.to(memory_format=torch.channels_last)), expected)
    with torch.autocast('cpu', torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))


@pytest.mark.parametrize('form', ['factored', 'merged', 'dense', 'auto'])
def test_export_gives_the_same_outputs(form):
    layer = random_layer(padding=1, form=form).eval()
    x = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_compile_without_graph_breaks():
    layer = nn.Sequential(random_layer(padding=1), nn.ReLU())
    x = torch.randn(2, 6, 8, 8)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for mode in (True, False):
        layer.train(mode)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize('channels', [8, 128])
def test_torch_fx_follows_the_layer(channels: int) -> None:
    layer = CPDConv2d(channels, channels, 3, 2, padding=1, form='dense').eval()
    x = torch.randn(1, channels, 5, 5)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))
