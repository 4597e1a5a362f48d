"""ResNets for CIFAR (He et al. 2015, section 4.2): three stages of 16, 32 and 64 channels, option-A shortcuts.

State-dict names are those of the usual CIFAR code (`layer1.0.conv1`, `bn1`, ...); the head is `fc`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from norton_timm.layers import ChannelMap
from norton_timm.models.builder import build_network
from norton_timm.models.cifar import NORTON_DENSE, CifarNet, cifar_cfg


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters.

    Args:
        in_chs: Channels of the input (N, in_chs, H, W).
        out_chs: Channels of the output (N, out_chs, H / stride, W / stride).
        stride: Stride of the first convolution.
        first: This is the stage's first block. Its shortcut is a `ChannelMap` even where it changes nothing, because
            pruning may give its two sides different channels.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, first: bool = False, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(out_chs, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.shortcut = ChannelMap(in_chs, out_chs, stride) if first else nn.Identity()
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return self.act2(y)


class ResNetCifar(CifarNet):
    """ResNet of depth 6n + 2.

    Args:
        depth: 20, 32, 44, 56, 110, ...
        num_classes: Outputs of the classifier, 0 for none.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(num_classes, in_chans, drop_rate)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f'depth is {depth}, expected 6n + 2 (20, 32, 44, 56, 110, ...)')
        dd = dict(device=device, dtype=dtype)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(16, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [dict(num_chs=16, reduction=1, module='act1')]
        chs = 16
        for stage, width in enumerate((16, 32, 64)):
            blocks = []
            for i in range((depth - 2) // 6):
                stride = 2 if i == 0 and stage > 0 else 1
                blocks.append(BasicBlock(chs, width, stride, first=i == 0, **dd))
                chs = width
            self.add_module(f'layer{stage + 1}', nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=chs, reduction=2**stage, module=f'layer{stage + 1}'))
        self.num_features = chs
        self._finish(['conv1', 'bn1', 'act1', 'layer1', 'layer2', 'layer3'], global_pool, **dd)

    @torch.jit.ignore
    def rate_layout(self) -> list[list[str]]:
        """Stem; outputs of stages 1 and 2 (the last is never pruned); inner width of every block."""
        counts = [len(getattr(self, f'layer{i}')) for i in (1, 2, 3)]
        outputs = [[f'layer{i}.{j}.conv2' for j in range(counts[i - 1])] for i in (1, 2)]
        inner = [[f'layer{i}.{j}.conv1'] for i, n in enumerate(counts, 1) for j in range(n)]
        return [['conv1'], *outputs, *inner]

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        return self.layer3(self.layer2(self.layer1(x)))


default_cfgs = generate_default_cfgs(
    {f'resnet{depth}_cifar': cifar_cfg(NORTON_DENSE if depth in (56, 110) else '') for depth in (20, 32, 44, 56, 110)}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ResNetCifar:
    return build_network(ResNetCifar, variant, pretrained, feature_cfg=dict(ResNetCifar.feature_cfg), **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-20."""
    return _create('resnet20_cifar', pretrained, **dict(dict(depth=20), **kwargs))


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-32."""
    return _create('resnet32_cifar', pretrained, **dict(dict(depth=32), **kwargs))


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-44."""
    return _create('resnet44_cifar', pretrained, **dict(dict(depth=44), **kwargs))


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-56."""
    return _create('resnet56_cifar', pretrained, **dict(dict(depth=56), **kwargs))


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-110."""
    return _create('resnet110_cifar', pretrained, **dict(dict(depth=110), **kwargs))
