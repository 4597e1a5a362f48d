"""The row beside: ready timm networks with the MACs of a compressed one, or with its accuracy, measured here too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from norton_timm.checkpoints import base_name
from norton_timm.models import published_accuracy
from norton_timm.profiling import count

_MORE_MACS = 1.05  # a network with 5 % more MACs still counts as equal
_LESS_TOP1 = 0.2  # percentage points; differences below are within the noise of a training
_TABLE = Path(__file__).with_name('ready_networks.yaml')


@dataclass(frozen=True)
class BesideRow:
    """A network in the table of `--beside`.

    Attributes:
        name: timm's name with its tag.
        why: `compressed`, `no more MACs` (5 % more are none) or `no less top-1` (0.2 points less are none).
        px: Side of the image in pixels.
        params: Parameters.
        macs: Multiply-accumulates of convolutions and linear layers at that size.
        top1: Published accuracy on ImageNet-1k in %; None where nothing was published.
        source: Where that was published.
        ms: Median latency on this machine in ms.
    """

    name: str
    why: str
    px: int
    params: int
    macs: int
    top1: float | None
    source: str
    ms: float | None = None


@cache
def ready_networks() -> list[BesideRow]:
    """The networks of `ready_networks.yaml`, those with the fewest MACs first."""
    table: dict[str, Any] = yaml.safe_load(_TABLE.read_text(encoding='utf-8'))
    rows = [
        BesideRow(name, '', row['px'], row['params'], row['macs'], row['top1'], table['sources'][row['source']])
        for name, row in table['networks'].items()
    ]
    return sorted(rows, key=lambda row: row.macs)


def beside(macs: int, top1: float | None, most: int = 3) -> list[tuple[str, BesideRow]]:
    """Ready networks beside one with these MACs and this accuracy in %, with the reason for each.

    With no more MACs, those of the best accuracy; with no less accuracy, those of the fewest MACs; `most` of each.
    """
    within = [row for row in ready_networks() if row.macs <= _MORE_MACS * macs]
    best = sorted(within, key=lambda row: -(row.top1 or 0))[:most]
    found = [('no more MACs', row) for row in best]
    if top1 is not None:
        as_good = [row for row in ready_networks() if row.top1 is not None and row.top1 >= top1 - _LESS_TOP1]
        found += [('no less top-1', row) for row in as_good[:most]]
    return found


def beside_rows(names: Sequence[str], measure: bool = True, batch: int = 1) -> Iterator[BesideRow]:
    """Rows of the table: each compressed network, then the ready ones beside it.

    Args:
        names: Tags of networks for ImageNet.
        measure: Also measure latency on this machine; takes seconds for each row.
        batch: Images at a time.

    Raises:
        ValueError: A dense network, or one for CIFAR, for which no ready networks are known.

    Example:
        >>> rows = list(beside_rows(['norton_resnet50.r078'], measure=False))
    """
    for name in names:
        if base_name(name) == name or base_name(name).endswith('_cifar'):
            raise ValueError(
                f'got {name}, expected tags of compressed networks for ImageNet: norton_resnet50.r078, ...'
            )
    for name in names:
        model = timm.create_model(name).eval()
        size = model.pretrained_cfg['input_size']
        macs, params = count(model, size)
        top1 = published_accuracy(name).get('top1')
        told = 'the authors of the method' if top1 is not None else ''
        rows = [BesideRow(name, 'compressed', size[-1], params, macs, top1, told)]
        rows += [BesideRow(**{**vars(row), 'why': why}) for why, row in beside(macs, top1)]
        for row in rows:
            yield BesideRow(**{**vars(row), 'ms': _latency(row, batch)}) if measure else row


def _latency(row: BesideRow, batch: int) -> float:
    """Median latency in ms, a compressed network with its layers in their fastest forms."""
    from norton_timm.inference import tune_forms
    from norton_timm.profiling import channels_last, compare_latency, ready_to_run

    model, image = timm.create_model(row.name).eval(), torch.randn(batch, 3, row.px, row.px)
    if row.why == 'compressed':
        model = ready_to_run(model)
        tune_forms(model, channels_last(image))
    return compare_latency({row.name: model}, image)[row.name]
