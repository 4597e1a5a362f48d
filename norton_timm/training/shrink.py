"""A trained classifier and a folder of unlabelled images become a smaller network with nearly its accuracy.

Budget, compression with repair, and tuning run one after another. Every result is measured in the same way on images
that were held out, beside the dense network at the lower resolution of equal MACs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from norton_timm.compression import Activations, CompressionReport, CompressionSpec, compress
from norton_timm.inference import deploy
from norton_timm.profiling import channels_last, count, synchronise, take_turns
from norton_timm.search import find_spec
from norton_timm.training.label_free import (
    ClassAgreement,
    LabelFreeConfig,
    Tuned,
    agreement,
    resized,
    scores,
    tune_without_labels,
)

log = logging.getLogger(__name__)

FEW = 50  # with fewer images the figures are rough
_LEAST = 8  # images, of which some are held out
_HELD, _MOST_HELD = 0.2, 256
_CALIBRATION = 512  # images that the choices and the repair look at
_NEAR = 0.02  # share of the MACs that is not worth compressing for


@dataclass
class NetworkRow:
    """One network of the table.

    Attributes:
        name: what it is.
        size: pixels a side of its input.
        macs, params: of one image.
        ms: milliseconds of one image in deployed form; None if not measured.
        agreement: with the dense network at its own resolution; None for that network itself.
    """

    name: str
    size: int
    macs: int
    params: int
    ms: float | None = None
    agreement: ClassAgreement | None = None


@dataclass
class Shrunk:
    """What :func:`shrink` made.

    Attributes:
        model: the compressed network.
        spec: its recipe.
        size: (height, width) of the images that it reads.
        report: what was done to each layer.
        rows: dense, compressed, tuned, and the dense network at a lower resolution.
        tuned: what the tuning did; None if there was none.
        seconds: of each step.
        warnings: what the user should know.
    """

    model: nn.Module
    spec: CompressionSpec
    size: tuple[int, int]
    report: CompressionReport
    rows: list[NetworkRow]
    tuned: Tuned | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            'rows': [asdict(row) for row in self.rows],
            'tuned': None if self.tuned is None else asdict(self.tuned),
            'seconds': {k: round(v, 1) for k, v in self.seconds.items()},
            'warnings': self.warnings,
        }

    def __str__(self) -> str:
        dense = self.rows[0]
        lines = [
            f'{"network":28}  {"pixels":>6}  {"MMACs":>16}  {"params":>11}  {"ms":>7}  {"agreement":>9}  expected loss'
        ]
        for row in self.rows:
            ms = '-' if row.ms is None else f'{row.ms:.1f}'
            told, loss = '-', '-'
            if row.agreement is not None:
                told = f'{100 * row.agreement.top1:.1f} %'
                low, high = row.agreement.interval
                loss = f'{100 * row.agreement.expected_loss:.1f} points ({100 * low:.1f} to {100 * high:.1f})'
            share = f'{row.macs / 1e6:.0f} ({100 * row.macs / dense.macs:.0f} %)'
            lines.append(f'{row.name:28}  {row.size:>6}  {share:>16}  {row.params:>11,}  {ms:>7}  {told:>9}  {loss}')
        return '\n'.join(lines)


def shrink(
    dense: nn.Module,
    images: Tensor,
    budget: Mapping[str, float],
    *,
    example_input: Tensor | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    method: str = 'norton',
    allow_resolution: bool = False,
    config: LabelFreeConfig | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    latency: bool = True,
    progress: bool = False,
) -> Shrunk:
    """Compress a trained classifier to a budget, repair it, tune it, and measure what is left.

    A fifth of the images is held out: nothing is fitted to them, but they choose the best state of the tuning.

    Args:
        dense: the trained network, in evaluation mode; it is not changed.
        images: (N, 3, H, W), normalised as the network expects; no labels.
        budget: one target of :func:`norton_timm.find_spec`, such as ``{'macs': 0.5}``.
        example_input: one image; by default the first of ``images``.
        minutes: time for the tuning; neither minutes nor steps: no tuning.
        steps: or the number of its steps.
        method: ``norton`` (all kinds of choices) or ``coring`` (convolutions stay dense).
        allow_resolution: also try networks that read smaller images and keep more of their layers; for a budget of
            MACs. The one nearest to the dense network on the held-out images is taken.
        config: settings of the tuning.
        seed: of everything random.
        checkpoint: file from which the tuning goes on.
        latency: measure milliseconds.
        progress: show bars.

    Raises:
        ValueError: too few images, class scores of another form than (N, K), or a target that cannot be met.

    Example:
        >>> result = shrink(model, images, {'macs': 0.5}, minutes=10)
        >>> print(result)
    """
    if len(images) < _LEAST:
        raise ValueError(f'got {len(images)} images, expected at least {_LEAST}, and better some hundreds')
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_count = max(2, min(_MOST_HELD, round(_HELD * len(images))))
    held, rest = images[order[:held_count]], images[order[held_count:]]
    example_input = images[:1] if example_input is None else example_input
    warnings = []
    if len(images) < FEW:
        warnings.append(f'{len(images)} images are few: the figures are rough, some hundreds are better')
    wanted = scores(dense, held)
    if wanted.dim() != 2 or wanted.shape[1] < 2:
        raise ValueError(f'got outputs of shape {tuple(wanted.shape)}, expected class scores (N, K)')
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        seconds[name] = time.perf_counter() - began
        began = time.perf_counter()

    full = cast(tuple[int, int], tuple(example_input.shape[-2:]))
    sizes = sizes_for(dense, example_input, budget) if allow_resolution else [full]
    best: _Try | None = None
    for size in sizes:
        one = _compressed(dense, resized(example_input, size), rest[:_CALIBRATION], size, budget, method, progress)
        one.agreement = agreement(scores(one.model, resized(held, size)), wanted)
        log.info('%d x %d pixels: divergence %.4f', *size, one.agreement.divergence)
        if best is not None and one.agreement.divergence >= best.agreement.divergence:
            break  # larger images only get worse from here on
        best = one
    assert best is not None
    lap('search and repair')
    model, spec, report, size, image = best.model, best.spec, best.report, best.size, best.image
    macs_params = count(model, image)
    rows = [
        NetworkRow('dense', full[1], *count(dense, example_input)),
        NetworkRow('compressed', size[1], *macs_params, agreement=best.agreement),
    ]
    tuned = None
    if minutes is not None or steps is not None:
        tuned = tune_without_labels(
            model, dense, rest, held, minutes=minutes, steps=steps, config=config, seed=seed, size=size,
            checkpoint=checkpoint, progress=progress, facts=[spec.to_yaml()],
        )  # fmt: skip
        rows.append(NetworkRow('compressed and tuned', size[1], *macs_params, agreement=tuned.after))
        lap('tuning')
    if size != full:
        _set_size(model, size)
    lower = lower_resolution(full, rows[-1].macs / rows[0].macs)
    if lower is not None:
        small = resized(example_input, lower)
        found = agreement(scores(dense, resized(held, lower)), wanted)
        rows.append(NetworkRow('dense, lower resolution', lower[1], *count(dense, small), agreement=found))
        ours = rows[-2].agreement
        if ours is not None and found.expected_loss < ours.expected_loss:
            warnings.append(
                f'the dense network at {lower[1]} pixels loses less at as many MACs: allow a lower resolution '
                '(--allow-resolution), or resize its images yourself'
            )
    if latency:
        _measure(rows, dense, model, example_input, size, lower)
        lap('latency')
        if rows[1].ms is not None and rows[0].ms is not None and rows[1].ms > rows[0].ms:
            warnings.append(
                'the compressed network is slower than the dense one here; --latency-ms sets a target in time'
            )
    return Shrunk(model, spec, size, report, rows, tuned, seconds, warnings)


@dataclass
class _Try:
    """A compressed and repaired network at one size of images."""

    model: nn.Module
    spec: CompressionSpec
    report: CompressionReport
    size: tuple[int, int]
    image: Tensor
    agreement: ClassAgreement = field(init=False)


def _compressed(
    dense: nn.Module,
    image: Tensor,
    images: Tensor,
    size: tuple[int, int],
    budget: Mapping[str, float],
    method: str,
    progress: bool,
) -> _Try:
    """Search and repair at a size; the dense network itself where that meets the budget already."""
    if 'macs' in budget:
        left = budget['macs'] * count(dense, images[:1]).macs / count(dense, image).macs
        if left >= 1 - _NEAR and size != tuple(images.shape[2:]):
            spec = CompressionSpec(rank=0)
            return _Try(*_swap(compress(dense, spec, image), spec), size, image)
        budget = {'macs': min(left, 1.0)}
    batches = list(resized(images, size).split(32))
    activations = Activations(dense, image, batches)
    spec = find_spec(
        dense, method=method, calibration=batches, example_input=image, activations=activations, progress=progress,
        **cast(Any, budget),
    )  # fmt: skip
    return _Try(*_swap(compress(dense, spec, image, calibration=batches, activations=activations), spec), size, image)


def _swap(
    made: tuple[nn.Module, CompressionReport], spec: CompressionSpec
) -> tuple[nn.Module, CompressionSpec, CompressionReport]:
    return made[0], spec, made[1]


def sizes_for(dense: nn.Module, image: Tensor, budget: Mapping[str, float]) -> list[tuple[int, int]]:
    """Sizes of images to try, the smallest first: the first alone nearly meets the budget, the last is the full one.

    Raises:
        ValueError: a budget of another kind than MACs.
    """
    if set(budget) != {'macs'}:
        raise ValueError(f'allow_resolution: got a budget of {", ".join(budget)}, expected macs')
    height, width = image.shape[-2:]
    step = 16 if min(height, width) >= 112 else 4
    whole, found = count(dense, image).macs, [(height, width)]
    for side in range(width - step, step, -step):
        size = (max(step, round(height * side / width / step) * step), side)
        share = count(dense, resized(image, size)).macs / whole
        if share < (1 - _NEAR) * budget['macs']:
            break
        found.insert(0, size)
    return found


def _set_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Note the size of images that a network reads where timm and our tools look for it."""
    cfg = getattr(model, 'pretrained_cfg', None)
    if cfg is not None:
        model.pretrained_cfg = {**cfg, 'input_size': (3, *size)}  # type: ignore[assignment]


def lower_resolution(size: tuple[int, ...], share: float) -> tuple[int, int] | None:
    """Height and width, multiples of 8, at which a network has about this share of its MACs; None above 97 %."""
    height, width = (max(8, 8 * round(side * math.sqrt(share) / 8)) for side in size)
    return None if height >= size[0] or share > 0.97 else (height, width)


def _measure(
    rows: list[NetworkRow],
    dense: nn.Module,
    model: nn.Module,
    image: Tensor,
    size: tuple[int, int],
    lower: tuple[int, int] | None,
) -> None:
    """Set the milliseconds of each network in its deployed form, at its own size."""
    of = [(rows[0], dense, image), (rows[1], model, resized(image, size))]
    if lower is not None:
        of.append((rows[-1], dense, resized(image, lower)))
    calls = [partial(deploy(network, x), channels_last(x)) for _, network, x in of]
    with torch.no_grad():
        times = take_turns(calls, partial(synchronise, image)).milliseconds()
    for (row, _, _), ms in zip(of, times):
        row.ms = ms
    for row in rows:
        if row.name == 'compressed and tuned':
            row.ms = rows[1].ms
