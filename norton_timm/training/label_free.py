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

from norton_timm.training.distill import recorded
from norton_timm.training.features import balance, classifier_of, read_by, relative_error, shared_maps
from norton_timm.utils import check_weights, evaluating, load_plain, replacing, write_plain

log = logging.getLogger(__name__)

_TIMED = 3  # steps whose time sets the number of steps of a limit in minutes
_LOOKS = 8  # times that the held-out images are looked at
_SMALL = 64  # pixels a side; such images are shifted and not scaled, as networks for them are trained
_VECTOR = 0.1  # taken as the typical size of biases, which may be zero


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


def resized(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Images (N, C, H, W) at another size (height, width); None leaves them."""
    if size is None or size == tuple(images.shape[2:]):
        return images
    return F.interpolate(images, size, mode='bicubic', antialias=True, align_corners=False)


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
        lr: of Adam at its peak, relative: a step changes each weight by this share of the typical one of its layer.
        batch_size: images of a step.
        scale: smallest share of an image that a random crop keeps; images of up to 64 pixels are shifted instead.
        warmup: share of the steps with a rising learning rate.
    """

    lr: float = 5e-4
    batch_size: int = 32
    scale: float = 0.6
    warmup: float = 0.1


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
    size: tuple[int, int] | None = None,
    checkpoint: Path | None = None,
    progress: bool = False,
    facts: Sequence[str] = (),
) -> Tuned:
    """Tune a compressed network, in place, so that its blocks give the maps that the dense network's give.

    Maps say far more of each image than soft labels, which a few hundred images are too few for (compare Wang and Wu,
    2022). For smaller images than the dense network's, what the classifier reads is compared instead, and where its
    width differs, the class scores. Batch norms run in evaluation mode with statistics of their own,
    which few images would spoil; their scale is moved into the layers before, see :func:`balance`. The state nearest to
    the dense network on the held-out images is kept; that may be the start. With ``steps`` the result is the same for
    the same seed; with ``minutes`` the time of the first steps decides how many are made.

    Args:
        student: the compressed network.
        teacher: the dense network; it is not changed.
        images: (N, 3, H, W), normalised, to learn from.
        held: (M, 3, H, W), to choose the best state by.
        minutes: time to spend.
        steps: or the number of steps.
        config: settings.
        seed: of order and augmentation.
        size: (height, width) of the images that the student gets; the dense network gets them as they are.
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
    run = _Run(student, teacher, images, held, config or LabelFreeConfig(), seed, size)
    run.state.total = steps
    run.facts = [*map(str, facts), str(seed), str(len(images)), str(run.config), str(size)]
    if checkpoint is not None and checkpoint.is_file():
        run.resume(checkpoint)
    return run.run(minutes, checkpoint, progress)


def _inputs(model: nn.Module, linear: str) -> int:
    return int(model.get_submodule(linear).in_features)  # type: ignore[arg-type]


@dataclass
class _State:
    step: int = 0
    total: int | None = None  # None until the first steps were timed
    best: int = 0
    least: float = math.inf
    history: list[tuple[int, float]] = field(default_factory=list)


class _Run:
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: Tensor,
        held: Tensor,
        config: LabelFreeConfig,
        seed: int,
        size: tuple[int, int] | None,
    ) -> None:
        self.student, self.images, self.config, self.seed, self.size = student, images, config, seed, size
        self.teacher = copy.deepcopy(teacher).eval()
        self.wanted, self.held = scores(teacher, held), resized(held, size)
        with evaluating(student):
            balance(student, self.held[:1])
            same = self.held.shape[2:] == held.shape[2:]
            self.maps = shared_maps(student, self.teacher, held[:1]) if same else []
            ours, theirs = (classifier_of(m, x[:1]) for m, x in ((student, self.held), (self.teacher, held)))
        if ours is None or theirs is None or _inputs(student, ours) != _inputs(self.teacher, theirs):
            ours = theirs = None
        self.classifiers = ours, theirs
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        sizes = [float(p.detach().square().mean().sqrt()) if p.dim() > 1 else _VECTOR for p in self.parameters]
        self.optimizer = torch.optim.Adam(
            [{'params': [p], 'size': size} for p, size in zip(self.parameters, sizes)], betas=(0.9, 0.99), eps=1e-12
        )
        size_in = tuple(images.shape[2:])
        crop: nn.Module = v2.RandomResizedCrop(size_in, (config.scale, 1.0), antialias=True)
        if max(size_in) <= _SMALL:
            crop = v2.RandomCrop(size_in, padding=min(size_in) // 8)
        self.crop = v2.Compose([crop, v2.RandomHorizontalFlip()])
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
            group['lr'] = self.config.lr * self._rate() * group['size']
        images = self._batch()
        loss = self._error(images)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f'the loss of step {self.state.step} is not finite; a lower lr may help')
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.state.step += 1

    def _error(self, images: Tensor) -> Tensor:
        """Relative error of the student's maps or features on images (N, C, H, W) of the dense network's size."""
        if self.maps:
            with torch.no_grad(), recorded(self.teacher, self.maps) as wanted:
                self.teacher(images)
            with recorded(self.student, self.maps) as found:
                self.student(images)
            return sum((relative_error(found[n], wanted[n]) for n in self.maps), images.new_zeros(())) / len(self.maps)
        ours, theirs = self.classifiers
        with torch.no_grad(), read_by(self.teacher, theirs) as features:
            self.teacher(images)
        with read_by(self.student, ours) as mine:
            self.student(resized(images, self.size))
        return relative_error(mine[0], features[0])

    def _look(self, found: ClassAgreement) -> None:
        self.state.history.append((self.state.step, found.expected_loss))
        if found.divergence < self.state.least or not self.best_weights:
            check_weights(self.student, 'the tuned network')
            self.state.least, self.state.best = found.divergence, self.state.step
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
