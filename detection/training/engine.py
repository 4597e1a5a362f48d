"""The one training loop of detection."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from detection.data import CocoDataset
from detection.evaluation import IOU_TYPES, Metrics, evaluate_detector
from detection.training.checkpoint import describe_data, load_checkpoint, save_checkpoint, save_latest
from detection.training.config import RunConfig
from detection.training.loader import BatchStream, train_loader
from detection.training.optim import build_optimizer, learning_rate
from norton_timm.checkpoints import surgery_of
from norton_timm.profiling import process_peak
from norton_timm.training import MetricsWriter
from norton_timm.utils import HeldSignals, autocast, is_main, rank, remove_partial, world_size, write_text

log = logging.getLogger(__name__)


class DetectorTrainer:
    """Trains a detector as a configuration says, with exact resume.

    Seed, step and process determine all that is random in a step, and the step alone determines the learning rate. A
    checkpoint therefore needs no more than weights, optimiser and step.

    Args:
        config: the run.
        model: what `build_detector` returns.
        train_set: training split; made with `seed=config.seed` its augmentation can be resumed exactly.
        val_set: evaluation split.
        output: folder for `config.yaml`, `metrics.jsonl`, `checkpoint.pt` (with `keep_checkpoints` above 1 the newest
            ones as `checkpoint_ITERATION.pt`), `best.pt` (with `eval_every`) and `results.json`.
        device: where to train.
        progress: show a progress bar.

    Raises:
        ValueError: `optim.accumulate` above the number of batches of an epoch.

    Example:
        >>> train_set, val_set = training_sets(config, find_data().root)
        >>> model = detector_from_config(config, describe_data(train_set, config.task))
        >>> DetectorTrainer(config, model, train_set, val_set, 'runs/box', device=torch.device('cpu')).run()
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        train_set: CocoDataset,
        val_set: CocoDataset,
        output: str | Path,
        *,
        device: torch.device,
        progress: bool = True,
    ) -> None:
        self.config, self.device, self.output, self.progress = config, device, Path(output), progress
        self.train_set, self.val_set = train_set, val_set
        self.model = model.to(device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.optim.amp == 'fp16')
        self.ema = ModelEmaV3(self.model, config.optim.ema, use_warmup=True) if config.optim.ema else None
        self.wrapped: nn.Module = self.model
        if world_size() > 1:
            self.wrapped = DistributedDataParallel(
                self.model, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True
            )
        data = config.data
        self.loader = train_loader(train_set, data, config.seed, pin=device.type == 'cuda')
        if len(self.loader) < config.optim.accumulate:
            raise ValueError(
                f'optim.accumulate is {config.optim.accumulate}, expected at most the {len(self.loader)} batches of an '
                'epoch'
            )
        self.steps_per_epoch = len(self.loader) // config.optim.accumulate
        self.total = config.optim.iterations or max(1, round(config.optim.epochs * self.steps_per_epoch))
        self.step_images = data.batch_size * world_size() * config.optim.accumulate
        self.iteration, self.best = 0, -1.0
        self.results: Metrics = {}
        self.metrics: MetricsWriter | None = None  # from the start of the run, in the process that writes
        self._bar: tqdm | None = None
        self._window = (time.perf_counter(), 0)  # when and at which step the last row of metrics was written

    def resume(self, path: str | Path) -> None:
        """Continue from a checkpoint of a run with the same model and data.

        If a step now has another number of images (the number of processes may change), a run with its length in epochs
        continues after the same number of images, and one with its length in iterations after the same number of steps.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no checkpoint, lacks what a resume needs, or is of another model, data set or task.
        """
        content = load_checkpoint(path)
        lacking = [key for key in ('scaler', 'iteration', 'best', 'results') if key not in content]
        if lacking and 'optimizer' in content:
            raise ValueError(f'{path} lacks {", ".join(lacking)}, so no run can be resumed from it')
        if 'optimizer' not in content:
            raise ValueError(f'{path} holds no optimiser state, so no run can be resumed from it')
        if content['meta'] != describe_data(self.train_set, self.config.task):
            raise ValueError(f'{path} was trained on other classes or another task than this run')
        try:
            self.model.load_state_dict(content['model'])
            self.optimizer.load_state_dict(content['optimizer'])
            self.scaler.load_state_dict(content['scaler'])
            if self.ema is not None:
                self.ema.module.load_state_dict(content['ema'] or content['model'])
        # a state of something else fails in whatever part comes first
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            told = (str(error) or type(error).__name__).splitlines()[0][:160]
            raise ValueError(f'{path} does not fit this configuration: {told}') from error
        self.iteration, self.best, self.results = content['iteration'], content['best'], content['results']
        before = content.get('step_images', self.step_images)
        if before != self.step_images:
            log.info('%s was written with %d images a step, now there are %d', path, before, self.step_images)
            if self.config.optim.iterations is None:
                self.iteration = self.iteration * before // self.step_images

    def run(self) -> Metrics:
        """Train to the end, evaluate, and write everything; returns the final metrics."""
        if is_main():
            self.metrics = MetricsWriter(self.output, self.iteration, self.config.tensorboard)
            remove_partial(self.output)
            write_text(self.output / 'config.yaml', self.config.to_yaml())
        save_every = max(1, round(self.config.save_every * self.steps_per_epoch))
        eval_every = round((self.config.eval_every or 0) * self.steps_per_epoch)
        evaluated = False
        self._window = (time.perf_counter(), self.iteration)
        hidden = not (self.progress and is_main())
        self._bar = tqdm(total=self.total, initial=self.iteration, desc='train', disable=hidden)
        with self._bar, HeldSignals() as signals:
            while self.iteration < self.total:
                for _ in self.train_epoch():
                    self._bar.update()
                    evaluated = bool(eval_every) and self.iteration % max(1, eval_every) == 0
                    if evaluated:
                        self._evaluate(signals)
                    if self.iteration % save_every == 0 and self.iteration < self.total:
                        self.save('checkpoint.pt')
                    if signals.arrived(self.device):
                        self.save('checkpoint.pt')
                        log.info('stopped after iteration %d of %d', self.iteration, self.total)
                        signals.deliver()
                    if self.iteration >= self.total:
                        break
            if not evaluated:
                self.save('checkpoint.pt')  # an evaluation may take long enough to be killed
                self._evaluate(signals)
            self.save('checkpoint.pt')
        if self.metrics is not None:
            write_text(self.output / 'results.json', json.dumps(self.results, indent=1) + '\n')
            self.metrics.close()
        return self.results

    @property
    def trained(self) -> nn.Module:
        """The network to evaluate: averaged weights if the run keeps them."""
        return self.model if self.ema is None else self.ema.module

    def save(self, name: str) -> None:
        """Write a checkpoint into the output folder."""
        if not is_main():
            return
        content = {
            'model': self.model.state_dict(),
            'ema': None if self.ema is None else self.ema.module.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'iteration': self.iteration,
            'step_images': self.step_images,
            'best': self.best,
            'results': self.results,
            'config': self.config.to_dict(),
            'meta': describe_data(self.train_set, self.config.task),
            'surgery': surgery_of(self.model),
        }
        if name == 'checkpoint.pt':
            save_latest(self.output, content, self.config.keep_checkpoints)
        else:
            save_checkpoint(self.output / name, content)

    def train_epoch(self) -> Iterator[int]:
        """Take the steps left in the current epoch; yields the number of steps done so far after each."""
        epoch, done = divmod(self.iteration, self.steps_per_epoch)
        accumulate = self.config.optim.accumulate
        self.wrapped.train()
        self.train_set.set_epoch(epoch)
        stream = cast(BatchStream, self.loader.batch_sampler)
        stream.set_epoch(epoch, done * accumulate)
        batches = []
        for batch in self.loader:
            batches.append(batch)
            if len(batches) == accumulate:
                self._step(batches)
                yield self.iteration
                batches = []
                if self.iteration % self.steps_per_epoch == 0:
                    return

    def _step(self, batches: list) -> None:
        """One step of the optimiser."""
        optim = self.config.optim
        torch.manual_seed(((self.config.seed * 1_000_003 + self.iteration) * 4096 + rank()) % 2**63)
        rate = learning_rate(optim, self.iteration, self.total, self.step_images)
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        sums: dict[str, float] = {}
        for k, (images, targets) in enumerate(batches):
            last = k == len(batches) - 1
            wait = contextlib.nullcontext() if last or world_size() == 1 else self.wrapped.no_sync()  # type: ignore
            with wait:
                losses = self._losses(images, targets)
                self.scaler.scale(torch.stack(list(losses.values())).sum() / len(batches)).backward()
            values = torch.stack([v.detach().float() for v in losses.values()]).tolist()
            parts = dict(zip(losses, values))
            if not all(math.isfinite(v) for v in values):
                ids = [int(t['image_id']) for t in targets]
                bad = ', '.join(f'{name} {value}' for name, value in parts.items() if not math.isfinite(value))
                raise FloatingPointError(f'loss is not finite at iteration {self.iteration}: {bad}; image ids {ids}')
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value / len(batches)
        if optim.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, self.iteration)
        self.iteration += 1
        self._report(sums, rate)

    def _losses(self, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = [image.to(self.device, non_blocking=True) for image in images]
        moved = [{k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in target.items()}
                 for target in targets]  # fmt: skip
        with autocast(self.device, self.config.optim.amp):
            return self.wrapped(images, moved)

    def _report(self, losses: dict[str, float], rate: float) -> None:
        if self.metrics is None or (self.iteration % self.config.log_every and self.iteration != self.total):
            return
        now, (since, first) = time.perf_counter(), self._window
        speed = self.step_images * (self.iteration - first) / max(now - since, 1e-9)
        self._window = (now, self.iteration)
        row = {
            'iteration': self.iteration,
            'epoch': round(self.iteration / self.steps_per_epoch, 4),
            'loss': sum(losses.values()),
            **losses,
            'lr': rate,
            'images_per_s': round(speed, 3),
            'memory_mb': round(process_peak(self.device) / 2**20, 1),
        }
        self.metrics.write(row)
        if self._bar is not None:
            self._bar.set_postfix(loss=f'{row["loss"]:.3f}', img_s=f'{speed:.1f}', refresh=False)

    def _evaluate(self, signals: HeldSignals) -> None:
        try:
            with signals.released():
                self.results = evaluate_detector(
                    self.trained,
                    self.val_set,
                    device=self.device,
                    batch_size=self.config.data.batch_size,
                    workers=self.config.data.workers,
                    amp=self.config.optim.amp,
                    progress=self.progress,
                )
        except KeyboardInterrupt:
            self.save('checkpoint.pt')
            raise
        self._window = (time.perf_counter(), self.iteration)
        if self.metrics is not None:
            self.metrics.write({'iteration': self.iteration, 'results': self.results})
        figure = self.results[IOU_TYPES[self.config.task][-1]]['AP']
        if figure > self.best:
            self.best = figure
            if self.config.eval_every:
                self.save('best.pt')
