"""DenseNet-40 for CIFAR (Huang et al. 2016): growth rate 12, no bottlenecks, no compression in the transitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from norton_timm.models.builder import build_network
from norton_timm.models.cifar import NORTON_DENSE, CifarNet, cifar_cfg


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution; its `growth` maps are appended to the input."""

    def __init__(self, in_chs: int, growth: int, device=None, dtype=None):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs, device=device, dtype=dtype)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_chs, growth, 3, padding=1, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv1(self.relu(self.bn1(x)))], dim=1)


class Transition(nn.Module):
    """Batch norm, ReLU, a 1x1 convolution and 2x2 average pooling."""

    def __init__(self, in_chs: int, out_chs: int, device=None, dtype=None):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs, device=device, dtype=dtype)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 1, bias=False, device=device, dtype=dtype)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv1(self.relu(self.bn1(x))))


class DenseNetCifar(CifarNet):
    """DenseNet of depth 3n + 4.

    Args:
        depth: 40 in both papers.
        growth: Feature maps that each layer adds.
        num_classes: Outputs of the classifier, 0 for none.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        depth: int = 40,
        growth: int = 12,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(num_classes, in_chans, drop_rate)
        if depth < 7 or (depth - 4) % 3:
            raise ValueError(f'depth is {depth}, expected 3n + 4 (40, ...)')
        dd = dict(device=device, dtype=dtype)
        chs = 2 * growth
        self.conv1 = nn.Conv2d(in_chans, chs, 3, padding=1, bias=False, **dd)
        self.feature_info = [dict(num_chs=chs, reduction=1, module='conv1')]
        body = ['conv1']
        for stage in (1, 2, 3):
            layers = []
            for _ in range((depth - 4) // 3):
                layers.append(DenseLayer(chs, growth, **dd))
                chs += growth
            self.add_module(f'dense{stage}', nn.Sequential(*layers))
            body.append(f'dense{stage}')
            if stage < 3:
                self.feature_info.append(dict(num_chs=chs, reduction=2 ** (stage - 1), module=f'dense{stage}'))
                self.add_module(f'trans{stage}', Transition(chs, chs, **dd))
                body.append(f'trans{stage}')
        self.bn = nn.BatchNorm2d(chs, **dd)
        self.relu = nn.ReLU(inplace=True)
        self.feature_info.append(dict(num_chs=chs, reduction=4, module='relu'))
        self.num_features = chs
        self._finish([*body, 'bn', 'relu'], global_pool, **dd)

    @torch.jit.ignore
    def rate_layout(self) -> list[list[str]]:
        """Stem (never pruned), the layers of block 1, transition 1, block 2, transition 2, block 3."""
        entries: list[list[str]] = [[]]
        for stage in (1, 2, 3):
            entries += [[f'dense{stage}.{j}.conv1'] for j in range(len(getattr(self, f'dense{stage}')))]
            if stage < 3:
                entries.append([f'trans{stage}.conv1'])
        return entries

    @torch.jit.ignore
    def follow_rates(self, widths: dict[str, int], rates: Sequence[float]) -> None:
        """Set the widths of the transitions: each keeps a share of the channels that reach it."""
        chs = self.conv1.out_channels
        for entry, names in enumerate(self.rate_layout()):
            for name in names:
                if name.startswith('dense'):
                    chs += widths[name]
                    continue
                rate = rates[entry] if entry < len(rates) else 0.0
                chs = widths[name] = int(chs * (1 - rate))

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            stages = [self.dense1, self.trans1, self.dense2, self.trans2, self.dense3]
            x = checkpoint_seq(stages, x)
        else:
            x = self.dense3(self.trans2(self.dense2(self.trans1(self.dense1(x)))))
        return self.relu(self.bn(x))


default_cfgs = generate_default_cfgs({'densenet40_cifar': cifar_cfg(NORTON_DENSE)})


@register_model
def densenet40_cifar(pretrained: bool = False, **kwargs: Any) -> DenseNetCifar:
    """DenseNet-40 with growth rate 12."""
    return build_network(
        DenseNetCifar, 'densenet40_cifar', pretrained, feature_cfg=dict(DenseNetCifar.feature_cfg), **kwargs
    )
