"""Residual blocks that are left out: their shortcut remains."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from norton_timm.utils import replace_module


class DroppedBlock(nn.Identity):
    """Stands where a residual block was, and passes its input on."""


def present_at(model: nn.Module, name: str) -> nn.Module:
    """The module of this name, or the dropped block that it belonged to.

    Raises:
        AttributeError: neither is there.
    """
    module = model
    for part in name.split('.'):
        if isinstance(module, DroppedBlock):
            break
        module = getattr(module, part)
    return module


def drop_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Replace blocks by :class:`DroppedBlock`, in place.

    Raises:
        ValueError: a name that the network does not have, or that of the network itself.
    """
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            raise ValueError(f'got a block {name[:80]!r} to leave out that the network does not have')
        replace_module(model, name, DroppedBlock())
