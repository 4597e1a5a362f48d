"""Change a network in place: slice channels out of coupled layers, replace convolutions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.layers import BlurPool2d
from torch import Tensor, nn

from norton_timm.graph.channels import Slot
from norton_timm.graph.groups import ChannelGraph
from norton_timm.layers import ChannelMap, CPDConv2d


def _take(module: nn.Module, name: str, keep: Tensor, dim: int) -> None:
    """Put the given indices of one parameter or buffer in its place, -1 is zero; type, device, layout stay."""
    old = getattr(module, name)
    source = old.detach()
    if (keep < 0).any():
        source = torch.cat([source, torch.zeros_like(source.narrow(dim, 0, 1))], dim)
    new = source.index_select(dim, torch.where(keep < 0, old.shape[dim], keep).to(old.device))
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, name, new)


def remove_channels(graph: ChannelGraph, classes: Iterable[int]) -> None:
    """Slice the given channel classes out of every layer of ``graph``, in place.

    The graph stays valid for further pruning of the same model.

    Raises:
        ValueError: a class is frozen, or nothing of a layer would be left.
    """
    gone = set(int(c) for c in classes)
    held = [graph.frozen[c] for c in gone if c in graph.frozen]
    if held:
        raise ValueError(f'got a channel that must stay: {held[0]}')
    keeps = [[k for k, c in enumerate(slot.labels.tolist()) if c not in gone] for slot in graph.slots]
    empty = [slot.name for slot, keep in zip(graph.slots, keeps) if len(slot.labels) and not keep]
    if empty:
        raise ValueError(f'got a request to remove every channel of {empty[0]}, expected one at least to stay')
    for slot, keep in zip(graph.slots, keeps):
        if len(keep) < len(slot.labels):
            put_channels(slot, torch.tensor(keep))
            slot.labels = slot.labels[keep]
    graph.shrink(gone)


def put_channels(slot: Slot, keep: Tensor) -> None:
    """Give one slot of a module the channels with these of its old indices, -1 stands for a channel of zeros."""
    module, kind = slot.module, slot.kind
    if kind == 'param':
        _take(module, slot.name.rsplit('.', 1)[-1], keep, slot.dim)
    elif kind == 'channel':
        _slice_norm(module, keep)
    elif isinstance(module, ChannelMap):
        _slice_map(module, kind, keep)
    elif isinstance(module, CPDConv2d):
        _slice_cpd(module, kind, keep)
    elif isinstance(module, nn.Linear):
        _take(module, 'weight', keep, 0 if kind == 'out' else 1)
        if kind == 'out':
            module.out_features = len(keep)
            if module.bias is not None:
                _take(module, 'bias', keep, 0)
        else:
            module.in_features = len(keep)
    else:
        _slice_conv(module, kind, keep)  # type: ignore[arg-type]


def _slice_norm(module: nn.Module, keep: Tensor) -> None:
    if isinstance(module, BlurPool2d):
        _take(module, 'filt', keep, 0)
        module.channels = len(keep)
        return
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        values = getattr(module, name, None)
        if values is not None and values.numel() > 1:  # a PReLU may have one slope for all channels
            _take(module, name, keep, 0)
    if isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif hasattr(module, 'num_features'):
        module.num_features = len(keep)


def _slice_conv(module: nn.modules.conv._ConvNd, kind: str, keep: Tensor) -> None:
    out_dim = 1 if module.transposed else 0
    if kind == 'in':
        per_group = module.in_channels // module.groups
        if module.transposed:  # weight (I, O / groups, ...)
            _take(module, 'weight', keep, 0)
        else:  # equal places are kept in every group
            _take(module, 'weight', keep[keep < per_group], 1)
        module.in_channels = len(keep)
        return
    if module.transposed and module.groups > 1 and kind == 'out':
        keep_weight = keep[keep < module.out_channels // module.groups]
    else:
        keep_weight = keep
    _take(module, 'weight', keep_weight, 0 if kind == 'depthwise' else out_dim)
    if module.bias is not None:
        _take(module, 'bias', keep, 0)
    if kind == 'depthwise':
        multiplier = module.out_channels // module.in_channels
        module.in_channels = module.groups = len(keep) // multiplier
    module.out_channels = len(keep)


def _slice_cpd(module: CPDConv2d, kind: str, keep: Tensor) -> None:
    if kind == 'in':
        per_group = module.in_channels // module.groups
        _take(module, 'pointwise', keep[keep < per_group], 1)
        module.in_channels = len(keep)
    else:
        rank = module.rank
        rows = torch.where(keep[:, None] < 0, -1, keep[:, None] * rank + torch.arange(rank)).flatten()
        _take(module, 'pointwise', rows, 0)
        _take(module, 'vertical', rows, 0)
        _take(module, 'horizontal', keep, 0)
        if module.bias is not None:
            _take(module, 'bias', keep, 0)
        if kind == 'depthwise':
            multiplier = module.out_channels // module.in_channels
            module.in_channels = module.groups = len(keep) // multiplier
        module.out_channels = len(keep)
    module.tuned.clear()


def _slice_map(module: ChannelMap, kind: str, keep: Tensor) -> None:
    index = module.index.cpu()
    if kind == 'out':
        module.set_index(index[keep])
        return
    new = torch.full((module.in_channels + 1,), -1)  # index -1, zero, stays -1
    new[keep] = torch.arange(len(keep))
    module.set_index(new[index], len(keep))
