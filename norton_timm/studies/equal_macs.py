"""Compression without labels at equal MACs: ours, the controls with equal repair and tuning, and a lower resolution.

Every method gets the same unlabelled images. A fifth is held out, as in :func:`norton_timm.training.shrink`; the others
are for choices, repair and tuning. Accuracy is measured on test images that nothing else looks at.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from norton_timm.compression import compress, refit
from norton_timm.profiling import count, process_peak, reset_process_peak
from norton_timm.studies.controls import (
    TORCH_PRUNING,
    UNIFORM,
    LeftOut,
    has_torch_pruning,
    prune_by_torch_pruning,
    torch_pruning_ratio,
    uniform_spec,
)
from norton_timm.studies.reproduce import read_rows, row_key, write_row
from norton_timm.studies.trained import IMAGENET, TrainedNetwork, TrainedNetworks
from norton_timm.training import agreement, lower_resolution, resized, scores, shrink, tune_without_labels
from norton_timm.utils import copy_of

log = logging.getLogger(__name__)

OURS, LOWER = 'ours', 'resolution'
ENTRANTS = (OURS, *UNIFORM, TORCH_PRUNING, LOWER)  # the methods
FIXED, FREE = 'fixed', 'free'  # whether a method may lower the resolution
SHARES = {True: (0.7, 0.5), False: (0.5, 0.3)}  # of MACs, by default: for ImageNet's networks, for CIFAR-10's
CELL_KEYS = ('network', 'data', 'macs_asked', 'resolution', 'method', 'seed', 'images', 'limit')
_LEAST = 8  # images, of which some are held out
_HELD, _MOST_HELD = 0.2, 256
_CALIBRATION, _BATCH = 512, 32


class Cell(NamedTuple):
    """One row of the table."""

    network: str
    macs: float
    resolution: str
    method: str
    seed: int


class Limit(NamedTuple):
    """How long each network is tuned: a number of steps, or minutes."""

    steps: int | None = None
    minutes: float | None = None

    def __str__(self) -> str:
        return f'{self.steps} steps' if self.minutes is None else f'{self.minutes:g} minutes'


@dataclass
class _Made:
    """A compressed network; that of a control before the tuning.

    Attributes:
        model: the network; it takes images of any size.
        size: height and width in pixels at which it runs.
        repair: what repaired it: ``refit`` or ``none``.
        seconds: of search and repair, and of the tuning if there was one.
        steps: of the tuning.
    """

    model: nn.Module
    size: tuple[int, ...]
    repair: str = 'none'
    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0


class AtSize(nn.Module):
    """A network that first brings its images to another size.

    Args:
        model: the network.
        size: height and width in pixels.
    """

    def __init__(self, model: nn.Module, size: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.size = model, (size[0], size[1])

    def forward(self, images: Tensor) -> Tensor:
        return self.model(resized(images, self.size))


def study_cells(
    networks: Sequence[str],
    macs: Sequence[float] | None = None,
    methods: Sequence[str] = ENTRANTS,
    seeds: Sequence[int] = (0, 1, 2),
    resolutions: Sequence[str] = (FIXED, FREE),
) -> list[Cell]:
    """The rows to measure.

    Args:
        networks: of :mod:`norton_timm.studies.trained`.
        macs: shares of the MACs to keep; by default 0.7 and 0.5 for ImageNet's networks, 0.5 and 0.3 for CIFAR-10's.
        methods: some of ``ENTRANTS``.
        seeds: of the images that are held out, of the tuning, and of the random control.
        resolutions: ``fixed``, ``free`` or both, for our method. The other controls keep the resolution.

    Raises:
        ValueError: a share outside 0 to 1, or an unknown name.

    Example:
        >>> len(study_cells(['resnet20_cifar'], [0.5], ['ours', 'l1'], [0]))
        3
    """
    for name, values, allowed in (('methods', methods, ENTRANTS), ('resolutions', resolutions, (FIXED, FREE))):
        for value in values:
            if value not in allowed:
                raise ValueError(f'{name}: got {value!r}, expected some of {", ".join(allowed)}')
    for share in macs or ():
        if not 0 < share < 1:
            raise ValueError(f'macs: got {share}, expected shares to keep, above 0 and below 1')
    runs = {OURS: tuple(resolutions), LOWER: (FREE,)}
    return list(dict.fromkeys(
        Cell(network, share, resolution, method, seed)
        for network in networks
        for share in macs or SHARES[network in IMAGENET]
        for method in methods
        for resolution in runs.get(method, (FIXED,))
        for seed in seeds
    ))  # fmt: skip


def run_cells(
    cells: Sequence[Cell], networks: TrainedNetworks, path: Path, limit: Limit, progress: bool = False
) -> Iterator[dict[str, Any]]:
    """Measure cells and write each as a row as soon as it is done. Rows that the file has are not measured again.

    A control that cannot be had is left out, and the log says why.

    Args:
        cells: see :func:`study_cells`.
        networks: where weights and images are.
        path: CSV file.
        limit: of the tuning; 0 steps for none.
        progress: show bars.

    Raises:
        ValueError: no such network, or weights or images that are missing.

    Example:
        >>> for row in run_cells(study_cells(['resnet20_cifar']), networks, Path('label_free.csv'), Limit(steps=300)):
        ...     print(row['method'], row['points_lost'])
    """
    _check_limit(limit)

    def is_done(cell: Cell) -> bool:
        wanted = row_key(_facts(cell, networks, limit), CELL_KEYS)
        return any(row_key(row, CELL_KEYS) == wanted for row in read_rows(path))

    cells = [cell for cell in cells if not is_done(cell)]
    if any(cell.method == TORCH_PRUNING for cell in cells) and not has_torch_pruning():
        log.warning('torch_pruning is left out: torch-pruning is not installed: pip install -e ".[controls]"')
        cells = [cell for cell in cells if cell.method != TORCH_PRUNING]
    networks.check(list(dict.fromkeys(cell.network for cell in cells)))
    for cell in cells:
        if is_done(cell):  # by another process meanwhile
            continue
        try:
            row = _facts(cell, networks, limit) | _measure(cell, networks.open(cell.network), limit, progress)
        except (LeftOut, FloatingPointError) as error:
            log.warning('%s at %s, %s, seed %s is left out: %s', *cell[:2], *cell[3:], error)
            continue
        write_row(path, row, CELL_KEYS)
        yield row


def _check_limit(limit: Limit) -> None:
    if (limit.steps is None) == (limit.minutes is None):
        raise ValueError('got neither or both of steps and minutes, expected one of them')
    if (limit.steps or 0) < 0 or (limit.minutes is not None and not 0 < limit.minutes < float('inf')):
        raise ValueError(f'got {limit}, expected 0 steps or more, or minutes above 0')


def _facts(cell: Cell, networks: TrainedNetworks, limit: Limit) -> dict[str, Any]:
    """What tells a cell's row from others."""
    tuned = 'none' if cell.method == LOWER else str(limit)
    return {
        'network': cell.network, 'data': networks.data_name(cell.network), 'macs_asked': cell.macs,
        'resolution': cell.resolution, 'method': cell.method, 'seed': cell.seed,
        'images': networks.image_count(cell.network), 'limit': tuned,
    }  # fmt: skip


def _measure(cell: Cell, network: TrainedNetwork, limit: Limit, progress: bool) -> dict[str, Any]:
    """Compress, repair and tune a network, and everything that is measured of it."""
    dense, images = network.model, network.images
    if len(images) < _LEAST:
        raise ValueError(f'{network.name}: got {len(images)} images, expected at least {_LEAST}')
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(cell.seed))
    count_held = max(2, min(_MOST_HELD, round(_HELD * len(images))))
    held, rest = images[order[:count_held]], images[order[count_held:]]
    top1_dense, wanted = network.top1_dense, scores(dense, held)
    counts_memory = reset_process_peak()
    if cell.method == OURS:
        made = _ours(cell, dense, images, limit, progress)
    else:
        made = _make(cell, dense, rest[:_CALIBRATION])
    full = count(dense, images[:1]).macs
    macs = count(made.model, resized(images[:1], made.size[-2:])).macs  # type: ignore[arg-type]
    whole = tuple(images.shape[-2:])
    model = made.model if made.size == whole else AtSize(made.model, made.size)
    if cell.method not in (OURS, LOWER) and limit.steps != 0:
        began = time.perf_counter()
        made.steps = tune_without_labels(
            model, dense, rest, held, steps=limit.steps, minutes=limit.minutes, seed=cell.seed, progress=progress
        ).steps
        made.seconds['tuning'] = time.perf_counter() - began
    peak = process_peak(torch.device('cpu')) if counts_memory else None
    found = agreement(scores(model, held), wanted)
    top1 = network.top1(model)
    low, high = found.interval
    return {
        'macs_got': round(macs / full, 4), 'macs': macs, 'macs_dense': full, 'pixels': made.size[0],
        'steps': made.steps, 'repair': made.repair, 'top1_dense': round(top1_dense, 2), 'top1': round(top1, 2),
        'points_lost': round(top1_dense - top1, 2), 'expected_loss': round(100 * found.expected_loss, 2),
        'expected_low': round(100 * low, 2), 'expected_high': round(100 * high, 2),
        'agreement': round(100 * found.top1, 2),
        **{f'{name}_s': round(made.seconds.get(name, 0.0), 1) for name in ('search', 'repair', 'tuning')},
        'memory_gb': '' if peak is None else round(peak / 1e9, 2), 'threads': torch.get_num_threads(),
        'test_images': len(network.test_images),
        **{name: importlib.metadata.version(name) for name in ('norton-timm', 'torch', 'timm')},
    }  # fmt: skip


def _make(cell: Cell, dense: nn.Module, images: Tensor) -> _Made:
    """The compressed and repaired network of a control."""
    if cell.method == LOWER:
        size = lower_resolution(tuple(images.shape[-2:]), cell.macs)
        if size is None:
            raise LeftOut(f'no lower resolution, in steps of 8 pixels, has {cell.macs} of the MACs')
        return _Made(copy_of(dense), size)
    if cell.method == TORCH_PRUNING:
        return _by_torch_pruning(dense, cell.macs, images)
    return _uniform(dense, cell, images)


def _ours(cell: Cell, dense: nn.Module, images: Tensor, limit: Limit, progress: bool) -> _Made:
    """Our network, tuned already."""
    try:
        result = shrink(
            dense, images, {'macs': cell.macs}, steps=limit.steps or None, minutes=limit.minutes, seed=cell.seed,
            allow_resolution=cell.resolution == FREE, latency=False, progress=progress,
        )  # fmt: skip
    except ValueError as error:  # so few MACs cannot be had
        raise LeftOut(str(error)) from error
    repair = 'none' if 'repair' not in result.seconds else 'refit'
    steps = 0 if result.tuned is None else result.tuned.steps
    return _Made(result.model, result.size, repair, result.seconds, steps)


def _uniform(dense: nn.Module, cell: Cell, images: Tensor) -> _Made:
    clock, image = _Clock(), images[:1]
    spec = uniform_spec(dense, cell.macs, UNIFORM[cell.method], image, cell.seed)
    clock.lap('search')
    model, _ = compress(dense, spec, image, calibration=list(images.split(_BATCH)))
    clock.lap('repair')
    return _Made(model, tuple(image.shape[-2:]), 'refit', clock.seconds)


def _by_torch_pruning(dense: nn.Module, macs: float, images: Tensor) -> _Made:
    clock, image = _Clock(), images[:1]
    model, kept = prune_by_torch_pruning(dense, torch_pruning_ratio(dense, macs, image), image)
    clock.lap('search')
    refit(model, dense, kept, list(images.split(_BATCH)))
    clock.lap('repair')
    return _Made(model, tuple(image.shape[-2:]), 'refit', clock.seconds)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap."""
        now = time.perf_counter()
        self.seconds[name], self._began = now - self._began, now
