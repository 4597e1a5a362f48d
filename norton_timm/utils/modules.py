"""Walks over modules and tensors: modes, hooks, replacement, and NaN found and named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinite number; None where all are finite."""
    found = (n for n, t in tensors.items() if t.is_floating_point() and not t.is_meta and not bool(t.isfinite().all()))
    return next(found, None)


def check_weights(model: nn.Module, what: object) -> None:
    """Look at all weights and statistics of a network.

    Args:
        model: the network.
        what: of it, for the message.

    Raises:
        FloatingPointError: naming the tensor that is not finite.
    """
    name = not_finite(model.state_dict())
    if name is not None:
        raise FloatingPointError(f'{what}: the tensor {name} holds NaN or infinite numbers')


@contextlib.contextmanager
def removing(hooks: Iterable[Any]) -> Iterator[None]:
    """Within the block these hooks are called; then they are removed."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def watched(modules: Mapping[str, nn.Module], hint: str) -> Iterator[None]:
    """Within the block, outputs of these modules that are not finite raise `FloatingPointError` with their name.

    Args:
        modules: what to watch; outputs are tensors, or mappings or sequences of them.
        hint: the end of the message, what to do about it.
    """

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if any(t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors_in(output)):
                raise FloatingPointError(f'the output of {name} holds NaN or infinite numbers; {hint}')

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in modules.items()]
    with removing(handles):
        yield


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors inside nested lists, tuples, dicts and objects with ``tensors`` (torchvision's ImageList)."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_in(v)]
    return tensors_in(value.tensors) if hasattr(value, 'tensors') else []


def tied_modules(model: nn.Module) -> set[nn.Module]:
    """Modules with a parameter that is also another module's."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's training flag comes back."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def plain_layer(model: nn.Module, name: str, kind: type[nn.Module], what: str) -> Any:
    """The layer of this dotted name, of exactly this type; ``what`` tells in messages what it becomes.

    Raises:
        ValueError: there is no such layer.
    """
    found = dict(model.named_modules()).get(name)
    if found is None:
        raise ValueError(f'got a {what} layer {name[:80]!r} that the network does not have')
    if type(found) is not kind:
        raise ValueError(f'got a {what} layer {name!r}, expected a {kind.__name__} there, not {type(found).__name__}')
    return found


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule of this dotted name, everywhere that it is used."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
