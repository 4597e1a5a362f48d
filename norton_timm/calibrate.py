"""What images without labels can repair after compression: least-squares refits and batch-norm statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from norton_timm.layers import CPDConv2d, conv_padding
from norton_timm.metadata import evaluating

Batches = Iterable[Any]
_CHUNK = 2**25  # float64 values of a temporary: 256 MiB


def _images(batches: Batches, model: nn.Module) -> Iterator[Tensor]:
    """The images of each batch, labels left out, on the model's device and in its type.

    Raises:
        ValueError: no batch, or something that is neither a tensor nor a tuple that starts with one.
    """
    parameter = next(model.parameters())
    empty, size = True, None
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise ValueError(f'calibration: got {type(images).__name__}, expected batches of images (N, C, H, W)')
        if size is not None and images.shape[1:] != size:
            raise ValueError(
                f'calibration: got images of {tuple(images.shape[1:])} after {tuple(size)}, expected one size'
            )
        empty, size = False, images.shape[1:]
        yield images.to(parameter.device, parameter.dtype)
    if empty:
        raise ValueError('calibration: got no batch, expected at least one')


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Batches) -> None:
    """Set every batch norm's running mean and variance to the averages over ``batches``, in place."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes, momenta = {m: m.training for m in model.modules()}, [m.momentum for m in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        for images in _images(batches, model):
            model(images)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training


class _Reached(Exception):
    """Ends a forward pass at the layer that was wanted."""


def _input_of(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """Input of a layer of ``model``; the layer and what comes behind it are not run."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    hook = layer.register_forward_pre_hook(stop)
    try:
        model(images)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]


class _Samples:
    """Outputs of the dense network's layers, at the same few places of every map, from one pass per batch.

    Attributes:
        places: layer name -> indices into the flattened output map.
        wanted: layer name -> for each batch, outputs (N, O, places).
    """

    def __init__(self, dense: nn.Module, names: Iterable[str], batches: list[Tensor], per_image: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.places: dict[str, Tensor] = {}
        self.wanted: dict[str, list[Tensor]] = {name: [] for name in names}

        def record(name: str, y: Tensor) -> None:
            if name not in self.places:
                self.places[name] = torch.randperm(y[0, 0].numel(), generator=generator)[:per_image].to(y.device)
            self.wanted[name].append(y.flatten(2)[:, :, self.places[name]])

        hooks = [
            dense.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: record(name, y))
            for name in self.wanted
        ]
        try:
            for images in batches:
                dense(images)
        finally:
            for hook in hooks:
                hook.remove()


def _moments(
    layer: nn.Conv2d | CPDConv2d, inputs: Iterable[Tensor], wanted: Iterable[Tensor], places: Tensor
) -> tuple[Tensor, Tensor]:
    """Second moments of the input patches, (P, P), and of patches and wanted outputs, (P, O); P = I * Kh * Kw."""
    padding = conv_padding(layer) if isinstance(layer, nn.Conv2d) else layer.padding
    gram = cross = torch.zeros(())
    count = 0
    for x, y in zip(inputs, wanted):
        patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # type: ignore[arg-type]
        p = patches[:, :, places].transpose(1, 2).flatten(0, 1).double()
        t = y.transpose(1, 2).flatten(0, 1).double()
        gram, cross, count = gram + p.mT @ p, cross + p.mT @ t, count + len(p)
    return gram / count, cross / count


def _refit_dense(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Kernel (O, I, Kh, Kw) of least squared output error, drawn to the present one by ``ridge``."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (ridge * gram.diagonal().mean())
    old = weight.double().flatten(1).mT
    return torch.linalg.solve(gram + eye, cross + eye @ old).mT.reshape(weight.shape)


def _refit_cpd(layer: CPDConv2d, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Pointwise factors (O, R, I) of least squared output error with the spatial factors held."""
    o, r, i = layer.out_channels, layer.rank, layer.in_channels
    k = layer.kernel_size[0] * layer.kernel_size[1]
    spatial = layer.merged_kernel().double().view(o, r, k)
    gram, cross = gram.view(i, k, i, k), cross.view(i, k, o)
    old = layer.pointwise.double().view(o, r, i)
    new = torch.empty_like(old)
    size = max(1, _CHUNK // (i * k * i * r))
    for start in range(0, o, size):
        s = spatial[start : start + size]
        half = torch.einsum('ihjg,osg->oihjs', gram, s)
        normal = torch.einsum('orh,oihjs->orisj', s, half).reshape(len(s), r * i, r * i)
        right = torch.einsum('orh,iho->ori', s, cross[:, :, start : start + size]).reshape(len(s), r * i, 1)
        weight = ridge * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
        eye = torch.eye(r * i, dtype=gram.dtype, device=gram.device) * weight
        before = old[start : start + size].reshape(len(s), r * i, 1)
        new[start : start + size] = torch.linalg.solve(normal + eye, right + weight * before).view(len(s), r, i)
    return new


@torch.no_grad()
def refit(
    compressed: nn.Module,
    dense: nn.Module,
    kept: Mapping[str, Tensor],
    batches: Batches,
    *,
    ridge: float = 1e-3,
    per_image: int = 32,
) -> list[str]:
    """Refit each convolution of ``compressed``, in order, to give the dense network's output from its own input.

    The input already carries the error of the layers before, so that each layer also makes up for theirs. A
    CPDConv2d keeps its spatial factors and gets new pointwise ones. Layers of several groups,
    or that run more than once in a pass (heads shared by the levels of a pyramid), are left as they are.

    Args:
        compressed: the network to repair, in place; its layers have the names they have in ``dense``.
        dense: the network before compression.
        kept: for each pruned layer the indices of the filters it kept; layers not named kept all.
        batches: images, read once and held in memory: a few hundred are enough.
        ridge: weight of the present parameters, relative to the mean energy of the input.
        per_image: places of each output map that enter the fit.

    Returns:
        Names of the layers that were refitted.
    """
    images = list(_images(batches, compressed))
    layers = {
        name: layer
        for name, layer in _in_order(compressed, images[0][:1]).items()
        if isinstance(layer, CPDConv2d) or _changed(layer, dense.get_submodule(name))
    }
    with evaluating(compressed), evaluating(dense):
        samples = _Samples(dense, layers, images, per_image)
        for name, layer in layers.items():
            wanted = samples.wanted.pop(name)
            if name in kept:
                wanted = [y[:, kept[name].to(y.device)] for y in wanted]
            if layer.bias is not None:
                wanted = [y - layer.bias[:, None] for y in wanted]
            inputs = (_input_of(compressed, layer, x) for x in images)
            gram, cross = _moments(layer, inputs, wanted, samples.places[name])
            if isinstance(layer, CPDConv2d):
                layer.pointwise.copy_(_refit_cpd(layer, gram, cross, ridge).reshape(layer.pointwise.shape))
            else:
                layer.weight.copy_(_refit_dense(layer.weight, gram, cross, ridge))
    return list(layers)


def _changed(layer: nn.Conv2d, target: nn.Module) -> bool:
    return not isinstance(target, nn.Conv2d) or layer.weight.shape != target.weight.shape


def _in_order(model: nn.Module, image: Tensor) -> dict[str, nn.Conv2d | CPDConv2d]:
    """Ungrouped 2-d convolutions that run once a pass, by name, in the order in which they run."""
    names = {m: n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, CPDConv2d)) and m.groups == 1}
    order: dict[str, nn.Conv2d | CPDConv2d] = {}
    calls: Counter[str] = Counter()

    def note(module: nn.Conv2d | CPDConv2d) -> None:
        order.setdefault(names[module], module)
        calls[names[module]] += 1

    hooks = [m.register_forward_hook(lambda m, a, o: note(m)) for m in names]
    try:
        with evaluating(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: layer for name, layer in order.items() if calls[name] == 1}
