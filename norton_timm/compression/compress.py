"""The pipeline on one screen: a network and a spec become a compressed network and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.compression.choose import removed_classes
from norton_timm.compression.fitting import refit
from norton_timm.compression.observe import observe
from norton_timm.compression.output_error import Activations, readers_of
from norton_timm.compression.plan import Plan, low_rank_layers, make_plan, scope_prefix
from norton_timm.compression.repair import images_of
from norton_timm.compression.report import CompressionReport, make_report
from norton_timm.compression.spec import OUTPUT_ERROR, CompressionSpec
from norton_timm.graph import ChannelGraph, ChannelGroup, Metadata, remove_channels
from norton_timm.layers import CPDConv2d, can_factor, drop_blocks, factor_layers, factor_shapes
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
    activations: Activations | None = None,
    progress: bool = False,
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
        activations: what the dense network's layers read on the calibration images, if it was measured before.
        progress: show a bar of the repair.

    Returns:
        The compressed copy and a report of every layer.

    Raises:
        ValueError: a spec that does not fit the network, weights with NaN or infinity (naming the layer), or the
            criterion ``output_error`` without calibration.

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
    leave_out(model, spec, example_input)
    before = layer_costs(dense, example_input)
    graph = channel_graph(model, example_input)
    plan = make_plan(model, graph, spec)

    images = None if calibration is None else list(images_of(calibration, model))
    if images is not None and activations is None:
        activations = Activations(model, example_input, images, _measured(graph, plan))
    aims: dict[str, Tensor] = {}
    kept, nmse = run_plan(model, graph, plan, between_shots, activations, aims)
    low_rank = low_rank_layers(model, graph, spec)
    aims.update((name, model.get_submodule(name).weight.detach().flatten(1)) for name in low_rank)  # type: ignore[union-attr, operator]
    errors = factor_layers(model, low_rank)
    refitted = []
    if images is not None and activations is not None:
        refitted = refit(model, dense, kept, images, aims=aims, importance=activations.importance, progress=progress)

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
    leave_out(model, spec, example_input)
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


def leave_out(model: nn.Module, spec: CompressionSpec, example_input: Any) -> None:
    """Replace the blocks that a spec leaves out by their shortcuts, in place.

    Raises:
        ValueError: a name that is no residual block whose shortcut passes its input as it is.
    """
    if not spec.drop:
        return
    prefix = scope_prefix(model, spec)
    blocks = observe(model, example_input).blocks
    for name in spec.drop:
        if prefix + name not in blocks:
            known = [b[len(prefix) :] for b in blocks if b.startswith(prefix)]
            told = ', '.join(known[:3]) or 'a network that has such blocks'
            raise ValueError(f'drop: got {name!r}, expected blocks with an identity shortcut, such as {told}')
    drop_blocks(model, [prefix + name for name in spec.drop])


def channel_graph(model: nn.Module, example_input: Any) -> ChannelGraph:
    """The channel graph of a network; outputs are kept, unless they are features that the network describes."""
    return ChannelGraph(model, example_input, freeze_outputs=None)


def run_plan(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    between_shots: BetweenShots | None = None,
    activations: Activations | None = None,
    aims: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Decompose and prune a network as planned, in place.

    Args:
        model: the dense network.
        graph: its channel graph, which follows the changes.
        plan: made of both.
        between_shots: see :func:`compress`.
        activations: of the dense network, for the criterion ``output_error``, which prunes first in either order.
        aims: gets the weight (O, P) of each layer that was pruned first and then decomposed, as it was in between.

    Returns:
        Two dicts by layer name: the indices of the filters that each layer of a group kept, and the NMSE of the kept
        filters of each decomposed layer.
    """
    first = plan.spec.order == 'decompose-prune' and plan.spec.distance != OUTPUT_ERROR
    nmse = _decompose(model, graph, plan) if first else {}
    kept = _prune(model, graph, plan, between_shots, activations)
    if first:
        return kept, {name: values[kept[name]] if name in kept else values for name, values in nmse.items()}
    if aims is not None:
        aims.update((name, model.get_submodule(name).weight.detach().flatten(1)) for name in plan.ranks)  # type: ignore[union-attr, operator]
    return kept, _decompose(model, graph, plan)


def _measured(graph: ChannelGraph, plan: Plan) -> set[str]:
    """Layers whose inputs and gradients the plan needs: low-rank ones, and readers of channels that may leave."""
    names = {name for name, module in graph_layers(graph).items() if can_factor(module) and plan.spec.low_rank}
    if plan.spec.distance == OUTPUT_ERROR:
        for group, keep in zip(graph.groups, plan.keep):
            if keep < len(group.classes):
                names.update(readers_of(graph, group) or ())
    return names


def graph_layers(graph: ChannelGraph) -> dict[str, nn.Module]:
    """The layers of a graph that make channels, by name."""
    return {slot.name: slot.module for slot in graph.slots if slot.kind == 'out'}


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


def _prune(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    between_shots: BetweenShots | None,
    activations: Activations | None,
) -> dict[str, Tensor]:
    """Bring every group to its number of channels in ``spec.shots`` rounds; the filters kept, by layer name."""
    spec, generator = plan.spec, torch.Generator().manual_seed(plan.spec.seed)
    widths = [len(group.classes) for group in graph.groups]
    makers = {slot.name: slot.labels for slot in graph.slots if slot.kind in ('out', 'depthwise')}
    all_gone: set[int] = set()
    for shot in range(1, spec.shots + 1):
        gone: set[int] = set()
        for group, full, target in zip(graph.groups, widths, plan.keep):
            # equal shares of the channels that go in all; the last round reaches the target exactly
            keep = target + (full - target) * (spec.shots - shot) // spec.shots
            left = torch.ones(len(group.classes), dtype=torch.bool)
            if spec.distance == OUTPUT_ERROR:
                left[_removed_by_error(model, graph, group, keep, activations)] = False
            else:
                left[removed_classes(group, keep, spec, plan.ranks, generator)] = False
            gone.update(int(c) for c in group.classes[~left.numpy()])
        remove_channels(graph, gone)
        all_gone |= gone
        if between_shots is not None and shot < spec.shots:
            between_shots(model, shot)
    return {
        name: torch.tensor([k for k, label in enumerate(labels.tolist()) if label not in all_gone])
        for name, labels in makers.items()
    }


def _removed_by_error(
    model: nn.Module, graph: ChannelGraph, group: ChannelGroup, keep: int, activations: Activations | None
) -> Tensor:
    """Classes that leave by the criterion ``output_error``; the layers that read the others make up for them."""
    gone = torch.ones(len(group.classes), dtype=torch.bool)
    if keep >= len(gone):
        return ~gone
    if activations is None:
        raise ValueError(
            'criterion: got output_error without images, expected compress(..., calibration=BATCHES), or --calibration '
            'FOLDER in the tools'
        )
    found = activations.removals(graph, group, [keep])
    assert found is not None  # the plan keeps all channels of other groups
    alive, changes = found[keep]
    for name, change in changes.items():
        layer = model.get_submodule(name)
        layer.weight.data += change.view_as(layer.weight)  # type: ignore[union-attr, operator, arg-type]
    gone[alive] = False
    return gone
