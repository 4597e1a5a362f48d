"""The dense network that a file names, built without weights, and saved tensors fitted into it."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torchvision
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from norton_timm.layers import CPDConv2d, nearest_handler
from norton_timm.utils import evaluating, plain_layer, replace_module

TORCHVISION = 'torchvision/'


@contextmanager
def _weightless() -> Iterator[None]:
    """Put parameters that this thread registers on the meta device; the random generator keeps its state."""
    thread = threading.get_ident()

    def drop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to('meta'), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(drop)  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        handle.remove()


def base_name(architecture: str) -> str:
    """The name without a tag; for one of our compressed networks, the name of its dense network."""
    if architecture.startswith(TORCHVISION):
        return architecture
    name = architecture.partition('.')[0]
    base = re.sub('^(norton|coring)_', '', name)
    return base if is_model(base) else name


def dense_name(name: str) -> str:
    """Timm's name of the dense network that a compressed one was made from; other names come back unchanged."""
    dense = base_name(name)
    return dense if dense != name.partition('.')[0] else name


def build_base(architecture: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The dense network with its parameters on the meta device; buffers are real.

    Raises:
        ValueError: no registered architecture, or arguments that it does not take.
    """
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    if architecture.startswith(TORCHVISION):
        name = architecture[len(TORCHVISION) :]
        if name not in torchvision.models.list_models():
            raise ValueError(f'got architecture {architecture[:80]!r}, which torchvision does not have')
        make = torchvision.models.get_model_builder(name)
        # without an explicit None, some builders fetch weights
        kwargs.update({k: None for k in inspect.signature(make).parameters if k.startswith('weights')})
    else:
        if not re.fullmatch(r'[A-Za-z0-9_]+', architecture) or not is_model(architecture):
            raise ValueError(f'got architecture {architecture[:80]!r}, expected the plain name of a timm model')
        make, kwargs['pretrained'] = model_entrypoint(architecture), False
    try:
        with _weightless():
            return make(**kwargs).eval()
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f'cannot build {architecture} with {kwargs}: {" ".join(str(error).split())[:200]}') from None


class Owned(NamedTuple):
    """One parameter or buffer of a network and every (module, attribute) that holds it."""

    tensor: Tensor
    places: list[tuple[nn.Module, str]]
    persistent: bool


def owned_tensors(model: nn.Module) -> dict[str, Owned]:
    """Parameters and buffers by dotted name; one that several modules share appears once, under its first name."""
    found: dict[int, Owned] = {}
    names: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in found:
                found[id(tensor)] = Owned(tensor, [], key not in module._non_persistent_buffers_set)
                names[id(tensor)] = f'{prefix}.{key}' if prefix else key
            found[id(tensor)].places.append((module, key))
    return {names[key]: owned for key, owned in found.items()}


def _some(names: list[str]) -> str:
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def decompose_shapes(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Replace the named convolutions by CPDConv2d without weights (on the meta device), in place.

    Raises:
        ValueError: a name that is no plain convolution.
    """
    for name, rank in ranks.items():
        conv = plain_layer(model, name, nn.Conv2d, 'decomposed')
        replace_module(model, name, CPDConv2d.like(conv, rank, device='meta'))


def fit_tensors(model: nn.Module, tensors: Mapping[str, Tensor], maps: Mapping[str, int]) -> None:
    """Replace the tensors of a larger network by saved ones, in place, and set every width to match.

    Args:
        model: the network before pruning, decomposed where the saved one is; weights may be on the meta device.
        tensors: every persistent tensor by name, and the other buffers of changed shape.
        maps: input channels of every :class:`ChannelMap`.

    Raises:
        ValueError: a tensor is missing, unexpected, or larger than the network's own.
    """
    owned = owned_tensors(model)
    missing = [name for name, o in owned.items() if o.persistent and name not in tensors]
    extra = [name for name in tensors if name not in owned]
    if missing or extra:
        told = ([f'without {_some(missing)}'] if missing else []) + ([f'with {_some(extra)}'] if extra else [])
        raise ValueError(f'got tensors {" and ".join(told)}, expected those of the network')
    for name, tensor in tensors.items():
        _check(name, owned[name].tensor, tensor)
    for name, tensor in tensors.items():
        old = owned[name].tensor
        new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        for module, key in owned[name].places:
            if isinstance(new, nn.Parameter):
                module._parameters[key] = new
            else:
                module._buffers[key] = new
    for name, module in model.named_modules():
        handler = nearest_handler(module)
        if handler is not None:
            handler.read_widths(module, name, maps.get(name))


def _check(name: str, old: Tensor, new: Tensor) -> None:
    """Surgery only ever shrinks the first two dimensions, and keeps the kind of number."""
    got, most = tuple(new.shape), tuple(old.shape)
    fits = len(got) == len(most) and got[2:] == most[2:] and all(1 <= g <= m for g, m in zip(got, most))
    if not fits:
        raise ValueError(f'got {name} of shape {got}, expected at most {most}')
    if new.is_floating_point() != old.is_floating_point() or new.is_complex():
        raise ValueError(f'got {name} of type {new.dtype}, expected {old.dtype}')


def first_channels(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The leading part of a constant buffer (a blur kernel, the same for every channel)."""
    return old[tuple(slice(n) for n in shape)].clone()


def runs_through(model: nn.Module, example_input: Tensor) -> None:
    """Run one forward pass on shapes alone; it computes and allocates nothing.

    Raises:
        ValueError: the widths of two layers disagree.
    """
    state = {name: o.tensor.detach().to('meta') for name, o in owned_tensors(model).items()}
    try:
        with evaluating(model):
            torch.func.functional_call(model, state, (example_input.to('meta'),))
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        raise ValueError(f'layers do not fit together: {" ".join(str(error).split())[:200]}') from None
