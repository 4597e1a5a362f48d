"""The training loop against torchvision's reference loop: images per second, side by side in one run."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detection.training import (
    DetectorTrainer,
    RunConfig,
    build_optimizer,
    describe_data,
    detector_from_config,
    train_loader,
    training_sets,
)
from norton_timm.profiling import synchronise
from norton_timm.training import MetricsWriter


def benchmark_loop(config: RunConfig, root: Path, *, device: torch.device, rounds: int = 4) -> dict[str, Any]:
    """Time epochs of our loop and of the reference's, alternating, on the same model, data, batches and workers.

    Both start from the same weights and see the same batches in each round; the first round warms up and is not
    counted. Every other round the reference comes first. Neither evaluates nor writes checkpoints; what the reference
    does not do (clipping, averaged weights, accumulation, mixed precision) is switched off.

    Args:
        config: the run; its model, data and optimiser count, not its length.
        root: folder in COCO layout.
        device: where to train.
        rounds: epochs of each loop that count.

    Returns:
        `rounds`: a dict each with `ours` and `reference` in images a second and their `ratio`; `ours`, `reference`
        and `ratio`: medians over the rounds.
    """
    optim = dataclasses.replace(config.optim, clip=None, ema=None, accumulate=1, amp='none')
    data = dataclasses.replace(config.data, val_split=config.data.train_split)  # nothing is evaluated
    config = dataclasses.replace(config, optim=optim, data=data)
    train_set, val_set = training_sets(config, root)
    torch.manual_seed(config.seed)
    model = detector_from_config(config, describe_data(train_set, config.task)).to(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DetectorTrainer(config, model, train_set, val_set, folder, device=device, progress=False)
        trainer.metrics = MetricsWriter(folder, tensorboard=False)
        other = copy.deepcopy(trainer.model)
        optimizer = build_optimizer(other, config.optim)
        loader: Any = train_loader(train_set, config.data, config.seed, pin=device.type == 'cuda')
        images = trainer.steps_per_epoch * trainer.step_images
        rows = []
        for epoch in range(rounds + 1):
            seconds = {}
            for name in ('ours', 'reference') if epoch % 2 else ('reference', 'ours'):
                synchronise(device)
                start = time.perf_counter()
                if name == 'ours':
                    for _ in trainer.train_epoch():
                        pass
                else:
                    train_set.set_epoch(epoch)
                    loader.batch_sampler.set_epoch(epoch)
                    train_one_epoch(other, optimizer, loader, device, epoch)
                synchronise(device)
                seconds[name] = time.perf_counter() - start
            speed = {name: images / value for name, value in seconds.items()}
            rows.append({**speed, 'ratio': speed['ours'] / speed['reference']})
    counted = rows[1:]
    return {
        'rounds': counted,
        **{name: statistics.median(row[name] for row in counted) for name in ('ours', 'reference', 'ratio')},
    }


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: Iterable[tuple[list[Tensor], list[dict[str, Any]]]],
    device: torch.device,
    epoch: int,
    print_freq: int = 20,
) -> dict[str, SmoothedValue]:
    """One epoch as in `references/detection/engine.py` of torchvision: what our loop is measured against.

    Kept as it is there: warm-up by a scheduler in the first epoch, losses summed for the log and again for the
    gradient, one transfer of their sum to the host, the gradient cleared and the rate set after each step, smoothed
    averages of every loss. Losses of several processes are not averaged, as there is one.
    """
    model.train()
    meters: dict[str, SmoothedValue] = {}
    scheduler = None
    if epoch == 0:
        warmup = min(1000, len(data_loader) - 1)  # type: ignore[arg-type]
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0 / 1000, total_iters=max(1, warmup))
    end = time.time()
    for i, (images, targets) in enumerate(data_loader):
        meters.setdefault('data', SmoothedValue()).update(time.time() - end)
        images = [image.to(device) for image in images]
        targets = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in t.items()} for t in targets]
        with torch.autocast(device.type, enabled=False):
            loss_dict = model(images, targets)
            losses = sum(loss for loss in loss_dict.values())
        losses_reduced = sum(loss for loss in loss_dict.values())
        loss_value = losses_reduced.item()
        if not math.isfinite(loss_value):
            raise FloatingPointError(f'loss is {loss_value}: {loss_dict}')
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        for name, value in {'loss': losses_reduced, **loss_dict, 'lr': optimizer.param_groups[0]['lr']}.items():
            meters.setdefault(name, SmoothedValue()).update(value.item() if isinstance(value, Tensor) else value)
        meters.setdefault('time', SmoothedValue()).update(time.time() - end)
        if i % print_freq == 0:
            print(f'Epoch: [{epoch}] [{i}] ' + '  '.join(f'{k}: {v}' for k, v in meters.items()), file=sys.stderr)
        end = time.time()
    return meters


class SmoothedValue:
    """A figure's last values and its total, as in `references/detection/utils.py` of torchvision."""

    def __init__(self, window: int = 20) -> None:
        self.values: deque[float] = deque(maxlen=window)
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        """Add a value."""
        self.values.append(value)
        self.count += 1
        self.total += value

    def __str__(self) -> str:
        return f'{torch.tensor(list(self.values)).median().item():.4f} ({self.total / self.count:.4f})'
