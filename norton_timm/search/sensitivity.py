"""The sensitivity table: how much each layer loses at each rank and at each number of kept channels.

The error of a layer is the *NMSE* of its weights, ``|W - W'|^2 / |W|^2``, where W' holds the rank-R filters and
zeros in place of the removed filters. The next layer sees this error relative to the signal that is left,
``NMSE / (1 - NMSE)``, because normalisation (or fine-tuning) scales the output back. Multiplied by the layer's weight
it is the *weighted NMSE*. Weights are 1 without data, and measured from the loss with calibration images. The total is
the sum over all convolutions; a channel that several layers make together counts in each of them, and a depthwise
layer makes no channels of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from norton_timm.compression import (
    CompressionSpec,
    channel_graph,
    layer_distance,
    make_plan,
    merge_layers,
    run_plan,
)
from norton_timm.graph import ChannelGraph, ChannelGroup
from norton_timm.layers import filters_of
from norton_timm.profiling import make_input
from norton_timm.tensors import cp_decompose, select_filters
from norton_timm.utils import copy_of

_KEPT_AT = np.linspace(0, 1, 17)  # fractions of a group's free channels at which the selection is run
_EVERY_KEEP = 32  # in groups of at most so many free channels the selection is run at every number
_MOST_RANKS = 12
_LEAST_LEFT = 1e-9  # a layer always keeps this share of its energy, so that errors stay finite
_CACHED = 16_384

_cache: OrderedDict[tuple[Any, ...], np.ndarray] = OrderedDict()


@dataclass
class Sensitivity:
    """The table of one model.

    Attributes:
        left_at_rank: layer -> rank -> share of the layer's energy that its rank-R filters hold; rank 0 (dense) is 1.
        left_at_keep: group number -> (member names, array (members, classes + 1)): share of each member's energy
            that is left when the group keeps so many channel classes. Only groups that may be pruned.
        least: group number -> channel classes that must stay.
        weights: layer -> weight of its error; 1 where it is not named.
        reasons: layer -> why it stays dense.
    """

    left_at_rank: dict[str, dict[int, float]] = field(default_factory=dict)
    left_at_keep: dict[int, tuple[list[str], np.ndarray]] = field(default_factory=dict)
    least: dict[int, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def nmse(self) -> dict[str, dict[int, float]]:
        """NMSE by layer and rank."""
        return {name: {r: 1 - left for r, left in row.items() if r} for name, row in self.left_at_rank.items()}


def measure_sensitivity(model: nn.Module, graph: ChannelGraph, method: str = 'norton') -> Sensitivity:
    """Fill the table from the weights alone; results are cached by the content of the weights.

    The stem's rank and the channels of the stem and of the last convolution are left alone, as in the papers.

    Args:
        model: the dense network.
        graph: its channel graph.
        method: ``norton`` or ``coring`` (which has no ranks).
    """
    table = Sensitivity()
    anywhere = make_plan(model, graph, CompressionSpec(method=method, rank={'*': 1}))
    uniform = make_plan(model, graph, CompressionSpec(method=method, rates=0.5))
    candidates, table.reasons = dict(anywhere.ranks), dict(anywhere.dense_because)
    for name, why in uniform.dense_because.items():
        if why.startswith('protected') and name in candidates:
            del candidates[name]
            table.reasons[name] = why
    for name in candidates:
        weight = filters_of(model.get_submodule(name))
        ranks = _candidate_ranks(weight)
        if ranks:
            key = _digest(weight)
            table.left_at_rank[name] = {0: 1.0, **{r: _left_at_rank(weight, key, r) for r in ranks}}
        else:
            table.reasons[name] = 'no rank would make it smaller'
    for number, (group, keep) in enumerate(zip(graph.groups, uniform.keep)):
        if keep < len(group.classes):  # a group that one rate for all prunes may have any rate
            table.least[number] = max(1, len(group.frozen))
    refresh_selection(table, graph, method, {})
    return table


def refresh_selection(table: Sensitivity, graph: ChannelGraph, method: str, ranks: Mapping[str, int]) -> None:
    """Set ``left_at_keep`` to what the selection of ``compress`` leaves at these ranks; distances depend on them."""
    spec = CompressionSpec(method=method)
    other = max(ranks.values(), default=1)
    for number in table.least:
        group = graph.groups[number]
        used = [ranks.get(slot.name, other) for slot in group.members]
        table.left_at_keep[number] = group.names, _left_at_keep(group, used, spec)


def _digest(weight: Tensor) -> str:
    data = weight.detach().float().cpu().contiguous().numpy()
    return hashlib.blake2b(data.tobytes() + str(data.shape).encode(), digest_size=16).hexdigest()


def _remember(key: tuple[Any, ...], value: np.ndarray) -> np.ndarray:
    _cache[key] = value
    while len(_cache) > _CACHED:
        _cache.popitem(last=False)
    return value


def _candidate_ranks(weight: Tensor) -> list[int]:
    """Ranks that store fewer numbers than the dense filter; at most ``_MOST_RANKS`` of them, the low ones first."""
    _, i, kh, kw = weight.shape
    top = (i * kh * kw - 1) // (i + kh + kw)
    if top <= _MOST_RANKS:
        return list(range(1, top + 1))
    return sorted({round(r) for r in np.geomspace(1, top, _MOST_RANKS)})


def _energy(weight: Tensor) -> Tensor:
    return weight.detach().double().flatten(1).square().sum(1).cpu()


def _left_at_rank(weight: Tensor, digest: str, rank: int) -> float:
    key = ('rank', digest, rank)
    if key not in _cache:
        energy, nmse = _energy(weight), cp_decompose(weight, rank).nmse.double().cpu()
        left = 1 - (energy * nmse).sum() / energy.sum().clamp_min(1e-300)
        _remember(key, np.array(float(left)))
    return max(float(_cache[key]), _LEAST_LEFT)


def _left_at_keep(group: ChannelGroup, ranks: list[int], spec: CompressionSpec) -> np.ndarray:
    """Energy left in each member (members, classes + 1) by the number of classes kept, by the spec's criterion."""
    filters = [filters_of(slot.module) for slot in group.members]
    # a 1x1 filter is a vector whatever the rank
    ranks = [min(rank, f.shape[2] * f.shape[3]) if spec.method == 'norton' else 1 for rank, f in zip(ranks, filters)]
    key = ('keep', spec.method, *map(_digest, filters), *ranks, tuple(group.frozen), len(group.classes))
    if key in _cache:
        return _cache[key]
    n = len(group.classes)
    energy = torch.stack([_class_energy(f, p, n) for f, p in zip(filters, group.places)]).numpy()
    stays = np.array([*group.frozen], dtype=int)
    free = np.array([k for k in range(n) if k not in group.frozen], dtype=int)
    distances = [layer_distance(s.module, spec, r).double().cpu() for s, r in zip(group.members, ranks)]
    index = torch.from_numpy(free)
    distance = merge_layers(distances, group, n)[index][:, index]
    few = len(free) <= _EVERY_KEEP
    points = range(1, len(free) + 1) if few else sorted({1, *(round(f * len(free)) for f in _KEPT_AT[1:])})
    known_at, known = [len(stays)], [energy[:, stays].sum(1)]
    for stay in points:
        kept = np.concatenate([free[select_filters(distance, stay).numpy()], stays])
        known_at.append(stay + len(stays))
        known.append(energy[:, kept].sum(1))
    total = np.maximum(energy.sum(1), 1e-300)
    left = np.stack([np.interp(np.arange(n + 1), known_at, k) for k in np.array(known).T / total[:, None]])
    left[:, n] = 1
    return _remember(key, np.maximum(left, _LEAST_LEFT))


def _class_energy(filters: Tensor, places: np.ndarray, classes: int) -> Tensor:
    return torch.zeros(classes, dtype=torch.float64).index_add_(0, torch.from_numpy(places), _energy(filters))


def layer_errors(model: nn.Module, spec: CompressionSpec, example_input: Any = None) -> dict[str, float]:
    """NMSE of the weights of every layer that ``compress(model, spec)`` changes, removed filters counted as zeros.

    This decomposes and selects as ``compress`` does, with nothing taken from the table.

    Returns:
        ``|W - W'|^2 / |W|^2`` in [0, 1] by layer name.
    """
    model = copy_of(model)
    energies = {n: _energy(filters_of(m)) for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    graph = channel_graph(model, make_input(model, example_input))
    plan = make_plan(model, graph, dataclasses.replace(spec, order='decompose-prune'))
    widths = {name: len(places) for group in graph.groups for name, places in zip(group.names, group.places)}
    kept, nmse = run_plan(model, graph, plan)
    errors = {}
    for name, energy in energies.items():
        chosen = kept.get(name, torch.arange(len(energy)))
        if name in nmse or len(chosen) < widths.get(name, 0):
            left = energy[chosen] * (1 - nmse[name].double().cpu() if name in nmse else 1)
            errors[name] = float(1 - left.sum() / energy.sum().clamp_min(1e-300))
    return errors


def weighted_nmse(
    model: nn.Module, spec: CompressionSpec, example_input: Any = None, weights: Mapping[str, float] | None = None
) -> float:
    """Total weighted NMSE of ``compress(model, spec)``: the sum over layers of ``weight * NMSE / (1 - NMSE)``.

    ``find_spec`` minimises this figure for its target. The module's docstring says why the error is relative to what is
    left of a layer.

    Args:
        model: the dense network.
        spec: any recipe, uniform or per layer.
        example_input: what the model's ``forward`` takes.
        weights: weight by layer name, 1 where not named (:func:`norton_timm.search.loss_weights.loss_weights`).

    Example:
        >>> weighted_nmse(model, CompressionSpec(rank=1, rates=0.3))
    """
    errors = layer_errors(model, spec, example_input)
    weights = weights or {}
    return sum(weights.get(n, 1.0) * e / max(1 - e, _LEAST_LEFT) for n, e in errors.items())
