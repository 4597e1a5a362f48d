"""Measured milliseconds of several networks on one input, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from norton_timm.measure import latencies


def compare_latency(
    models: Mapping[str, nn.Module], example_input: Any, repeats: int = 7, seconds: float = 2.0
) -> dict[str, float]:
    """Median milliseconds of a forward pass of each network, see :func:`norton_timm.measure.latencies`.

    Args:
        models: networks that take the same input, on the same device; they take turns and are not changed.
        example_input: what their ``forward`` takes.
        repeats: timed passes of each at least.
        seconds: about how long to measure in all.

    Raises:
        ValueError: no networks, or fewer than one pass.
    """
    if not models or repeats < 1:
        raise ValueError(f'got {len(models)} networks and repeats={repeats}, expected at least one of each')
    return dict(zip(models, latencies(list(models.values()), example_input, seconds, repeats)))
