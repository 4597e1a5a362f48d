"""The architectures that compression is tested on, and helpers that the sweeps share."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import timm
import torch
import torchvision
from torch import nn

from norton_timm.graph.groups import ChannelGraph
from norton_timm.layers.channel_map import ChannelMap
from norton_timm.layers.cpd_conv import CPDConv2d

QUICK = [
    'resnet18', 'seresnet50', 'regnety_008', 'densenet121', 'mobilenetv2_100', 'res2net50_26w_4s', 'ghostnet_100',
    'convnext_tiny', 'resnet20_cifar',
]  # fmt: skip
SLOW = [
    'resnet34', 'resnext50_32x4d', 'skresnet50', 'resnet50',
    'resnet101', 'resnet50d', 'wide_resnet50_2', 'ecaresnet50t', 'resnetv2_50', 'vgg16_bn',
    'inception_v3', 'mobilenetv3_large_100', 'efficientnet_b0', 'cspresnet50', 'darknet53', 'resnest14d',
    'dpn68', 'hrnet_w18_small', 'rexnet_100', 'dla34', 'xception41', 'resnetblur50', 'nf_resnet50', 'ese_vovnet19b_dw',
    'tresnet_m', 'repvgg_a0', 'mixnet_s', 'densenet40_cifar', 'vgg16_bn_cifar', 'resnet56_cifar', 'resnet110_cifar',
    'googlenet_cifar', 'mobilenetv2_cifar', 'torchvision/googlenet',
]  # fmt: skip
FAMILIES = [*QUICK, *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]]


def image_size(name: str) -> int:
    """Pixels a side: as few as the architecture allows."""
    return {'inception_v3': 139}.get(name, 32 if name.endswith('_cifar') else 64)


def build(name: str, **kwargs) -> nn.Module:
    """A network whose batch norms have statistics and affine parameters that matter."""
    torch.manual_seed(0)
    if name.startswith('torchvision/'):
        options = dict(weights=None, init_weights=False, aux_logits=False)
        model = torchvision.models.get_model(name.removeprefix('torchvision/'), **options, **kwargs).eval()
    else:
        model = timm.create_model(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model


def images(name: str, n: int = 2) -> torch.Tensor:
    size = image_size(name)
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def silence(graph: ChannelGraph, gone: Iterable[int]) -> None:
    """Zero the weights that read the given channels, so that removing them must change nothing."""
    gone = set(gone)
    for slot in graph.slots:
        if slot.kind != 'in':
            continue
        module, index = slot.module, [k for k, c in enumerate(slot.labels.tolist()) if c in gone]
        if isinstance(module, ChannelMap):
            module.set_index([-1 if i in index else i for i in module.index.tolist()])
        elif isinstance(module, nn.Linear):
            module.weight[:, index] = 0
        elif getattr(module, 'transposed', False):
            module.weight[index] = 0
        else:
            weight = module.pointwise if isinstance(module, CPDConv2d) else module.weight
            width = module.in_channels // module.groups
            weight[:, [k for k in index if k < width]] = 0


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
