"""Tuning without labels: a compressed network learns from the dense one on a few images, and how far the two agree."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from norton_timm.training.config import DistillConfig
from norton_timm.training.distill import Distillation, shared_features
from norton_timm.utils import check_weights, evaluating, load_plain, replacing, write_plain

log = logging.getLogger(__name__)

_TIMED = 3  # steps whose time sets the number of steps of a limit in minutes
_LOOKS = 8  # times that the held-out images are looked at


@dataclass(frozen=True)
class ClassAgreement:
    """How far a network agrees with the dense one on images that neither was tuned on.

    Attributes:
        top1: share of the images with the same first class.
        divergence: mean Kullback-Leibler divergence of the class scores from the dense network's.
        images: how many images.
        expected_loss: expected loss of top-1 accuracy, as a share: of images whose first class changed, those weighed
            by the dense network's own confidence in its class, less the compressed network's chance to be right.
        interval: bounds of the loss with 95 % confidence.
    """

    top1: float
    divergence: float
    images: int
    expected_loss: float
    interval: tuple[float, float]


@torch.no_grad()
def scores(model: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Class scores (N, K) of a network in evaluation mode."""
    with evaluating(model):
        return torch.cat([model(batch).float() for batch in images.split(batch_size)])


def agreement(found: Tensor, wanted: Tensor) -> ClassAgreement:
    """Compare class scores (N, K) with the dense network's.

    The dense network's probabilities stand for the truth. An image counts for the loss with the dense network's
    probability of its own first class, less its probability of the class that the other network names.

    Args:
        found: scores of the compressed network.
        wanted: scores of the dense network on the same images.

    Example:
        >>> agreement(scores(small, held), scores(model, held)).top1
        0.95
    """
    p = wanted.softmax(1)
    ours, theirs = found.argmax(1), wanted.argmax(1)
    of_theirs, of_ours = (p.gather(1, label[:, None]).flatten().double() for label in (theirs, ours))
    each = of_theirs - of_ours
    divergence = F.kl_div(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction='batchmean')
    n = len(each)
    mean = float(each.mean())
    # the truth is drawn from p: an image counts 1, 0 or -1, so the error of the mean is that of such draws
    changed = (ours != theirs).double()
    variance = float((changed * (of_theirs + of_ours)).mean() - mean**2)
    error = 1.96 * math.sqrt(max(variance, 1 / n) / n)
    same = float((ours == theirs).double().mean())
    return ClassAgreement(same, float(divergence), n, mean, (mean - error, mean + error))


@dataclass(frozen=True)
class LabelFreeConfig:
    """Settings of the tuning.

    Attributes:
        lr: of AdamW, at its peak.
        batch_size: images of a step.
        temperature: of the class scores.
        features: weight of the relative error of the feature maps.
        scale: smallest share of an image that a random crop keeps.
        warmup: share of the steps with a rising learning rate.
        weight_decay: of AdamW.
    """

    lr: float = 2e-5
    batch_size: int = 32
    temperature: float = 1.0
    features: float = 1.0
    scale: float = 0.5
    warmup: float = 0.1
    weight_decay: float = 0.0


@dataclass
class Tuned:
    """What the tuning did.

    Attributes:
        steps: steps made.
        seconds: time of the steps and looks of this process.
        best: step of the state that is kept, 0 for the start.
        before, after: agreement on the held-out images.
        history: (step, expected loss) of every look.
    """

    steps: int
    seconds: float
    best: int
    before: ClassAgreement
    after: ClassAgreement
    history: list[tuple[int, float]] = field(default_factory=list)


def tune_without_labels(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    held: Tensor,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    config: LabelFreeConfig | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = False,
    facts: Sequence[str] = (),
) -> Tuned:
    """Tune a compressed network, in place, to give the dense network's class scores and features.

    Batch norms keep their statistics, which few images would spoil. The state with the least expected loss on the
    held-out images is kept; that may be the start. With ``steps`` the result is the same for the same seed; with
    ``minutes`` the time of the first steps decides how many are made.

    Args:
        student: the compressed network.
        teacher: the dense network; it is not changed.
        images: (N, 3, H, W), normalised, to learn from.
        held: (M, 3, H, W), to choose the best state by.
        minutes: time to spend.
        steps: or the number of steps.
        config: settings.
        seed: of order and augmentation.
        checkpoint: file to go on from; it is written at every look, and removed by the caller.
        progress: show a bar.
        facts: what else must be equal for the checkpoint to be gone on from.

    Raises:
        ValueError: neither minutes nor steps, no images, or a checkpoint of another run.
        FloatingPointError: the loss became NaN or infinite; the student has the best state so far.

    Example:
        >>> tuned = tune_without_labels(small, model, images[:900], images[900:], minutes=5)
        >>> tuned.after.top1 - tuned.before.top1
        0.04
    """
    if (minutes is None) == (steps is None):
        raise ValueError('got neither or both of minutes and steps, expected one of them')
    if not len(images) or not len(held):
        raise ValueError(f'got {len(images)} images to tune on and {len(held)} held out, expected some of each')
    run = _Run(student, teacher, images, held, config or LabelFreeConfig(), seed)
    run.state.total = steps
    run.facts = [*map(str, facts), str(seed), str(len(images)), str(run.config)]
    if checkpoint is not None and checkpoint.is_file():
        run.resume(checkpoint)
    return run.run(minutes, checkpoint, progress)


@dataclass
class _State:
    step: int = 0
    total: int | None = None  # None until the first steps were timed
    best: int = 0
    least: float = math.inf
    history: list[tuple[int, float]] = field(default_factory=list)


class _Run:
    def __init__(
        self, student: nn.Module, teacher: nn.Module, images: Tensor, held: Tensor, config: LabelFreeConfig, seed: int
    ) -> None:
        self.student, self.images, self.held, self.config, self.seed = student, images, held, config, seed
        self.teacher = copy.deepcopy(teacher)
        self.wanted = scores(teacher, held)
        features = config.features if shared_features(self.teacher, student) else 0.0
        self.distillation = Distillation(self.teacher, student, DistillConfig(1.0, config.temperature, features))
        matrices = [p for p in student.parameters() if p.requires_grad and p.dim() > 1]
        vectors = [p for p in student.parameters() if p.requires_grad and p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{'params': matrices, 'weight_decay': config.weight_decay}, {'params': vectors, 'weight_decay': 0.0}],
            lr=config.lr,
            betas=(0.9, 0.99),
        )
        self.crop = v2.Compose([
            v2.RandomResizedCrop(tuple(images.shape[2:]), (config.scale, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
        ])  # fmt: skip
        self.state = _State()
        self.facts: list[str] = []
        self.best_weights: dict[str, Tensor] = {}

    def run(self, minutes: float | None, checkpoint: Path | None, progress: bool) -> Tuned:
        began = time.perf_counter()
        before = agreement(scores(self.student, self.held), self.wanted)
        if not self.state.history:
            self._look(before)
        modes = {m: m.training for m in self.student.modules()}
        self.student.eval()
        try:
            bar: Any = tqdm(total=self.state.total, initial=self.state.step, desc='tuning', disable=not progress)
            with bar:
                while self.state.total is None or self.state.step < self.state.total:
                    self._step()
                    bar.update()
                    if self.state.total is None and self.state.step == _TIMED:
                        each = (time.perf_counter() - began) / _TIMED
                        self.state.total = max(_TIMED, int(0.9 * 60 * (minutes or 0) / each))
                        bar.total = self.state.total
                    if self._is_look():
                        self._look(agreement(scores(self.student, self.held), self.wanted))
                        bar.set_postfix_str(f'expected loss {100 * self.state.history[-1][1]:.1f} points')
                        if checkpoint is not None:
                            self._save(checkpoint)
        finally:
            self.student.load_state_dict(self.best_weights)
            for module, training in modes.items():
                module.training = training
        after = agreement(scores(self.student, self.held), self.wanted)
        seconds = time.perf_counter() - began
        return Tuned(self.state.step, seconds, self.state.best, before, after, list(self.state.history))

    def _is_look(self) -> bool:
        total = self.state.total
        return total is not None and (self.state.step == total or self.state.step % max(1, total // _LOOKS) == 0)

    def _batch(self) -> Tensor:
        """The images of this step; the same for the same seed and step."""
        size = min(self.config.batch_size, len(self.images))
        each = len(self.images) // size  # steps of an epoch
        epoch, part = divmod(self.state.step, each)
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.seed * 100_003 + epoch))
        chosen = self.images[order[part * size : (part + 1) * size]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + self.state.step)
            return torch.stack([self.crop(image) for image in chosen])

    def _rate(self) -> float:
        total = self.state.total or 100 * _TIMED
        warm = max(1.0, self.config.warmup * total)
        return min((self.state.step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1, self.state.step / total))))

    def _step(self) -> None:
        for group in self.optimizer.param_groups:
            group['lr'] = self.config.lr * self._rate()
        images = self._batch()
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)  # of no weight
        loss = self.distillation.loss(self.student, images, labels)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f'the loss of step {self.state.step} is not finite; a lower lr may help')
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.state.step += 1

    def _look(self, found: ClassAgreement) -> None:
        self.state.history.append((self.state.step, found.expected_loss))
        if found.expected_loss < self.state.least or not self.best_weights:
            check_weights(self.student, 'the tuned network')
            self.state.least, self.state.best = found.expected_loss, self.state.step
            self.best_weights = {k: v.detach().clone() for k, v in self.student.state_dict().items()}

    def _save(self, path: Path) -> None:
        content = {
            'facts': self.facts, 'state': vars(self.state), 'student': self.student.state_dict(),
            'optimizer': self.optimizer.state_dict(), 'best': self.best_weights,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_plain(temporary, content)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is damaged, or of another run.
        """
        content = load_plain(path)
        if not isinstance(content, dict) or content.get('facts') != self.facts:
            raise ValueError(f'{path}: of another tuning; give another folder, or remove it to start anew')
        self.student.load_state_dict(content['student'])
        self.optimizer.load_state_dict(content['optimizer'])
        self.state = _State(**content['state'])
        self.best_weights = content['best']
        log.info('goes on from step %d', self.state.step)
