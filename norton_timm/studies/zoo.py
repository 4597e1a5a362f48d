"""The table of the zoo: size, published accuracy, source of weights, and latency of each network on this machine."""

from __future__ import annotations

import csv
import fnmatch
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import timm
import torch
from torch import nn

from norton_timm.checkpoints import SHIPPED, base_name, find_file
from norton_timm.models import published_accuracy, spec_of, tags
from norton_timm.profiling import count
from norton_timm.studies.beside import BesideRow

_TITLES = {
    'name': 'tag',
    'rank': 'rank',
    'rates': 'rates',
    'params': 'parameters',
    'macs': 'MACs',
    'top1': 'top-1 %',
    'weights': 'weights',
    'dense_ms': 'dense ms',
    'ms': 'ms',
    'speedup': 'faster',
    'control_px': 'dense, no more MACs',
    'control_ms': 'its ms',
}
COLUMNS = tuple(_TITLES)
_TITLES.update(why='why', px='px', source='published by')  # of the rows beside
_MEASURED = ('dense_ms', 'ms', 'speedup', 'control_px', 'control_ms')


@dataclass(frozen=True)
class ZooRow:
    """One network of the zoo.

    Attributes:
        name: Its name with the tag.
        rank: CPD rank, 0 for a network that is only pruned, None for a dense one.
        rates: Pruning rates in the authors' notation.
        params: Parameters.
        macs: Multiply-accumulates of convolutions and linear layers at the network's own image size.
        top1: What the authors printed, in %.
        weights: Where `pretrained=True` finds weights: shipped, a directory, the authors' release, url, hub, or none.
        dense_ms: Median latency of the dense network on this machine, in ms.
        ms: The same of the compressed one.
        speedup: `dense_ms` over `ms`.
        control_px: Largest image side at which the dense network needs no more MACs than the compressed one.
        control_ms: The dense network's latency at that side, in ms.
    """

    name: str
    rank: int | None
    rates: str
    params: int
    macs: int
    top1: float | None
    weights: str
    dense_ms: float | None = None
    ms: float | None = None
    speedup: float | None = None
    control_px: int | None = None
    control_ms: float | None = None


def zoo_names(patterns: Sequence[str] = ()) -> list[str]:
    """Networks of the table: each dense one, then its compressed ones; by default all that were published.

    Raises:
        ValueError: A pattern that matches none.
    """
    everything, published = [], []
    bases = list(dict.fromkeys(base for rows in tags().values() for base in rows))
    for base in bases:
        names = [base, *(f'{m}_{base}.{t}' for m, rows in tags().items() for t in rows.get(base, ()))]
        everything += names
        published += [name for name in names if published_accuracy(name)]
    for pattern in patterns:
        if not fnmatch.filter(everything, pattern):
            raise ValueError(f'no network matches {pattern!r}, expected names such as {", ".join(published[1:4])}')
    if not patterns:
        return published
    return [name for name in everything if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def zoo_rows(names: Sequence[str], measure: bool = True, batch: int = 1) -> Iterator[ZooRow]:
    """Rows of the table, one after the other as they are made.

    Args:
        names: As `zoo_names` gives them.
        measure: Also measure latency on this machine; takes seconds for each row.
        batch: Images at a time.
    """
    for name in names:
        model = timm.create_model(name).eval()
        size = model.pretrained_cfg['input_size']
        base = base_name(name)
        macs, params = count(model, size)
        rank, rates = _recipe(name, base)
        row = ZooRow(name, rank, rates, params, macs, published_accuracy(name).get('top1'), _weights_source(name))
        yield _measured(row, model, base, size, batch) if measure else row


def _recipe(name: str, base: str) -> tuple[int | None, str]:
    if name == base:
        return None, ''
    spec = spec_of(name)
    rank = next(iter(spec.rank.values())) if isinstance(spec.rank, dict) else spec.rank
    assert isinstance(rank, int) and isinstance(spec.rates, str), 'tags have one rank and a list'
    return rank, spec.rates


def _weights_source(name: str) -> str:
    found = find_file(name)
    if found is not None:
        return 'shipped' if found.parent == SHIPPED else str(found)
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    assert cfg is not None
    if str(cfg.url).startswith('authors:'):
        return 'authors'
    for key, text in (('hf_hub_id', 'hub'), ('url', 'url'), ('file', 'file')):
        if getattr(cfg, key):
            return text
    return 'none'


def _measured(row: ZooRow, model: nn.Module, base: str, size: Sequence[int], batch: int) -> ZooRow:
    from norton_timm.inference import tune_forms
    from norton_timm.profiling import channels_last, compare_latency, ready_to_run

    image = torch.randn(batch, *size)
    dense = timm.create_model(base).eval()
    model = ready_to_run(model)
    tune_forms(model, channels_last(image))
    times = compare_latency({'dense': dense, 'compressed': model}, image)
    values = asdict(row)
    values.update(dense_ms=times['dense'], ms=times['compressed'], speedup=times['dense'] / times['compressed'])
    side = control_side(dense, row.macs, size) if row.name != base else None
    if side is not None:
        small = compare_latency({'control': dense}, torch.randn(batch, size[0], side, side))
        values.update(control_px=side, control_ms=small['control'])
    return ZooRow(**values)


def control_side(dense: nn.Module, macs: int, size: Sequence[int]) -> int | None:
    """Largest image side (pixels) below the network's own at which `dense` needs at most `macs`; None if there is none.

    Sides are multiples of 4 pixels for networks of CIFAR's size, of 32 for others, and large enough for every pooling
    layer.
    """
    step = 4 if size[-1] <= 64 else 32
    for side in range(size[-1] - step, step - 1, -step):
        try:
            needed = count(dense, (size[0], side, side)).macs
        except RuntimeError as error:
            if 'Output size is too small' in str(error):
                return None
            raise
        if needed <= macs:
            return side
    return None


def to_markdown(rows: Sequence[ZooRow] | Sequence[BesideRow], columns: Sequence[str] = ()) -> str:
    """A table for people: millions, two decimals, a dash for what is not known."""
    own = [f.name for f in fields(rows[0])] if rows else []
    keys = columns or [k for k in own if k not in _MEASURED or any(getattr(r, k) is not None for r in rows)]
    lines = ['| ' + ' | '.join(_TITLES[k] for k in keys) + ' |', '|' + '|'.join(_rule(k) for k in keys) + '|']
    lines += ['| ' + ' | '.join(_cell(row, k) for k in keys) + ' |' for row in rows]
    return '\n'.join(lines) + '\n'


def to_csv(rows: Sequence[ZooRow] | Sequence[BesideRow]) -> str:
    """The same for programs: every column, exact numbers, empty where not known."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(rows[0])] if rows else [], lineterminator='\n')
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def _rule(key: str) -> str:
    return '---' if key in ('name', 'rates', 'weights', 'why', 'source') else '--:'


def _cell(row: ZooRow | BesideRow, key: str) -> str:
    value = getattr(row, key)
    if value in (None, ''):
        return '–'
    if key in ('params', 'macs'):
        return f'{value / 1e6:,.2f} M'
    if key == 'speedup':
        return f'{value:.2f}x'
    if key == 'control_px':
        return f'{value} px'
    if key in ('name', 'rates'):
        return f'`{value}`'
    return f'{value:.2f}' if isinstance(value, float) else str(value)
