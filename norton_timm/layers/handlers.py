"""A handler for every layer type that the toolkit knows; a new type is one more class here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm import layers as timm_layers
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from norton_timm.layers.channel_map import ChannelMap
from norton_timm.layers.cpd_conv import CPDConv2d
from norton_timm.layers.handler_base import MIXES, PASSES, LayerHandler, Positions, four_dimensions, register, take


def _set_outputs(module: Any, kind: str, channels: int) -> None:
    """Set the number of outputs; a depthwise layer also has outputs / multiplier inputs and groups."""
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
        if kind == 'in':  # every group keeps the same places
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
        else:  # every group keeps the same places
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
        if module.groups > 1:  # (O / groups, I, ...): a filter reads the input channels of one group
            weight = torch.cat([w for w in weight.split(weight.shape[1] // module.groups, dim=1)])
        return four_dimensions(weight)

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
        return super().filter_cost(module, places, module.rank)  # its own rank decides


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
    """Norms with separate statistics for each channel."""

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
