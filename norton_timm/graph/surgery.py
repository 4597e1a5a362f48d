"""Slice channels out of coupled layers, in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from norton_timm.graph.channels import Slot
from norton_timm.graph.groups import ChannelGraph
from norton_timm.layers import handler_of, take


def remove_channels(graph: ChannelGraph, classes: Iterable[int]) -> None:
    """Slice the given channel classes out of every layer of ``graph``, in place.

    The graph stays valid for further pruning of the same model.

    Args:
        graph: channel graph of the model.
        classes: values of :attr:`ChannelGroup.classes`.

    Raises:
        ValueError: a class is frozen, or a layer would lose all its channels.

    Example:
        >>> graph = ChannelGraph(model, torch.rand(1, 3, 224, 224))
        >>> remove_channels(graph, graph.group_of('layer1.0.conv1').classes[:8])
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
    """Keep these old indices of one slot of a module; -1 adds a channel of zeros."""
    if slot.kind == 'param':
        take(slot.module, slot.name.rsplit('.', 1)[-1], keep, slot.dim)
        return
    handler = handler_of(slot.module)
    assert handler is not None  # the tracer makes slots of such modules only
    handler.put(slot.module, slot.kind, keep)
