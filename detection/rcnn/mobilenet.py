"""Torchvision's MobileNetV3-Large as its detectors use it: timm's has no maps in these places."""

from __future__ import annotations

from collections.abc import Mapping

from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large

MOBILENET = 'torchvision/mobilenet_v3_large'


class MobileNetFeatures(nn.Sequential):
    """Maps of 160 and 960 channels, both at stride 32 (Howard et al., 2019, arXiv:1905.02244).

    Forward maps images `(N, 3, H, W)` to a list of `(N, 160, H / 32, W / 32)` and `(N, 960, H / 32, W / 32)`. Names are
    those of torchvision's files.
    """

    pyramid = (0, 1)  # positions of the maps that an FPN takes

    def __init__(self) -> None:
        layers = mobilenet_v3_large(weights=None, norm_layer=nn.BatchNorm2d).features
        super().__init__(*layers)
        strided = [k for k, layer in enumerate(layers) if getattr(layer, '_is_cn', False)]
        self.places = (strided[-1], len(layers) - 1)
        widths = [layers[k].out_channels for k in self.places]
        info = [{'num_chs': w, 'reduction': 32, 'module': str(k)} for w, k in zip(widths, self.places)]
        self.feature_info = FeatureInfo(info, out_indices=(0, 1))
        self.pretrained_cfg = {'architecture': MOBILENET}

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        maps = []
        for k, layer in enumerate(self):
            x = layer(x)
            if k in self.places:
                maps.append(x)
        return maps


def is_mobilenet(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether the tensors under a prefix are those of `MobileNetFeatures`."""
    return f'{prefix}0.0.weight' in tensors and f'{prefix}16.1.running_var' in tensors
