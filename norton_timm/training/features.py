"""What a tuning without labels works on: the features that the classifier reads, and weights of natural size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.compression import observe
from norton_timm.layers import CPDConv2d, has_computed_weight
from norton_timm.utils import removing


def classifier_of(model: nn.Module, image: Tensor) -> str | None:
    """Name of the linear layer that makes the class scores; None where something else does."""
    last: list[tuple[str, Any]] = []
    hooks = [
        module.register_forward_hook(lambda m, a, y, name=name: last.append((name, y)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with removing(hooks), torch.no_grad():
        scores = model(image)
    return last[-1][0] if last and last[-1][1] is scores else None


def shared_maps(student: nn.Module, teacher: nn.Module, image: Tensor) -> list[str]:
    """Modules with modules in them, such as blocks and stages, that run once and give maps of equal shape in both."""
    ours, theirs = _maps(student, image), _maps(teacher, image)
    return [name for name, shape in ours.items() if shape and theirs.get(name) == shape]


def _maps(model: nn.Module, image: Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes of maps (N, C, H, W) by module; empty for modules that run more than once or give something else."""
    found: dict[str, tuple[int, ...]] = {}

    def see(name: str, out: Any) -> None:
        fits = isinstance(out, Tensor) and out.dim() == 4 and name not in found
        found[name] = tuple(out.shape) if fits else ()

    inner = [(n, m) for n, m in model.named_modules() if n and any(True for _ in m.children())]
    hooks = [m.register_forward_hook(lambda m, a, y, name=n: see(name, y)) for n, m in inner]
    with removing(hooks), torch.no_grad():
        model(image)
    return found


@contextmanager
def read_by(model: nn.Module, classifier: str | None) -> Iterator[list[Tensor]]:
    """Within the block, the list holds what the classifier read (N, F) in the last forward pass, or its scores."""
    found: list[Tensor] = []

    def see(module: nn.Module, args: Any, out: Any) -> None:
        found[:] = [out if classifier is None else args[0]]

    with removing([model.get_submodule(classifier or '').register_forward_hook(see)]):
        yield found


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of features (N, C, ...) as a share of the wanted ones' squared distance from their mean."""
    mean = wanted.mean([k for k in range(wanted.dim()) if k != 1], keepdim=True)
    return (found - wanted).float().square().sum() / (wanted - mean).float().square().sum().clamp_min(1e-30)


@torch.no_grad()
def balance(model: nn.Module, image: Tensor) -> bool:
    """Move the scale of every batch norm into the weights before it, in place; the outputs stay.

    The norms of narrow networks scale some filters up a thousandfold, so that a step which is small for most weights
    is large for theirs. Afterwards all filters of a layer make outputs of like size.

    Returns:
        False where the outputs would change, as with weights that are used in two places; nothing is done then.

    Example:
        >>> balance(model, torch.rand(1, 3, 224, 224))
        True
        >>> model.bn1.weight
        Parameter containing: tensor([1., 1., ...])
    """
    before, state = model(image), {k: v.clone() for k, v in model.state_dict().items()}
    order = observe(model, image)
    for name, norm in order.norms.items():
        layer = order.layers[name]
        weight = layer.horizontal if isinstance(layer, CPDConv2d) else layer.weight
        if norm.weight is None or norm.bias is None or has_computed_weight(layer):
            continue
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))
        norm.bias.sub_(scale * norm.running_mean)
        if layer.bias is not None:
            layer.bias.mul_(scale)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        norm.weight.fill_(1.0)
    after = model(image)
    if float((after - before).abs().max()) <= 1e-3 * float(before.abs().max()):
        return True
    model.load_state_dict(state)
    return False
