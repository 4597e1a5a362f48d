"""The dense network that a file names, built without weights."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from timm.models import is_model, model_entrypoint
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

TORCHVISION = 'torchvision/'


@contextmanager
def _weightless() -> Iterator[None]:
    """Parameters that this thread registers go to the meta device; the random generator is left as it was."""
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
    """The name without a tag; the dense network where it is one of our compressed ones."""
    if architecture.startswith(TORCHVISION):
        return architecture
    name = architecture.partition('.')[0]
    base = re.sub('^(norton|coring)_', '', name)
    return base if is_model(base) else name


def dense_name(name: str) -> str:
    """Timm's name of the dense network that a compressed one was made from; others as they are."""
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
