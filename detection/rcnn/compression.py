"""Compression of whole detectors: the recipes that ship with the package, and how a spec is applied to an R-CNN."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_timm.compression import CompressionSpec, compress, reshape
from norton_timm.graph import Metadata
from norton_timm.layers import CPDConv2d

log = logging.getLogger(__name__)

RECIPES = ('backbone', 'full', 'light')
_FOLDER = Path(__file__).parent / 'recipes'
_FULLY_CONNECTED = 'roi_heads.box_head.5'  # of version 2, after four convolutions and a Flatten
_SIDE = 64  # pixels; channels do not depend on the size, and 800 pixels would take a hundred times as long
# with these settings every part of a detector runs, and briefly, with any weights
_BRIEF: dict[str, Any] = {
    'transform.min_size': (_SIDE,),
    'transform.max_size': _SIDE,
    'rpn._post_nms_top_n': {'training': 8, 'testing': 8},
    'roi_heads.score_thresh': -1.0,
    'roi_heads.detections_per_img': 4,
}


def recipe_spec(task: str, recipe: str, version: int = 1) -> CompressionSpec | None:
    """The spec of a recipe for FPN, RPN and heads of a task's detector; None for `'backbone'`: they stay dense.

    The recipes name the layers of version 1. In version 2 the convolutions of the box head become as narrow as those of
    the RPN, which read the same maps, and its one fully connected layer stands for both.
    """
    if recipe == 'backbone':
        return None
    spec = CompressionSpec.from_yaml(_FOLDER / f'{task}.{recipe}.yaml')
    if version == 1:
        return spec
    rates, low_rank = dict(spec.rates), dict(spec.low_rank)  # type: ignore[arg-type]
    rates['roi_heads.box_head.?.0'] = rates['rpn.head.conv.*']
    if 'roi_heads.box_head.fc7' in rates:
        rates[_FULLY_CONNECTED] = rates.pop('roi_heads.box_head.fc7')
    low_rank[_FULLY_CONNECTED] = low_rank.pop('roi_heads.box_head.fc6')
    return dataclasses.replace(spec, rates=rates, low_rank=low_rank)


def read_spec(source: CompressionSpec | str | os.PathLike[str]) -> CompressionSpec:
    """A spec for a detector, from a YAML file if need be; a spec without a scope is for the backbone alone."""
    spec = source if isinstance(source, CompressionSpec) else CompressionSpec.from_yaml(Path(source))
    return spec if spec.scope else dataclasses.replace(spec, scope='backbone')


def compress_detector(model: GeneralizedRCNN, spec: CompressionSpec, fresh: bool = False) -> GeneralizedRCNN:
    """An R-CNN with FPN, compressed.

    Args:
        model: as `build_detector` makes it; it may be changed.
        spec: its `scope` says whether names are those of the backbone or of the whole detector.
        fresh: the layers to compress have random weights. They are then drawn again or cut without a look at the
            weights, and their outputs keep their variance.

    Raises:
        ValueError: the spec does not fit the detector.

    Example:
        >>> dense = build_detector('box', 'resnet50')
        >>> small = compress_detector(dense, CompressionSpec(rank=2, rates=0.3, scope='backbone'))
    """
    device = next(model.parameters()).device
    images, batch = [torch.rand(3, _SIDE, _SIDE, device=device)], torch.rand(1, 3, _SIDE, _SIDE, device=device)
    facts = Metadata(model.backbone.body, batch)
    settings = _set(model, _BRIEF)
    try:
        if fresh:
            before = _fan_in(model)
            model = reshape(model, spec, images)  # type: ignore[assignment]
            _keep_variance(model, before)
        else:
            model, report = compress(model, spec, images)  # type: ignore[assignment]
            log.info('compressed:\n%s', report)
    finally:
        _set(model, settings)
    facts.refresh(model.backbone.body, batch)
    model.backbone.out_channels = model.backbone.fpn.layer_blocks[0][0].out_channels
    return model


def _set(model: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    """Set attributes by dotted name; returns what they were."""
    before = {}
    for path, value in values.items():
        owner, _, key = path.rpartition('.')
        module = model.get_submodule(owner)
        before[path] = getattr(module, key)
        setattr(module, key, value)
    return before


def _fan_in(model: GeneralizedRCNN) -> dict[str, int]:
    """Number of inputs of every layer after the backbone: no normalisation sets the scale of these layers."""
    layers = {n: m for n, m in model.named_modules() if not n.startswith('backbone.body.')}
    fan_in = {n: m.in_features for n, m in layers.items() if type(m) is nn.Linear}
    return {**fan_in, **{n: m.in_channels for n, m in layers.items() if isinstance(m, (nn.Conv2d, CPDConv2d))}}


@torch.no_grad()
def _keep_variance(model: GeneralizedRCNN, before: dict[str, int]) -> None:
    """Scale up weights that were drawn for more inputs than are left, to the variance of a fresh draw."""
    for name, fan_in in _fan_in(model).items():
        if name in before:
            layer = model.get_submodule(name)
            weight = layer.pointwise if isinstance(layer, CPDConv2d) else layer.weight
            weight.mul_((before[name] / fan_in) ** 0.5)
