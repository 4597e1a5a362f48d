"""The forms of a CPDConv2d: each form as plain convolutions with fixed kernels, and the time that each form takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.layers import CPDConv2d
from norton_timm.profiling import synchronise, take_turns
from norton_timm.utils import before_call, evaluating, removing

FIXED_FORMS = ('factored', 'merged', 'separable', 'dense')
_MEASURED = ('factored', 'merged', 'dense')
_fastest: dict[tuple[Any, ...], dict[str, float]] = {}  # milliseconds by form, by layer shape and device


def distinct_forms(model: nn.Module) -> tuple[str, ...]:
    """The fixed forms that differ in at least one layer of the model."""
    ranks = {m.rank for m in model.modules() if isinstance(m, CPDConv2d)}
    return tuple(form for form in FIXED_FORMS if form != 'separable' or ranks != {1})


class Sum(nn.Module):
    """Sum of the outputs of its branches, which all read one input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, input: Tensor) -> Tensor:  # called as the layer that it replaces
        first, *others = self.branches
        y = first(input)
        for branch in others:
            y = y + branch(input)
        return y


@torch.no_grad()
def fixed(layer: CPDConv2d, form: str) -> nn.Module:
    """The layer in one form as plain convolutions.

    ``separable`` exists only here: each component becomes a 1x1 and a depthwise Kh x Kw convolution, because a CPD of
    rank R is a sum of R depthwise-separable convolutions. Above rank 1, depthwise convolutions are far faster on CPUs
    than the grouped one of ``merged``, which has R inputs per group. At rank 1 the two forms are the same.

    Raises:
        ValueError: a form that is not one of ``FIXED_FORMS``.
    """
    if form not in FIXED_FORMS:
        raise ValueError(f'got form {form!r}, expected one of {", ".join(FIXED_FORMS)}')
    if form == 'dense':
        return layer.to_conv()
    if form == 'separable' and layer.rank > 1:
        result: nn.Module = Sum(*(_component(layer, r) for r in range(layer.rank)))
    elif form == 'factored':
        result = _factored(layer)
    else:
        result = _pair(layer, layer.pointwise, layer.merged_kernel(), layer.bias)
    return result.requires_grad_(layer.pointwise.requires_grad).train(layer.training)


def _component(layer: CPDConv2d, r: int) -> nn.Sequential:
    """Component ``r`` of all filters; the first one has the bias."""
    o, rank = layer.out_channels, layer.rank
    pointwise = layer.pointwise.unflatten(0, (o, rank))[:, r]
    return _pair(layer, pointwise, layer.merged_kernel()[:, r, None], None if r else layer.bias)


def _pair(layer: CPDConv2d, pointwise: Tensor, spatial: Tensor, bias: Tensor | None) -> nn.Sequential:
    """A 1x1 convolution and a Kh x Kw convolution with one group per filter."""
    result = nn.Sequential()
    result.add_module('pointwise', _pointwise(layer, pointwise))
    conv = nn.Conv2d(
        len(pointwise), layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        groups=layer.out_channels, bias=bias is not None,
    )  # fmt: skip
    result.add_module('spatial', _with_weights(conv, spatial, bias))
    return result


def _factored(layer: CPDConv2d) -> nn.Sequential:
    """A 1x1, a Kh x 1 and a 1 x Kw convolution."""
    o, rows, (kh, kw) = layer.out_channels, len(layer.pointwise), layer.kernel_size
    (sh, sw), (ph, pw), (dh, dw) = layer.stride, layer.padding, layer.dilation
    vertical = nn.Conv2d(rows, rows, (kh, 1), (sh, 1), (ph, 0), (dh, 1), groups=rows, bias=False)
    horizontal = nn.Conv2d(rows, o, (1, kw), (1, sw), (0, pw), (1, dw), groups=o, bias=layer.bias is not None)
    result = nn.Sequential()
    result.add_module('pointwise', _pointwise(layer, layer.pointwise))
    result.add_module('vertical', _with_weights(vertical, layer.vertical))
    result.add_module('horizontal', _with_weights(horizontal, layer.horizontal, layer.bias))
    return result


def _pointwise(layer: CPDConv2d, weight: Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(layer.in_channels, len(weight), 1, groups=layer.groups, bias=False)
    return _with_weights(conv, weight)


def _with_weights(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    conv.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return conv


def _key(layer: CPDConv2d, x: Tensor, training: bool) -> tuple[Any, ...]:
    layout = x.is_contiguous(memory_format=torch.channels_last)
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.rank)
    return (
        tuple(x.shape),
        x.dtype,
        str(x.device),
        layout,
        layer.out_channels,
        geometry,
        training,
        layer.pointwise.requires_grad,
        torch.get_num_threads(),
    )


def measure_forms(layer: CPDConv2d, x: Tensor, training: bool = False, repeats: int = 7) -> dict[str, float]:
    """Median milliseconds of each form on input ``x`` (N, I, H, W); forward and backward where ``training``.

    The forms take turns, so that a drift of the machine's speed affects all of them. Results are cached for the life
    of the process, by layer shape, input shape, layout, type, device and number of threads.
    """
    key = _key(layer, x, training)
    if key in _fastest:
        return _fastest[key]
    x = x.detach().requires_grad_(training)

    def run(form: str) -> None:
        layer.form = form
        with torch.set_grad_enabled(training):
            y = layer(x)
        if training:
            torch.autograd.grad(y.sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])

    before = layer.form
    try:
        turns = take_turns([partial(run, form) for form in _MEASURED], partial(synchronise, x), 0.0, repeats)
    finally:
        layer.form = before
    _fastest[key] = dict(zip(_MEASURED, turns.milliseconds()))
    return _fastest[key]


def tune_forms(
    model: nn.Module, example_input: Any, training: bool = False, repeats: int = 7
) -> dict[str, dict[str, float]]:
    """Measure every CPDConv2d of ``model`` on the inputs it meets and tell ``form='auto'`` the fastest form.

    Args:
        model: a compressed network; only layers whose form is ``auto`` change.
        example_input: what the model's ``forward`` takes, of the size and layout that matter.
        training: tune for training steps instead of inference.
        repeats: timed rounds per layer.

    Returns:
        Milliseconds of each form by layer name.

    Example:
        >>> times = tune_forms(model, torch.rand(1, 3, 224, 224))
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CPDConv2d)}
    inputs: dict[str, Tensor] = {}

    def hook_for(name: str, layer: CPDConv2d) -> Any:
        return before_call(layer, lambda _, x: inputs.setdefault(name, x.detach()))

    hooks = [hook_for(name, layer) for name, layer in layers.items()]
    with removing(hooks), evaluating(model):
        model(example_input)
    report = {}
    for name, x in inputs.items():
        layer = layers[name]
        report[name] = times = measure_forms(layer, x, training, repeats)
        layer.tuned[training] = min(times, key=lambda form: times[form])
    return report
