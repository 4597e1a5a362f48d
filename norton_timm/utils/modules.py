"""Helpers for modules and tensors: evaluation mode, hooks, replaced submodules, and NaN that is found and named."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, nn.Module, type)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinite number; None where all are finite."""
    found = (n for n, t in tensors.items() if t.is_floating_point() and not t.is_meta and not bool(t.isfinite().all()))
    return next(found, None)


def at_least_float32(x: Tensor) -> Tensor:
    """Numbers of half precision as float32: neither sums nor decompositions hold in less."""
    return x if x.dtype == torch.float64 else x.float()


def check_weights(model: nn.Module, what: object) -> None:
    """Check that all weights and statistics of a network are finite.

    Args:
        model: the network.
        what: name of the network, for the message.

    Raises:
        FloatingPointError: a tensor is not finite; the message names it.
    """
    name = not_finite(model.state_dict())
    if name is not None:
        raise FloatingPointError(f'{what}: the tensor {name} holds NaN or infinite numbers')


@contextlib.contextmanager
def removing(hooks: Iterable[Any]) -> Iterator[None]:
    """Remove these hooks at the end of the block."""
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
        hint: end of the message: what to do about it.
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
    """All tensors inside nested lists, tuples, mappings and the attributes of objects that hold data.

    Such objects are dataclasses, namespaces and outputs of other libraries. Modules and classes are not looked into.
    """
    return list(_tensors(value, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if value is None or isinstance(value, _PLAIN) or id(value) in seen:
        return
    seen.add(id(value))  # an object may hold itself
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = value
    elif not callable(value):
        items = list(getattr(value, '__dict__', {}).values())
        items += [getattr(value, name, None) for name in getattr(type(value), '__slots__', ())]
    for item in items:
        yield from _tensors(item, seen)


def before_call(module: nn.Module, see: Callable[[Any, Any], object]) -> Any:
    """A hook: ``see(module, first input)`` before each call, whether the input comes by position or by keyword."""

    def hook(m: nn.Module, args: Any, kwargs: Any) -> None:
        see(m, first_input(args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def after_call(module: nn.Module, see: Callable[[Any, Any, Any], object]) -> Any:
    """A hook: ``see(module, first input, output)`` after each call, see :func:`before_call`."""

    def hook(m: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        see(m, first_input(args, kwargs), output)

    return module.register_forward_hook(hook, with_kwargs=True)


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call, by position or by keyword; None where there is none."""
    return args[0] if args else next(iter(kwargs.values()), None)


def uncompiled(model: nn.Module) -> nn.Module:
    """The network without ``torch.compile``: the one inside, or a copy where only parts of it are compiled."""
    model = getattr(model, '_orig_mod', model)
    if _compiled_part(model):
        model = copy_of(model)
    while name := _compiled_part(model):
        replace_module(model, name, model.get_submodule(name)._orig_mod)  # type: ignore[arg-type]
    return model


def _compiled_part(model: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if hasattr(module, '_orig_mod')), '')


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; weights that a hook computed in a pass with gradients are copied without their history."""
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, memo)


def to_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Change the memory layout of 4-d weights, in place; PyTorch's own way fails where there are 5-d weights too."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=layout)
    return model


def tied_modules(model: nn.Module) -> set[nn.Module]:
    """Modules that share a parameter with another module."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode without gradients, then restore every module's training flag."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def plain_layer(model: nn.Module, name: str, kind: type[nn.Module], what: str) -> Any:
    """The layer with this dotted name and exactly this type; messages say ``what`` it is to become.

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
    """Replace the submodule with this dotted name by ``new``, everywhere it is used."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
