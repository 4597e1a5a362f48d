"""The channel graph: which layers must keep the same channel indices, because of residual sums, concatenations, ..."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from torch import nn

from norton_timm.graph.channels import ZERO, Slot
from norton_timm.graph.tracer import ChannelTracer
from norton_timm.layers import handler_of


@dataclass(eq=False)
class ChannelGroup:
    """Layers that must keep the same output channels.

    A *channel class* is a set of channels that must all stay or all go: the same index of every layer in a residual
    sum, or the same place in every group of a grouped convolution.

    Attributes:
        members: ``out`` slots of the layers that make the channels, in order of execution.
        places: for each member, the class of each of its filters, as an index into ``classes``.
        classes: union-find roots of the channel classes.
        frozen: class index -> why it must stay.
    """

    members: list[Slot] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)
    classes: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=int))
    frozen: dict[int, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the member layers."""
        return [slot.name for slot in self.members]

    @property
    def why_frozen(self) -> str | None:
        """The reason where no channel of the group may go, else None."""
        return next(iter(self.frozen.values())) if len(self.frozen) == len(self.classes) else None


class ChannelGraph:
    """The channel dependencies of a model, found by running it once (see :mod:`norton_timm.graph.tracer`).

    Args:
        model: any convolutional network; it is run in evaluation mode without gradients and left as it was.
        example_input: what the model's ``forward`` takes.
        freeze_outputs: keep the model's output channels; None keeps them unless they are the features that the
            model's ``feature_info`` describes.

    Attributes:
        groups: coupled groups in order of execution.
        slots: every dimension of every parameter that channels run along.
        frozen: channel class -> why it must stay.
        outside: layers with a weight that a function reads too, by name; they must stay as they are.
        unknown: operation without a rule -> its number of calls; the channels that entered it are frozen.

    Example:
        >>> graph = ChannelGraph(model, torch.rand(1, 3, 224, 224))
        >>> graph.group_of('layer1.0.conv1').names
        ['layer1.0.conv1']
    """

    def __init__(self, model: nn.Module, example_input: Any, freeze_outputs: bool | None = True) -> None:
        tracer = ChannelTracer(model)
        self.outputs = tracer.run(example_input, freeze_outputs)
        self.unknown, self.outside = tracer.unknown, tracer.outside
        self.slots = tracer.slots
        for slot in self.slots:
            slot.labels = np.array([tracer.find(i) if i != ZERO else ZERO for i in slot.labels.tolist()], dtype=int)
        self.frozen = {tracer.find(i): why for i, why in tracer.frozen.items()}
        self.groups = self._make_groups()

    def _make_groups(self) -> list[ChannelGroup]:
        group_of: dict[int, int] = {}  # class -> group number
        members: dict[int, list[Slot]] = {}
        numbers = count()
        for slot in self.slots:
            if slot.kind != 'out':
                continue
            touched = {group_of[c] for c in set(slot.labels.tolist()) if c in group_of}
            number = next(numbers)
            joined = [slot]
            for other in sorted(touched):
                joined = members.pop(other) + joined
            members[number] = sorted(joined, key=self.slots.index)
            for s in joined:
                group_of.update((c, number) for c in s.labels.tolist())
        return [self._make_group(slots) for slots in sorted(members.values(), key=lambda m: self.slots.index(m[0]))]

    def _make_group(self, members: list[Slot]) -> ChannelGroup:
        def carries(slot: Slot) -> bool:
            handler = handler_of(slot.module)
            return handler is not None and handler.carries

        order: dict[int, int] = {}
        # what only carries channels makes none: a group's classes come from its layers first
        for slot in sorted(members, key=carries):
            for c in slot.labels.tolist():
                order.setdefault(c, len(order))
        layers = [s for s in members if not carries(s)]
        return ChannelGroup(
            members=layers,
            places=[np.array([order[c] for c in s.labels.tolist()], dtype=int) for s in layers],
            classes=np.array(list(order), dtype=int),
            frozen={k: self.frozen[c] for c, k in order.items() if c in self.frozen},
        )

    def shrink(self, gone: set[int]) -> None:
        """Remove channel classes that were sliced out of the model."""
        for group in self.groups:
            kept = [k for k, c in enumerate(group.classes.tolist()) if c not in gone]
            new = {old: k for k, old in enumerate(kept)}
            group.places = [np.array([new[p] for p in ps.tolist() if p in new], dtype=int) for ps in group.places]
            group.frozen = {new[k]: why for k, why in group.frozen.items()}
            group.classes = group.classes[kept]

    def follow(self, name: str, layer: nn.Module) -> None:
        """Record that ``layer``, which has the same channels, has replaced the layer of this name."""
        for slot in self.slots:
            if slot.name == name:
                slot.module = layer

    def group_of(self, name: str) -> ChannelGroup | None:
        """The group whose members include the layer of this name."""
        return next((g for g in self.groups if name in g.names), None)
