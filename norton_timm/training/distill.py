"""Distillation: a compressed network learns from the dense one (Hinton et al., 2015; Romero et al., 2015)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norton_timm.training.config import DistillConfig
from norton_timm.utils import removing


class Distillation:
    """The loss of a student beside its teacher.

    Args:
        teacher: the dense network; put into evaluation mode, never changed.
        student: the network that learns; its feature maps are those that `feature_info` names.
        config: weights and temperature.

    Raises:
        ValueError: features are asked for, but no feature map of the two has the same width.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, config: DistillConfig) -> None:
        self.teacher, self.student, self.config = teacher.eval().requires_grad_(False), student, config
        self.shared = shared_features(teacher, student) if config.features else []
        if config.features and not self.shared:
            raise ValueError('distill.features is above 0, but no feature map of student and teacher has equal width')

    def loss(self, forward: nn.Module, images: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Weighted sum of cross-entropy, divergence from the teacher's soft labels, and error of the features.

        Args:
            forward: the student, perhaps compiled or wrapped.
            images: (N, 3, H, W).
            labels: classes (N,) or probabilities (N, K).
            smoothing: of the labels.
        """
        with torch.no_grad(), recorded(self.teacher, self.shared) as wanted:
            target = self.teacher(images).float()
        with recorded(self.student, self.shared) as found:
            logits = forward(images).float()
        t, soft = self.config.temperature, self.config.weight
        total = (1 - soft) * F.cross_entropy(logits, labels, label_smoothing=smoothing)
        total = total + soft * t * t * F.kl_div(
            F.log_softmax(logits / t, dim=1), F.log_softmax(target / t, dim=1), log_target=True, reduction='batchmean'
        )
        for name in self.shared:
            error = (found[name] - wanted[name]).float().square().sum()
            total = total + self.config.features / len(self.shared) * error / wanted[name].float().square().sum()
        return total


def shared_features(teacher: nn.Module, student: nn.Module) -> list[str]:
    """Names of the modules in `feature_info` with the same width in both networks."""
    infos = [getattr(model, 'feature_info', None) or [] for model in (teacher, student)]
    widths = [{row['module']: row['num_chs'] for row in info} for info in infos]
    return [name for name, width in widths[0].items() if widths[1].get(name) == width]


@contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of modules in the forward passes of the block, by name."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: found.update({name: y}))
        for name in names
    ]
    with removing(hooks):
        yield found
