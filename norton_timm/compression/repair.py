"""Repair after compression with unlabelled images: least-squares refits and new batch-norm statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from norton_timm.layers import CPDConv2d, conv_padding
from norton_timm.tensors import CPFactors
from norton_timm.utils import before_call, evaluating, removing

Batches = Iterable[Any]
_CHUNK = 2**25  # float64 values of a temporary: 256 MiB
_BATCH = 32  # images whose patches are held at a time


def without_labels(batch: Any) -> Any:
    """The images of a batch (images, labels), a tuple or a loader's list; other batches come back as they are."""
    if isinstance(batch, tuple) and batch:
        return batch[0]
    loaded = isinstance(batch, list) and batch and isinstance(batch[0], Tensor) and batch[0].dim() == 4
    return batch[0] if loaded else batch


def _images(batches: Batches, model: nn.Module) -> Iterator[Tensor]:
    """The images of each batch, labels left out, on the model's device and in its type.

    Raises:
        ValueError: no batch, or something that is neither a tensor nor a tuple that starts with one.
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
        empty, size = False, images.shape[1:]
        yield images.to(parameter.device, parameter.dtype)
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
        for images in _images(batches, model):
            model(images)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training


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
        with removing(hooks):
            for images in batches:
                dense(images)


def _patches(layer: nn.Conv2d | CPDConv2d, x: Tensor, places: Tensor) -> Tensor:
    """What the filters see at some places of the output map: (N * places, I * Kh * Kw)."""
    ph, pw = conv_padding(layer) if isinstance(layer, nn.Conv2d) else layer.padding
    (kh, kw), (sh, sw), (dh, dw) = (tuple(map(int, t)) for t in (layer.kernel_size, layer.stride, layer.dilation))
    x = F.pad(x, (pw, pw, ph, ph))
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    rows = (places // width * sh)[:, None, None] + dh * torch.arange(kh, device=x.device)[:, None]
    columns = (places % width * sw)[:, None, None] + dw * torch.arange(kw, device=x.device)
    index = (rows * x.shape[3] + columns).flatten()
    seen = x.flatten(2)[:, :, index].view(*x.shape[:2], len(places), kh * kw)
    return seen.transpose(1, 2).flatten(2).flatten(0, 1)


class _Moments:
    """Means and second moments of patches (M, P) and wanted outputs (M, O); the moments are about the means or zero.

    Attributes:
        gram: (P, P), of the patches with themselves.
        cross: (P, O), of the patches with the outputs.
        seen, wanted: means (P,) and (O,); zero if the moments are about zero.
    """

    def __init__(self, layer: nn.Conv2d | CPDConv2d, x: Tensor, y: Tensor, places: Tensor, centred: bool) -> None:
        sums: list[Any] = [0, 0, 0, 0]
        count = 0
        for some, made in zip(x.split(_BATCH), y.split(_BATCH)):
            p = _patches(layer, some, places).double()
            t = made.transpose(1, 2).flatten(0, 1).double()
            for k, term in enumerate((p.mT @ p, p.mT @ t, p.sum(0), t.sum(0))):
                sums[k] = sums[k] + term
            count += len(p)
        self.gram, self.cross, self.seen, self.wanted = (total / count for total in sums)
        if centred:
            self.gram -= torch.outer(self.seen, self.seen)
            self.cross -= torch.outer(self.seen, self.wanted)
        else:
            self.seen, self.wanted = torch.zeros_like(self.seen), torch.zeros_like(self.wanted)


def _refit_dense(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Kernel (O, I, Kh, Kw) with the least squared output error; ``ridge`` pulls it to the present one."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (ridge * gram.diagonal().mean())
    old = weight.double().flatten(1).mT
    return torch.linalg.solve(gram + eye, cross + eye @ old).mT.reshape(weight.shape)


def _solve(normal: Tensor, right: Tensor, old: Tensor, ridge: float) -> Tensor:
    """Solutions (O, R, n) of normal equations (O, R n, R n); ``ridge`` pulls them to ``old``."""
    weight = ridge * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
    eye = torch.eye(normal.shape[1], dtype=normal.dtype, device=normal.device)
    sides = right.reshape(len(old), -1, 1) + weight * old.reshape(len(old), -1, 1)
    return torch.linalg.solve(normal + weight * eye, sides).view(old.shape)


def _refit_cpd(layer: CPDConv2d, gram: Tensor, cross: Tensor, ridge: float, sweeps: int) -> CPFactors:
    """Factors with the least squared output error, by alternating least squares from the present ones.

    The three factors take turns as in the decomposition itself, but the error is that of the filters' outputs, not
    of the filters. The pointwise factors are solved last.
    """
    old = layer.factors()
    a, b, c = (f.double().mT.contiguous() for f in old[:3])  # (O, R, n)
    (kh, kw), i, r = layer.kernel_size, layer.in_channels, layer.rank
    gram, cross = gram.view(i, kh * kw, i, kh * kw), cross.view(i, kh, kw, -1)
    size = max(1, _CHUNK // (i * kh * kw * i * r))
    for some in torch.arange(layer.out_channels, device=gram.device).split(size):
        fa, fb, fc, x = a[some], b[some], c[some], cross[..., some]
        for sweep in range(sweeps):
            if sweep:
                half = torch.einsum('ori,ihjg->orhjg', fc, gram)
                core = torch.einsum('orhjg,osj->orhsg', half, fc).view(len(some), r, kh, kw, r, kh, kw)
                seen = torch.einsum('ori,ihwo->orhw', fc, x)
                normal = torch.einsum('orw,orhwsgv,osv->orhsg', fb, core, fb).reshape(len(some), r * kh, r * kh)
                fa = _solve(normal, torch.einsum('orw,orhw->orh', fb, seen), fa, ridge)
                normal = torch.einsum('orh,orhwsgv,osg->orwsv', fa, core, fa).reshape(len(some), r * kw, r * kw)
                fb = _solve(normal, torch.einsum('orh,orhw->orw', fa, seen), fb, ridge)
            spatial = torch.einsum('orh,orw->orhw', fa, fb)
            half = torch.einsum('ihjg,osg->oihjs', gram, spatial.flatten(2))
            normal = torch.einsum('orh,oihjs->orisj', spatial.flatten(2), half).reshape(len(some), r * i, r * i)
            fc = _solve(normal, torch.einsum('orhw,ihwo->ori', spatial, x), fc, ridge)
        a[some], b[some], c[some] = fa, fb, fc
    return CPFactors(a.mT, b.mT, c.mT, old.nmse)


@torch.no_grad()
def refit(
    compressed: nn.Module,
    dense: nn.Module,
    kept: Mapping[str, Tensor],
    batches: Batches,
    *,
    ridge: float = 1e-3,
    per_image: int = 32,
    sweeps: int = 3,
) -> list[str]:
    """Refit each changed convolution of ``compressed``, in order, so that it gives the dense output from its own input.

    The input already carries the error of the layers before, so that each layer also makes up for theirs. The mean
    of the error goes into the layer's bias or, if it has none, the running mean of the batch norm after it. Grouped
    convolutions stay as they are, and so do layers that run more than once in a pass (heads that the levels of a
    pyramid share). One forward pass of all images is enough: each layer is solved when its input arrives.

    Args:
        compressed: the network to repair, in place; its layers have the names they have in ``dense``.
        dense: the network before compression.
        kept: for each pruned layer the indices of the filters it kept; other layers kept all.
        batches: images of one size, read once and run as one batch in memory: a few hundred are enough.
        ridge: weight of the present parameters, relative to the mean energy of the input.
        per_image: places of each output map that enter the fit.
        sweeps: how often the pointwise factors of a CPDConv2d are solved, with the spatial factors in between.

    Returns:
        Names of the layers that were refitted.

    Example:
        >>> kept, _ = run_plan(model, graph, plan)
        >>> names = refit(model, dense, kept, [torch.rand(32, 3, 224, 224)])
    """
    images = list(_images(batches, compressed))
    order, norms = _in_order(compressed, images[0][:1])
    layers = {
        name: layer
        for name, layer in order.items()
        if isinstance(layer, CPDConv2d) or _changed(layer, dense.get_submodule(name))
    }
    with evaluating(compressed), evaluating(dense):
        samples = _Samples(dense, layers, images, per_image)

        def solve(name: str, layer: nn.Conv2d | CPDConv2d, x: Tensor) -> None:
            wanted = torch.cat(samples.wanted.pop(name))
            if name in kept:
                wanted = wanted[:, kept[name].to(wanted.device)]
            if layer.bias is not None:
                wanted = wanted - layer.bias[:, None]
            centred = layer.bias is not None or name in norms
            m = _Moments(layer, x, wanted, samples.places[name], centred)
            if isinstance(layer, CPDConv2d):
                layer.set_factors(_refit_cpd(layer, m.gram, m.cross, ridge, sweeps))
            else:
                layer.weight.copy_(_refit_dense(layer.weight, m.gram, m.cross, ridge))
            kernel = layer.kernel() if isinstance(layer, CPDConv2d) else layer.weight
            missing = m.wanted - kernel.double().flatten(1) @ m.seen
            if layer.bias is not None:
                layer.bias += missing
            elif centred:
                norms[name].running_mean -= missing  # type: ignore[operator]

        hooks = [before_call(layer, partial(solve, name)) for name, layer in layers.items()]
        with removing(hooks):
            compressed(torch.cat(images))
    return list(layers)


def _changed(layer: nn.Conv2d, target: nn.Module) -> bool:
    return not isinstance(target, nn.Conv2d) or layer.weight.shape != target.weight.shape


Order = tuple[dict[str, nn.Conv2d | CPDConv2d], dict[str, nn.modules.batchnorm._BatchNorm]]


def _in_order(model: nn.Module, image: Tensor) -> Order:
    """Ungrouped 2-d convolutions that run once a pass, by name, in the order in which they run.

    Returns:
        The convolutions, and the batch norm that reads a convolution's output, by the convolution's name.
    """
    names = {m: n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, CPDConv2d)) and m.groups == 1}
    order: dict[str, nn.Conv2d | CPDConv2d] = {}
    made: dict[int, tuple[str, Tensor]] = {}  # with the tensors, or another tensor could get the same id
    norms: dict[str, nn.modules.batchnorm._BatchNorm] = {}
    calls: Counter[nn.Module] = Counter()

    def note(module: nn.Conv2d | CPDConv2d, out: Tensor) -> None:
        order.setdefault(names[module], module)
        made[id(out)] = names[module], out
        calls[module] += 1

    def read(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> None:
        calls[norm] += 1
        if id(x) in made and norm.running_mean is not None:
            norms[made[id(x)][0]] = norm

    hooks = [m.register_forward_hook(lambda m, a, o: note(m, o)) for m in names]
    hooks += [before_call(m, read) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with removing(hooks), evaluating(model):
        model(image)
    order = {name: layer for name, layer in order.items() if calls[layer] == 1}
    return order, {name: norm for name, norm in norms.items() if calls[norm] == 1}
