"""align.py: layers get a round number of channels, and nothing that comes out changes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from families import build, images, relative_error
from torch import nn

from detection.studies.networks import _build as build_detector
from norton_timm.graph.widen import align_channels
from norton_timm.inference import deploy
from norton_timm.inference.deploy import deployment_report
from norton_timm.layers.cpd_conv import CPDConv2d
from norton_timm.profiling.complexity import count


def give_statistics(model: nn.Module) -> nn.Module:
    """Batch norms that shift and scale every channel differently."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize(
    'name',
    ['norton_resnet50.r078', 'norton_resnet18.r050', 'norton_densenet40_cifar.r026', 'coring_vgg16_bn_cifar.r058'],
)
@torch.no_grad()
def test_published_networks_keep_their_outputs(name):
    torch.manual_seed(0)
    model = give_statistics(timm.create_model(name)).eval()
    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    aligned = copy.deepcopy(model)
    widened = align_channels(aligned, x, 8)
    assert relative_error(aligned(x), model(x)) < 1e-6
    for layer, channels in widened.items():
        assert aligned.get_submodule(layer).out_channels == channels and channels % 8 == 0
        assert 0 < channels - model.get_submodule(layer).out_channels < 8
    odd = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, CPDConv2d)) and m.out_channels % 8]
    assert odd and set(odd) == set(widened)
    if name == 'norton_resnet50.r078':
        more = count(aligned, tuple(x.shape[1:])).macs / count(model, tuple(x.shape[1:])).macs
        assert 1 < more < 1.03


@pytest.mark.parametrize('name', ['seresnet50', 'mobilenetv2_100', 'regnety_002', 'resnet20_cifar'])
@torch.no_grad()
def test_families_keep_their_outputs(name):
    model, x = build(name), images(name)
    aligned = copy.deepcopy(model)
    widened = align_channels(aligned, x, 24)
    assert relative_error(aligned(x), model(x)) < 1e-5
    assert widened, 'there is something to widen'


class Joined(nn.Module):
    """Five and six channels side by side, some of which a sum, a slice or a group reads."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.a, self.b, self.join = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1), join
        self.norm = nn.GroupNorm(1, 11) if join == 'norm' else nn.BatchNorm2d(11)
        self.c = nn.Conv2d(6 if join == 'slice' else 11, 11, 3, padding=1, groups=11 if join == 'groups' else 1)
        self.out = nn.Linear(11, 2)

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], 1)
        y = self.norm(y).sigmoid()  # sigmoid(0) is not 0
        y = self.c(y[:, 2:8]) if self.join == 'slice' else self.c(y)
        return self.out(y.mean((2, 3)))


@pytest.mark.parametrize(
    'join, widened',
    [('cat', {'a': 8, 'b': 8, 'c': 12}), ('groups', {'a': 8, 'b': 8}), ('slice', {'c': 12}), ('norm', {'c': 12})],
)
@torch.no_grad()
def test_what_can_grow(join, widened):
    torch.manual_seed(0)
    model, x = Joined(join).eval(), torch.randn(2, 3, 6, 6)
    expected = model(x)
    assert align_channels(model, x, 4) == widened
    torch.testing.assert_close(model(x), expected)


def test_bad_and_idle_multiples():
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3)).eval(), torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match='got 0 as the multiple of channels'):
        align_channels(model, x, 0)
    assert align_channels(model, x, 1) == {} and align_channels(model, x, 5) == {}
    assert align_channels(model, x, 8) == {'0': 8} and model(x).shape == (1, 4, 4, 4)


@torch.no_grad()
def test_deploy_tells_what_it_widened():
    model = give_statistics(timm.create_model('norton_resnet18.r050')).eval()
    x = torch.randn(1, 3, 64, 64)
    deployed = deploy(model, x, autotune=False, channel_multiple=16)
    report = deployment_report(deployed)
    assert report.widened and report.error < 1e-5
    assert not deployment_report(deploy(model, x, autotune=False)).widened


@torch.no_grad()
def test_a_detector_keeps_its_boxes():
    torch.manual_seed(0)
    model, x = build_detector('box', 'norton_resnet18.r050', 'backbone', (96, 128)), [torch.rand(3, 96, 128)]
    expected, aligned = model(x)[0], copy.deepcopy(model)
    widened = align_channels(aligned, x, 24)
    assert widened['backbone.fpn.inner_blocks.0.0'] == widened['rpn.head.conv.0.0'] == 264
    assert widened['roi_heads.box_head.fc6'] == 1032 and widened['backbone.body.conv1'] == 72
    found = aligned(x)[0]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-3)
