"""The activation-aware criterion: channels leave whose removal changes least what the layers that read them give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from norton_timm.compression.gradients import output_importance
from norton_timm.compression.moments import MOST_INPUTS, Moments, add_samples, places_of
from norton_timm.compression.observe import Order, observe
from norton_timm.compression.reconstruct import Reader, removals
from norton_timm.graph import ChannelGraph, ChannelGroup, Slot
from norton_timm.layers import can_factor, has_computed_weight
from norton_timm.utils import after_call, at_least_float32, evaluating, removing

_GRADIENT_IMAGES = 32


def can_measure(layer: nn.Module) -> bool:
    """Whether the error of a layer's outputs can be told from second moments of its input."""
    return can_factor(layer) and not has_computed_weight(layer) and layer.weight[0].numel() <= MOST_INPUTS  # type: ignore[union-attr, index, operator]


def readers_of(graph: ChannelGraph, group: ChannelGroup) -> dict[str, tuple[Slot, np.ndarray]] | None:
    """The layers that read a group's channels: their slots, and the columns (classes, Q) of each class.

    Q counts the inputs of a class, without kernel positions. None where a layer reads them in a way that has no error
    of its own: a grouped or transposed convolution, a layer of another kind or with too many inputs, or classes of
    unequal numbers of inputs.
    """
    number = {int(c): k for k, c in enumerate(group.classes)}
    found: dict[str, tuple[Slot, np.ndarray]] = {}
    for slot in graph.slots:
        if slot.kind == 'param' and any(int(c) in number for c in slot.labels):
            return None
        if slot.kind != 'in' or not any(int(c) in number for c in slot.labels):
            continue
        if not can_measure(slot.module) or slot.name in graph.outside:
            return None
        columns: list[list[int]] = [[] for _ in number]
        for place, label in enumerate(slot.labels.tolist()):
            if label in number:
                columns[number[label]].append(place)
        if len({len(c) for c in columns}) != 1:
            return None
        found[slot.name] = slot, np.array(columns)
    return found or None


class Activations:
    """What a dense network's layers read on calibration images, and how much errors of their outputs matter.

    Args:
        model: the dense network; it is not changed.
        example_input: one image, batched.
        images: batches (N, C, H, W) of one size.
        names: layers whose inputs are measured; by default all that can be factored.

    Attributes:
        order: the layers in order.
        importance: weight (O,) of errors of each layer's outputs.
        moments: of each layer's input.
    """

    def __init__(
        self, model: nn.Module, example_input: Any, images: list[Tensor], names: Iterable[str] | None = None
    ) -> None:
        self.order = observe(model, example_input)
        layers = {n: m for n, m in self.order.layers.items() if can_measure(m)}
        if names is not None:
            layers = {n: m for n, m in layers.items() if n in set(names)}
        self.layers = layers
        self.importance = output_importance(model, layers, torch.cat(images)[:_GRADIENT_IMAGES])
        self.moments = _input_moments(model, self.order, layers, images)

    def gram(self, name: str) -> Tensor:
        """Second moments (P, P) of a layer's input, about the mean where a bias can take it up."""
        return self.moments[name].gram(self.order.has_bias(name))

    def mean_shift(self, name: str, change: Tensor) -> Tensor:
        """What keeps the mean output of a layer (O,) when its weight (O, P) changes."""
        return -(change @ self.moments[name].mean) if self.order.has_bias(name) else change.new_zeros(len(change))

    def removals(
        self, graph: ChannelGraph, group: ChannelGroup, keeps: Iterable[int]
    ) -> dict[int, tuple[Tensor, dict[str, Tensor]]] | None:
        """Which classes of a group stay at several numbers of them, and the change (O, P) of each reader's weight.

        None where the group has no readers with an error of their own, see :func:`readers_of`.
        """
        readers = readers_of(graph, group)
        if readers is None or any(name not in self.moments for name in readers):
            return None
        parts, present = [], []
        for name, (slot, columns) in readers.items():
            weight = at_least_float32(slot.module.weight.detach().flatten(1))  # type: ignore[union-attr, operator]
            taps = weight.shape[1] // len(slot.labels)
            index = (torch.from_numpy(columns)[:, :, None] * taps + torch.arange(taps)).flatten(1)
            parts.append(Reader(self.importance[name][:, None] * weight, self.gram(name), index))
            present.append(weight)
        free = torch.tensor([k for k in range(len(group.classes)) if k not in group.frozen], dtype=torch.long)
        found = removals(parts, free, keeps)
        return {
            keep: (
                alive,
                {
                    name: weight / self.importance[name][:, None] - before
                    for name, weight, before in zip(readers, weights, present)
                },
            )
            for keep, (alive, weights) in found.items()
        }


def _input_moments(
    model: nn.Module, order: Order, layers: Mapping[str, Any], images: list[Tensor]
) -> dict[str, Moments]:
    generator = torch.Generator().manual_seed(0)
    count = sum(len(batch) for batch in images)
    moments = {name: Moments() for name in layers}

    def see(name: str, layer: Any, x: Tensor, out: Tensor) -> None:
        inputs, channels = layer.weight[0].numel(), len(layer.weight)
        places = places_of(out[0].numel() // channels, inputs, count, generator)
        add_samples(moments[name], layer, x, None, places)

    hooks = [after_call(module, partial(see, name)) for name, module in layers.items()]
    with removing(hooks), evaluating(model):
        for batch in images:
            model(batch)
    return moments
