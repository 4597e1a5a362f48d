"""Residual blocks that are left out: their shortcut remains."""

from __future__ import annotations

import itertools
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
        ValueError: a name that the network does not have, that of the network itself, or that of a part of another
            block that is left out.
    """
    modules, names = dict(model.named_modules()), dict.fromkeys(names)
    for name in names:
        if not name or name not in modules:
            raise ValueError(f'got a block {name[:80]!r} to leave out that the network does not have')
        outer = next((o for o in itertools.accumulate(name.split('.'), '{}.{}'.format) if o in names), name)
        if outer != name:
            raise ValueError(f'got a block {name!r} to leave out, which is a part of {outer!r}')
    for name in names:
        replace_module(model, name, DroppedBlock())
