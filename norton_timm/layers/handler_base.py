"""The base class of layer handlers, and how the handler of a layer is found.

A handler says how channels run through a layer, how they are sliced, what a filter costs, what the filters are, and
how the widths are read back from tensors. `handler_of` looks the type up. The handlers are in `handlers.py`.
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
    """Positions at which a layer computes, summed over its calls and the batch.

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
        carries: whether it only moves channels to other places.
        scales: name of the parameter that a norm can be folded into, because its rows scale the outputs; '' if none.
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
        """Number of groups of a convolution, 1 for other layers."""
        return int(getattr(module, 'groups', 1))

    def put(self, module: Any, kind: str, keep: Tensor) -> None:
        """Keep the channels of these indices, in place; -1 adds a channel of zeros.

        Args:
            module: the layer.
            kind: ``in``, ``out``, ``depthwise`` (both at once), or ``channel`` where the role is ``passes``.
            keep: (channels,) old indices.
        """
        raise NotImplementedError(f'{type(self).__name__} slices no channels')

    def read_widths(self, module: Any, name: str, inputs: int | None = None) -> None:
        """Set the numbers of channels from the layer's tensors, after they were replaced.

        Args:
            module: the layer.
            name: name of the layer, for messages.
            inputs: number of input channels, for layers without a tensor that tells it.

        Raises:
            ValueError: tensors that do not fit together.
        """

    def filters(self, module: Any) -> Tensor:
        """The filters (O, I, Kh, Kw) with I inputs of one group; missing kernel dimensions are 1."""
        return four_dimensions(module.weight.detach())

    def note_positions(self, places: Positions, inputs: Tensor, output: Tensor) -> None:
        """Add the positions of one call."""
        places.inputs += inputs.numel() // inputs.shape[1]
        places.outputs += output.numel() // output.shape[1]
        if inputs.dim() == 4:
            places.middle += inputs.shape[0] * output.shape[2] * inputs.shape[3]

    def filter_cost(self, module: Any, places: Positions, rank: int) -> tuple[float, float]:
        """Multiply-accumulates of one filter: per input channel that it reads, and those that do not depend on inputs.

        Args:
            module: the layer.
            places: positions at which it computes; with one position each, the result is the filter's parameters.
            rank: rank of a decomposition of the layer, 0 for the layer as it is.
        """
        return 0.0, 0.0


_HANDLERS: dict[type, LayerHandler] = {}


def register(cls: type[LayerHandler]) -> type[LayerHandler]:
    """Decorator that registers a handler for its layer types.

    Raises:
        ValueError: a type that has a handler already.

    Example:
        >>> @register
        ... class MyConvHandler(ConvHandler):
        ...     types = (MyConv2d,)
    """
    handler = cls()
    for kind in cls.types:
        if kind in _HANDLERS:
            raise ValueError(f'{kind.__name__} has a handler already, {type(_HANDLERS[kind]).__name__}')
        _HANDLERS[kind] = handler
    return cls


def handler_of(module: nn.Module) -> LayerHandler | None:
    """The handler of exactly this layer type; None for modules without one.

    Example:
        >>> conv = nn.Conv2d(3, 8, 5)
        >>> handler_of(conv).widths(conv)
        (3, 8)
    """
    return _HANDLERS.get(type(module))


def nearest_handler(module: nn.Module) -> LayerHandler | None:
    """The handler of the layer's type, or of its nearest base class that has one; None if there is none."""
    return next((_HANDLERS[kind] for kind in type(module).__mro__ if kind in _HANDLERS), None)


def has_computed_weight(module: nn.Module) -> bool:
    """Whether a hook computes the weight from other tensors before each call (weight norm, pruning masks)."""
    if getattr(module, 'holds_factors', False):  # our layers, whose weight is made for others to look at
        return False
    return isinstance(getattr(module, 'weight', None), Tensor) and 'weight' not in module._parameters


def filters_of(module: nn.Module) -> Tensor:
    """The filters of a layer (O, I, Kh, Kw), see :meth:`LayerHandler.filters`.

    Example:
        >>> filters_of(nn.Conv2d(3, 8, 5)).shape
        torch.Size([8, 3, 5, 5])
    """
    return (nearest_handler(module) or LayerHandler()).filters(module)


def is_counted(module: nn.Module) -> bool:
    """Whether the module is a layer whose multiply-accumulates are counted: a convolution or a linear layer."""
    handler = nearest_handler(module)
    return handler is not None and handler.counted


def first_conv(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the first 2-d convolution, dense or decomposed; None where there is none."""
    return next(((n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, CPDConv2d))), None)


def take(module: nn.Module, name: str, keep: Tensor, dim: int) -> None:
    """Replace a parameter or buffer by the given indices of it; dtype, device and memory layout stay.

    Args:
        module: owner of the tensor.
        name: name of the tensor.
        keep: (n,) old indices, -1 gives zeros.
        dim: dimension that the indices select from.
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
