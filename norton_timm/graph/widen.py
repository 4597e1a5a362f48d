"""Widen layers to round numbers of channels; the fast kernels of some runtimes take no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from norton_timm.graph.channels import Slot
from norton_timm.graph.groups import ChannelGraph, ChannelGroup
from norton_timm.graph.surgery import put_channels
from norton_timm.layers import LayerHandler, has_computed_weight, nearest_handler


@torch.no_grad()
def align_channels(model: nn.Module, example_input: Any, multiple: int = 8) -> dict[str, int]:
    """Append channels of zeros, in place, up to a multiple of ``multiple`` channels; outputs stay equal.

    ONNX Runtime keeps maps in blocks of 8 channels where a layer's channels fill the blocks. Around other layers it
    converts the maps each time. Pruned networks have 38 or 614 channels; 40 and 616 are faster there.

    Args:
        model: a network in evaluation mode. A coupled group stays as it is where its layers cannot be widened alike.
        example_input: what its ``forward`` takes.
        multiple: the new numbers of channels are multiples of this.

    Returns:
        New number of output channels of each widened layer, by name.

    Raises:
        ValueError: a multiple below 1.

    Example:
        >>> widened = align_channels(model, torch.rand(1, 3, 224, 224), multiple=8)
    """
    if multiple < 1:
        raise ValueError(f'got {multiple} as the multiple of channels, expected 1 or more')
    if multiple == 1:
        return {}
    graph = ChannelGraph(model, example_input)
    runs = {}
    for group in graph.groups:
        labels = group.members[0].labels.tolist() if group.members else []
        more = -len(labels) % multiple
        if labels and more and _can_grow(group, labels, graph.slots):
            runs[labels[0]] = len(labels), more
    for slot in graph.slots:
        labels, index, start = slot.labels.tolist(), [], 0
        while start < len(labels):
            length, more = runs.get(labels[start], (1, 0))
            index += [*range(start, start + length), *[-1] * more]
            start += length
        if len(index) > len(labels):
            put_channels(slot, torch.tensor(index))
    heads = [g for g in graph.groups if g.members and g.members[0].labels[0] in runs]
    return {s.name: sum(runs[s.labels[0]]) for g in heads for s in g.members}


def _can_grow(group: ChannelGroup, labels: list[int], slots: list[Slot]) -> bool:
    """Whether every layer that makes or reads the group's channels has all of them, in this order."""
    if group.frozen or len(set(labels)) < len(labels) or len(group.classes) != len(labels):
        return False
    mine = set(labels)
    for slot in slots:
        found = slot.labels.tolist()
        if mine.isdisjoint(found):
            continue
        module, handler, length = slot.module, nearest_handler(slot.module) or LayerHandler(), len(labels)
        grouped = getattr(module, 'groups', 1) > 1 and slot.kind != 'depthwise'
        multiplies = slot.kind == 'depthwise' and module.in_channels != module.out_channels
        if handler.carries or grouped or multiplies or has_computed_weight(module):
            return False
        starts = [k for k, label in enumerate(found) if label == labels[0]]
        whole = all(found[k : k + length] == labels for k in starts)
        if not whole or sum(label in mine for label in found) != length * len(starts):
            return False
    return True
