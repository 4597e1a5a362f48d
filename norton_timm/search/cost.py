"""The cost of a candidate, computed from shapes that are traced once, without a forward pass per candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from norton_timm.graph import ChannelGraph, Slot
from norton_timm.layers import LayerHandler, Positions, handler_of, prefers_merged
from norton_timm.profiling import count_params, layer_macs
from norton_timm.utils import after_call, evaluating, removing

COSTS = ('macs', 'params')


def positions_of(model: nn.Module, example_input: Any) -> dict[str, Positions]:
    """Positions of every convolution and linear layer that one forward pass calls."""
    found: dict[str, Positions] = {}
    hooks = []
    for name, module in model.named_modules():
        handler = handler_of(module)
        if handler is None or not handler.counted:
            continue

        def record(_: nn.Module, x: Tensor, out: Tensor, name: str = name, handler: LayerHandler = handler) -> None:
            handler.note_positions(found.setdefault(name, Positions()), x, out)

        hooks.append(after_call(module, record))
    with removing(hooks), evaluating(model):
        model(example_input)
    return found


@dataclass
class CostTerm:
    """One cost term: ``out * (alpha * in + beta)`` with channel counts that depend on what the groups keep."""

    name: str
    module: nn.Module
    reads: Slot | None
    makes: Slot


class CostModel:
    """MACs and parameters of any choice of kept channels and ranks.

    Each layer costs ``out * (alpha * in + beta)``, where ``in`` and ``out`` are linear in the numbers of channel
    classes that the coupled groups keep. This is exact where every class of a group appears equally often in a
    layer: always, except for channels that are split or sliced at places fixed in code.

    Args:
        model: the dense network.
        graph: its channel graph.
        example_input: what its ``forward`` takes.

    Attributes:
        rows: the cost terms; the first ``layers`` of them are convolutions and linear layers.
        reads, makes: (rows, groups) channels per kept class of each group.
        fixed_in, fixed_out: (rows,) channels that no group controls.
        widths: (groups,) classes of each group in the dense model.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, example_input: Any) -> None:
        self.positions = positions_of(model, example_input)
        self.widths = np.array([len(g.classes) for g in graph.groups], dtype=float)
        self.rows = self._rows(graph)
        group_of = {int(c): k for k, group in enumerate(graph.groups) for c in group.classes}
        shape = (len(self.rows), len(graph.groups))
        self.reads, self.makes = np.zeros(shape), np.zeros(shape)
        self.fixed_in, self.fixed_out = np.zeros(shape[0]), np.zeros(shape[0])
        for k, row in enumerate(self.rows):
            self.fixed_out[k] = self._count(row.makes, group_of, self.makes[k])
            if row.reads is not None:
                self.fixed_in[k] = self._count(row.reads, group_of, self.reads[k])
        self.index = {row.name: k for k, row in enumerate(self.rows) if row.name in self.positions}
        macs = layer_macs(model, example_input)['']
        dense = {'macs': macs, 'params': count_params(model)}
        self.constant = {kind: 0.0 for kind in COSTS}
        for kind in COSTS:
            self.constant[kind] = dense[kind] - self.total(kind, self.widths, {})
        self.dense = dense
        self.milliseconds: dict[str, float] = {}

    @staticmethod
    def _rows(graph: ChannelGraph) -> list[CostTerm]:
        reads = {slot.name: slot for slot in graph.slots if slot.kind == 'in'}
        rows = []
        for slot in graph.slots:
            handler = handler_of(slot.module)
            if slot.kind == 'in' or (handler is not None and handler.carries):
                continue
            rows.append(CostTerm(slot.name, slot.module, reads.get(slot.name) if slot.kind == 'out' else None, slot))
        return rows

    def _count(self, slot: Slot, group_of: Mapping[int, int], per_class: np.ndarray) -> int:
        """Channels of the slot per kept class of each group, written to ``per_class``; returns the others."""
        fixed = 0
        for label in slot.labels.tolist():
            if label in group_of:
                per_class[group_of[label]] += 1
            else:
                fixed += 1
        per_class /= self.widths
        return fixed

    def coefficients(self, row: int, kind: str, rank: int) -> tuple[float, float]:
        """(alpha, beta) of one term at a rank (0: dense)."""
        entry = self.rows[row]
        module, slot = entry.module, entry.makes
        if kind == 'ms':
            return self._milliseconds(row, rank)
        if slot.kind == 'channel':
            affine = sum(p.shape[0] == len(slot.labels) for p in module.parameters(recurse=False))
            return 0.0, float(affine) if kind == 'params' else 0.0
        if slot.kind == 'param':
            return 0.0, float(kind == 'params')
        handler = handler_of(module)
        if handler is None:
            return 0.0, 0.0
        # one position each counts the numbers that a filter stores
        at = Positions(1, 1, 1) if kind == 'params' else self.positions.get(entry.name, Positions())
        per_input, rest = handler.filter_cost(module, at, rank)
        rest += float(kind == 'params' and getattr(module, 'bias', None) is not None)
        if entry.reads is None:  # depthwise: each filter reads one channel
            return 0.0, per_input + rest
        return per_input / handler.groups(module), rest

    def low_rank_coefficients(self, row: int, kind: str, rank: int) -> tuple[float, float]:
        """(beta, gamma) of a convolution of low rank, which costs ``beta * out + gamma * in``."""
        module: Any = self.rows[row].module
        dense, _ = self.coefficients(row, kind, 0)  # of one pair of channels
        bias = float(kind == 'params' and module.bias is not None)
        return dense * rank / float(np.prod(module.kernel_size)) + bias, dense * rank

    def set_latency(self, layers: Mapping[str, float], whole: float) -> None:
        """Add the cost kind ``ms`` from measured milliseconds of the dense layers and of the whole model."""
        self.milliseconds = dict(layers)
        self.constant['ms'] = 0.0
        self.constant['ms'] = max(whole - self.total('ms', self.widths, {}), 0.0)

    def _milliseconds(self, row: int, rank: int) -> tuple[float, float]:
        """Time in proportion to the work of the form that ``form='auto'`` runs, see :class:`CPDConv2d`."""
        entry = self.rows[row]
        spent = self.milliseconds.get(entry.name, 0.0) if self.index.get(entry.name) == row else 0.0
        n_in, n_out = (float(n[row]) for n in self.channels(self.widths))
        if entry.reads is None:
            return 0.0, spent / n_out
        if rank:
            module = entry.module
            kernel = float(np.prod(module.kernel_size))  # type: ignore[arg-type]
            stride = float(np.prod(module.stride))  # type: ignore[arg-type]
            fan_in = n_in / module.groups  # type: ignore[operator]
            if prefers_merged(rank, fan_in, kernel, stride):
                return spent * rank * stride / (n_in * n_out * kernel), spent * 4 * rank / (n_out * fan_in)
        return spent / (n_in * n_out), 0.0

    def channels(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Input and output channels (rows,) of every term."""
        return self.fixed_in + self.reads @ keep, self.fixed_out + self.makes @ keep

    def total(self, kind: str, keep: np.ndarray, ranks: Mapping[str, int]) -> float:
        """Cost of the whole model.

        Args:
            kind: ``macs``, ``params``, or ``ms`` after :meth:`set_latency`.
            keep: (groups,) channel classes that each group keeps.
            ranks: rank by layer name; layers that are not named stay dense.
        """
        n_in, n_out = self.channels(keep)
        terms = [self.coefficients(k, kind, ranks.get(row.name, 0)) for k, row in enumerate(self.rows)]
        alpha, beta = np.array(terms).reshape(-1, 2).T
        return float((n_out * (alpha * n_in + beta)).sum() + self.constant[kind])
