"""MobileNetV2 (Sandler et al. 2018) for CIFAR: the stem and the second stage have stride 1 instead of 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from norton_timm.models.builder import build_network
from norton_timm.models.cifar import CORING_DENSE, CifarNet, cifar_cfg

# expansion, output channels, blocks, stride of the first block
INVERTED_RESIDUALS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv(in_chs: int, out_chs: int, kernel_size: int, stride: int = 1, groups: int = 1, act: bool = True, **dd: Any):
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False, **dd)
    return [conv, nn.BatchNorm2d(out_chs, **dd)] + ([nn.ReLU6(inplace=True)] if act else [])


class InvertedResidual(nn.Module):
    """1x1 expansion (none for 1), depthwise 3x3, linear 1x1 projection, and a shortcut where shapes agree."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, expansion: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        hidden = in_chs * expansion
        expand = [] if expansion == 1 else _conv(in_chs, hidden, 1, **dd)
        depthwise = _conv(hidden, hidden, 3, stride, groups=hidden, **dd)
        self.conv = nn.Sequential(*expand, *depthwise, *_conv(hidden, out_chs, 1, act=False, **dd))
        self.has_shortcut = stride == 1 and in_chs == out_chs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2Cifar(CifarNet):
    """MobileNetV2 with a total stride of 8.

    Args:
        num_classes: Outputs of the classifier, 0 for none.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling.
        drop_rate: Dropout before the classifier.
    """

    classifier_name = 'classifier'
    feature_cfg: ClassVar[dict[str, Any]] = dict(flatten_sequential=True)

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.2,
        device=None,
        dtype=None,
    ):
        super().__init__(num_classes, in_chans, drop_rate)
        dd = dict(device=device, dtype=dtype)
        layers: list[nn.Module] = [nn.Sequential(*_conv(in_chans, 32, 3, **dd))]
        self.feature_info = []
        chs, reduction = 32, 1
        for stage, (expansion, width, blocks, stride) in enumerate(INVERTED_RESIDUALS):
            reduction *= stride
            for i in range(blocks):
                layers.append(InvertedResidual(chs, width, stride if i == 0 else 1, expansion, **dd))
                chs = width
            if stage in (0, 1, 2, 4, 6):
                self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=f'features.{len(layers) - 1}'))
        layers.append(nn.Sequential(*_conv(chs, 1280, 1, **dd)))
        self.features = nn.Sequential(*layers)
        self.num_features = 1280
        self._finish(['features'], global_pool, **dd)

    @torch.jit.ignore
    def rate_layout(self) -> list[list[str]]:
        """Stem (never pruned); per stage the outputs of its blocks."""
        entries: list[list[str]] = [[]]
        first = 1
        for _, _, blocks, _ in INVERTED_RESIDUALS:
            entries.append([self._projection(i) for i in range(first, first + blocks)])
            first += blocks
        return entries

    @torch.jit.ignore
    def follow_rates(self, widths: dict[str, int], rates: Sequence[float]) -> None:
        """Set the widths of the expansions: each is a multiple of its block's input."""
        index, chs = 1, self.features[0][0].out_channels
        for expansion, _, blocks, _ in INVERTED_RESIDUALS:
            for _ in range(blocks):
                if expansion != 1:
                    widths[f'features.{index}.conv.0'] = chs * expansion
                chs = widths[self._projection(index)]
                index += 1

    @torch.jit.ignore
    def _projection(self, index: int) -> str:
        return f'features.{index}.conv.{len(self.features[index].conv) - 2}'

    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.features, x)
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.classifier(x)


default_cfgs = generate_default_cfgs(
    {'mobilenetv2_cifar': cifar_cfg(CORING_DENSE, first_conv='features.0.0', classifier='classifier', pool_size=(4, 4))}
)


@register_model
def mobilenetv2_cifar(pretrained: bool = False, **kwargs: Any) -> MobileNetV2Cifar:
    """MobileNetV2 for 32-pixel images."""
    return build_network(
        MobileNetV2Cifar, 'mobilenetv2_cifar', pretrained, feature_cfg=dict(MobileNetV2Cifar.feature_cfg), **kwargs
    )
