"""The report of a compression: what was done to each layer, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from norton_timm.compression.plan import Plan
from norton_timm.graph import ChannelGraph
from norton_timm.layers import DroppedBlock, present_at
from norton_timm.profiling import Complexity, LayerCost


@dataclass
class LayerReport:
    """One convolution or linear layer.

    Attributes:
        name: dotted name in the model.
        kind: class name of the layer after compression.
        channels, kept: filters before and after.
        params, params_after: parameters of the layer, bias included.
        macs, macs_after: multiply-accumulates for the example input.
        rank: rank of its decomposition, 0 where the layer is dense.
        nmse: mean over the kept filters of the squared relative error of the decomposition; None where dense.
        dense_because, unpruned_because: why the layer was left alone; empty where it was not.
    """

    name: str
    kind: str
    channels: int
    kept: int
    params: int
    params_after: int
    macs: int
    macs_after: int
    rank: int = 0
    nmse: float | None = None
    dense_because: str = ''
    unpruned_because: str = ''


@dataclass
class CompressionReport:
    """Per-layer and total figures of one compression.

    Attributes:
        spec: the recipe, as :meth:`CompressionSpec.to_dict` gives it.
        before, after: MACs and parameters of the whole model.
        layers: every convolution and linear layer, in the model's order.
        unknown_operations: operations the channel tracer has no rule for, and how often it met them; the
            channels that enter them were kept.
        refitted: layers that were refitted to the dense network's outputs on calibration images.
    """

    spec: dict[str, Any]
    before: Complexity
    after: Complexity
    layers: list[LayerReport] = field(default_factory=list)
    unknown_operations: dict[str, int] = field(default_factory=dict)
    refitted: list[str] = field(default_factory=list)

    @property
    def nmse(self) -> float | None:
        """Mean NMSE over the decomposed layers; None where there are none."""
        values = [layer.nmse for layer in self.layers if layer.nmse is not None]
        return sum(values) / len(values) if values else None

    @property
    def untouched(self) -> dict[str, str]:
        """Layers that were neither decomposed nor pruned, with the reason."""
        return {
            layer.name: layer.unpruned_because or layer.dense_because
            for layer in self.layers
            if layer.rank == 0 and layer.kept == layer.channels and (layer.unpruned_because or layer.dense_because)
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = dataclasses.asdict(self)
        values['before'], values['after'] = self.before._asdict(), self.after._asdict()
        values['nmse'] = self.nmse
        return values

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f'{"layer":{width}}  {"filters":>11}  rank   nmse  {"params":>21}  {"MMACs":>17}  left alone because']
        for layer in self.layers:
            nmse = f'{layer.nmse:6.3f}' if layer.nmse is not None else '     -'
            reasons = '' if layer.rank else layer.dense_because, layer.unpruned_because
            lines.append(
                f'{layer.name:{width}}  {layer.channels:>5}>{layer.kept:<5}  {layer.rank or "-":>4} {nmse}  '
                f'{layer.params:>10}>{layer.params_after:<10}  '
                f'{layer.macs / 1e6:>8.1f}>{layer.macs_after / 1e6:<8.1f}  '
                + '; '.join(dict.fromkeys(filter(None, reasons)))
            )
        macs, params = self.before.macs, self.before.params
        lines.append(
            f'total: {params:,} -> {self.after.params:,} parameters ({_percent(params, self.after.params)}), '
            f'{macs:,} -> {self.after.macs:,} MACs ({_percent(macs, self.after.macs)})'
        )
        if self.refitted:
            lines.append(f'refitted on calibration images: {len(self.refitted)} layers')
        if self.unknown_operations:
            told = ', '.join(f'{name} ({n})' for name, n in sorted(self.unknown_operations.items()))
            lines.append(f'channels kept because they enter operations without a rule: {told}')
        return '\n'.join(lines)


def make_report(
    model: nn.Module,
    plan: Plan,
    graph: ChannelGraph,
    before: Mapping[str, LayerCost],
    after: Mapping[str, LayerCost],
    errors: Mapping[str, float],
    refitted: Sequence[str] = (),
) -> CompressionReport:
    """The report of one compression.

    Args:
        model: the compressed network.
        plan: what was planned.
        graph: channel graph of the network.
        before: cost of every layer of the dense network, see `layer_costs`.
        after: the same of the compressed one.
        errors: squared relative error of each factored layer's weight, by name.
        refitted: names of the layers that were fitted to calibration images.
    """
    traced = {slot.name for slot in graph.slots}
    unpruned = {name: 'did not run on the example input' for name in before if name not in traced}
    unpruned.update(plan.unpruned_because)
    layers = []
    for name, cost in before.items():
        if not name:
            continue
        layer, left = present_at(model, name), _cost_within(after, name)
        layers.append(LayerReport(
            name, type(layer).__name__, channels=cost.filters, kept=left.filters, params=cost.params,
            params_after=left.params, macs=cost.macs, macs_after=left.macs, rank=getattr(layer, 'rank', 0),
            nmse=errors.get(name), dense_because=plan.dense_because.get(name, ''),
            unpruned_because='' if isinstance(layer, DroppedBlock) else unpruned.get(name, ''),
        ))  # fmt: skip
    total, rest = (Complexity(costs[''].macs, costs[''].params) for costs in (before, after))
    return CompressionReport(plan.spec.to_dict(), total, rest, layers, dict(graph.unknown), list(refitted))


def _cost_within(costs: Mapping[str, LayerCost], name: str) -> LayerCost:
    """Cost of a layer, or of the layers that have taken its place."""
    parts = [cost for n, cost in costs.items() if n == name or n.startswith(f'{name}.')]
    if not parts:  # of a block that was left out
        return LayerCost(0, 0, 0)
    return LayerCost(parts[-1].filters, sum(c.params for c in parts), sum(c.macs for c in parts))


def _percent(before: int, after: int) -> str:
    return f'{100 * (after / before - 1):+.1f} %' if before else 'n/a'
