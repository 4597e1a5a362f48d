"""The size of a network's images as a choice: which sizes to try for a budget, and the control of equal MACs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from norton_timm.profiling import count
from norton_timm.training.label_free import resized

NEAR = 0.02  # share of the MACs that is not worth compressing for


def lower_resolution(size: tuple[int, ...], share: float) -> tuple[int, int] | None:
    """Height and width, multiples of 8, at which a network has about this share of its MACs; None above 97 %."""
    height, width = (max(8, 8 * round(side * math.sqrt(share) / 8)) for side in size)
    return None if height >= size[0] or share > 0.97 else (height, width)


def sizes_for(dense: nn.Module, image: Tensor, budget: Mapping[str, float]) -> list[tuple[int, int]]:
    """Sizes of images to try, the smallest first: the first alone nearly meets the budget, the last is the full one.

    Raises:
        ValueError: a budget of another kind than MACs.

    Example:
        >>> sizes_for(model, torch.rand(1, 3, 224, 224), {'macs': 0.7})
        [(192, 192), (208, 208), (224, 224)]
    """
    if set(budget) != {'macs'}:
        raise ValueError(f'allow_resolution: got a budget of {", ".join(budget)}, expected macs')
    height, width = (int(side) for side in image.shape[-2:])
    step = 16 if min(height, width) >= 112 else 4
    whole, found = count(dense, image).macs, [(height, width)]
    for side in range(width - step, step, -step):
        size = (max(step, round(height * side / width / step) * step), side)
        if count(dense, resized(image, size)).macs < (1 - NEAR) * budget['macs'] * whole:
            break
        found.insert(0, size)
    return found
