"""What the CIFAR networks share: the timm model interface around a body and a pooled linear head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from timm.layers import create_classifier, get_device_dtype
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

# As in the authors' training code: not CIFAR-10's own standard deviations, but the published weights expect them.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
# where the authors released their dense networks; norton_timm.models.released reads it
NORTON_DENSE = 'authors:pvti/NORTON@v0.1.0,pvti/CORING@v0.1.0'
CORING_DENSE = 'authors:pvti/CORING@v0.1.0'


def cifar_cfg(url: str = '', **kwargs: Any) -> dict[str, Any]:
    """The `pretrained_cfg` of a CIFAR-10 network."""
    cfg = dict(
        url=url,
        num_classes=10,
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        interpolation='bicubic',
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        first_conv='conv1',
        classifier='fc',
        license='apache-2.0',
    )
    return dict(cfg, **kwargs)


class CifarNet(nn.Module):
    """Base of the CIFAR networks.

    A subclass registers the modules of its body in the order in which they run, sets `feature_info` and
    `num_features`, and ends its constructor with `_finish`. `forward_features` runs the body: (N, C, H, W) ->
    (N, num_features, H / r, W / r).
    """

    classifier_name = 'fc'
    feature_cfg: ClassVar[dict[str, Any]] = dict(out_indices=(0, 1, 2, 3))  # timm's, for `features_only`

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

    def _finish(self, body: list[str], global_pool: str, device=None, dtype=None) -> None:
        """Adds the head and initialises the weights; `body` names the children that make up the body."""
        self._body = body
        dd = dict(device=device, dtype=dtype)
        self.global_pool, fc = create_classifier(self.num_features, self.num_classes, pool_type=global_pool, **dd)
        self.head_drop = nn.Dropout(self.drop_rate)
        setattr(self, self.classifier_name, fc)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """He initialisation of the convolutions, as in every one of the original papers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates: stem, then the children of the body."""
        stem, *blocks = [name for name in self._body if any(True for _ in getattr(self, name).parameters())]
        depth = '' if coarse else r'(?:\.(\d+))?'
        return dict(stem=rf'^{stem}', blocks=[(rf'^({name}){depth}', None) for name in blocks])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: recomputes the activations inside blocks during the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity when `num_classes` is 0."""
        return getattr(self, self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head; `global_pool=''` needs `num_classes=0` and returns the feature map."""
        dd = get_device_dtype(self)
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool, fc = create_classifier(self.num_features, num_classes, pool_type=pool, **dd)
        setattr(self, self.classifier_name, fc)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        fc.train(self.training)

    @torch.jit.ignore
    def _body_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The body in order, a container named `features` opened."""
        for name in self._body:
            module = getattr(self, name)
            if name == 'features':
                yield from ((f'{name}.{child}', layer) for child, layer in module.named_children())
            else:
                yield name, module

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps that `feature_info` lists, and unless `intermediates_only` the last one too.

        Args:
            x: Images (N, C, H, W).
            indices: The last n when an int, all when None, else these.
            norm: Accepted for timm's interface; there is no final norm to apply.
            stop_early: Run no further than the last feature asked for.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return the list alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW'")
        take, last = feature_take_indices(len(self.feature_info), indices)
        taps = [info['module'] for info in self.feature_info]
        found: list[Tensor] = []
        for name, module in self._body_modules():
            if self.grad_checkpointing and self.training and isinstance(module, nn.Sequential):
                x = checkpoint(module, x)
            else:
                x = module(x)
            if name in taps:
                if taps.index(name) in take:
                    found.append(x)
                if stop_early and taps.index(name) == last:
                    break
        return found if intermediates_only else (x, found)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the body after the last feature asked for, and the head; returns the absolute indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        past = False
        for name, _ in list(self._body_modules()):
            if past:
                parent, _, child = name.rpartition('.')
                (self.get_submodule(parent) if parent else self)._modules[child] = nn.Identity()
            past = past or name == self.feature_info[last]['module']
        if prune_head or last < len(self.feature_info) - 1:
            self.num_features = self.feature_info[last]['num_chs']
            self.reset_classifier(0, '')
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and, unless `pre_logits`, the classifier: (N, C, H, W) -> (N, num_classes)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
