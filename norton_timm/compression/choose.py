"""Which channels of a coupled group leave: one decision from the distances of all its layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from norton_timm.compression.spec import CompressionSpec
from norton_timm.graph import ChannelGroup
from norton_timm.layers import CPDConv2d, filters_of
from norton_timm.tensors import SCORES, cp_decompose, filter_distance, filter_scores, hosvd, select_filters


def layer_distance(module: nn.Module, spec: CompressionSpec, rank: int) -> Tensor:
    """Distances (O, O) between the filters of a layer: NORTON's on CPD factors, CORING's on rank-1 HOSVD."""
    if spec.method == 'coring':
        return filter_distance(hosvd(filters_of(module), 1), spec.distance)
    if isinstance(module, CPDConv2d):
        return filter_distance(module.factors(), spec.distance)
    weight = filters_of(module)
    rank = max(1, min(rank, weight.shape[2] * weight.shape[3]))  # a 1x1 filter is a vector: exact at rank 1
    generator = torch.Generator().manual_seed(spec.seed)
    return filter_distance(cp_decompose(weight, rank, generator=generator), spec.distance)


def removed_classes(
    group: ChannelGroup, keep: int, spec: CompressionSpec, ranks: Mapping[str, int], generator: torch.Generator
) -> list[int]:
    """The channel classes to remove so that ``keep`` stay, as indices into ``group.classes``.

    The distance between two classes is the mean over their filters (several each in a grouped convolution), then over
    the layers. The distances of a layer are divided by their mean, so that layers weigh equally. Frozen classes stay.
    """
    n = len(group.classes)
    free = np.array([k for k in range(n) if k not in group.frozen], dtype=int)
    stay = max(keep - len(group.frozen), 0)
    if stay >= len(free):
        return []
    if stay == 0:
        return free.tolist()
    rank = max(ranks.values(), default=1)
    if spec.distance in SCORES:
        values = [filter_scores(filters_of(s.module), spec.distance, generator) for s in group.members]
    else:
        values = [layer_distance(s.module, spec, ranks.get(s.name, rank)) for s in group.members]
    merged = merge_layers([v.double().cpu() for v in values], group, n)[torch.from_numpy(free)]
    if spec.distance in SCORES:
        kept = merged.argsort(descending=True, stable=True)[:stay]
    else:
        kept = select_filters(merged[:, torch.from_numpy(free)], stay, spec.strategy)
    return np.delete(free, kept.numpy()).tolist()


def merge_layers(values: list[Tensor], group: ChannelGroup, n: int) -> Tensor:
    """Mean over layers of values per filter (O,) or (O, O), as values per channel class (n,) or (n, n)."""
    shape = (n,) * values[0].dim()
    total, times = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for value, places in zip(values, group.places):
        scale = value.mean().clamp_min(1e-30)
        copies = _copies(places)
        for copy in range(int(copies.max()) + 1):  # one for each group of a grouped convolution
            rows = torch.from_numpy(np.flatnonzero(copies == copy))
            at = torch.from_numpy(places)[rows]
            index = (at,) if value.dim() == 1 else (at[:, None], at[None, :])
            part = value[rows] if value.dim() == 1 else value[rows][:, rows]
            total[index] += part / scale
            times[index] += 1
    known = times > 0
    mean = total / times.clamp_min(1)
    return torch.where(known, mean, mean[known].mean())


def _copies(places: np.ndarray) -> np.ndarray:
    """For each filter, the number of earlier filters of its class: 0 for the first filter of a class."""
    seen: dict[int, int] = {}
    copies = np.empty(len(places), dtype=int)
    for k, place in enumerate(places.tolist()):
        copies[k] = seen[place] = seen.get(place, -1) + 1
    return copies
