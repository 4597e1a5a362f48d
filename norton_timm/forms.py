"""Find the fastest form of every CPDConv2d by measuring it on this device."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.layers import CPDConv2d
from norton_timm.measure import synchronise
from norton_timm.metadata import evaluating

_MEASURED = ('factored', 'merged', 'dense')
_fastest: dict[tuple[Any, ...], dict[str, float]] = {}  # milliseconds by form, by layer shape and device


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

    The forms take turns, so that a drift of the machine's speed meets all of them. Results are kept for the
    life of the process, by layer shape, input shape, layout, type, device and number of threads.
    """
    key = _key(layer, x, training)
    if key in _fastest:
        return _fastest[key]
    x = x.detach().requires_grad_(training)
    times: dict[str, list[float]] = {form: [] for form in _MEASURED}
    before = layer.form
    try:
        for repeat in range(repeats + 1):  # the first round warms up
            for form in _MEASURED:
                layer.form = form
                synchronise(x)
                start = time.perf_counter()
                with torch.set_grad_enabled(training):
                    y = layer(x)
                if training:
                    torch.autograd.grad(y.sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])
                synchronise(x)
                if repeat:
                    times[form].append(1000 * (time.perf_counter() - start))
    finally:
        layer.form = before
    _fastest[key] = {form: statistics.median(t) for form, t in times.items()}
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
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CPDConv2d)}
    inputs: dict[str, Tensor] = {}

    def hook_for(name: str):
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, args[0].detach())

        return record

    hooks = [layer.register_forward_pre_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            model(example_input)
    finally:
        for hook in hooks:
            hook.remove()
    report = {}
    for name, x in inputs.items():
        layer = layers[name]
        report[name] = times = measure_forms(layer, x, training, repeats)
        layer.tuned[training] = min(times, key=lambda form: times[form])
    return report
