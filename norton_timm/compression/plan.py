"""The plan: everything that is decided about a network before it is changed.

A plan is made once, from the dense network, its channel graph and a spec. A spec with the scope `backbone` names the
layers within the part called `backbone`; `scope_prefix` is the path of that part.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from norton_timm.compression.output_error import readers_of
from norton_timm.compression.rates import layout_of, widths_of
from norton_timm.compression.spec import OUTPUT_ERROR, CompressionSpec
from norton_timm.graph import ChannelGraph, ChannelGroup
from norton_timm.layers import (
    CPDConv2d,
    DroppedBlock,
    can_factor,
    conv_padding,
    full_rank,
    has_computed_weight,
    low_rank_parts,
)
from norton_timm.utils import tied_modules


@dataclass(frozen=True)
class Plan:
    """What a spec means for one network.

    Attributes:
        spec: the recipe.
        ranks: CPD rank by name of every layer to decompose.
        keep: channel classes that each group of the graph keeps, in the graph's order.
        dense_because: why each other convolution stays dense, by name.
        unpruned_because: why each layer keeps all its channels, by name; empty where it does not.
    """

    spec: CompressionSpec
    ranks: dict[str, int] = field(default_factory=dict)
    keep: list[int] = field(default_factory=list)
    dense_because: dict[str, str] = field(default_factory=dict)
    unpruned_because: dict[str, str] = field(default_factory=dict)


def make_plan(model: nn.Module, graph: ChannelGraph, spec: CompressionSpec) -> Plan:
    """Decide the rank of every layer and the number of channels of every group.

    Args:
        model: the dense network; it is not changed.
        graph: its channel graph.
        spec: the recipe.

    Raises:
        ValueError: a pattern that matches no layer, or rates that do not fit the network.

    Example:
        >>> graph = ChannelGraph(model, torch.rand(1, 3, 224, 224))
        >>> plan = make_plan(model, graph, CompressionSpec(rank=2, rates=0.3))
        >>> plan.ranks['layer1.0.conv2']
        2
    """
    ranks, dense_because = _ranks(model, graph, spec)
    keep, unpruned_because = _widths(model, graph, spec)
    return Plan(spec, ranks, keep, dense_because, unpruned_because)


def scope_prefix(model: nn.Module, spec: CompressionSpec) -> str:
    """What precedes the names in ``spec``: the path of the part called ``backbone``, or nothing for the whole model."""
    if spec.scope != 'backbone' or not isinstance(getattr(model, 'backbone', None), nn.Module):
        return ''
    return 'backbone.body.' if isinstance(getattr(model.backbone, 'body', None), nn.Module) else 'backbone.'


def _scoped(model: nn.Module, spec: CompressionSpec) -> tuple[nn.Module, str]:
    prefix = scope_prefix(model, spec)
    return model.get_submodule(prefix[:-1]), prefix


def _ranks(model: nn.Module, graph: ChannelGraph, spec: CompressionSpec) -> tuple[dict[str, int], dict[str, str]]:
    """CPD rank of every layer to decompose, and for every other convolution the reason why it stays dense."""
    ranks: dict[str, int] = {}
    kinds = (nn.modules.conv._ConvNd, CPDConv2d)
    net, prefix = _scoped(model, spec)
    reasons = {n: 'outside the backbone' for n, m in model.named_modules() if isinstance(m, kinds)} if prefix else {}
    convs = {name: m for name, m in net.named_modules() if isinstance(m, kinds)}
    tied, factored = tied_modules(model), low_rank_parts(model)
    if spec.method == 'coring':
        return {}, {**reasons, **{prefix + name: 'coring keeps convolutions dense' for name in convs}}
    if isinstance(spec.rank, Mapping):
        _check_patterns('rank', spec.rank, list(convs))
    for number, (name, conv) in enumerate(convs.items()):
        rank = spec.rank_of(name)
        why: str | None = 'shares parameters with another layer' if conv in tied else None
        if prefix + name in graph.outside and not has_computed_weight(conv):
            why = 'its weight is used outside of the layer as well'
        if conv in factored:
            why = 'of low rank already'
        if why is None and _is_low_rank(spec, name, conv):
            why = 'of low rank instead'
        why = why or _why_dense(conv, rank, uniform=not isinstance(spec.rank, Mapping))
        if not spec.touches(name):
            why = 'excluded by the spec'
        elif number == 0 and 'first' in spec.protect and not isinstance(spec.rank, Mapping):
            why = 'protected: first layer'
        if why:
            reasons[prefix + name] = why
        else:
            ranks[prefix + name] = rank
            reasons.pop(prefix + name, None)
    return ranks, reasons


def low_rank_layers(model: nn.Module, graph: ChannelGraph, spec: CompressionSpec) -> dict[str, int]:
    """Rank of every layer to factor, for its present width.

    Raises:
        ValueError: a pattern that matches no layer that can be factored, or a rank that the layer cannot have.
    """
    if not spec.low_rank:
        return {}
    net, prefix = _scoped(model, spec)
    apart = tied_modules(model) | low_rank_parts(model)
    layers = {
        name: m for name, m in net.named_modules()
        if can_factor(m) and spec.touches(name) and m not in apart and not has_computed_weight(m)
        and prefix + name not in graph.outside
    }  # fmt: skip
    _check_patterns('low_rank', spec.low_rank, list(layers))
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        rank = next((r for p, r in spec.low_rank.items() if fnmatch.fnmatchcase(name, p)), None)
        if rank is None:
            continue
        full = full_rank(layer)
        if rank > full:
            raise ValueError(f'low_rank: got {rank} for {name}, expected at most {full}, its full rank')
        ranks[prefix + name] = max(1, round(rank * full)) if isinstance(rank, float) else rank
    return ranks


def _is_low_rank(spec: CompressionSpec, name: str, layer: nn.Module) -> bool:
    return can_factor(layer) and any(fnmatch.fnmatchcase(name, p) for p in spec.low_rank)


def _why_dense(conv: nn.Module, rank: int, uniform: bool) -> str | None:
    if isinstance(conv, CPDConv2d):
        return 'decomposed already'
    if rank == 0:
        return 'rank 0'
    if has_computed_weight(conv):
        return 'its weight is computed by a hook'
    if type(conv) is not nn.Conv2d:
        return f'{type(conv).__name__} is not a plain nn.Conv2d'
    kh, kw = conv.kernel_size
    if kh * kw == 1:
        return '1x1 kernel, nothing to decompose'
    if conv.padding_mode != 'zeros':
        return f'padding mode {conv.padding_mode}'
    try:
        conv_padding(conv)
    except ValueError:
        return 'padding that is not symmetric'
    fan_in = conv.in_channels // conv.groups
    if uniform and fan_in == 1:
        return 'depthwise: a thin kernel already'
    if uniform and rank * (fan_in + kh + kw) >= fan_in * kh * kw:
        return f'rank {rank} would not make it smaller'
    sh, sw = conv.stride
    if uniform and rank * (fan_in * sh * sw + kh * sw + kw) >= fan_in * kh * kw:  # the 1x1 runs before the stride
        return f'rank {rank} would not lower its MACs'
    return None


def _widths(model: nn.Module, graph: ChannelGraph, spec: CompressionSpec) -> tuple[list[int], dict[str, str]]:
    """For every group the number of channel classes to keep; for every layer why all its channels stay, or ''."""
    net, prefix = _scoped(model, spec)
    wanted = _wanted(net, graph, spec, prefix)
    widths, reasons = [], {}
    for group in graph.groups:
        n = len(group.classes)
        keep, why = _group_width(group, wanted, spec, prefix)
        if keep < n and group.why_frozen:
            keep, why = n, group.why_frozen
        elif keep < n and spec.distance == OUTPUT_ERROR and readers_of(graph, group) is None:
            keep, why = n, 'read by a layer whose output error is not known'
        elif keep < n:
            keep = math.ceil(keep / spec.round_to) * spec.round_to
            keep = min(n, max(keep, len(group.frozen), 1))
            why = '' if keep < n else 'too few channels may go to keep a multiple of round_to'
        widths.append(keep)
        reasons.update(dict.fromkeys(group.names, why))
    return widths, reasons


class _Wanted(NamedTuple):
    """What a spec asks of one layer: a rate, a number of filters, or that all filters stay, with the reason."""

    rate: float | None = None
    width: int | None = None
    protected: str = ''


def _within(names: list[str], prefix: str) -> list[str]:
    """The names that start with a prefix, without the prefix."""
    return [name[len(prefix) :] for name in names if name.startswith(prefix)]


def _wanted(net: nn.Module, graph: ChannelGraph, spec: CompressionSpec, prefix: str) -> dict[str, _Wanted]:
    """What the spec asks of the layers of ``net``, the part of the graph's model at the prefix."""
    names = _within([name for group in graph.groups for name in group.names], prefix)
    layers = {name: net.get_submodule(name) for name in names}
    if isinstance(spec.rates, Mapping):
        _check_patterns('rates', spec.rates, list(layers))
        found = {}
        for name in layers:
            hit = next((r for p, r in spec.rates.items() if fnmatch.fnmatchcase(name, p)), None)
            if hit is not None:
                found[name] = _Wanted(rate=hit)
        return found
    rates = spec.rate_list()
    if rates is not None:
        return _listed(net, graph, rates, prefix)
    assert isinstance(spec.rates, float)
    order = _within([slot.name for slot in graph.slots if slot.kind == 'out'], prefix)  # of execution
    order = [name for name in order if name in layers]
    convs = [name for name in order if not isinstance(layers[name], nn.Linear)]
    found = {name: _Wanted(rate=spec.rates) for name in convs}
    ends = {'first': convs[:1], 'last': convs[-1:]}
    for end in spec.protect:
        found.update((name, _Wanted(protected=f'protected: {end} layer')) for name in ends[end])
    return found


def _listed(net: nn.Module, graph: ChannelGraph, rates: list[float], prefix: str) -> dict[str, _Wanted]:
    if any(isinstance(module, DroppedBlock) for module in net.modules()):
        raise ValueError(
            f'rates: got {len(rates)} entries for a network whose blocks were left out in part, expected one rate, or '
            'rates by layer name'
        )
    layout = layout_of(net)
    known = layout is not None
    if layout is None:  # an architecture without a published order: one entry for each group that can be pruned
        free = [g for g in graph.groups if not g.why_frozen]
        layout = [
            names for g in free
            if (names := _within(g.names, prefix)) and any(not isinstance(s.module, nn.Linear) for s in g.members)
        ]  # fmt: skip
    # the authors' lists may leave out the last entry, which is then 0
    if not len(layout) - 1 <= len(rates) <= len(layout):
        raise ValueError(f'rates: got {len(rates)} entries, expected {len(layout)} for this network')
    if known:
        return {name: _Wanted(width=width) for name, width in widths_of(net, rates).items()}
    return {name: _Wanted(rate=rate) for names, rate in zip(layout, rates) for name in names}


def _group_width(
    group: ChannelGroup, wanted: Mapping[str, _Wanted], spec: CompressionSpec, prefix: str
) -> tuple[int, str]:
    """Channel classes that the group should keep, and the reason if all stay; its layers must agree."""
    n = len(group.classes)
    outside = [name for name in group.names if not name.startswith(prefix)]
    if outside:
        return n, 'outside the backbone'
    excluded = [name for name in group.names if not spec.touches(name[len(prefix) :])]
    if excluded:
        return n, f'excluded by the spec ({excluded[0]})'
    keeps = {}
    for slot in group.members:
        want = wanted.get(slot.name[len(prefix) :])
        if want is None:
            continue
        if want.protected:  # one protected layer protects all that share its channels
            return n, want.protected
        if want.rate is not None:
            keeps[slot.name] = max(1, int(n * (1 - want.rate)))
        elif want.width is not None:
            keeps[slot.name] = max(1, want.width * n // len(slot.labels))  # fewer classes than filters where grouped
    if not keeps:
        return n, 'no rate given'
    if len(set(keeps.values())) > 1:
        told = ', '.join(f'{name} {keep} of {n}' for name, keep in keeps.items())
        raise ValueError(f'rates: layers that share channels must keep equally many, got {told}')
    keep = next(iter(keeps.values()))
    return keep, 'rate 0' if keep == n else ''


def _check_patterns(field: str, patterns: Mapping[str, float], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f'{field}: pattern {pattern!r} matches no layer, expected names such as {", ".join(names[:3])}'
            )
