"""The pipeline on one screen: model + spec -> compressed model + report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.compression.choose import removed_classes
from norton_timm.compression.plan import plan_low_rank, plan_pruning, plan_ranks
from norton_timm.compression.repair import refit
from norton_timm.compression.report import CompressionReport, LayerReport
from norton_timm.compression.spec import CompressionSpec
from norton_timm.graph import ChannelGraph, Metadata, is_feature_extractor, remove_channels
from norton_timm.layers import CPDConv2d, factor_linears, factor_shapes
from norton_timm.profiling import Complexity, LayerCost, layer_costs, make_input
from norton_timm.tensors import CPFactors, cp_decompose
from norton_timm.utils import replace_module

BetweenShots = Callable[[nn.Module, int], None]


def compress(
    model: nn.Module,
    spec: CompressionSpec,
    example_input: Any = None,
    calibration: Iterable[Any] | None = None,
    between_shots: BetweenShots | None = None,
) -> tuple[nn.Module, CompressionReport]:
    """Compress a convolutional network.

    Args:
        model: any convolutional network; it is not changed.
        spec: what to decompose and prune.
        example_input: the one argument of the model's ``forward``, a batch of images or a list of images; by
            default one random image of the model's own size.
        calibration: batches of images of one size (labels, if any, are ignored); each layer is refitted to the dense
            network's outputs on them. They are held in memory: a few hundred images are enough.
        between_shots: called with the model and the number of the round after each of ``spec.shots`` rounds but
            the last, to fine-tune in place.

    Returns:
        The compressed copy and a report of every layer.

    Raises:
        ValueError: a spec that does not fit the network, or weights with NaN or infinity (naming the layer).
    """
    if not isinstance(spec, CompressionSpec):
        raise ValueError(f'got a spec of type {type(spec).__name__}, expected a CompressionSpec')
    example_input = make_input(model, example_input)
    _check_finite(model)
    dense, model = model, copy.deepcopy(model)
    facts = Metadata(model, example_input)
    before = layer_costs(model, example_input)

    ranks, dense_because = plan_ranks(model, spec)
    generator = torch.Generator().manual_seed(spec.seed)
    nmse = _decompose(model, ranks, spec.seed) if spec.order == 'decompose-prune' else {}
    graph = ChannelGraph(model, example_input, freeze_outputs=not is_feature_extractor(model))
    plan = plan_pruning(model, graph, spec)
    kept = _prune(model, graph, [keep for _, keep, _ in plan], spec, ranks, generator, between_shots)
    if spec.order == 'decompose-prune':
        nmse = {name: values[kept[name]] if name in kept else values for name, values in nmse.items()}
    else:
        nmse = _decompose(model, ranks, spec.seed)
    refitted = [] if calibration is None else refit(model, dense, kept, calibration)
    errors = factor_linears(model, plan_low_rank(model, spec))

    facts.refresh(model, example_input)
    after = layer_costs(model, example_input)
    traced = {slot.name for slot in graph.slots}
    unpruned_because = {name: 'did not run on the example input' for name in before if name not in traced}
    unpruned_because.update((name, why) for group, _, why in plan for name in group.names)
    errors.update((name, float(values.mean())) for name, values in nmse.items())
    left = {name: _cost_within(after, name) for name in before}
    layers = [
        LayerReport(
            name,
            type(model.get_submodule(name)).__name__,
            channels=cost.filters,
            kept=left[name].filters,
            params=cost.params,
            params_after=left[name].params,
            macs=cost.macs,
            macs_after=left[name].macs,
            rank=getattr(model.get_submodule(name), 'rank', 0),
            nmse=errors.get(name),
            dense_because=dense_because.get(name, ''),
            unpruned_because=unpruned_because.get(name, ''),
        )
        for name, cost in before.items()
        if name
    ]
    total, rest = (Complexity(costs[''].macs, costs[''].params) for costs in (before, after))
    return model, CompressionReport(spec.to_dict(), total, rest, layers, dict(graph.unknown), refitted)


def _cost_within(costs: dict[str, LayerCost], name: str) -> LayerCost:
    """Cost of a layer, or of the layers that have taken its place."""
    parts = [cost for n, cost in costs.items() if n == name or (name and n.startswith(f'{name}.'))]
    return LayerCost(parts[-1].filters, sum(c.params for c in parts), sum(c.macs for c in parts))


def reshape(model: nn.Module, spec: CompressionSpec, example_input: Any = None) -> nn.Module:
    """Give a freshly built model the shapes of a spec, in place, without looking at its weights.

    Layers to decompose become CPDConv2d with fresh factors, linear layers of low rank likewise two fresh ones, and
    every group keeps its first channels.
    """
    example_input = make_input(model, example_input)
    facts = Metadata(model, example_input)
    ranks, _ = plan_ranks(model, spec)
    for name, rank in ranks.items():
        conv: nn.Conv2d = model.get_submodule(name)
        a, b, c = (conv.weight.new_zeros(conv.out_channels, n, rank) for n in (*conv.kernel_size, conv.weight.shape[1]))
        layer = CPDConv2d.from_conv(conv, rank, factors=CPFactors(a, b, c, conv.weight.new_zeros(conv.out_channels)))
        layer.reset_parameters()
        replace_module(model, name, layer)
    graph = ChannelGraph(model, example_input, freeze_outputs=not is_feature_extractor(model))
    gone: set[int] = set()
    for group, keep, _ in plan_pruning(model, graph, spec):
        free = [int(c) for k, c in enumerate(group.classes) if k not in group.frozen]
        gone.update(free[len(free) - (len(group.classes) - keep) :])
    remove_channels(graph, gone)
    factor_shapes(model, plan_low_rank(model, spec))
    facts.refresh(model, example_input)
    return model


def _decompose(model: nn.Module, ranks: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Replace the planned convolutions by their decompositions; NMSE (O,) by layer name.

    Every layer starts from the seed anew, so that its factors do not depend on what else is decomposed.
    """
    nmse = {}
    for name, rank in ranks.items():
        conv: nn.Conv2d = model.get_submodule(name)
        factors = cp_decompose(conv.weight.detach(), rank, generator=torch.Generator().manual_seed(seed))
        replace_module(model, name, CPDConv2d.from_conv(conv, rank, factors=factors))
        nmse[name] = factors.nmse
    return nmse


def _prune(
    model: nn.Module,
    graph: ChannelGraph,
    targets: list[int],
    spec: CompressionSpec,
    ranks: dict[str, int],
    generator: torch.Generator,
    between_shots: BetweenShots | None,
) -> dict[str, Tensor]:
    """Bring every group to its number of channels in ``spec.shots`` rounds.

    Returns:
        For each layer of a group, the indices of the filters it kept.
    """
    widths = [len(group.classes) for group in graph.groups]
    kept = {name: torch.arange(len(p)) for g in graph.groups for name, p in zip(g.names, g.places)}
    for shot in range(1, spec.shots + 1):
        gone: set[int] = set()
        for group, full, target in zip(graph.groups, widths, targets):
            # equal shares of the channels that go in all; the last round reaches the target exactly
            keep = target + (full - target) * (spec.shots - shot) // spec.shots
            left = torch.ones(len(group.classes), dtype=torch.bool)
            left[removed_classes(group, keep, spec, ranks, generator)] = False
            gone.update(int(c) for c in group.classes[~left.numpy()])
            for name, places in zip(group.names, group.places):
                kept[name] = kept[name][left[torch.from_numpy(places)]]
        remove_channels(graph, gone)
        if between_shots is not None and shot < spec.shots:
            between_shots(model, shot)
    return kept


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f'got NaN or infinity in {name}, expected finite weights')
