"""How each operation between layers maps the channel labels of its inputs to those of its outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from norton_timm.graph.channels import BINARY, UNARY, ZERO, ChannelCount, ChannelLabels, Channels
from norton_timm.utils import tensors_in

Labelled = list[tuple[Tensor, Channels]]

_SHAPES = frozenset('flatten view reshape squeeze unsqueeze expand expand_as view_as reshape_as'.split())
_REDUCTIONS = frozenset('mean sum amax amin'.split())
_SPLITS = frozenset('split chunk tensor_split split_with_sizes'.split())


def apply_rule(
    known: ChannelLabels,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labelled: Labelled,
    outputs: list[Tensor],
) -> bool:
    """Label the outputs of operation ``name``; without a rule, return False and label nothing."""
    source, found = labelled[0]
    if name == '__setitem__':
        return _assign(known, args, labelled)
    out = outputs[0]
    result: Channels | None = None
    if name in UNARY and len(labelled) == 1:
        if out.dim() == source.dim() and out.shape[found.dim] == len(found.labels):
            for output in outputs:  # max_pool2d may return indices as well
                known.set_channels(output, found)
            return True
    elif name in BINARY:
        result = _binary(known, [*tensors_in(args), *tensors_in(kwargs)], labelled, out)
    elif name in ('cat', 'concat', 'concatenate'):
        result = _concatenate(known, args, kwargs, labelled, out)
    elif name == 'roi_align':
        result = found if source is args[0] else None
    elif len(labelled) > 1 and name not in ('expand_as', 'view_as', 'reshape_as'):
        return False
    elif name in _SPLITS:
        return _split(known, args, kwargs, source, found, outputs)
    elif name in ('pad', '_pad'):
        result = _pad(args, kwargs, source, found, out)
    elif name in _REDUCTIONS:
        result = _reduce(args, kwargs, source, found, out)
    elif name in ('permute', 'transpose', 'swapaxes'):
        result = _permute(name, args, kwargs, source, found)
    elif name == '__getitem__':
        result = _index(known, args[1], source, found, out)
    elif name == '__get__':  # a property such as .data
        result = found if out.shape == source.shape else None
    elif name in _SHAPES and source is args[0]:
        result = _reshape(source, found, out)
        if result is not None and not _follows(known, name, args, kwargs, found, result, out):
            return False
    if result is None or out.dim() <= result.dim or out.shape[result.dim] != len(result.labels):
        return False
    known.set_channels(out, result)
    return True


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, default: int, ndim: int) -> int:
    return int(args[position] if len(args) > position else kwargs.get('dim', default)) % ndim


def _binary(known: ChannelLabels, operands: list[Tensor], labelled: Labelled, out: Tensor) -> Channels | None:
    aligned = [(c.labels, c.dim + out.dim() - t.dim()) for t, c in labelled]
    dim = aligned[0][1]
    if any(d != dim for _, d in aligned):
        return None
    width = out.shape[dim]
    full = [labels for labels, _ in aligned if len(labels) == width]
    if not full:
        return None
    for labels, _ in aligned:
        if len(labels) != width:
            known.freeze(labels, 'broadcast over channels')
    for other in operands:
        if known.channels(other) is None:
            place = dim - out.dim() + other.dim()
            if place >= 0 and other.shape[place] > 1:  # per-channel values from outside: they would not shrink
                return None
    result = full[0]
    for labels in full[1:]:
        result = known.tie(result, labels)
    return Channels(result, dim)


def _concatenate(
    known: ChannelLabels, args: tuple[Any, ...], kwargs: dict[str, Any], labelled: Labelled, out: Tensor
) -> Channels | None:
    parts = [t for t in (args[0] if args else kwargs['tensors']) if t.numel() or t.dim() > 1]
    dim = _dim(args, kwargs, 1, 0, out.dim())
    found = [known.channels(t) for t in parts]
    if any(c is None for c in found):
        return None
    channels = [c for c in found if c is not None]
    if all(c.dim == dim for c in channels):
        return Channels(np.concatenate([c.labels for c in channels]), dim)
    if any(c.dim != channels[0].dim for c in channels) or any(c.dim == dim for c in channels):
        return None
    result = channels[0].labels  # joined along another dimension: the channels must agree
    for c in channels[1:]:
        if len(c.labels) != len(result):
            return None
        result = known.tie(result, c.labels)
    return Channels(result, channels[0].dim)


def _split(
    known: ChannelLabels, args: tuple[Any, ...], kwargs: dict[str, Any], source: Tensor, found: Channels, outputs: Any
) -> bool:
    if _dim(args, kwargs, 2, 0, source.dim()) != found.dim:
        for output in outputs:
            known.set_channels(output, found)
        return True
    known.freeze(found.labels, 'split at places fixed in code')
    start = 0
    for output in outputs:
        width = output.shape[found.dim]
        known.set_channels(output, Channels(found.labels[start : start + width], found.dim))
        start += width
    return True


def _pad(
    args: tuple[Any, ...], kwargs: dict[str, Any], source: Tensor, found: Channels, out: Tensor
) -> Channels | None:
    if out.shape[found.dim] == len(found.labels):
        return found
    pads = [int(p) for p in (args[1] if len(args) > 1 else kwargs['pad'])]
    mode = args[2] if len(args) > 2 else kwargs.get('mode', 'constant')
    value = args[3] if len(args) > 3 else kwargs.get('value')
    place = 2 * (source.dim() - 1 - found.dim)
    if mode != 'constant' or value or place + 1 >= len(pads) or min(pads[place : place + 2]) < 0:
        return None
    before, after = pads[place : place + 2]
    return Channels(np.concatenate([np.full(before, ZERO), found.labels, np.full(after, ZERO)]), found.dim)


def _reduce(
    args: tuple[Any, ...], kwargs: dict[str, Any], source: Tensor, found: Channels, out: Tensor
) -> Channels | None:
    dims = kwargs.get('dim', args[1] if len(args) > 1 else None)
    if dims is None:
        return None
    if len(args) > 2 and not isinstance(args[2], bool):
        dims = [a for a in args[1:] if not isinstance(a, bool)]
    dims = [int(d) % source.dim() for d in (dims if isinstance(dims, (tuple, list)) else [dims])]
    if found.dim in dims:
        return None
    gone = 0 if out.dim() == source.dim() else sum(d < found.dim for d in dims)
    return Channels(found.labels, found.dim - gone)


def _permute(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], source: Tensor, found: Channels
) -> Channels | None:
    if kwargs:
        return None
    order = args[1] if len(args) == 2 else args[1:]
    if name == 'permute':
        return Channels(found.labels, [int(d) % source.dim() for d in order].index(found.dim))
    a, b = (int(d) % source.dim() for d in order)
    return Channels(found.labels, {a: b, b: a}.get(found.dim, found.dim))


def _index(known: ChannelLabels, index: Any, source: Tensor, found: Channels, out: Tensor) -> Channels | None:
    """Labels after indexing; a slice that drops some channels freezes all of them, one that keeps all does not."""
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [i for i in items if not isinstance(i, Tensor)]:
        at = next(k for k, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (source.dim() - len(items) + 1)
    dim = place = 0
    for item in items:
        if item is None:
            place += 1
            continue
        if dim == found.dim:
            if not isinstance(item, slice):
                return None
            labels = found.labels[item]
            if len(labels) != len(found.labels) or item.step not in (None, 1):
                known.freeze(found.labels, 'sliced at places fixed in code')
            return Channels(labels, place)
        if isinstance(item, Tensor) and item.dim() == 1:
            place += 1  # a mask or a list of indices keeps its dimension
        elif isinstance(item, slice):
            place += 1
        elif not isinstance(item, int):
            return None
        dim += 1
    return Channels(found.labels, place + found.dim - dim)


def _assign(known: ChannelLabels, args: tuple[Any, ...], labelled: Labelled) -> bool:
    """``target[rows] = value`` keeps channels together where only rows are chosen (torchvision's RoI pooling)."""
    target, index, value = args
    found = known.channels(value) if isinstance(value, Tensor) else None
    if found is None or found.dim == 0 or not isinstance(index, Tensor) or index.dim() != 1:
        return False
    if target.dim() != value.dim() or target.shape[1:] != value.shape[1:]:
        return False
    have = known.channels(target)
    if have is not None:
        if have.dim != found.dim:
            return False
        known.tie(have.labels, found.labels)
    known.set_channels(target, have or found)
    return True


def _reshape(source: Tensor, found: Channels, out: Tensor) -> Channels | None:
    dim, width = found.dim, len(found.labels)
    leading = source.shape[:dim]
    if out.dim() > dim and out.shape[:dim] == leading:
        if out.shape[dim] == width:
            return found
        inner = int(np.prod(source.shape[dim + 1 :])) if source.dim() > dim + 1 else 1
        if out.dim() == dim + 1 and out.shape[dim] == width * inner:  # (N, C, H, W) -> (N, C * H * W)
            return Channels(np.repeat(found.labels, inner), dim)
    if sum(n > 1 for n in source.shape[dim + 1 :]) == 0 or sum(n > 1 for n in source.shape) == 1:
        # only the place of the channels changes: (N, C, 1, 1) -> (N, 1, C)
        places = [d for d, n in enumerate(out.shape) if n == width]
        if len(places) == 1 and out.numel() == source.numel() and width > 1:
            return Channels(found.labels, places[0])
    return None


def _follows(
    known: ChannelLabels,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    found: Channels,
    result: Channels,
    out: Tensor,
) -> bool:
    """Whether the target shape would follow if channels were removed: it is not written as a number in code."""
    if name in ('expand_as', 'view_as', 'reshape_as'):
        other = args[1] if len(args) > 1 else kwargs['other']
        like = known.channels(other)
        if like is None or like.dim != result.dim or len(like.labels) != len(result.labels):
            return False
        known.tie(result.labels, like.labels)
        return True
    if name not in ('view', 'reshape', 'expand'):
        return True
    sizes: Any = args[1:] or tuple(kwargs.values())
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if len(sizes) != out.dim() or not all(isinstance(size, int) for size in sizes):
        return True  # a view as another type
    size = sizes[result.dim]
    if not isinstance(size, ChannelCount):
        return size == -1
    return [known.find(k) for k in size.labels if k != ZERO] == [known.find(k) for k in found.labels if k != ZERO]
