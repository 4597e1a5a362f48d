"""The one builder of our entrypoints: timm's builder, with our search for weights and our conversion of key names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, get_arch_pretrained_cfgs
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from norton_timm.checkpoints import convert_state_dict, locate
from norton_timm.layers import CPDConv2d, first_conv


def build_network(model_cls: Callable[..., nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Timm's `build_model_with_cfg`, with weights found by `norton_timm.checkpoints.locate`.

    Args:
        model_cls: Makes the network from the keyword arguments that are left.
        variant: Name of the entrypoint.
        pretrained: Load weights; fails at once, before anything is built, where there are none.
        kwargs: As in `timm.create_model`.
    """
    tag_of(variant, kwargs.get('pretrained_cfg'))
    if pretrained:
        overlay = locate(
            variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'), kwargs.get('cache_dir')
        )
        kwargs['pretrained_cfg_overlay'] = overlay
    return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=adapt_state_dict, **kwargs)


def tag_of(variant: str, pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None) -> str:
    """The tag that an entrypoint was called with, '' where there is none.

    Raises:
        ValueError: The entrypoint has no such tag.
    """
    known = {cfg.tag or '': name for name, cfg in get_arch_pretrained_cfgs(variant).items()}
    if isinstance(pretrained_cfg, str):
        tag = pretrained_cfg
        if tag not in known:
            expected = ', '.join(known) if any(known) else 'none'
            raise ValueError(f'unknown tag {tag!r} of {variant}, expected {expected}')
        return tag
    if pretrained_cfg is None:
        return next(iter(known), '')
    return (pretrained_cfg.get('tag') if isinstance(pretrained_cfg, dict) else pretrained_cfg.tag) or ''


def adapt_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Converts key names of common CIFAR code and of the authors' releases to ours; other files pass unchanged.

    A decomposed stem is adapted to another number of image channels as timm adapts a dense one: the factor of the
    input mode is summed or repeated, which does the same to the kernel.
    """
    converted = convert_state_dict(state_dict, model)
    stem = first_conv(model)
    if stem is not None and isinstance(stem[1], CPDConv2d):
        name = f'{stem[0]}.pointwise'
        if name in converted and converted[name].shape[1] == 3 != stem[1].in_channels:
            converted[name] = adapt_input_conv(stem[1].in_channels, converted[name])
    return converted
