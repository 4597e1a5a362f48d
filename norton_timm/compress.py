"""The pipeline on one screen: model + spec -> compressed model + report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_timm.complexity import Complexity, count_params, is_counted, layer_macs
from norton_timm.cp import CPFactors, cp_decompose
from norton_timm.groups import ChannelGraph
from norton_timm.layers import CPDConv2d
from norton_timm.metadata import Metadata, is_feature_extractor
from norton_timm.plan import plan_pruning, plan_ranks
from norton_timm.report import CompressionReport, LayerReport
from norton_timm.selection import removed_classes
from norton_timm.spec import CompressionSpec
from norton_timm.surgery import remove_channels, replace_module

Step = Callable[[nn.Module, int], None]


def default_input(model: nn.Module) -> Any:
    """One random image of the size that the model's ``pretrained_cfg`` names (else 224); a list for a detector."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, CPDConv2d))), None)
    if first is None:
        raise ValueError(f'got {type(model).__name__} without a 2-d convolution, expected a convolutional network')
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    size = tuple(cfg.get('input_size', (3, 224, 224)))[-2:]
    parameter = next(model.parameters())
    image = torch.randn(first.in_channels, *size, generator=torch.Generator().manual_seed(0))
    image = image.to(parameter.device, parameter.dtype)
    return [image] if isinstance(model, GeneralizedRCNN) else image[None]


def compress(
    model: nn.Module,
    spec: CompressionSpec,
    example_input: Any = None,
    between_shots: Step | None = None,
) -> tuple[nn.Module, CompressionReport]:
    """Compress a convolutional network.

    Args:
        model: any convolutional network; it is not changed.
        spec: what to decompose and prune.
        example_input: what the model's ``forward`` takes; by default one random image of the model's own size.
        between_shots: called with the model and the number of the round after each of ``spec.shots`` rounds but
            the last, to fine-tune in place.

    Returns:
        The compressed copy and a report of every layer.

    Raises:
        ValueError: a spec that does not fit the network, or weights with NaN or infinity (naming the layer).
    """
    if not isinstance(spec, CompressionSpec):
        raise ValueError(f'got a spec of type {type(spec).__name__}, expected a CompressionSpec')
    example_input = default_input(model) if example_input is None else example_input
    _check_finite(model)
    model = copy.deepcopy(model)
    facts = Metadata(model, example_input)
    before = _snapshot(model, example_input)

    ranks, dense_because = plan_ranks(model, spec)
    generator = torch.Generator().manual_seed(spec.seed)
    nmse = _decompose(model, ranks, generator) if spec.order == 'decompose-prune' else {}
    graph = ChannelGraph(model, example_input, freeze_outputs=not is_feature_extractor(model))
    plan = plan_pruning(model, graph, spec)
    widths = [len(group.classes) for group, _, _ in plan]
    for shot in range(1, spec.shots + 1):
        # equal shares of the channels that go in all; the last round reaches the plan exactly
        keeps = [keep + (n - keep) * (spec.shots - shot) // spec.shots for n, (_, keep, _) in zip(widths, plan)]
        kept = _prune(graph, keeps, spec, ranks, generator)
        nmse = {name: values[kept[name]] if name in kept else values for name, values in nmse.items()}
        if between_shots is not None and shot < spec.shots:
            between_shots(model, shot)
    if spec.order == 'prune-decompose':
        nmse = _decompose(model, ranks, generator)
    unpruned_because = {name: why for group, _, why in plan for name in group.names}

    facts.refresh(model, example_input)
    after = _snapshot(model, example_input)
    layers = [
        LayerReport(
            name, type(model.get_submodule(name)).__name__, *_pair(old[0], after[name][0]),
            *_pair(old[1], after[name][1]), *_pair(old[2], after[name][2]), rank=ranks.get(name, 0),
            nmse=float(nmse[name].mean()) if name in nmse else None,
            dense_because=dense_because.get(name, ''), unpruned_because=unpruned_because.get(name, ''),
        )
        for name, old in before.items()
        if name
    ]  # fmt: skip
    report = CompressionReport(
        spec.to_dict(), Complexity(before[''][2], before[''][1]), Complexity(after[''][2], after[''][1]), layers,
        dict(graph.unknown),
    )  # fmt: skip
    return model, report


def reshape(model: nn.Module, spec: CompressionSpec, example_input: Any = None) -> nn.Module:
    """Give a freshly built model the shapes of a spec, in place, without looking at its weights.

    Layers to decompose become CPDConv2d with fresh factors, and every group keeps its first channels.
    """
    example_input = default_input(model) if example_input is None else example_input
    facts = Metadata(model, example_input)
    ranks, _ = plan_ranks(model, spec)
    for name, rank in ranks.items():
        conv: nn.Conv2d = model.get_submodule(name)  # type: ignore[assignment]
        zeros = [conv.weight.new_zeros(conv.out_channels, n, rank) for n in (*conv.kernel_size, conv.weight.shape[1])]
        layer = CPDConv2d.from_conv(conv, rank, factors=CPFactors(*zeros, conv.weight.new_zeros(conv.out_channels)))
        layer.reset_parameters()
        replace_module(model, name, layer)
    graph = ChannelGraph(model, example_input, freeze_outputs=not is_feature_extractor(model))
    gone: set[int] = set()
    for group, keep, _ in plan_pruning(model, graph, spec):
        free = [int(c) for k, c in enumerate(group.classes) if k not in group.frozen]
        gone.update(free[len(free) - (len(group.classes) - keep) :])
    remove_channels(graph, gone)
    facts.refresh(model, example_input)
    return model


def _decompose(model: nn.Module, ranks: dict[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Replace the planned convolutions by their decompositions; NMSE (O,) by layer name."""
    nmse = {}
    for name, rank in ranks.items():
        conv: nn.Conv2d = model.get_submodule(name)  # type: ignore[assignment]
        factors = cp_decompose(conv.weight.detach(), rank, generator=generator)
        replace_module(model, name, CPDConv2d.from_conv(conv, rank, factors=factors))
        nmse[name] = factors.nmse
    return nmse


def _prune(
    graph: ChannelGraph, keeps: list[int], spec: CompressionSpec, ranks: dict[str, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Bring every group to its number of channels; indices of the filters that each layer kept."""
    gone: set[int] = set()
    kept: dict[str, Tensor] = {}
    for group, keep in zip(graph.groups, keeps):
        left = torch.ones(len(group.classes), dtype=torch.bool)
        left[removed_classes(group, keep, spec, ranks, generator)] = False
        gone.update(int(c) for c in group.classes[~left.numpy()])
        for name, places in zip(group.names, group.places):
            kept[name] = left[torch.from_numpy(places)].nonzero().flatten()
    remove_channels(graph, gone)
    return kept


def _snapshot(model: nn.Module, example_input: Any) -> dict[str, tuple[int, int, int]]:
    """(filters, params, MACs) of every counted layer; '' is the whole model."""
    macs = layer_macs(model, example_input)
    found = {'': (0, count_params(model), macs[''])}
    for name, module in model.named_modules():
        if is_counted(module):
            width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            found[name] = (int(width), count_params(module), macs.get(name, 0))  # type: ignore[arg-type]
    return found


def _pair(before: int, after: int) -> tuple[int, int]:
    return before, after


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f'got NaN or infinity in {name}, expected finite weights')
