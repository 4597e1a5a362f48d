"""Repair after compression with unlabelled images: every layer is fitted to the dense network, in order."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from tqdm import tqdm

from norton_timm.compression.lockstep import Walk, stopping
from norton_timm.compression.moments import MOST_INPUTS, Moments, add_samples, outputs_at, places_of, samples_of
from norton_timm.compression.observe import Order, observe
from norton_timm.compression.reconstruct import OutputAxes, WhiteFilters, least_squares
from norton_timm.compression.repair import Batches, images_of
from norton_timm.layers import LOW_RANK, CPDConv2d, has_computed_weight, present_at
from norton_timm.utils import after_call, at_least_float32, evaluating, removing

_CHUNK = 32  # images of one forward pass
_MEMORY = 1.5e9  # bytes of maps that the passes may hold together
_LIVE = 4  # maps as large as a layer's larger one that are alive in a pass


class _Chunk:
    """Some images on their way through the compressed network.

    Attributes:
        places: layer name -> indices into the flattened output map.
        made: layer name -> the dense network's outputs there (N, places, O).
        wanted: layer name -> what the dense network adds to them; only of layers in sums.
        added: layer name -> what the compressed network adds.
    """

    def __init__(self, dense: nn.Module, order: Order, places: Mapping[str, Tensor], images: Tensor) -> None:
        self.images = images
        self.places = places
        self.made: dict[str, Tensor] = {}
        self.wanted: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        self._linear = {name for name in places if isinstance(order.layers[name], nn.Linear)}
        hooks = [after_call(dense.get_submodule(name), partial(self._keep, self.made, name)) for name in places]
        joins = [name for name in places if name in order.joins]
        hooks += [
            after_call(dense.get_submodule(order.joins[name]), partial(self._keep, self.wanted, name)) for name in joins
        ]
        with removing(hooks):
            dense(images)

    def _keep(self, into: dict[str, Tensor], name: str, _: nn.Module, x: Any, y: Tensor) -> None:
        into[name] = self.at(name, y)

    def at(self, name: str, y: Tensor) -> Tensor:
        """A map at a layer's places: (N, places, O)."""
        return outputs_at(y, self.places[name], name in self._linear)


@torch.no_grad()
def refit(
    compressed: nn.Module,
    dense: nn.Module,
    kept: Mapping[str, Tensor],
    batches: Batches,
    *,
    aims: Mapping[str, Tensor] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> list[str]:
    """Refit the layers of ``compressed``, in order, so that each gives the dense output from its own input.

    The input already carries the error of the layers before, so that each layer also makes up for theirs. The last
    layer before a residual sum is fitted to the sum, and so makes up for the other branch as well. The mean of the
    error goes into the layer's bias or, if it has none, the running mean of the batch norm after it. Every layer from
    the first changed one on is fitted by ridge regression on samples of the maps, with one system per layer and not
    per filter; low-rank and CPD layers are then factored anew. Layers that run more than once in a pass stay as they
    are (heads that the levels of a pyramid share).

    All images go through the network together, a chunk at a time, and wait at each layer until it is fitted. The maps
    take about 1.5 GB: where they are large, in the first layers, only some of the images take part.

    Args:
        compressed: the network to repair, in place; its layers have the names they have in ``dense``.
        dense: the network before compression.
        kept: for each pruned layer the indices of the filters it kept; other layers kept all.
        batches: images of one size, a few hundred or more.
        aims: weight (O, P) that the ridge pulls a layer to; by default the present one. For factored layers this is the
            weight before it was factored.
        importance: weight (O,) of the error of each output of the dense layer, for low-rank layers.
        progress: show a bar.

    Returns:
        Names of the layers that were refitted.

    Example:
        >>> kept, _ = run_plan(model, graph, plan)
        >>> names = refit(model, dense, kept, [torch.rand(32, 3, 224, 224)])
    """
    images = [part for batch in images_of(batches, compressed) for part in batch.split(_CHUNK)]
    if len(images) == 1 and len(images[0]) > 1:  # two halves, to choose the ridge
        images = list(images[0].chunk(2))
    order = observe(dense, images[0][:1])
    names = _to_fit(compressed, dense, order)
    aims, importance = aims or {}, importance or {}
    ours = _Ours(compressed, dense, order)
    takes = _chunks_at(order, names, images)
    generator = torch.Generator().manual_seed(0)
    walks: dict[Walk, _Chunk] = {}
    joins: dict[str, list[str]] = {}
    for name in names:
        if name in order.joins:
            joins.setdefault(order.joins[name], []).append(name)
    with evaluating(compressed), evaluating(dense), stopping(compressed, names) as stops:
        hooks = []

        def see_added(here: list[str], _: nn.Module, x: Any, y: Tensor) -> None:
            assert stops.running is not None
            chunk = walks[stops.running]
            chunk.added.update((name, chunk.at(name, y)) for name in here if name in chunk.places)

        hooks = [after_call(present_at(compressed, name), partial(see_added, here)) for name, here in joins.items()]
        with removing(hooks):
            for k, name in enumerate(tqdm(names, desc='repair', disable=not progress, leave=False)):
                while len(walks) < takes[name]:
                    at = len(walks)
                    places = {
                        n: places_of(order.positions[n], _inputs(order.layers[n]), _CHUNK * takes[n], generator)
                        for n in names[k:]
                    }
                    chunk = _Chunk(dense, order, {n: p.to(images[at].device) for n, p in places.items()}, images[at])
                    walk = stops.walk(partial(compressed, chunk.images))
                    walks[walk] = chunk
                    stops.advance(walk)
                if any(walk.at != name for walk in walks):
                    raise RuntimeError(f'{name} does not run where it does in the dense network')
                parts = [_part(ours, name, chunk, walk.x, kept.get(name)) for walk, chunk in walks.items()]
                weight = importance.get(name)
                if weight is not None and name in kept:
                    weight = weight[kept[name]]
                _fit_layer(ours, name, parts, aims.get(name), weight)
                stops.finished.add(name)
                for walk in walks:
                    stops.advance(walk)
    return names


def _inputs(layer: Any) -> int:
    """Numbers that each filter reads."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    kh, kw = layer.kernel_size
    return layer.in_channels // layer.groups * kh * kw


def _chunks_at(order: Order, names: list[str], images: list[Tensor]) -> dict[str, int]:
    """How many chunks take part at each layer: as many as memory holds there and at the layers after it."""
    most, found = len(images), {}
    for name in reversed(names):
        layer = order.layers[name]
        sides = order.numbers[name]
        held = _LIVE * images[0].element_size() * max(sides) * len(images[0])
        if isinstance(layer, nn.Linear):
            held = 1
        most = max(1, min(most, int(_MEMORY / held)))
        found[name] = most
    return found


def _part(ours: _Ours, name: str, chunk: _Chunk, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's share of the fit of a layer: its input, the outputs (N, places, O) that it should give, the places."""
    wanted = chunk.made.pop(name)
    keep = None if keep is None else keep.to(wanted.device)
    wanted = wanted if keep is None else wanted[..., keep]
    if name in chunk.added:
        missing = chunk.wanted.pop(name)
        missing = (missing if keep is None else missing[..., keep]) - chunk.added.pop(name)
        scale = ours.scale(name)
        if scale is not None:
            missing = missing / scale.where(scale.abs() > 1e-6, torch.inf)
        wanted = wanted + missing
    bias = getattr(ours.layers[name], 'bias', None)
    return x, wanted if bias is None else wanted - bias, chunk.places[name]


class _Ours:
    """Layers and norms of the compressed network by the dense network's names."""

    def __init__(self, compressed: nn.Module, dense: nn.Module, order: Order) -> None:
        paths = {m: n for n, m in dense.named_modules()}
        self.layers = {name: present_at(compressed, name) for name in order.layers}
        self.norms = {name: present_at(compressed, paths[norm]) for name, norm in order.norms.items()}
        self._order = Order(layers=self.layers, norms=self.norms)
        self.has_bias, self.shift, self.scale = self._order.has_bias, self._order.shift, self._order.scale


def _to_fit(compressed: nn.Module, dense: nn.Module, order: Order) -> list[str]:
    """Layers from the first changed one on, in order."""
    names = [name for name in order.layers if order.calls[name] == 1]
    ours = {name: present_at(compressed, name) for name in names}
    changed = [_changed(ours[name], order.layers[name]) for name in names]
    if True not in changed:
        return []
    return [name for name in names[changed.index(True) :] if _can_fit(ours[name])]


def _changed(layer: Any, target: nn.Module) -> bool:
    return type(layer) is not type(target) or [p.shape for p in layer.parameters()] != [
        p.shape for p in target.parameters()
    ]


def _can_fit(layer: Any) -> bool:
    if isinstance(layer, CPDConv2d):
        return layer.groups == 1
    if isinstance(layer, LOW_RANK):
        layer = layer[0]
    # no subclasses, whose weight may be standardised or else changed in each pass
    if type(layer) not in (nn.Conv2d, Conv2dSame, nn.Linear) or has_computed_weight(layer):
        return False
    return _inputs(layer) <= MOST_INPUTS


def _fit_layer(
    ours: _Ours,
    name: str,
    parts: list[tuple[Tensor, Tensor, Tensor]],
    aim: Tensor | None,
    importance: Tensor | None,
) -> None:
    """Fit one layer to inputs and the outputs that it should give at some places, see :func:`_part`."""
    layer: Any = ours.layers[name]
    reads = layer[0] if isinstance(layer, LOW_RANK) else layer
    centred = ours.has_bias(name)
    if getattr(layer, 'groups', 1) > 1:
        missing = _fit_groups(layer, parts, centred)
    else:
        halves = Moments(), Moments()
        for k, (x, wanted, places) in enumerate(parts):
            add_samples(halves[k % 2], reads, x, wanted, places)
        present = _weight_of(layer)
        weight = least_squares(*halves, present if aim is None else aim.to(present), centred)
        whole = halves[0] + halves[1]
        _install(layer, weight, whole.gram(centred), importance)
        missing = whole.mean_output - _weight_of(layer) @ whole.mean
    if centred:
        ours.shift(name, missing)


def _weight_of(layer: Any) -> Tensor:
    """The weight (O, P) of a layer of any kind, in float32 at least."""
    if isinstance(layer, LOW_RANK):
        return at_least_float32(layer.weight_product())
    weight = layer.kernel() if isinstance(layer, CPDConv2d) else layer.weight
    return at_least_float32(weight.detach().flatten(1))


def _install(layer: Any, weight: Tensor, gram: Tensor, importance: Tensor | None) -> None:
    """Give a layer a new weight (O, P), factored if it holds factors."""
    if isinstance(layer, LOW_RANK):
        importance = weight.new_ones(len(weight)) if importance is None else importance.to(weight)
        layer.set_factors(*OutputAxes(weight, gram, importance).factors(layer.rank))
    elif isinstance(layer, CPDConv2d):
        shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        layer.set_factors(WhiteFilters(weight.view(shape), gram).factors(layer.rank))
    else:
        layer.weight.copy_(weight.view_as(layer.weight))


def _fit_groups(layer: Any, parts: list[tuple[Tensor, Tensor, Tensor]], centred: bool) -> Tensor:
    """Fit a grouped convolution, all groups at once; the mean output (O,) that is still missing.

    The ridge is fixed: few numbers are fitted to many samples.
    """
    groups, outputs = layer.groups, layer.out_channels
    old = at_least_float32(layer.weight).flatten(1).view(groups, outputs // groups, -1)
    xx = xy = x_sum = y_sum = old.new_zeros(())
    count = 0
    for x, wanted, places in parts:
        seen, wanted = at_least_float32(samples_of(layer, x, places)), at_least_float32(wanted)
        seen = seen.view(len(seen), groups, -1).transpose(0, 1)  # (groups, M, P)
        want = wanted.flatten(0, 1).view(-1, groups, outputs // groups).transpose(0, 1)
        xx, xy = xx + seen.mT @ seen, xy + seen.mT @ want
        x_sum, y_sum = x_sum + seen.sum(1), y_sum + want.sum(1)
        count += seen.shape[1]
    mean_x, mean_y = x_sum[:, None] / count, y_sum[:, None] / count  # (groups, 1, ...)
    gram, cross = xx / count, xy / count
    if centred:
        gram, cross = gram - mean_x.mT @ mean_x, cross - mean_x.mT @ mean_y
    size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-20)[:, None, None]
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weight = old + torch.linalg.solve(gram + 1e-2 * size * eye, cross - gram @ old.mT).mT
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    return (mean_y - mean_x @ weight.mT).flatten()
