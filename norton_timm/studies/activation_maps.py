"""What two networks look at in a picture: class-activation maps, and feature maps before and after compression."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from norton_timm.utils import read_rgb


@dataclass(frozen=True)
class Look:
    """What one network makes of a picture.

    Attributes:
        name: of the network, for the headings.
        label: the class it gives the picture.
        confidence: softmax probability of ``label``, 0 to 1.
        activation: class-activation map ``(H, W)`` of the class that was asked for, 0 to 1; all zero where nothing in
            the picture speaks for the class.
        features: feature maps ``(C, h, w)`` of the layer that was asked for.
    """

    name: str
    label: int
    confidence: float
    activation: np.ndarray
    features: Tensor


@dataclass(frozen=True)
class Comparison:
    """Two looks at one picture.

    Attributes:
        picture: RGB ``uint8 (H, W, 3)``, as the networks were given it, before normalisation.
        target: the class whose maps are shown.
        dense, compressed: the looks.
        nearest: for each feature map of the compressed network, the index of the dense one that correlates best.
        correlation: that correlation, -1 to 1.
    """

    picture: np.ndarray
    target: int
    dense: Look
    compressed: Look
    nearest: Tensor
    correlation: Tensor

    @property
    def agreement(self) -> float:
        """Pearson correlation of the two class-activation maps; NaN where one of them is constant."""
        both = torch.from_numpy(np.stack([self.dense.activation, self.compressed.activation])).flatten(1)
        unit, constant = _standardised(both)
        return float('nan') if constant.any() else float(unit[0] @ unit[1])


def stage_names(model: nn.Module) -> list[str]:
    """Names of the layers that end the stages of a timm network, the finest first; empty where it does not say."""
    info: Any = getattr(model, 'feature_info', None)
    return [entry['module'] for entry in getattr(info, 'info', info) or ()]


def compare_looks(
    dense: tuple[str, nn.Module],
    compressed: tuple[str, nn.Module],
    picture: Path,
    *,
    target: int | None = None,
    layer: str | None = None,
    features: str | None = None,
    size: int | None = None,
) -> Comparison:
    """Show one picture to a dense and to a compressed network.

    Class-activation maps are Grad-CAM's (Selvaraju et al., 2017), by the library ``grad-cam``.

    Args:
        dense: name and network, which is not changed.
        compressed: the same of the other one.
        picture: file; it is resized, cropped and normalised as the dense network's ``pretrained_cfg`` says.
        target: class whose maps are drawn; by default the one that the dense network gives.
        layer: layer whose outputs make the class-activation map; by default the last stage.
        features: layer whose outputs are the feature maps; by default the first stage.
        size: side of the picture in pixels, if not the network's own.

    Raises:
        ValueError: no picture, an unknown layer or class, networks of different outputs, grad-cam not installed.

    Example:
        >>> found = compare_looks(('dense', model), ('compressed', small), Path('cat.jpg'))
        >>> plot_comparison(found, Path('looks.png'))
    """
    cfg = resolve_data_config(pretrained_cfg=getattr(dense[1], 'pretrained_cfg', None))
    if size is not None:
        cfg['input_size'] = (3, size, size)
    image = create_transform(**cfg)(read_rgb(picture, picture))[None]
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ('mean', 'std'))
    seen = ((image[0] * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    stages = stage_names(dense[1])
    if not stages and (layer is None or features is None):
        raise ValueError(f'{dense[0]} does not name its stages: give the layers for both kinds of maps')
    with torch.no_grad():
        outputs = [model.eval()(image)[0] for model in (copy.deepcopy(m) for _, m in (dense, compressed))]
    if len(outputs[0]) != len(outputs[1]):
        raise ValueError(f'{dense[0]} has {len(outputs[0])} classes and {compressed[0]} {len(outputs[1])}, expected '
                         'two networks for the same classes')  # fmt: skip
    target = int(outputs[0].argmax()) if target is None else target
    if not 0 <= target < len(outputs[0]):
        raise ValueError(f'class: got {target}, expected 0 to {len(outputs[0]) - 1}')
    layers = (layer or stages[-1], features or stages[0])
    first, second = (look(name, model, image, target, *layers) for name, model in (dense, compressed))
    return Comparison(seen, target, first, second, *match_channels(first.features, second.features))


def look(name: str, model: nn.Module, image: Tensor, target: int, layer: str, features: str) -> Look:
    """What a network makes of an image ``(1, 3, H, W)``; arguments as in :func:`compare_looks`."""
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise ValueError(f'grad-cam is not installed ({error}): pip install -e ".[visualize]"') from None
    model = copy.deepcopy(model).eval().requires_grad_(True)
    for module in model.modules():
        if hasattr(module, 'inplace'):
            module.inplace = False  # type: ignore[assignment]  # it would change the maps after they were taken
    maps: list[Tensor] = []
    hook = find_layer(name, model, features).register_forward_hook(lambda _, __, output: maps.append(output.detach()))
    with torch.no_grad():
        probabilities = F.softmax(model(image)[0], 0)
    hook.remove()
    with torch.enable_grad(), GradCAM(model=model, target_layers=[find_layer(name, model, layer)]) as cam:
        activation = cam(input_tensor=image, targets=[ClassifierOutputTarget(target)])[0]
    label = int(probabilities.argmax())
    return Look(name, label, float(probabilities[label]), activation, maps[0][0])


def find_layer(name: str, model: nn.Module, layer: str) -> nn.Module:
    """A layer by its dotted name.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        return model.get_submodule(layer)
    except AttributeError:
        known = stage_names(model) or [n for n, _ in model.named_children()]
        raise ValueError(f'{name} has no layer {layer!r}, expected one such as {", ".join(known)}') from None


def match_channels(dense: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
    """For each map of a compressed network, find the dense network's map that correlates best.

    Pruning leaves no record of which channels went, and the network may have been trained since.

    Args:
        dense: ``(C, h, w)``.
        compressed: ``(D, h, w)``.

    Returns:
        Indices ``(D,)`` into the dense maps, and the correlations ``(D,)``; 0 where a map is constant.
    """
    if dense.ndim != 3 or compressed.ndim != 3 or dense.shape[1:] != compressed.shape[1:]:
        shapes = f'{tuple(dense.shape)} and {tuple(compressed.shape)}'
        raise ValueError(f'feature maps of shapes {shapes}, expected (C, h, w) of one size')
    correlation, nearest = (_standardised(compressed.flatten(1))[0] @ _standardised(dense.flatten(1))[0].T).max(1)
    return nearest, correlation


def _standardised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of mean 0 and length 1, and which of them are constant and stay 0."""
    rows = rows.double() - rows.double().mean(1, keepdim=True)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / length.where(length > 1e-12, 1), length[:, 0] <= 1e-12
