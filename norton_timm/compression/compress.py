"""The pipeline on one screen: a network and a spec become a compressed network and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.compression.choose import removed_classes
from norton_timm.compression.plan import Plan, low_rank_layers, make_plan
from norton_timm.compression.repair import refit
from norton_timm.compression.report import CompressionReport, make_report
from norton_timm.compression.spec import CompressionSpec
from norton_timm.graph import ChannelGraph, Metadata, remove_channels
from norton_timm.layers import CPDConv2d, factor_linears, factor_shapes
from norton_timm.profiling import layer_costs, make_input
from norton_timm.tensors import cp_decompose
from norton_timm.utils import copy_of, not_finite, replace_module, uncompiled

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
        example_input: the one argument of the model's ``forward``, a batch of images or a list of images; by default
            one random image of the model's own size.
        calibration: batches of images of one size (labels, if any, are ignored); each layer is refitted to the dense
            network's outputs on them. They are held in memory: a few hundred images are enough.
        between_shots: called with the model and the number of the round after each of ``spec.shots`` rounds but
            the last, to fine-tune in place.

    Returns:
        The compressed copy and a report of every layer.

    Raises:
        ValueError: a spec that does not fit the network, or weights with NaN or infinity (naming the layer).

    Example:
        >>> model = timm.create_model('resnet50', pretrained=True)
        >>> small, report = compress(model, CompressionSpec(rank=2, rates=0.3))
        >>> print(report)
    """
    if not isinstance(spec, CompressionSpec):
        raise ValueError(f'got a spec of type {type(spec).__name__}, expected a CompressionSpec')
    model = uncompiled(model)
    example_input = make_input(model, example_input)
    bad = not_finite(model.state_dict())
    if bad is not None:
        raise ValueError(f'got NaN or infinity in {bad}, expected finite weights')
    dense, model = model, copy_of(model)
    facts = Metadata(model, example_input)
    before = layer_costs(model, example_input)
    graph = channel_graph(model, example_input)
    plan = make_plan(model, graph, spec)

    kept, nmse = run_plan(model, graph, plan, between_shots)
    refitted = [] if calibration is None else refit(model, dense, kept, calibration)
    errors = factor_linears(model, low_rank_layers(model, graph, spec))

    facts.refresh(model, example_input)
    errors.update((name, float(values.mean())) for name, values in nmse.items())
    after = layer_costs(model, example_input)
    return model, make_report(model, plan, graph, before, after, errors, refitted)


def reshape(model: nn.Module, spec: CompressionSpec, example_input: Any = None) -> nn.Module:
    """Give a freshly built model the shapes of a spec, in place, without looking at its weights.

    Layers to decompose become CPDConv2d with random factors, low-rank linear layers become two random ones, and every
    group keeps its first channels.

    Example:
        >>> model = reshape(timm.create_model('resnet50'), CompressionSpec(rank=2, rates=0.3))
    """
    example_input = make_input(model, example_input)
    facts = Metadata(model, example_input)
    graph = channel_graph(model, example_input)
    plan = make_plan(model, graph, spec)
    for name, rank in plan.ranks.items():
        _replace(model, graph, name, CPDConv2d.like(model.get_submodule(name), rank))  # type: ignore[arg-type]
    gone: set[int] = set()
    for group, keep in zip(graph.groups, plan.keep):
        free = [int(c) for k, c in enumerate(group.classes) if k not in group.frozen]
        gone.update(free[len(free) - (len(group.classes) - keep) :])
    remove_channels(graph, gone)
    factor_shapes(model, low_rank_layers(model, graph, spec))
    facts.refresh(model, example_input)
    return model


def channel_graph(model: nn.Module, example_input: Any) -> ChannelGraph:
    """The channel graph of a network; outputs are kept, unless they are features that the network describes."""
    return ChannelGraph(model, example_input, freeze_outputs=None)


def run_plan(
    model: nn.Module, graph: ChannelGraph, plan: Plan, between_shots: BetweenShots | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Decompose and prune a network as planned, in place.

    Args:
        model: the dense network.
        graph: its channel graph, which follows the changes.
        plan: made of both.
        between_shots: see :func:`compress`.

    Returns:
        Two dicts by layer name: the indices of the filters that each layer of a group kept, and the NMSE of the kept
        filters of each decomposed layer.
    """
    first = plan.spec.order == 'decompose-prune'
    nmse = _decompose(model, graph, plan) if first else {}
    kept = _prune(model, graph, plan, between_shots)
    if first:
        return kept, {name: values[kept[name]] if name in kept else values for name, values in nmse.items()}
    return kept, _decompose(model, graph, plan)


def _replace(model: nn.Module, graph: ChannelGraph, name: str, layer: nn.Module) -> None:
    replace_module(model, name, layer)
    graph.follow(name, layer)


def _decompose(model: nn.Module, graph: ChannelGraph, plan: Plan) -> dict[str, Tensor]:
    """Replace the planned convolutions by their decompositions; NMSE (O,) by layer name.

    Every layer starts from the seed anew, so that its factors do not depend on what else is decomposed.
    """
    nmse = {}
    for name, rank in plan.ranks.items():
        conv: nn.Conv2d = model.get_submodule(name)  # type: ignore[assignment]
        generator = torch.Generator().manual_seed(plan.spec.seed)
        factors = cp_decompose(conv.weight.detach(), rank, generator=generator)
        _replace(model, graph, name, CPDConv2d.from_conv(conv, rank, factors=factors))
        nmse[name] = factors.nmse
    return nmse


def _prune(model: nn.Module, graph: ChannelGraph, plan: Plan, between_shots: BetweenShots | None) -> dict[str, Tensor]:
    """Bring every group to its number of channels in ``spec.shots`` rounds; the filters kept, by layer name."""
    spec, generator = plan.spec, torch.Generator().manual_seed(plan.spec.seed)
    widths = [len(group.classes) for group in graph.groups]
    kept = {name: torch.arange(len(p)) for g in graph.groups for name, p in zip(g.names, g.places)}
    for shot in range(1, spec.shots + 1):
        gone: set[int] = set()
        for group, full, target in zip(graph.groups, widths, plan.keep):
            # equal shares of the channels that go in all; the last round reaches the target exactly
            keep = target + (full - target) * (spec.shots - shot) // spec.shots
            left = torch.ones(len(group.classes), dtype=torch.bool)
            left[removed_classes(group, keep, spec, plan.ranks, generator)] = False
            gone.update(int(c) for c in group.classes[~left.numpy()])
            for name, places in zip(group.names, group.places):
                kept[name] = kept[name][left[torch.from_numpy(places)]]
        remove_channels(graph, gone)
        if between_shots is not None and shot < spec.shots:
            between_shots(model, shot)
    return kept
