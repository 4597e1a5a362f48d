"""What the toolkit must know of a layer type: one class per type.

A handler says how channels run through a layer, how they are sliced, what a filter costs, what the filters are, and
how the widths are read back from tensors. `handler_of` looks the type up; to add a type, write a subclass of
`LayerHandler`, name the types it is for, and decorate it with `register`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm import layers as timm_layers
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from norton_timm.layers.channel_map import ChannelMap
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
        return _four_dimensions(module.weight.detach())

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


def _four_dimensions(weight: Tensor) -> Tensor:
    weight = weight.flatten(3) if weight.dim() == 5 else weight
    return weight.reshape(*weight.shape, *[1] * (4 - weight.dim()))


def _set_outputs(module: Any, kind: str, channels: int) -> None:
    """Note the number of outputs; a depthwise layer has as many inputs and groups, by its multiplier."""
    if kind == 'depthwise':
        module.in_channels = module.groups = channels // (module.out_channels // module.in_channels)
    module.out_channels = channels


class _Convolution(LayerHandler):
    counted = True

    def filter_cost(self, module: Any, places: Positions, rank: int) -> tuple[float, float]:
        if rank == 0:
            return float(np.prod(module.kernel_size) * places.outputs), 0.0
        height, width = module.kernel_size
        return float(rank * places.inputs), float(rank * (height * places.middle + width * places.outputs))


@register
class ConvHandler(_Convolution):
    """Convolutions: weight (O, I / groups, ...)."""

    types = (nn.Conv1d, nn.Conv2d, nn.Conv3d, timm_layers.Conv2dSame)
    scales = 'weight'

    def put(self, module: Any, kind: str, keep: Tensor) -> None:
        if kind == 'in':  # equal places are kept in every group
            take(module, 'weight', keep[keep < module.in_channels // module.groups], 1)
            module.in_channels = len(keep)
            return
        take(module, 'weight', keep, 0)
        if module.bias is not None:
            take(module, 'bias', keep, 0)
        _set_outputs(module, kind, len(keep))

    def read_widths(self, module: Any, name: str, inputs: int | None = None) -> None:
        outputs, fan_in = module.weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise
            multiplier = module.out_channels // module.in_channels
            module.in_channels = module.groups = outputs // multiplier
            wrong = fan_in != 1 or outputs % multiplier
        else:
            module.in_channels = fan_in * module.groups
            wrong = outputs % module.groups
        if wrong:
            raise ValueError(f'got {name}.weight of shape {tuple(module.weight.shape)}, which its groups do not divide')
        module.out_channels = outputs


@register
class TransposedConvHandler(_Convolution):
    """Transposed convolutions: weight (I, O / groups, ...)."""

    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    scales = 'weight'

    def put(self, module: Any, kind: str, keep: Tensor) -> None:
        if kind == 'in':
            take(module, 'weight', keep, 0)
            module.in_channels = len(keep)
            return
        if kind == 'depthwise':
            take(module, 'weight', keep, 0)
        else:  # equal places are kept in every group
            take(module, 'weight', keep[keep < module.out_channels // module.groups], 1)
        if module.bias is not None:
            take(module, 'bias', keep, 0)
        _set_outputs(module, kind, len(keep))

    def read_widths(self, module: Any, name: str, inputs: int | None = None) -> None:
        fan_in, per_group = module.weight.shape[:2]
        if fan_in % module.groups:
            raise ValueError(f'got {name}.weight of shape {tuple(module.weight.shape)}, which its groups do not divide')
        module.in_channels, module.out_channels = fan_in, per_group * module.groups

    def filters(self, module: Any) -> Tensor:
        weight = module.weight.detach().transpose(0, 1)
        if module.groups > 1:  # (O / groups, I, ...): the input channels of a filter are one group's
            weight = torch.cat([w for w in weight.split(weight.shape[1] // module.groups, dim=1)])
        return _four_dimensions(weight)

    def filter_cost(self, module: Any, places: Positions, rank: int) -> tuple[float, float]:
        return float(np.prod(module.kernel_size) * places.inputs), 0.0


@register
class CPDConvHandler(_Convolution):
    """Decomposed convolutions: factors in filter-major order."""

    types = (CPDConv2d,)
    scales = 'horizontal'

    def put(self, module: CPDConv2d, kind: str, keep: Tensor) -> None:
        if kind == 'in':
            take(module, 'pointwise', keep[keep < module.in_channels // module.groups], 1)
            module.in_channels = len(keep)
        else:
            rank = module.rank
            rows = torch.where(keep[:, None] < 0, -1, keep[:, None] * rank + torch.arange(rank)).flatten()
            take(module, 'pointwise', rows, 0)
            take(module, 'vertical', rows, 0)
            take(module, 'horizontal', keep, 0)
            if module.bias is not None:
                take(module, 'bias', keep, 0)
            _set_outputs(module, kind, len(keep))
        module.tuned.clear()

    def read_widths(self, module: CPDConv2d, name: str, inputs: int | None = None) -> None:
        outputs, rank = module.horizontal.shape[:2]
        rows = outputs * rank
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise
            module.groups = outputs // (module.out_channels // module.in_channels)
        if rank != module.rank or module.pointwise.shape[0] != rows or module.vertical.shape[0] != rows:
            raise ValueError(f'got factors of {name} that do not fit rank {module.rank} and {outputs} filters')
        module.in_channels, module.out_channels = module.pointwise.shape[1] * module.groups, outputs
        if outputs % module.groups:
            raise ValueError(f'got {name} with {outputs} filters, expected a multiple of its {module.groups} groups')

    def filters(self, module: CPDConv2d) -> Tensor:
        return module.kernel().detach()

    def filter_cost(self, module: CPDConv2d, places: Positions, rank: int) -> tuple[float, float]:
        return super().filter_cost(module, places, module.rank)  # it costs what its own rank says


@register
class LinearHandler(LayerHandler):
    """Linear layers: weight (O, I), channels on the last dimension."""

    types = (nn.Linear, timm_layers.Linear)
    counted = True

    def widths(self, module: nn.Linear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def channel_dim(self, output: Tensor) -> int:
        return output.dim() - 1

    def put(self, module: nn.Linear, kind: str, keep: Tensor) -> None:
        take(module, 'weight', keep, 0 if kind == 'out' else 1)
        if kind == 'in':
            module.in_features = len(keep)
            return
        if module.bias is not None:
            take(module, 'bias', keep, 0)
        module.out_features = len(keep)

    def read_widths(self, module: nn.Linear, name: str, inputs: int | None = None) -> None:
        module.out_features, module.in_features = module.weight.shape

    def note_positions(self, places: Positions, inputs: Tensor, output: Tensor) -> None:
        places.outputs += output.numel() // output.shape[-1]

    def filter_cost(self, module: nn.Linear, places: Positions, rank: int) -> tuple[float, float]:
        return float(places.outputs), 0.0


@register
class ChannelMapHandler(LayerHandler):
    """The shortcut of CIFAR ResNets: it carries channels to other places and makes none."""

    types = (ChannelMap,)
    carries = True

    def put(self, module: ChannelMap, kind: str, keep: Tensor) -> None:
        index = module.index.cpu()
        if kind == 'out':
            module.set_index(index[keep])
            return
        new = torch.full((module.in_channels + 1,), -1)  # index -1, zero, stays -1
        new[keep] = torch.arange(len(keep))
        module.set_index(new[index], len(keep))

    def read_widths(self, module: ChannelMap, name: str, inputs: int | None = None) -> None:
        channels = module.in_channels if inputs is None else inputs
        if not 1 <= channels <= module.in_channels:
            raise ValueError(f'got {name} with {channels} input channels, expected 1 to {module.in_channels}')
        module.set_index(module.index, channels)


@register
class BatchNormHandler(LayerHandler):
    """Norms with statistics of each channel on its own."""

    types = (
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d,
        timm_layers.BatchNormAct2d, timm_layers.SyncBatchNormAct, timm_layers.FrozenBatchNormAct2d,
        nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    )  # fmt: skip
    role = PASSES

    def put(self, module: Any, kind: str, keep: Tensor) -> None:
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            if getattr(module, name, None) is not None:
                take(module, name, keep, 0)
        if hasattr(module, 'num_features'):
            module.num_features = len(keep)

    def read_widths(self, module: Any, name: str, inputs: int | None = None) -> None:
        tensors = (getattr(module, key, None) for key in ('running_mean', 'weight'))
        channels = next((len(tensor) for tensor in tensors if tensor is not None), None)
        if channels is not None and hasattr(module, 'num_features'):
            module.num_features = channels


@register
class PReLUHandler(LayerHandler):
    """PReLU: a slope for each channel, or one for all."""

    types = (nn.PReLU,)
    role = PASSES

    def put(self, module: nn.PReLU, kind: str, keep: Tensor) -> None:
        if module.weight.numel() > 1:
            take(module, 'weight', keep, 0)
        module.num_parameters = len(module.weight)

    def read_widths(self, module: nn.PReLU, name: str, inputs: int | None = None) -> None:
        module.num_parameters = len(module.weight)


@register
class BlurPoolHandler(LayerHandler):
    """timm's anti-aliasing pooling: the same blur for each channel, in a buffer."""

    types = (timm_layers.BlurPool2d,)
    role = PASSES

    def put(self, module: Any, kind: str, keep: Tensor) -> None:
        take(module, 'filt', keep, 0)
        module.channels = len(keep)

    def read_widths(self, module: Any, name: str, inputs: int | None = None) -> None:
        module.channels = module.filt.shape[0]


@register
class MixingHandler(LayerHandler):
    """Norms with statistics over channels: every channel depends on all of them."""

    types = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
    role = MIXES
