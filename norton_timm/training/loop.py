"""The one training loop and the one evaluation loop of classification."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from norton_timm.profiling import process_peak
from norton_timm.training.config import OptimConfig
from norton_timm.training.data import Batch, ClassificationData
from norton_timm.training.distill import Distillation
from norton_timm.training.metrics import MetricsWriter
from norton_timm.utils import (
    HeldSignals,
    autocast,
    check_weights,
    evaluating,
    is_main,
    load_plain,
    rank,
    remove_partial,
    replacing,
    world_size,
    write_plain,
)

log = logging.getLogger(__name__)

_STATE = ('model', 'ema', 'optimizer', 'scaler', 'epoch', 'results')


def evaluate(
    model: nn.Module, data: ClassificationData, device: torch.device, batch_size: int = 256, amp: str = 'none'
) -> dict[str, float]:
    """Accuracy on the test split; under torchrun each process takes a part and all get the result.

    Returns:
        `top1` and `top5` in percent, and `loss`, the mean cross-entropy.

    Raises:
        FloatingPointError: NaN or infinite weights or outputs.
        ValueError: a test split without images.

    Example:
        >>> data = open_data('cifar10', Preprocessing.from_cfg(model.pretrained_cfg), torch.device('cpu'))
        >>> evaluate(model, data, torch.device('cpu'))['top1']
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    with evaluating(model):
        for images, labels in data.test_batches(batch_size):
            with autocast(device, amp):
                logits = model(images).float()
            ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction='sum')
            values = (ranked[:, 0].sum(), ranked.sum(), loss, torch.tensor(len(labels), device=device))
            sums += torch.stack([v.double() for v in values])
    if world_size() > 1:
        dist.all_reduce(sums)
    top1, top5, loss, count = sums.tolist()
    if not math.isfinite(loss):
        check_weights(model, 'the network to evaluate')
        told = 'mixed precision in fp16 overflows at 65504, try bf16' if amp == 'fp16' else 'its weights are finite'
        raise FloatingPointError(f'the network answers with NaN or infinite numbers; {told}')
    if not count:
        raise ValueError('the test split has no images, expected at least one')
    return {'top1': 100 * top1 / count, 'top5': 100 * top5 / count, 'loss': loss / count}


class Trainer:
    """Trains a network on labels and, if there is one, on its teacher.

    Seed, epoch and step determine all that is random in a step. A checkpoint is written after each epoch, and after the
    step at which Ctrl-C or SIGTERM arrived. A run that was stopped at any moment and started again therefore gives the
    same weights (on one machine's CPU, bit for bit).

    Args:
        model: the network; it is trained in place.
        data: training and test split.
        optim: optimiser and schedule.
        output: folder for `metrics.jsonl`, TensorBoard's files (where it is installed) and the checkpoint.
        device: where to train.
        seed: of order, augmentation and dropout.
        teacher: dense network to learn from beside the labels.
        mixup, cutmix: alpha of each, 0 for none.
        channels_last: layout of images and weights.
        compile: run through torch.compile.
        checkpoint: name of the checkpoint; phases of one run each have their own.
        progress: show a progress bar.

    Raises:
        ValueError: too few training images for one step.

    Example:
        >>> trainer = Trainer(model, data, OptimConfig(epochs=5), Path('runs/cls'), device=torch.device('cpu'))
        >>> trainer.run()['top1']
    """

    def __init__(
        self,
        model: nn.Module,
        data: ClassificationData,
        optim: OptimConfig,
        output: Path,
        *,
        device: torch.device,
        seed: int = 0,
        teacher: Distillation | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        channels_last: bool = True,
        compile: bool = False,
        checkpoint: str = 'checkpoint.pt',
        progress: bool = True,
    ) -> None:
        self.data, self.optim, self.output, self.device, self.seed = data, optim, output, device, seed
        self.teacher, self.progress, self.checkpoint = teacher, progress, output / checkpoint
        self.model = model.to(device)
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.steps = data.train_size // (optim.batch_size * world_size()) // optim.accumulate
        if self.steps < 1:
            raise ValueError(f'{data.train_size} training images do not fill one step of {optim.batch_size} images')
        self.optimizer = create_optimizer_v2(
            self.model, optim.name, lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, optim.schedule, optim.epochs, warmup_epochs=cast(int, optim.warmup), warmup_prefix=False,
            warmup_lr=optim.lr / 100, step_on_epochs=False, updates_per_epoch=self.steps,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=optim.amp == 'fp16')
        self.ema = ModelEmaV3(self.model, optim.ema, use_warmup=True) if optim.ema else None
        self.mixup = None
        if mixup or cutmix:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=optim.smoothing, num_classes=len(data.classes))
        self.wrapped: nn.Module = cast(nn.Module, torch.compile(self.model)) if compile else self.model
        if world_size() > 1:
            self.wrapped = DistributedDataParallel(
                self.wrapped, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True
            )
        self.epoch, self.step, self.loss = 0, 0, 0.0  # epochs done, steps of the next one, their summed loss
        self.results: dict[str, float] = {}

    @property
    def trained(self) -> nn.Module:
        """The network to evaluate: averaged weights if the run keeps them."""
        return self.model if self.ema is None else self.ema.module

    def run(self) -> dict[str, float]:
        """Train to the end, from the checkpoint if there is one; returns the accuracy after the last epoch."""
        if self.checkpoint.is_file():
            self._resume()
        with contextlib.ExitStack() as stack:
            metrics = None
            if is_main():
                remove_partial(self.checkpoint)
                metrics = MetricsWriter(self.output, self.epoch, step='epoch', run=self.checkpoint.stem)
                stack.callback(metrics.close)
            signals = stack.enter_context(HeldSignals())
            while self.epoch < self.optim.epochs:
                row = self._epoch(signals)
                if (self.epoch + 1) % self.optim.eval_every == 0 or self.epoch + 1 == self.optim.epochs:
                    self.results = self._evaluate(signals)
                    row.update({'test_loss' if key == 'loss' else key: v for key, v in self.results.items()})
                self.epoch, self.step, self.loss = self.epoch + 1, 0, 0.0
                if metrics is not None:
                    metrics.write(row)
                self._save()
                told = f', top-1 {row["top1"]:.2f} %' if 'top1' in row else ''
                log.info('epoch %d of %d: loss %.4f%s', self.epoch, self.optim.epochs, row['loss'], told)
        return self.results

    def _evaluate(self, signals: HeldSignals) -> dict[str, float]:
        """Accuracy after the epoch's last step; after an interruption the resumed run evaluates again."""
        try:
            with signals.released():
                return evaluate(self.trained, self.data, self.device, amp=self.optim.amp)
        except KeyboardInterrupt:
            self._save()
            raise

    def _epoch(self, signals: HeldSignals) -> dict[str, float]:
        """Train the rest of an epoch; returns its row of metrics. An epoch with a loss of NaN is never kept."""
        self.wrapped.train()
        total = torch.tensor(self.loss, device=self.device)
        began, first = time.perf_counter(), self.step
        batches = self.data.train_batches(self.epoch, self.optim.batch_size, self.seed)
        if first < self.steps:
            for _ in range(first * self.optim.accumulate):
                next(batches)
        bar = tqdm(total=self.steps, initial=first, desc=f'epoch {self.epoch + 1}', leave=False,
                   disable=not (self.progress and is_main()))  # fmt: skip
        with bar:
            for step in range(first, self.steps):
                self.scheduler.step_update(self.epoch * self.steps + step)
                self._seed(step)
                total += self._step(batches)
                if self.ema is not None:
                    self.ema.update(self.model, self.epoch * self.steps + step)
                bar.update()
                if self.device.type == 'cpu' or step % 20 == 0 or step == self.steps - 1:
                    self._check(total, step)
                    self.step, self.loss = step + 1, float(total)
                    if signals.arrived(self.device):
                        self._save()
                        log.info('stopped after step %d of epoch %d', self.step, self.epoch + 1)
                        signals.deliver()
        seconds = max(time.perf_counter() - began, 1e-9)
        images = (self.steps - first) * self.optim.batch_size * self.optim.accumulate * world_size()
        return {
            'epoch': self.epoch + 1,
            'loss': float(total) / self.steps,
            'lr': self.optimizer.param_groups[0]['lr'],
            'seconds': round(seconds, 2),
            'images_per_s': round(images / seconds, 1),
            'memory_mb': round(process_peak(self.device) / 2**20, 1),
        }

    def _seed(self, step: int) -> None:
        key = ((self.seed * 1_000_003 + self.epoch) * 1_000_003 + step) * 4096 + rank()
        torch.manual_seed(key % 2**63)
        np.random.seed(key % 2**32)  # timm's Mixup draws from it
        random.seed(key)  # and its augmentations from this, where there is no loading process

    def _step(self, batches: Iterator[Batch]) -> Tensor:
        """Take one step of the optimiser; returns the loss."""
        total = torch.zeros((), device=self.device)
        for k in range(self.optim.accumulate):
            images, labels = next(batches)
            last = k == self.optim.accumulate - 1
            wait = contextlib.nullcontext() if last or world_size() == 1 else self.wrapped.no_sync()  # type: ignore
            with wait:
                loss = self._loss(images, labels) / self.optim.accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if self.optim.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.optim.smoothing
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
            smoothing = 0.0  # the mixed labels are smoothed already
        with autocast(self.device, self.optim.amp):
            if self.teacher is not None:
                return self.teacher.loss(self.wrapped, images, labels, smoothing)
            return F.cross_entropy(self.wrapped(images).float(), labels, label_smoothing=smoothing)

    def _check(self, total: Tensor, step: int) -> None:
        if not math.isfinite(float(total)):
            kept = f'{self.checkpoint} keeps epoch {self.epoch}' if self.epoch else 'no epoch was complete'
            raise FloatingPointError(f'loss is not finite in epoch {self.epoch + 1}, step {step + 1}; {kept}')

    def _save(self) -> None:
        if not is_main():
            return
        content = {
            'model': self.model.state_dict(),
            'ema': None if self.ema is None else self.ema.module.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'epoch': self.epoch,
            'step': self.step,
            'loss': self.loss,
            'results': self.results,
        }
        with replacing(self.checkpoint) as temporary:
            write_plain(temporary, content)

    def _resume(self) -> None:
        try:
            content = load_plain(self.checkpoint)
            values = [content[key] for key in _STATE]
            epoch, results, step, loss = *values[4:], content.get('step', 0), content.get('loss', 0.0)
            if not (isinstance(epoch, int) and isinstance(results, dict) and isinstance(step, int)):
                raise TypeError(f'got epoch {epoch!r} and step {step!r}')
            self.model.load_state_dict(values[0])
            if self.ema is not None:
                self.ema.module.load_state_dict(values[1])
            self.optimizer.load_state_dict(values[2])
            self.scaler.load_state_dict(values[3])
        # a checkpoint of something else fails in whatever part of the state comes first
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            told = ' '.join(str(error).split())[:160]
            raise ValueError(
                f'{self.checkpoint} is damaged or no checkpoint of this run: {told}; move it away to begin this phase '
                'anew, or choose another --output'
            ) from None
        self.epoch, self.results, self.step, self.loss = epoch, results, step, float(loss)
        log.info('resumed after epoch %d, step %d', self.epoch, self.step)
