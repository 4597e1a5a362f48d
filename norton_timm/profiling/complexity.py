"""MACs and parameters, counted in the same way for dense and compressed networks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from norton_timm.layers import first_conv, nearest_handler, use_form
from norton_timm.utils import as_whole, evaluating, tensors_in, uncompiled

# convolutions and linear layers; attention products and pointwise work are not counted
_COUNTED = ('convolution', '_convolution', 'addmm', 'mm', 'linear')


class Complexity(NamedTuple):
    """Cost of one forward pass: multiply-accumulates of convolutions and linear layers, and parameters."""

    macs: int
    params: int


def default_input(model: nn.Module, size: int | None = None) -> Tensor:
    """One random image for the model, (1, C, H, W).

    Args:
        model: its first convolution gives C; its ``pretrained_cfg`` gives H and W, which are 224 without one.
        size: H and W in pixels, instead.

    Raises:
        ValueError: a model without a 2-d convolution.

    Example:
        >>> default_input(timm.create_model('resnet18')).shape
        torch.Size([1, 3, 224, 224])
    """
    first = first_conv(model)
    if first is None:
        raise ValueError(f'got {type(model).__name__} without a 2-d convolution, expected a convolutional network')
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    pixels = (size, size) if size is not None else tuple(cfg.get('input_size', (3, 224, 224)))[-2:]
    return make_input(model, (first[1].in_channels, *pixels))


def make_input(model: nn.Module, source: int | Sequence[int] | Tensor | list[Tensor] | None = None) -> Any:
    """An input on the model's device and in its type.

    Args:
        model: the network that is to take it.
        source: 224, (C, H, W), (N, C, H, W), or the images themselves; None means :func:`default_input`.

    Raises:
        ValueError: anything else, also a tuple of tensors: the network must take one argument.
    """
    check_one_input(model)
    if source is None:
        return default_input(model)
    parameter = next(iter(model.parameters()), torch.empty(0))
    if isinstance(source, Tensor):
        return source.to(parameter.device, parameter.dtype if source.is_floating_point() else source.dtype)
    if isinstance(source, list) and source and all(isinstance(t, Tensor) for t in source):
        return [make_input(model, t) for t in source]
    if isinstance(source, (tuple, dict)) and tensors_in(source):
        raise ValueError(f'got {len(source)} inputs, expected one: give a network of several a forward of one argument')
    side = as_whole(source)
    size = [3, side, side] if side is not None else list(source) if isinstance(source, (tuple, list)) else []  # type: ignore[arg-type]
    sides = [whole for s in size if (whole := as_whole(s)) is not None and whole > 0]
    if len(size) not in (3, 4) or len(sides) < len(size):
        got = str(source)[:80] if side is not None or isinstance(source, (tuple, list)) else type(source).__name__
        raise ValueError(f'got input size {got}, expected 224, (C, H, W) or (N, C, H, W), or a tensor of images')
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(sides if len(sides) == 4 else [1, *sides], generator=generator)
    return image.to(parameter.device, parameter.dtype)


def check_one_input(model: nn.Module) -> None:
    """Check that a network runs on one argument.

    Raises:
        ValueError: its ``forward`` needs more.
    """
    try:
        parameters = inspect.signature(uncompiled(model).forward).parameters.values()
    except (TypeError, ValueError):  # a callable that does not tell
        return
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if len(needed) > 1:
        told = f'{type(model).__name__}.forward needs {", ".join(needed)}'
        raise ValueError(f'{told}, expected one input: wrap the network in one whose forward takes one argument')


def layer_macs(model: nn.Module, example_input: Any) -> dict[str, int]:
    """MACs of every module, by name ('' is the whole model), of one forward pass in evaluation mode.

    A CPDConv2d counts as its three factors whatever form it runs in.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), use_form(model, 'factored'), counter:
        model(example_input)
    root = type(model).__name__
    macs: dict[str, int] = {'': 0}
    for name, ops in counter.get_flop_counts().items():
        total = sum(int(f) for op, f in ops.items() if str(op).removeprefix('aten.').split('.')[0] in _COUNTED)
        if name == 'Global':
            macs[''] = total // 2
        elif name.startswith(root + '.'):
            macs[name[len(root) + 1 :]] = total // 2
    return macs


def count_params(module: nn.Module) -> int:
    """Number of parameters: weights, biases and normalisation's affine parameters."""
    return sum(p.numel() for p in module.parameters())


def count(model: nn.Module, input_size: int | Sequence[int] | Tensor | list[Tensor] | None = None) -> Complexity:
    """Convolution + linear multiply-accumulates and parameters.

    Args:
        model: any network, dense or compressed.
        input_size: 224, (C, H, W), (N, C, H, W), or the input itself; by default the model's own size.

    Raises:
        ValueError: an input size that is not one of these.

    Example:
        >>> count(timm.create_model('resnet18'))
        Complexity(macs=1814073344, params=11689512)
    """
    return Complexity(layer_macs(model, make_input(model, input_size))[''], count_params(model))


class LayerCost(NamedTuple):
    """Cost of one layer: filters, parameters (bias included), and multiply-accumulates."""

    filters: int
    params: int
    macs: int


def layer_costs(model: nn.Module, example_input: Any) -> dict[str, LayerCost]:
    """Cost of every convolution, CPDConv2d and linear layer by name; '' is the whole model."""
    macs = layer_macs(model, example_input)
    costs = {'': LayerCost(0, count_params(model), macs[''])}
    for name, module in model.named_modules():
        handler = nearest_handler(module)
        if handler is not None and handler.counted:
            costs[name] = LayerCost(handler.widths(module)[1], count_params(module), macs.get(name, 0))
    return costs
