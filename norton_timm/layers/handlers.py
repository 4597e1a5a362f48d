"""What the toolkit must know of a layer type: one class per type.

A handler says how channels run through a layer, how they are sliced, what a filter costs, what the filters are, and
how the widths are read back from tensors. `handler_of` looks the type up. The handlers stand in `layer_types.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.layers.cpd_conv import CPDConv2d

MAKES, PASSES, MIXES = 'makes', 'passes', 'mixes'  # roles of a layer, see LayerHandler


@dataclass
class Positions:
    """Places that a layer computes at, summed over its calls and the batch.

    Attributes:
        inputs: positions of the input map.
        middle: positions between the Kh x 1 and the 1 x Kw convolution of a CPDConv2d (output rows, input columns).
        outputs: positions of the output map.
    """

    inputs: int = 0
    middle: int = 0
    outputs: int = 0


class LayerHandler:
    """Base of the handlers. ``module`` is always of one of the handler's types.

    Attributes:
        types: the layer types, matched exactly: a subclass may use its weights in another way.
        role: ``makes`` channels from those that it reads (a convolution), ``passes`` each channel through on its own
            (a batch norm), or ``mixes`` all channels, which are then kept (a layer norm).
        counted: whether its multiply-accumulates count.
        carries: whether it only puts channels into other places.
        scales: name of the parameter whose rows scale the outputs, so that a norm can be folded into it; '' if none.
    """

    types: tuple[type[nn.Module], ...] = ()
    role = MAKES
    counted = False
    carries = False
    scales = ''

    def widths(self, module: Any) -> tuple[int, int]:
        """Input and output channels."""
        return module.in_channels, module.out_channels

    def channel_dim(self, output: Tensor) -> int:
        """The dimension of input and output that channels lie on."""
        return 1

    def groups(self, module: Any) -> int:
        """Groups in which outputs read inputs."""
        return int(getattr(module, 'groups', 1))

    def put(self, module: Any, kind: str, keep: Tensor) -> None:
        """Give the layer the channels of these indices, in place; -1 stands for a channel of zeros.

        Args:
            module: the layer.
            kind: ``in``, ``out``, ``depthwise`` (both at once), or ``channel`` where the role is ``passes``.
            keep: (channels,) old indices.
        """
        raise NotImplementedError(f'{type(self).__name__} slices no channels')

    def read_widths(self, module: Any, name: str, inputs: int | None = None) -> None:
        """Set the numbers of channels after new tensors took the place of the old ones.

        Args:
            module: the layer.
            name: for messages.
            inputs: input channels, where no tensor tells them.

        Raises:
            ValueError: tensors that do not fit together.
        """

    def filters(self, module: Any) -> Tensor:
        """The filters (O, I, Kh, Kw), I of one group; missing kernel dimensions are 1."""
        return four_dimensions(module.weight.detach())

    def note_positions(self, places: Positions, inputs: Tensor, output: Tensor) -> None:
        """Add the positions of one call."""
        places.inputs += inputs.numel() // inputs.shape[1]
        places.outputs += output.numel() // output.shape[1]
        if inputs.dim() == 4:
            places.middle += inputs.shape[0] * output.shape[2] * inputs.shape[3]

    def filter_cost(self, module: Any, places: Positions, rank: int) -> tuple[float, float]:
        """Multiply-accumulates of one filter: for each input channel that it reads, and besides.

        Args:
            module: the layer.
            places: where it computes; one place each gives the numbers that a filter stores.
            rank: of a decomposition of the layer, 0 for the layer as it is.
        """
        return 0.0, 0.0


_HANDLERS: dict[type, LayerHandler] = {}


def register(cls: type[LayerHandler]) -> type[LayerHandler]:
    """Make a handler known for its types; a decorator.

    Raises:
        ValueError: a type that has a handler already.
    """
    handler = cls()
    for kind in cls.types:
        if kind in _HANDLERS:
            raise ValueError(f'{kind.__name__} has a handler already, {type(_HANDLERS[kind]).__name__}')
        _HANDLERS[kind] = handler
    return cls


def handler_of(module: nn.Module) -> LayerHandler | None:
    """The handler of exactly this layer type, None for all other modules."""
    return _HANDLERS.get(type(module))


def nearest_handler(module: nn.Module) -> LayerHandler | None:
    """The handler of the layer's type or of the nearest type that it derives from."""
    return next((_HANDLERS[kind] for kind in type(module).__mro__ if kind in _HANDLERS), None)


def filters_of(module: nn.Module) -> Tensor:
    """The filters of a layer (O, I, Kh, Kw), see :meth:`LayerHandler.filters`."""
    return (nearest_handler(module) or LayerHandler()).filters(module)


def is_counted(module: nn.Module) -> bool:
    """Whether the module is a layer whose multiply-accumulates are counted: a convolution or a linear layer."""
    handler = nearest_handler(module)
    return handler is not None and handler.counted


def first_conv(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the first 2-d convolution, dense or decomposed; None where there is none."""
    return next(((n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, CPDConv2d))), None)


def take(module: nn.Module, name: str, keep: Tensor, dim: int) -> None:
    """Put the given indices of one parameter or buffer in its place; type, device and memory layout stay.

    Args:
        module: the owner.
        name: of the tensor.
        keep: (n,) old indices, -1 is zero.
        dim: that they are of.
    """
    old = getattr(module, name)
    source = old.detach()
    if (keep < 0).any():
        source = torch.cat([source, torch.zeros_like(source.narrow(dim, 0, 1))], dim)
    new = source.index_select(dim, torch.where(keep < 0, old.shape[dim], keep).to(old.device))
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, name, new)


def four_dimensions(weight: Tensor) -> Tensor:
    """A weight (O, I, ...) as (O, I, Kh, Kw): missing kernel dimensions become 1, a third one joins the second."""
    weight = weight.flatten(3) if weight.dim() == 5 else weight
    return weight.reshape(*weight.shape, *[1] * (4 - weight.dim()))
