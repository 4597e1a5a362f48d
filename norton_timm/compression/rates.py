"""How a published list of pruning rates maps to the layers of a network.

The authors number their rates per architecture (stem, stages, inner widths). Coupled layers share an entry. A network
tells its order by a method `rate_layout()`; that of timm's ResNets and MobileNetV2, which have no such method, is
defined here. Widths that depend on a layer's input are set by the network's method `follow_rates(widths, rates)`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock as TimmBasicBlock
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from norton_timm.graph import is_feature_extractor

Layout = list[list[str]]


def layout_of(model: nn.Module) -> Layout | None:
    """The layers that each entry of an authors' list of rates prunes.

    Some entries of the authors' lists prune nothing and have no layers here. Layers in no entry keep all their
    channels, except those that `widths_of` derives.

    Returns:
        One list of module names per entry, or None for a network without a known list.
    """
    own = getattr(model, 'rate_layout', None)
    if own is not None:
        return own()
    if _is_mobilenetv2(model):
        return _mobilenetv2(model)
    return _resnet(model) if isinstance(model, ResNet) or _is_resnet_body(model) else None


def widths_of(model: nn.Module, rates: Sequence[float]) -> dict[str, int]:
    """Output channels that a list of rates gives each layer of the dense `model`: `int(full * (1 - rate))`.

    Two kinds of layers follow the pruning before them. A transition of DenseNet keeps that share of the channels that
    reach it, also when its own rate is 0. An expansion of MobileNetV2 stays a multiple of the channels that enter its
    block.

    Args:
        model: The uncompressed network.
        rates: One rate in [0, 1) per entry of `layout_of(model)`; missing ones at the end are 0.

    Returns:
        Module name -> output channels, for every layer that an entry or one of those two rules sets.

    Raises:
        ValueError: No layout is known for the network, or there are more rates than entries.
    """
    layout = layout_of(model)
    if layout is None:
        raise ValueError(f'a list of rates was given, but no layout of {type(model).__name__} is known: give one rate')
    if len(rates) > len(layout):
        raise ValueError(f'{len(rates)} rates given, expected at most {len(layout)} for {type(model).__name__}')
    modules = dict(model.named_modules())
    widths: dict[str, int] = {}
    for names, rate in zip(layout, [*rates, *[0.0] * (len(layout) - len(rates))]):
        for name in names:
            widths[name] = int(_out_channels(modules[name]) * (1 - rate))
    follow = getattr(model, 'follow_rates', None)
    if follow is not None:
        follow(widths, rates)
    elif _is_mobilenetv2(model):
        _expand(model, widths)
    return widths


def exact_rates(model: nn.Module, rates: Sequence[float]) -> dict[str, float]:
    """One rate per layer name for which `int(full * (1 - rate))` is the width that `widths_of` gives."""
    modules = dict(model.named_modules())
    found: dict[str, float] = {}
    for name, width in widths_of(model, rates).items():
        full = _out_channels(modules[name])
        found[name] = 0.0 if width == full else 1 - (width + 0.5) / full
    return found


def _out_channels(module: nn.Module) -> int:
    return int(module.out_channels)  # type: ignore[arg-type]


def _is_resnet_body(model: nn.Module) -> bool:
    """True for a ResNet built with `features_only=True`, which has the same four stages."""
    stages = [getattr(model, f'layer{i}', None) for i in (1, 2, 3, 4)]
    return is_feature_extractor(model) and all(isinstance(stage, nn.Sequential) for stage in stages)


def _is_plain(block: nn.Module) -> bool:
    """True for a residual block without grouped convolutions: its inner widths are free."""
    return all(m.groups == 1 for m in block.modules() if isinstance(m, nn.Conv2d))


def _resnet(model: nn.Module) -> Layout | None:
    """Stem; outputs of stages 1 to 3 (the last is never pruned); inner width of every block.

    Where the first block of a stage has no projection (ResNet-18 and 34: stage 1), its output channels are the
    stem's, and the two share the first entry.
    """
    stages = [getattr(model, f'layer{i}') for i in (1, 2, 3, 4)]
    blocks = [(f'layer{i}.{j}', b) for i, stage in enumerate(stages, 1) for j, b in enumerate(stage)]
    if not all(isinstance(b, (Bottleneck, TimmBasicBlock)) and _is_plain(b) for _, b in blocks):
        return None
    stem = [n for n, m in model.named_modules() if re.match(r'conv1(\.|$)', n) and isinstance(m, nn.Conv2d)]
    entries: Layout = [stem]
    for i, stage in enumerate(stages[:3], 1):
        last = 'conv3' if isinstance(stage[0], Bottleneck) else 'conv2'
        names = [f'layer{i}.{j}.{last}' for j in range(len(stage))]
        down = stage[0].downsample
        if down is None:
            entries[-1] = entries[-1] + names
            continue
        projection = next(n for n, m in down.named_modules() if isinstance(m, nn.Conv2d))
        entries.append([*names, f'layer{i}.0.downsample.{projection}'])
    for name, block in blocks:
        inner = ('conv1', 'conv2') if isinstance(block, Bottleneck) else ('conv1',)
        entries.append([f'{name}.{conv}' for conv in inner])
    return entries


def _is_mobilenetv2(model: nn.Module) -> bool:
    """True for timm's MobileNetV2: seven stages of inverted residuals with 3x3 kernels and no squeeze-excitation."""
    if not isinstance(model, EfficientNet) or len(model.blocks) != 7:
        return False
    return all(
        type(block) in (DepthwiseSeparableConv, InvertedResidual)
        and isinstance(block.se, nn.Identity)
        and block.conv_dw.kernel_size == (3, 3)
        for stage in model.blocks
        for block in stage
    )


def _mobilenetv2(model: nn.Module) -> Layout:
    """Stem (never pruned); per stage the outputs of its blocks, as in the list for 32-pixel images."""
    stages: Sequence[nn.Sequential] = model.blocks  # type: ignore[assignment]
    return [[], *([_projection(f'blocks.{i}.{j}', block) for j, block in enumerate(s)] for i, s in enumerate(stages))]


def _projection(place: str, block: nn.Module) -> str:
    return f'{place}.conv_pwl' if isinstance(block, InvertedResidual) else f'{place}.conv_pw'


def _expand(model: nn.Module, widths: dict[str, int]) -> None:
    """Set the widths of a MobileNetV2's expansions: each is a multiple of its block's input."""
    stages: Sequence[nn.Sequential] = model.blocks  # type: ignore[assignment]
    chs = _out_channels(model.conv_stem)  # type: ignore[arg-type]
    for i, stage in enumerate(stages):
        for j, block in enumerate(stage):
            place = f'blocks.{i}.{j}'
            if isinstance(block, InvertedResidual):
                widths[f'{place}.conv_pw'] = chs * (block.conv_pw.out_channels // block.conv_pw.in_channels)
            chs = widths[_projection(place, block)]
