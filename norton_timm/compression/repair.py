"""Repair after compression with unlabelled images: least-squares refits and new batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from norton_timm.compression.moments import MOST_INPUTS, Moments, add_samples, outputs_at, places_of, samples_of
from norton_timm.compression.observe import Order, observe
from norton_timm.compression.reconstruct import cpd_factors, least_squares, low_rank_factors
from norton_timm.layers import LOW_RANK, CPDConv2d, has_computed_weight, present_at
from norton_timm.utils import at_least_float32, before_call, evaluating, removing

Batches = Iterable[Any]


def without_labels(batch: Any) -> Any:
    """The images of a batch (images, labels), a tuple or a loader's list; other batches come back as they are."""
    if isinstance(batch, tuple) and batch:
        return batch[0]
    loaded = isinstance(batch, list) and batch and isinstance(batch[0], Tensor) and batch[0].dim() == 4
    return batch[0] if loaded else batch


def images_of(batches: Batches, model: nn.Module) -> Iterator[Tensor]:
    """The images of each batch, labels left out, on the model's device and in its type.

    Raises:
        ValueError: no batch, something that is neither a tensor nor a tuple that starts with one, images of several
            sizes, or NaN in them.
    """
    parameter = next(model.parameters())
    empty, size = True, None
    for batch in batches:
        images = without_labels(batch)
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise ValueError(f'calibration: got {type(images).__name__}, expected batches of images (N, C, H, W)')
        if size is not None and images.shape[1:] != size:
            raise ValueError(
                f'calibration: got images of {tuple(images.shape[1:])} after {tuple(size)}, expected one size'
            )
        images = images.to(parameter.device, parameter.dtype)
        if not images.isfinite().all():
            raise ValueError(f'calibration: got NaN or infinity as {parameter.dtype}, expected finite images')
        empty, size = False, images.shape[1:]
        yield images
    if empty:
        raise ValueError('calibration: got no batch, expected at least one')


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Batches) -> None:
    """Set every batch norm's running mean and variance to the averages over ``batches``, in place.

    Args:
        model: the network.
        batches: images (N, C, H, W) of one size; labels, if any, are ignored.

    Raises:
        ValueError: no batch, or batches that are not images of one size.

    Example:
        >>> reestimate_batch_norm(model, [torch.rand(32, 3, 224, 224)])
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes, momenta = {m: m.training for m in model.modules()}, [m.momentum for m in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        for images in images_of(batches, model):
            model(images)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training


class _Targets:
    """What the dense network makes, at a few places of every map, from one pass per batch.

    Attributes:
        places: layer name -> indices into the flattened output map.
        made: layer name -> its outputs (N, places, O).
        added: layer name -> what is added to them, at the same places; only of layers in sums.
    """

    def __init__(self, dense: nn.Module, order: Order, names: list[str], images: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        count = sum(len(batch) for batch in images)
        self.places: dict[str, Tensor] = {}
        for name in names:
            inputs = _inputs(order.layers[name])
            places = places_of(order.positions[name], inputs, count, generator)
            self.places[name] = places.to(images[0].device)
        self._linear = {name for name in names if isinstance(order.layers[name], nn.Linear)}
        made: dict[str, list[Tensor]] = {name: [] for name in names}
        added: dict[str, list[Tensor]] = {name: [] for name in names if name in order.joins}
        hooks = [
            dense.get_submodule(name).register_forward_hook(
                lambda m, a, y, name=name: made[name].append(self.at(name, y))
            )
            for name in names
        ]
        hooks += [
            dense.get_submodule(order.joins[name]).register_forward_hook(
                lambda m, a, y, name=name: added[name].append(self.at(name, y))
            )
            for name in added
        ]
        with removing(hooks):
            for batch in images:
                dense(batch)
        self.made = {name: torch.cat(parts) for name, parts in made.items()}
        self.added = {name: torch.cat(parts) for name, parts in added.items()}

    def at(self, name: str, y: Tensor) -> Tensor:
        """A map at a layer's places: (N, places, O)."""
        return outputs_at(y, self.places[name], name in self._linear)


def _inputs(layer: Any) -> int:
    """Numbers that each filter reads."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    kh, kw = layer.kernel_size
    return layer.in_channels // layer.groups * kh * kw


@torch.no_grad()
def refit(
    compressed: nn.Module,
    dense: nn.Module,
    kept: Mapping[str, Tensor],
    batches: Batches,
    *,
    aims: Mapping[str, Tensor] | None = None,
    importance: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Refit the layers of ``compressed``, in order, so that each gives the dense output from its own input.

    The input already carries the error of the layers before, so that each layer also makes up for theirs. The last
    layer before a residual sum is fitted to the sum, and so makes up for the other branch as well. The mean of the
    error goes into the layer's bias or, if it has none, the running mean of the batch norm after it. Every layer from
    the first changed one on is fitted by ridge regression on samples of the maps, with one system per layer and not
    per filter; low-rank and CPD layers are then factored anew. Layers that run more than once in a pass stay as they
    are (heads that the levels of a pyramid share).

    Args:
        compressed: the network to repair, in place; its layers have the names they have in ``dense``.
        dense: the network before compression.
        kept: for each pruned layer the indices of the filters it kept; other layers kept all.
        batches: images of one size, read once and run as one batch in memory: a few hundred are enough.
        aims: weight (O, P) that the ridge pulls a layer to; by default the present one. For factored layers this is the
            weight before it was factored.
        importance: weight (O,) of the error of each output of the dense layer, for low-rank layers.

    Returns:
        Names of the layers that were refitted.

    Example:
        >>> kept, _ = run_plan(model, graph, plan)
        >>> names = refit(model, dense, kept, [torch.rand(32, 3, 224, 224)])
    """
    images = list(images_of(batches, compressed))
    order = observe(dense, images[0][:1])
    names = _to_fit(compressed, dense, order)
    aims, importance = aims or {}, importance or {}
    with evaluating(compressed), evaluating(dense):
        targets = _Targets(dense, order, names, images)
        # layers and norms of the compressed network, under the names of the dense one
        ours = _Ours(compressed, dense, order)
        added: dict[str, Tensor] = {}

        def solve(name: str, _: nn.Module, x: Tensor) -> None:
            wanted = targets.made.pop(name)
            keep = kept[name].to(wanted.device) if name in kept else None
            wanted = wanted if keep is None else wanted[..., keep]
            if name in added:
                missing = targets.added.pop(name)
                missing = (missing if keep is None else missing[..., keep]) - added.pop(name)
                scale = ours.scale(name)
                if scale is not None:
                    missing = missing / scale.where(scale.abs() > 1e-6, torch.inf)
                wanted = wanted + missing
            weight = importance.get(name)
            weight = weight if weight is None or keep is None else weight[keep]
            _fit_layer(ours, name, x, wanted, targets.places[name], aims.get(name), weight)

        hooks: list[Any] = [before_call(compressed.get_submodule(name), partial(solve, name)) for name in names]
        hooks += [
            present_at(compressed, order.joins[name]).register_forward_hook(
                lambda m, a, y, name=name: added.__setitem__(name, targets.at(name, y))
            )
            for name in targets.added
        ]
        with removing(hooks):
            compressed(torch.cat(images))
    return names


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
    ours: _Ours, name: str, x: Tensor, wanted: Tensor, places: Tensor, aim: Tensor | None, importance: Tensor | None
) -> None:
    """Fit one layer to the outputs (N, places, O) that it should give."""
    layer: Any = ours.layers[name]
    reads = layer[0] if isinstance(layer, LOW_RANK) else layer
    bias = getattr(layer, 'bias', None)
    centred = ours.has_bias(name)
    if bias is not None:
        wanted = wanted - bias
    if getattr(layer, 'groups', 1) > 1:
        missing = _fit_groups(layer, x, wanted, places, centred)
    else:
        half = -(-len(x) // 2)
        first, second = Moments(), Moments()
        add_samples(first, reads, x[:half], wanted[:half], places)
        add_samples(second, reads, x[half:], wanted[half:], places)
        present = _weight_of(layer)
        weight = least_squares(first, second, present if aim is None else aim.to(present), centred)
        whole = first + second
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
        layer.set_factors(*low_rank_factors(weight, gram, importance, layer.rank))
    elif isinstance(layer, CPDConv2d):
        shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        layer.set_factors(cpd_factors(weight.view(shape), gram, layer.rank))
    else:
        layer.weight.copy_(weight.view_as(layer.weight))


def _fit_groups(layer: Any, x: Tensor, wanted: Tensor, places: Tensor, centred: bool) -> Tensor:
    """Fit a grouped convolution, all groups at once; the mean output (O,) that is still missing.

    The ridge is fixed: few numbers are fitted to many samples.
    """
    groups, outputs = layer.groups, layer.out_channels
    seen, wanted = at_least_float32(samples_of(layer, x, places)), at_least_float32(wanted)
    seen = seen.view(len(seen), groups, -1).transpose(0, 1)  # (groups, M, P)
    want = wanted.flatten(0, 1).view(-1, groups, outputs // groups).transpose(0, 1)
    mean_x, mean_y = seen.mean(1, keepdim=True), want.mean(1, keepdim=True)
    if centred:
        seen, want = seen - mean_x, want - mean_y
    old = at_least_float32(layer.weight).flatten(1).view(groups, outputs // groups, -1)
    gram = seen.mT @ seen / seen.shape[1]
    size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-20)[:, None, None]
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    change = seen.mT @ want / seen.shape[1] - gram @ old.mT
    weight = old + torch.linalg.solve(gram + 1e-2 * size * eye, change).mT
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    return (mean_y - mean_x @ weight.mT).flatten()
