"""Detectors and backbones whose compression comes from a file: our checkpoints, and `norton_timm.save`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

import norton_timm
from detection.weights import state_of
from norton_timm.bases import base_name
from norton_timm.metadata import Metadata
from norton_timm.rebuild import repeat_surgery, surgery_of


def restore(model: GeneralizedRCNN, content: Mapping[str, Any]) -> None:
    """Give a detector the compression and the weights of a checkpoint (averaged ones if it has them), in place.

    Args:
        model: the dense detector; one of the checkpoint's own shapes where that tells of no compression.
        content: the checkpoint.

    Raises:
        ValueError: they do not fit together.
    """
    state = state_of(content)
    # a frozen batch norm is stored without its counter of batches; in evaluation both kinds are the same
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f'{name}.running_mean' in state:
            state.setdefault(f'{name}.num_batches_tracked', torch.tensor(0))
    if content.get('surgery') is not None:
        backbone, batch = model.backbone, torch.rand(1, 3, 64, 64)
        facts = Metadata(backbone.body, batch)
        repeat_surgery(model, content['surgery'], state)
        facts.refresh(backbone.body, batch)
        backbone.out_channels = backbone.fpn.layer_blocks[0][0].out_channels
        return
    problem = model.load_state_dict(state, strict=False)
    if problem.missing_keys or problem.unexpected_keys:
        raise ValueError(f'tensors {[*problem.missing_keys, *problem.unexpected_keys][:3]} ... are not in both')


def load_compressed(body: nn.Module, name: str, path: str | Path) -> None:
    """Give a dense backbone the compression and the weights of a network that `norton_timm.save` wrote, in place.

    Args:
        body: timm's `features_only` model.
        name: timm's name of it.
        path: the file, of the same architecture; its classifier is left out.

    Raises:
        ValueError: another architecture, or a damaged file.
    """
    network = norton_timm.load(path)
    made = network.norton_base['architecture']
    if made != name:
        raise ValueError(f'{path} holds a compressed {made}, expected {name}')
    places = {n: _place(n, body) for n, _ in network.named_modules()}
    surgery = surgery_of(network)
    for part in ('layers', 'low_rank', 'maps'):
        if part in surgery:
            surgery[part] = {places[n]: facts for n, facts in surgery[part].items() if places[n] is not None}
    surgery['buffers'] = {key: shape for n, shape in surgery.get('buffers', {}).items() if (key := _key(n, places))}
    tensors = {key: tensor for n, tensor in network.state_dict().items() if (key := _key(n, places))}
    batch = torch.rand(1, 3, 64, 64)
    facts = Metadata(body, batch)
    repeat_surgery(body, surgery, tensors)
    facts.refresh(body, batch)


def _place(name: str, body: nn.Module) -> str | None:
    """Where timm's feature wrappers put a network's module: as it was, stages flattened, or one level down."""
    modules = dict(body.named_modules())
    return next((n for n in (name, name.replace('.', '_', 1), f'model.{name}') if n in modules), None)


def _key(tensor: str, places: Mapping[str, str | None]) -> str | None:
    owner, _, leaf = tensor.rpartition('.')
    place = places[owner]
    return None if place is None else f'{place}.{leaf}'.lstrip('.')
