"""Measured milliseconds of several networks on one input, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from norton_timm.metadata import evaluating


def _wait(device: torch.device) -> None:
    if device.type in ('cuda', 'mps', 'xpu'):
        getattr(torch, device.type).synchronize()


def compare_latency(
    models: Mapping[str, nn.Module], example_input: Any, repeats: int = 7, warmup: int = 2
) -> dict[str, float]:
    """Median milliseconds of a forward pass in evaluation mode, by name.

    The networks take turns, so that a drift of the machine's speed meets all of them.

    Args:
        models: networks that take the same input, on the same device.
        example_input: what their ``forward`` takes.
        repeats: timed passes of each.
        warmup: passes of each before, not timed.

    Raises:
        ValueError: no networks, or fewer than one pass.
    """
    if not models or repeats < 1 or warmup < 0:
        raise ValueError(f'got {len(models)} networks, repeats={repeats}, warmup={warmup}, expected at least 1, 1, 0')
    device = next((p.device for m in models.values() for p in m.parameters()), torch.device('cpu'))
    times: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for turn in range(warmup + repeats):
            for name, model in models.items():
                _wait(device)
                start = time.perf_counter()
                model(example_input)
                _wait(device)
                if turn >= warmup:
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}
