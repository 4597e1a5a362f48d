"""How a detector resizes pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class ThinPictureTransform(GeneralizedRCNNTransform):
    """Torchvision's transform, which also takes very thin pictures: no side gets shorter than a pixel.

    Torchvision's own fails where the limit on the longer side leaves less of the shorter one, as of 2x3000 pixels.
    """

    fixed_size: tuple[int, int] | None

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image `(C, H, W)` and its target."""
        height, width = image.shape[-2:]
        if self.fixed_size is not None or torch.jit.is_tracing():
            return super().resize(image, target)
        scale = self.max_size / max(height, width)
        if math.floor(min(height, width) * scale) >= 1:
            return super().resize(image, target)
        self.fixed_size = (max(1, math.floor(width * scale)), max(1, math.floor(height * scale)))
        try:
            return super().resize(image, target)
        finally:
            self.fixed_size = None


def take_thin_pictures(model: GeneralizedRCNN) -> GeneralizedRCNN:
    """Let a torchvision R-CNN take very thin pictures; the model itself is changed and returned."""
    old = model.transform
    if type(old) is GeneralizedRCNNTransform:
        model.transform = ThinPictureTransform(
            old.min_size,
            old.max_size,
            old.image_mean,
            old.image_std,
            size_divisible=old.size_divisible,
            fixed_size=old.fixed_size,
            _skip_resize=old._skip_resize,
        )
    return model
