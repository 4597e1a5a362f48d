"""Optimiser and learning rate of a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from detection.training.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters; biases and norms do not decay with AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.name == 'sgd':
        # as in torchvision's reference script, all parameters decay
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, foreach=True
        )
    groups = [
        {'params': [p for p in parameters if p.ndim > 1], 'weight_decay': config.weight_decay},
        {'params': [p for p in parameters if p.ndim <= 1], 'weight_decay': 0.0},
    ]
    return torch.optim.AdamW(groups, config.lr, foreach=True)


def learning_rate(config: OptimConfig, iteration: int, total: int, images: int) -> float:
    """The rate of a step: linear warm-up (at most a tenth of the run), then falling in steps or as a cosine.

    Args:
        config: the schedule.
        iteration: steps done so far.
        total: steps of the run.
        images: images of one step, over all processes.
    """
    rate = config.lr * (images / config.lr_batch if config.lr_batch else 1.0)
    warmup = min(config.warmup, total // 10)
    if iteration < warmup:
        rate *= (iteration + 1) / (warmup + 1)
    if config.schedule == 'cosine':
        done = max(0, iteration - warmup) / max(1, total - warmup)
        return rate * 0.5 * (1 + math.cos(math.pi * done))
    return rate * 0.1 ** sum(iteration >= step / config.epochs * total for step in config.steps)
