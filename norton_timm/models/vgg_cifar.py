"""VGG with batch norm for CIFAR: the thirteen or sixteen 3x3 convolutions, and a head of two linear layers.

State-dict names are those of the pruning literature's code (`features.conv0`, `classifier.linear1`, ...).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from timm.layers import SelectAdaptivePool2d, get_device_dtype
from timm.models import generate_default_cfgs, register_model
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from norton_timm.models.builder import build_network
from norton_timm.models.cifar import NORTON_DENSE, CifarNet, cifar_cfg

HIDDEN = 512  # width of the head's first linear layer

# widths of the convolutions, 0 for 2x2 max pooling
VGG_WIDTHS = {
    16: (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512),
    19: (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512),
}


class VGGCifar(CifarNet):
    """VGG with batch norm.

    Args:
        depth: 16 or 19.
        num_classes: Outputs of the classifier; 0 keeps the hidden layer and drops the last one.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling; '' (with `num_classes=0`) drops the whole head.
        drop_rate: Dropout before the last layer.
    """

    feature_cfg: ClassVar[dict[str, Any]] = dict(flatten_sequential=True)

    def __init__(
        self,
        depth: int = 16,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(num_classes, in_chans, drop_rate)
        if depth not in VGG_WIDTHS:
            raise ValueError(f'depth is {depth}, expected one of {sorted(VGG_WIDTHS)}')
        dd = dict(device=device, dtype=dtype)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        self.feature_info = []
        chs, reduction = in_chans, 1
        layout = VGG_WIDTHS[depth]
        for i, width in enumerate(layout):
            if width:
                layers[f'conv{i}'] = nn.Conv2d(chs, width, 3, padding=1, **dd)
                layers[f'norm{i}'] = nn.BatchNorm2d(width, **dd)
                layers[f'relu{i}'] = nn.ReLU(inplace=True)
                chs = width
            if width == 0:
                layers[f'pool{i}'] = nn.MaxPool2d(2)
                reduction *= 2
            if i + 1 == len(layout) or layout[i + 1] == 0:
                self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=f'features.relu{i}'))
        self.features = nn.Sequential(layers)
        self.num_features = chs
        self._finish(['features'], global_pool, **dd)

    def _finish(self, body: list[str], global_pool: str, device=None, dtype=None) -> None:
        self._body = body
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.classifier = nn.Sequential()
        self.reset_classifier(self.num_classes, global_pool)
        if device is not None or dtype is not None:
            self.classifier.to(device=device, dtype=dtype)
        self.init_weights()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity when `num_classes` is 0."""
        return self.classifier.linear2 if hasattr(self.classifier, 'linear2') else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the last layer, and the hidden one only where the pooled width changes."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        if not pool and num_classes:
            raise ValueError(f"global_pool '' needs num_classes=0, got num_classes={num_classes}")
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool))
        self.head_hidden_size = HIDDEN if pool else self.num_features
        hidden: OrderedDict[str, nn.Module] = OrderedDict()
        if pool:
            width = self.num_features * self.global_pool.feat_mult()
            old = getattr(self.classifier, 'linear1', None)
            if old is not None and old.in_features == width:
                hidden['linear1'], hidden['norm1'] = old, self.classifier.norm1
                self.head_hidden_size = old.out_features
            else:
                hidden['linear1'] = nn.Linear(width, HIDDEN, **dd)
                hidden['norm1'] = nn.BatchNorm1d(HIDDEN, **dd)
            hidden['relu1'] = nn.ReLU(inplace=True)
        if num_classes:
            hidden['drop'] = nn.Dropout(self.drop_rate)
            hidden['linear2'] = nn.Linear(self.head_hidden_size, num_classes, **dd)
        self.classifier = nn.Sequential(hidden)
        self.classifier.train(self.training)
        self.global_pool.train(self.training)

    @torch.jit.ignore
    def _segments(self) -> list[nn.Sequential]:
        """The body cut after each ReLU: a checkpointed segment may not start with an in-place layer."""
        segments, layers = [], []
        for layer in self.features:
            layers.append(layer)
            if isinstance(layer, nn.ReLU):
                segments.append(nn.Sequential(*layers))
                layers = []
        return segments + ([nn.Sequential(*layers)] if layers else [])

    @torch.jit.ignore
    def rate_layout(self) -> list[list[str]]:
        """One entry per convolution, in order."""
        return [[f'features.{name}'] for name, _ in self.features.named_children() if name.startswith('conv')]

    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self._segments(), x)
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if pre_logits:
            for name, layer in self.classifier.named_children():
                if name != 'linear2':
                    x = layer(x)
            return x
        return self.classifier(x)


_CFG: dict[str, Any] = dict(first_conv='features.conv0', classifier='classifier.linear2', pool_size=(2, 2))
default_cfgs = generate_default_cfgs(
    {'vgg16_bn_cifar': cifar_cfg(NORTON_DENSE, **_CFG), 'vgg19_bn_cifar': cifar_cfg(**_CFG)}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VGGCifar:
    return build_network(VGGCifar, variant, pretrained, feature_cfg=dict(VGGCifar.feature_cfg), **kwargs)


@register_model
def vgg16_bn_cifar(pretrained: bool = False, **kwargs: Any) -> VGGCifar:
    """VGG-16 with batch norm."""
    return _create('vgg16_bn_cifar', pretrained, **dict(dict(depth=16), **kwargs))


@register_model
def vgg19_bn_cifar(pretrained: bool = False, **kwargs: Any) -> VGGCifar:
    """VGG-19 with batch norm."""
    return _create('vgg19_bn_cifar', pretrained, **dict(dict(depth=19), **kwargs))
