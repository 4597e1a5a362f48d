"""Any timm feature extractor with a feature pyramid (FPN) on top, for torchvision's R-CNNs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

import timm
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

import norton_timm  # noqa: F401  (registers the compressed models with timm)
from detection.rcnn.mobilenet import MOBILENET, MobileNetFeatures
from detection.rcnn.restore import load_compressed
from norton_timm.checkpoints import base_name, dense_name, is_saved

STRIDES = (4, 8, 16, 32)
NORMS = ('train', 'frozen', 'sync')


class BackboneWithFPN(nn.Module):
    """Features at strides 4, 8, 16 and 32 of a timm network, merged by an FPN, plus one max-pooled level.

    A body with an attribute `pyramid` says itself which of its maps are merged.

    Forward maps images `(N, 3, H, W)` to an ordered dict `'0', '1', '2', '3', 'pool'` of maps
    `(N, out_channels, H / s, W / s)`, s = 4, 8, 16, 32, 64 (Lin et al., 2017, arXiv:1612.03144).

    Args:
        body: a timm `features_only` model, or any module that returns a list of maps and has a `feature_info` with
            `channels()` and `reduction()`. All widths are read from there.
        out_channels: width of every pyramid level.
        norm_layer: normalisation after each convolution of the FPN; None for none.
    """

    parts_stay = True  # body and FPN stay modules in a fused network, so that each can be timed

    def __init__(
        self, body: nn.Module, out_channels: int = 256, norm_layer: Callable[..., nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.levels = pyramid_levels(body)
        channels = body.feature_info.channels()  # type: ignore[union-attr, operator]
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            [channels[i] for i in self.levels], out_channels, LastLevelMaxPool(), norm_layer
        )
        self.out_channels = out_channels
        self.channels_first = str(getattr(body, 'output_fmt', 'NCHW')).endswith('NCHW')

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        maps = [features[i] if self.channels_first else features[i].permute(0, 3, 1, 2) for i in self.levels]
        return self.fpn(OrderedDict((str(k), m) for k, m in enumerate(maps)))


def pyramid_levels(body: nn.Module) -> list[int]:
    """Positions, in the body's list of outputs, of the last features at strides 4, 8, 16 and 32."""
    info = getattr(body, 'feature_info', None)
    if info is None or not hasattr(info, 'reduction'):
        raise ValueError(
            f'backbone {type(body).__name__} has no feature_info with channels() and reduction(): '
            'pass a timm model built with features_only=True'
        )
    if hasattr(body, 'pyramid'):
        return list(body.pyramid)  # type: ignore[arg-type]
    strides = list(info.reduction())
    missing = [s for s in STRIDES if s not in strides]
    if missing:
        raise ValueError(f'backbone has features at strides {strides}, an FPN needs {list(STRIDES)}')
    return [len(strides) - 1 - strides[::-1].index(s) for s in STRIDES]


def create_features(name: str, *, pretrained: bool = False, weights: str | Path | None = None, **kwargs) -> nn.Module:
    """Build a timm model with `features_only=True`.

    Args:
        name: any timm name with its tag, such as `norton_resnet50.r078`; or `torchvision/mobilenet_v3_large`, see
            `MobileNetFeatures`.
        pretrained: load the weights that timm knows for this tag.
        weights: a local file with the weights of the classification network, instead; a file of `norton_timm.save`
            brings its compression along.
        **kwargs: passed on to `timm.create_model`, e.g. `rank=`, `rates=`.

    Raises:
        ValueError: timm has no such model, or it cannot give features.
        FileNotFoundError: `weights` does not exist.

    Example:
        >>> body = create_features('norton_resnet50.r078')
        >>> maps = body(torch.rand(1, 3, 224, 224))
    """
    if name == MOBILENET:
        if pretrained or weights is not None or kwargs:
            raise ValueError(f'{name} takes weights of whole detectors only, such as fasterrcnn_mobilenet_v3_large_fpn')
        return MobileNetFeatures()
    if not timm.is_model(name.split('.')[0]):
        near = get_close_matches(name.split('.')[0], timm.list_models(), n=3)
        raise ValueError(
            f'unknown backbone {name!r}: expected a timm model name such as norton_resnet50.r078, resnet50'
            + (f' (near: {", ".join(near)})' if near else '')
        )
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(f'no file with backbone weights at {weights}')
        if is_saved(weights) and dense_name(name) == name:
            body = create_features(name, **kwargs)
            load_compressed(body, base_name(name), weights)
            return body
        kwargs['pretrained_cfg_overlay'] = {'file': str(weights)}
    try:
        return timm.create_model(name, pretrained=pretrained or weights is not None, features_only=True, **kwargs)
    except (AttributeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f'timm cannot build backbone {name!r} with features_only=True: {error}') from error


def build_backbone(
    backbone: str | nn.Module,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    norm: str = 'train',
    frozen_stages: int = 0,
    out_channels: int = 256,
    norm_layer: Callable[..., nn.Module] | None = None,
) -> BackboneWithFPN:
    """A backbone with an FPN; its batch norms are trained, frozen or synchronised.

    Args:
        backbone: a timm name, or a module as `BackboneWithFPN` takes.
        pretrained: see `create_features`; must be False for a module.
        weights: see `create_features`; must be None for a module.
        norm: `'train'` leaves batch norms as they are, `'frozen'` makes them constant, `'sync'` shares their
            statistics between processes.
        frozen_stages: 0 to 4, number of pyramid levels that keep their weights, with all layers before them.
        out_channels: width of the FPN.
        norm_layer: see `BackboneWithFPN`; these norms are always trained.
    """
    if isinstance(backbone, str):
        body = create_features(backbone, pretrained=pretrained, weights=weights)
    elif pretrained or weights is not None:
        raise ValueError('pretrained and weights go with a backbone given by name; load the weights of a module first')
    else:
        body = backbone
    fpn = BackboneWithFPN(body, out_channels, norm_layer)
    set_training(fpn, norm, frozen_stages)
    return fpn


def set_training(fpn: BackboneWithFPN, norm: str, frozen_stages: int) -> None:
    """Set what is trained in the network below the FPN, in place; arguments as in `build_backbone`."""
    if norm not in NORMS:
        raise ValueError(f'norm is {norm!r}, expected one of {", ".join(NORMS)}')
    if norm == 'frozen':
        fpn.body = freeze_batch_norm_2d(fpn.body)
    elif norm == 'sync':
        fpn.body = convert_sync_batchnorm(fpn.body)
    freeze_stages(fpn.body, frozen_stages)


def freeze_stages(body: nn.Module, stages: int) -> None:
    """Stop training everything up to the end of the first `stages` pyramid levels, batch norms included."""
    if not 0 <= stages <= len(STRIDES):
        raise ValueError(f'frozen_stages is {stages}, expected 0 to {len(STRIDES)}')
    if not stages:
        return
    children = dict(body.named_children())
    names = [name.replace('.', '_') for name in body.feature_info.module_name()]  # type: ignore[union-attr, operator]
    levels = pyramid_levels(body)
    if stages > len(levels):
        raise ValueError(f'frozen_stages is {stages}, expected 0 to {len(levels)} for this backbone')
    last = names[levels[stages - 1]]
    if last not in children:
        raise ValueError(f'frozen_stages needs a backbone whose children are its stages; {last!r} is not one')
    for name, child in children.items():
        frozen = freeze_batch_norm_2d(child)
        if frozen is not child:
            setattr(body, name, frozen)
        for parameter in frozen.parameters():
            parameter.requires_grad_(False)
        if name == last:
            return


def normalisation(body: nn.Module) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (3 each, for RGB in 0..1) that the network expects; by default ImageNet's."""
    cfg = getattr(body, 'pretrained_cfg', None) or {}
    mean = cfg.get('mean') or timm.data.IMAGENET_DEFAULT_MEAN
    std = cfg.get('std') or timm.data.IMAGENET_DEFAULT_STD
    return list(mean), list(std)
