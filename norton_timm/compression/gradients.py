"""How much errors within a network change its outputs, to second order, from gradients at a few images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.utils import removing, tensors_in

TEMPERATURE = 4.0  # of class scores; at 1, images of whose class a network is sure would say nothing of errors


def output_probe(outputs: Any, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Output tensors, and a random vector v for each, with E[v v^T] the curvature of the error.

    For class scores (N, K) the error is the Kullback-Leibler divergence at ``TEMPERATURE``, times its square, whose
    curvature is ``diag(p) - p p^T``. For other outputs it is the squared error relative to the squared size.
    """
    tensors = [t for t in tensors_in(outputs) if t.requires_grad]
    if not tensors:
        raise ValueError('calibration: got a network whose outputs have no gradient, expected a differentiable one')
    if len(tensors) == 1 and tensors[0].dim() == 2 and tensors[0].shape[1] > 1:
        p = (tensors[0].detach().float() / TEMPERATURE).softmax(1)
        root = p.sqrt()
        noise = torch.randn(p.shape, generator=generator).to(p.device)
        v = root * noise - p * (root * noise).sum(1, keepdim=True)
        return tensors, [v.to(tensors[0].dtype)]
    size = sum(float(t.detach().float().square().sum()) for t in tensors) / 2
    noises = [torch.randn(t.shape, generator=generator).to(t) for t in tensors]
    return tensors, [noise / max(size, 1e-30) ** 0.5 for noise in noises]


@contextmanager
def _trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block the network is in evaluation mode and only these parameters have gradients."""
    modes = {m: m.training for m in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    grads = {p: p.grad for p in model.parameters()}
    wanted = set(parameters)
    model.eval()
    try:
        for p in model.parameters():
            p.requires_grad_(p in wanted)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for p, flag in flags.items():
            p.requires_grad_(flag)
            p.grad = grads[p]


def output_importance(model: nn.Module, layers: Mapping[str, Any], images: Tensor) -> dict[str, Tensor]:
    """Importance of an error of each output of each layer: the root of the summed squared gradient.

    Args:
        model: the network.
        layers: convolutions and linear layers by name.
        images: a batch; 32 are enough.

    Returns:
        Vectors (O,); no entry is below 1 % of the layer's root mean square.
    """
    if not layers:
        return {}
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            channel = output.dim() - 1 if isinstance(layer, nn.Linear) else 1

            def add(grad: Tensor) -> None:
                total = grad.detach().float().square().transpose(0, channel).flatten(1).sum(1)
                found[name] = found.get(name, 0) + total  # type: ignore[operator]

            if output.requires_grad:
                output.register_hook(add)

        return layer.register_forward_hook(hook)

    weights = [p for layer in layers.values() for p in layer.parameters(recurse=False)]
    hooks = [watch(name, layer) for name, layer in layers.items()]
    with removing(hooks), torch.enable_grad(), _trainable(model, weights):
        for image in images.split(8):
            model.zero_grad(set_to_none=True)
            tensors, vectors = output_probe(model(image), generator)
            torch.autograd.backward(tensors, vectors)
    result = {}
    for name, total in found.items():
        root = (total / len(images)).sqrt()
        size = float(root.square().mean().sqrt())
        result[name] = root.clamp_min(1e-2 * size) if size > 0 else torch.ones_like(root)
    return result


def each_gradient(
    model: nn.Module,
    layers: Mapping[str, Any],
    images: Tensor,
    seen: Callable[[dict[str, tuple[Tensor, Tensor]]], None],
) -> None:
    """Call ``seen`` once per image with the gradients of a random error of the outputs.

    With D a change of weights, ``0.5 * mean((sum(D * gradient)) ** 2)`` is the divergence that it causes, to second
    order (the generalised Gauss-Newton form).

    Args:
        model: the network.
        layers: convolutions and linear layers by name.
        images: a batch; a hundred are enough.
        seen: gets for each layer the gradients of its weight, and of a bias (O,) whether it has one or not.
    """
    generator = torch.Generator().manual_seed(1)
    sums: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            channel = output.dim() - 1 if isinstance(layer, nn.Linear) else 1

            def add(grad: Tensor) -> None:
                total = grad.detach().transpose(0, channel).flatten(1).sum(1)
                sums[name] = sums[name] + total if name in sums else total

            if output.requires_grad:
                output.register_hook(add)

        return layer.register_forward_hook(hook)

    hooks = [watch(name, layer) for name, layer in layers.items()]
    with removing(hooks), torch.enable_grad(), _trainable(model, [layer.weight for layer in layers.values()]):
        for image in images.split(1):
            model.zero_grad(set_to_none=True)
            sums.clear()
            tensors, vectors = output_probe(model(image), generator)
            torch.autograd.backward(tensors, vectors)
            seen({n: (layer.weight.grad, sums[n]) for n, layer in layers.items() if layer.weight.grad is not None})
