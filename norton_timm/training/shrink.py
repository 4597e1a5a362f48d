"""A trained classifier and a folder of unlabelled images become a smaller network with nearly its accuracy.

Budget, compression with repair, and tuning run one after another. Every result is measured in the same way on images
that were held out, beside the dense network at the lower resolution of equal MACs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from norton_timm.compression import Activations, CompressionReport, CompressionSpec, compress
from norton_timm.inference import deploy
from norton_timm.models import set_input_size
from norton_timm.profiling import channels_last, compare_latency, count, ready_to_run, synchronise, take_turns
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
from norton_timm.training.resolution import NEAR, lower_resolution, sizes_for

log = logging.getLogger(__name__)

FEW = 50  # with fewer images the figures are rough
_LEAST = 8  # images, of which some are held out
_HELD, _MOST_HELD = 0.2, 256
_AIM = 0.7  # of the dense network's milliseconds: what is proposed where fewer MACs took no less time
_CALIBRATION = 512  # images that the choices and the repair look at


@dataclass
class NetworkRow:
    """One network of the table.

    Attributes:
        name: what it is.
        size: pixels a side of its input.
        macs, params: of one image.
        ms: milliseconds of one image in deployed form; None if not measured.
        agreement: with the dense network at its own resolution; None for that network itself.
        top1: accuracy on labelled images, in percent; None if there were none.
    """

    name: str
    size: int
    macs: int
    params: int
    ms: float | None = None
    agreement: ClassAgreement | None = None
    top1: float | None = None


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
        labelled = f'  {"top-1":>7}' if dense.top1 is not None else ''
        lines = [
            f'{"network":28}  {"pixels":>6}  {"MMACs":>16}  {"params":>11}  {"ms":>7}{labelled}  {"agreement":>9}  '
            'expected loss'
        ]
        for row in self.rows:
            ms = '-' if row.ms is None else f'{row.ms:.1f}'
            told, loss = '-', '-'
            if row.agreement is not None:
                told = f'{100 * row.agreement.top1:.1f} %'
                low, high = row.agreement.interval
                loss = f'{100 * row.agreement.expected_loss:.1f} points ({100 * low:.1f} to {100 * high:.1f})'
            share = f'{row.macs / 1e6:.0f} ({100 * row.macs / dense.macs:.0f} %)'
            top1 = '' if row.top1 is None else f'  {row.top1:>5.1f} %'
            lines.append(
                f'{row.name:28}  {row.size:>6}  {share:>16}  {row.params:>11,}  {ms:>7}{top1}  {told:>9}  {loss}'
            )
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
    held_share: float = _HELD,
    latency: bool = True,
    deployed: bool = True,
    accuracy: Callable[[nn.Module, tuple[int, int]], float] | None = None,
    progress: bool = False,
) -> Shrunk:
    """Compress a trained classifier to a budget, repair it, tune it, and measure what is left.

    Some images are held out: nothing is fitted to them, but they choose the best state of the tuning.

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
        held_share: share of the images that is held out, of at most 256 images.
        latency: measure milliseconds.
        deployed: of the networks as :func:`norton_timm.deploy` makes them; False: as they are, for half a second.
        accuracy: gives the top-1, in percent, of a network at a height and width; called for every row of the table,
            and nothing is chosen by it. See :class:`norton_timm.training.LabelledAccuracy`.
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
    held_count = max(2, min(_MOST_HELD, round(held_share * len(images))))
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
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        began = time.perf_counter()

    def row(name: str, network: nn.Module, image: Tensor, found: ClassAgreement | None = None) -> NetworkRow:
        height, width = image.shape[-2:]
        made = NetworkRow(name, width, *count(network, image), agreement=found)
        if accuracy is not None:
            made.top1 = accuracy(network, (height, width))
            lap('accuracy')
        return made

    full = (int(example_input.shape[-2]), int(example_input.shape[-1]))
    best: _Try | None = None
    for size in sizes_for(dense, example_input, budget) if allow_resolution else [full]:
        one = _compressed(dense, resized(example_input, size), rest[:_CALIBRATION], budget, method, lap, progress)
        one.agreement = agreement(scores(one.model, resized(held, size)), wanted)
        if allow_resolution:
            log.info('%d x %d pixels: divergence %.4f from the dense network', *size, one.agreement.divergence)
        if best is not None and one.agreement.divergence >= best.agreement.divergence:
            break  # larger images, and fewer channels, only get worse from here on
        best = one
    assert best is not None
    model, spec, report, image = best.model, best.spec, best.report, best.image
    size = (int(image.shape[-2]), int(image.shape[-1]))
    rows = [row('dense', dense, example_input), row('compressed', model, image, best.agreement)]
    tuned = None
    if minutes is not None or steps is not None:
        log.info('tuning: the compressed network learns the outputs of the dense one on %d images', len(rest))
        tuned = tune_without_labels(
            model, dense, rest, held, minutes=minutes, steps=steps, config=config, seed=seed, size=size,
            checkpoint=checkpoint, progress=progress, facts=[spec.to_yaml()],
        )  # fmt: skip
        lap('tuning')
        rows.append(row('compressed and tuned', model, image, tuned.after))
    if size != full:
        set_input_size(model, size)
    lower = lower_resolution(full, rows[-1].macs / rows[0].macs)
    if lower is not None:
        small = resized(example_input, lower)
        found = agreement(scores(dense, resized(held, lower)), wanted)
        rows.append(row('dense, lower resolution', dense, small, found))
        ours = rows[-2].agreement
        if ours is not None and found.expected_loss < ours.expected_loss:
            warnings.append(
                f'the dense network at {lower[1]} pixels loses less at as many MACs: allow a lower resolution '
                '(--allow-resolution), or resize its images yourself'
            )
    if latency:
        log.info('latency: the networks take turns%s', ', each in its fastest form' if deployed else '')
        _measure(rows, dense, model, example_input, image, lower, deployed, progress)
        if rows[1].ms is not None and rows[0].ms is not None and rows[1].ms > rows[0].ms:
            target = _AIM * compare_latency({'dense': dense}, example_input, seconds=1)['dense']
            warnings.append(
                f'the compressed network is slower here than the dense one{", both in their fastest form" * deployed}: '
                f'{rows[1].ms:.2f} against {rows[0].ms:.2f} ms; --latency-ms {target:.3g} instead of another budget '
                'makes time the target'
            )
        lap('latency')
    return Shrunk(model, spec, size, report, rows, tuned, seconds, warnings)


@dataclass
class _Try:
    """A compressed and repaired network, and an image of the size that it reads."""

    model: nn.Module
    spec: CompressionSpec
    report: CompressionReport
    image: Tensor
    agreement: ClassAgreement = field(init=False)


def _compressed(
    dense: nn.Module,
    image: Tensor,
    images: Tensor,
    budget: Mapping[str, float],
    method: str,
    lap: Callable[[str], None],
    progress: bool,
) -> _Try:
    """Search and repair for images of the size of ``image``; the dense network where that meets the budget already."""
    size = (int(image.shape[-2]), int(image.shape[-1]))
    if size != tuple(images.shape[2:]):
        left = budget['macs'] * count(dense, images[:1]).macs / count(dense, image).macs
        if left >= 1 - NEAR:
            spec = CompressionSpec(rank=0)
            model, report = compress(dense, spec, image)
            return _Try(model, spec, report, image)
        budget = {'macs': left}
    log.info('search: the error of every choice is measured on %d images, and the best mix is taken', len(images))
    batches = list(resized(images, size).split(32))
    activations = Activations(dense, image, batches)
    spec = find_spec(
        dense, method=method, calibration=batches, example_input=image, activations=activations,
        progress=progress, **cast(Any, budget),
    )  # fmt: skip
    lap('search')
    log.info('repair: every layer is fitted in turn to the outputs of the dense network')
    model, report = compress(dense, spec, image, calibration=batches, activations=activations, progress=progress)
    lap('repair')
    return _Try(model, spec, report, image)


def _measure(
    rows: list[NetworkRow],
    dense: nn.Module,
    model: nn.Module,
    image: Tensor,
    small: Tensor,
    lower: tuple[int, int] | None,
    deployed: bool,
    progress: bool,
) -> None:
    """Set the milliseconds of each network, deployed or as it is, on ``image`` or on the ``small`` one it reads."""
    of = [(rows[0], dense, image), (rows[1], model, small)]
    if lower is not None:
        of.append((rows[-1], dense, resized(image, lower)))
    with tqdm(total=len(of) + 1, desc='latency', disable=not progress, leave=False) as bar:
        calls = []
        for row, network, x in of:
            bar.set_postfix_str(row.name)
            fast = deploy(network, x) if deployed else ready_to_run(network)
            calls.append(partial(fast, channels_last(x)))
            bar.update()
        with torch.no_grad():
            times = take_turns(calls, partial(synchronise, image), 2.0 if deployed else 0.5).milliseconds()
        bar.update()
    for (row, _, _), ms in zip(of, times):
        row.ms = ms
    for row in rows:
        if row.name == 'compressed and tuned':
            row.ms = rows[1].ms
