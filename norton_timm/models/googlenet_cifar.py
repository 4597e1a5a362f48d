"""GoogLeNet for CIFAR: nine inception blocks at 32, 16 and 8 pixels, every 5x5 convolution as two 3x3 ones.

The variant that the CIFAR pruning literature compares on (Szegedy et al. 2014 for the blocks).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from norton_timm.models.builder import build_network
from norton_timm.models.cifar import CORING_DENSE, CifarNet, cifar_cfg

# name: (1x1, 3x3 reduction, 3x3, 5x5 reduction, 5x5, pool projection), in the paper's order
BLOCKS = {
    'inception_a3': (64, 96, 128, 16, 32, 32),
    'inception_b3': (128, 128, 192, 32, 96, 64),
    'inception_a4': (192, 96, 208, 16, 48, 64),
    'inception_b4': (160, 112, 224, 24, 64, 64),
    'inception_c4': (128, 128, 256, 24, 64, 64),
    'inception_d4': (112, 144, 288, 32, 64, 64),
    'inception_e4': (256, 160, 320, 32, 128, 128),
    'inception_a5': (256, 160, 320, 32, 128, 128),
    'inception_b5': (384, 192, 384, 48, 128, 128),
}


def _conv(in_chs: int, out_chs: int, kernel_size: int, **dd: Any) -> list[nn.Module]:
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, padding=kernel_size // 2, **dd)
    return [conv, nn.BatchNorm2d(out_chs, **dd), nn.ReLU(inplace=True)]


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1 and 3x3; 1x1 and twice 3x3; pooling and 1x1."""

    def __init__(self, in_chs: int, widths: tuple[int, int, int, int, int, int], device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        n1, red3, n3, red5, n5, pool = widths
        self.branch1x1 = nn.Sequential(*_conv(in_chs, n1, 1, **dd))
        self.branch3x3 = nn.Sequential(*_conv(in_chs, red3, 1, **dd), *_conv(red3, n3, 3, **dd))
        self.branch5x5 = nn.Sequential(
            *_conv(in_chs, red5, 1, **dd), *_conv(red5, n5, 3, **dd), *_conv(n5, n5, 3, **dd)
        )
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *_conv(in_chs, pool, 1, **dd))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1x1(x), self.branch3x3(x), self.branch5x5(x), self.branch_pool(x)], dim=1)


class GoogLeNetCifar(CifarNet):
    """GoogLeNet with a 3x3 stem of 192 channels at full resolution.

    Args:
        num_classes: Outputs of the classifier, 0 for none.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(num_classes, in_chans, drop_rate)
        dd = dict(device=device, dtype=dtype)
        self.pre_layers = nn.Sequential(*_conv(in_chans, 192, 3, **dd))
        self.feature_info = [dict(num_chs=192, reduction=1, module='pre_layers')]
        body = ['pre_layers']
        chs, reduction = 192, 1
        for name, widths in BLOCKS.items():
            self.add_module(name, Inception(chs, widths, **dd))
            body.append(name)
            chs = widths[0] + widths[2] + widths[4] + widths[5]
            if name in ('inception_b3', 'inception_e4', 'inception_b5'):
                self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=name))
            if name in ('inception_b3', 'inception_e4'):
                pool = f'maxpool{reduction}'  # maxpool1, maxpool2
                self.add_module(pool, nn.MaxPool2d(3, stride=2, padding=1))
                body.append(pool)
                reduction *= 2
        self.num_features = chs
        self._finish(body, global_pool, **dd)

    @torch.jit.ignore
    def rate_layout(self) -> list[list[str]]:
        """Stem (never pruned); per inception block its 3x3 convolutions, in the last one only the inner one."""
        inner = ('branch3x3.3', 'branch5x5.3', 'branch5x5.6')
        entries = [[f'{name}.{conv}' for conv in inner] for name in BLOCKS]
        entries[-1] = [f'{list(BLOCKS)[-1]}.branch5x5.3']
        return [[], *entries]

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.pre_layers(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([getattr(self, name) for name in self._body[1:]], x)
        x = self.maxpool1(self.inception_b3(self.inception_a3(x)))
        x = self.inception_c4(self.inception_b4(self.inception_a4(x)))
        x = self.maxpool2(self.inception_e4(self.inception_d4(x)))
        return self.inception_b5(self.inception_a5(x))


default_cfgs = generate_default_cfgs({'googlenet_cifar': cifar_cfg(CORING_DENSE, first_conv='pre_layers.0')})


@register_model
def googlenet_cifar(pretrained: bool = False, **kwargs: Any) -> GoogLeNetCifar:
    """GoogLeNet for 32-pixel images."""
    return build_network(
        GoogLeNetCifar, 'googlenet_cifar', pretrained, feature_cfg=dict(GoogLeNetCifar.feature_cfg), **kwargs
    )
