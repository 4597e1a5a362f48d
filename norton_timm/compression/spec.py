"""CompressionSpec: what to decompose and prune, and how much; rates in the authors' grammar, specs in YAML."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from norton_timm.tensors import CRITERIA, SCORES, STRATEGIES
from norton_timm.utils import as_number, as_whole, read_plain, read_plain_file, write_text

METHODS = ('norton', 'coring')
ORDERS = ('decompose-prune', 'prune-decompose')
OUTPUT_ERROR = 'output_error'  # the criterion that needs calibration images
PROTECTED = ('first', 'last')
SCOPES = ('backbone', 'detector')

MAX_RATES = 10_000
_TERM = re.compile(r'\[\s*([^\[\],]+?)\s*\]\s*(?:\*\s*(\d+))?')

Rates = str | float | Sequence[float] | Mapping[str, float]


def parse_rates(text: str) -> list[float]:
    """Expand the authors' notation: ``"[0.]+[0.1]*2"`` gives ``[0.0, 0.1, 0.1]``.

    Raises:
        ValueError: text that is not ``[rate]`` or ``[rate]*count`` joined by ``+``, a rate outside 0 <= rate < 1,
            or more than 10,000 entries.
    """
    rates: list[float] = []
    for term in text.split('+'):
        match = _TERM.fullmatch(term.strip())
        if not match:
            raise ValueError(f'rates: got {term.strip()[:60]!r}, expected [rate] or [rate]*count joined by +')
        rate, repeat = _rate(match[1], 'rates'), int((match[2] or '1')[:9])
        if len(rates) + repeat > MAX_RATES:
            raise ValueError(f'rates: got more than {MAX_RATES} entries')
        rates += [rate] * repeat
    return rates


def format_rates(rates: Sequence[float]) -> str:
    """The authors' notation of a list: ``[0.0, 0.1, 0.1]`` gives ``"[0.0]+[0.1]*2"``."""
    terms: list[str] = []
    start = 0
    for end in range(1, len(rates) + 1):
        if end == len(rates) or rates[end] != rates[start]:
            terms.append(f'[{rates[start]}]' + (f'*{end - start}' if end - start > 1 else ''))
            start = end
    return '+'.join(terms)


def _rate(value: Any, field: str) -> float:
    try:
        rate = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 <= rate < 1:
        raise ValueError(f'{field}: got {str(value)[:60]!r}, expected a pruning rate with 0 <= rate < 1')
    return rate


def _check_rates(rates: Any) -> str | float | tuple[float, ...] | dict[str, float]:
    if isinstance(rates, str):
        parse_rates(rates)
        return rates
    rates = rates.tolist() if hasattr(rates, 'tolist') else rates  # an array or a tensor
    if isinstance(rates, Mapping):
        return {_pattern(k, 'rates'): _rate(v, f'rates[{k!r}]') for k, v in rates.items()}
    if isinstance(rates, Sequence):
        if len(rates) > MAX_RATES:
            raise ValueError(f'rates: got more than {MAX_RATES} entries')
        return tuple(_rate(v, f'rates[{k}]') for k, v in enumerate(rates))
    return _rate(rates, 'rates')


def _check_int(value: Any, field: str, low: int, high: int = 2**31) -> int:
    whole = as_whole(value)
    if whole is None or not low <= whole < high:
        raise ValueError(f'{field}: got {str(value)[:60]!r}, expected an integer from {low} to {high - 1}')
    return whole


def _pattern(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f'{field}: got {str(value)[:60]!r}, expected a layer-name pattern such as "layer1.*.conv2"')
    return value


def _choice(value: Any, field: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f'{field}: got {str(value)[:60]!r}, expected one of {", ".join(allowed)}')
    return str(value)


def _low_rank(value: Any) -> dict[str, int | float]:
    """Pattern -> rank (a whole number), or share of the full rank (a fraction)."""
    if not isinstance(value, Mapping):
        raise ValueError(f'low_rank: got {str(value)[:60]!r}, expected {{layer-name pattern: rank}}')
    ranks: dict[str, int | float] = {}
    for key, rank in value.items():
        _pattern(key, 'low_rank')
        whole, share = as_whole(rank), as_number(rank)
        if whole is not None and 1 <= whole <= 65536:
            ranks[key] = whole
        elif whole is None and share is not None and 0 < share < 1:
            ranks[key] = share
        else:
            raise ValueError(
                f'low_rank[{key!r}]: got {str(rank)[:60]!r}, expected a rank from 1 to 65536, or a share of the full '
                'rank between 0 and 1'
            )
    return ranks


def _strings(value: Any, field: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f'{field}: got {str(value)[:60]!r}, expected a list')
    return tuple(_pattern(v, field) for v in value)


@dataclass(frozen=True)
class CompressionSpec:
    """A compression recipe; the same for every architecture.

    Args:
        method: ``norton`` (decompose, then prune by the factors) or ``coring`` (prune dense filters).
        rank: CPD rank of every decomposed layer, or ``{layer-name pattern: rank}``; 0 leaves a layer dense.
            The first pattern that matches counts. ``coring`` never decomposes.
        rates: pruning rates: the authors' grammar (``"[0.]+[0.1]*2"``), a list in the order of the network's
            layout, one float for all layers, or ``{layer-name pattern: rate}``. A layer keeps
            ``int(filters * (1 - rate))``.
        criterion: distance between filters, one of ``CRITERIA``, or a score of ``SCORES`` as a control;
            None means ``pabs`` for norton and ``vbd`` for coring. ``output_error`` looks at calibration images:
            channels leave that the layers reading them miss least; it prunes before it decomposes.
        strategy: ``min_sum`` (Algorithm 1), ``min_min`` or ``sum``.
        include: only layers that match one of these patterns are touched (empty: all).
        exclude: layers that match are left alone.
        protect: ``first`` keeps the stem dense and its channels, ``last`` keeps the output channels of the last
            convolution. Channels are protected only where ``rates`` is one float, the dense stem only where ``rank``
            is one number: lists and patterns say exactly what they mean.
        low_rank: ``{layer-name pattern: rank}``: each linear layer or ungrouped convolution that matches becomes two:
            R filters of its kernel size, and a 1x1 convolution (linear layers likewise). A fraction is a share of the
            full rank, the smaller side of the weight (O, I * Kh * Kw). They are factored last, from the weights that
            pruning left, and are not decomposed otherwise. With calibration images the outputs' principal axes are
            kept, without them those of the weight.
        drop: names of residual blocks that are left out; each must pass its input through a shortcut as it is. Rates
            are then one float, or by layer name.
        scope: which part of a detector is compressed: ``backbone`` (patterns and rates then refer to the backbone
            alone) or ``detector`` (all of it). None means the whole network, whatever it is.
        round_to: kept channels are rounded up to a multiple of this number.
        order: ``decompose-prune`` as in the paper, or ``prune-decompose``.
        shots: rounds K in which the filters leave (CORING's K-shot pruning).
        seed: seed of the decomposition's random restarts and of ``random`` scores.

    Raises:
        ValueError: a bad value; the message names the field, the value, and what is allowed.

    Example:
        >>> spec = CompressionSpec(rank={'layer*.conv2': 2}, rates=0.3, low_rank={'fc': 0.5})
        >>> CompressionSpec.from_yaml(spec.to_yaml()) == spec
        True
    """

    method: str = 'norton'
    rank: int | Mapping[str, int] = 1
    rates: Rates = 0.0
    criterion: str | None = None
    strategy: str = 'min_sum'
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    protect: tuple[str, ...] = PROTECTED
    low_rank: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    drop: tuple[str, ...] = ()
    scope: str | None = None
    round_to: int = 1
    order: str = 'decompose-prune'
    shots: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        _choice(self.method, 'method', METHODS)
        if isinstance(self.rank, Mapping):
            put('rank', {_pattern(k, 'rank'): _check_int(v, f'rank[{k!r}]', 0, 4096) for k, v in self.rank.items()})
        else:
            put('rank', _check_int(self.rank, 'rank', 0, 4096))
        put('rates', _check_rates(self.rates))
        if self.criterion is not None:
            _choice(self.criterion, 'criterion', (*CRITERIA, *SCORES, OUTPUT_ERROR))
            if self.criterion == OUTPUT_ERROR and self.shots != 1:
                raise ValueError(f'shots: got {self.shots} with the criterion {OUTPUT_ERROR}, expected 1')
        _choice(self.strategy, 'strategy', STRATEGIES)
        put('include', _strings(self.include, 'include'))
        put('exclude', _strings(self.exclude, 'exclude'))
        put('drop', _strings(self.drop, 'drop'))
        put('protect', tuple(_choice(p, 'protect', PROTECTED) for p in _strings(self.protect, 'protect')))
        put('low_rank', _low_rank(self.low_rank))
        if self.scope is not None:
            _choice(self.scope, 'scope', SCOPES)
        put('round_to', _check_int(self.round_to, 'round_to', 1))
        _choice(self.order, 'order', ORDERS)
        put('shots', _check_int(self.shots, 'shots', 1))
        put('seed', _check_int(self.seed, 'seed', 0, 2**63))

    def __hash__(self) -> int:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return hash(tuple(frozenset(v.items()) if isinstance(v, Mapping) else v for v in values))

    @property
    def distance(self) -> str:
        """The criterion in force: the given one, or the method's own."""
        return self.criterion or ('pabs' if self.method == 'norton' else 'vbd')

    def touches(self, name: str) -> bool:
        """Whether ``include`` and ``exclude`` admit the layer of this name."""
        if any(fnmatch.fnmatchcase(name, p) for p in self.exclude):
            return False
        return not self.include or any(fnmatch.fnmatchcase(name, p) for p in self.include)

    def rank_of(self, name: str) -> int:
        """CPD rank for the layer of this name; 0 where it stays dense."""
        if self.method == 'coring' or not self.touches(name):
            return 0
        if isinstance(self.rank, Mapping):
            return next((r for p, r in self.rank.items() if fnmatch.fnmatchcase(name, p)), 0)
        return self.rank

    def rate_list(self) -> list[float] | None:
        """The rates as a list where they are given in the authors' grammar or as a list, else None."""
        if isinstance(self.rates, str):
            return parse_rates(self.rates)
        return list(self.rates) if isinstance(self.rates, tuple) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values of the fields that differ from their defaults, and of method, rank and rates."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = {} if field.name == 'low_rank' else field.default
            if field.name in ('method', 'rank', 'rates') or value != default:
                values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls, values: Any) -> CompressionSpec:
        """Inverse of :meth:`to_dict`; an unknown key raises a ValueError that names the nearest field."""
        if not isinstance(values, Mapping):
            raise ValueError(f'got {type(values).__name__}, expected a mapping of CompressionSpec fields')
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, 1)
                hint = f', did you mean {near[0]!r}?' if near else '.'
                raise ValueError(f'unknown field {str(key)[:60]!r}{hint} Fields: {", ".join(names)}')
        return cls(**values)

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """The spec as YAML text, which is also written to ``path`` if one is given."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> CompressionSpec:
        """Read a spec from a YAML file, or from YAML text.

        Raises:
            ValueError: a missing file, malformed YAML or a bad field, naming the source.
        """
        where = 'YAML text'
        try:
            if isinstance(source, os.PathLike) or ('\n' not in source and ':' not in source):
                where = str(source)
                values = read_plain_file(Path(source))
            else:
                values = read_plain(source)
            return cls.from_dict(values)
        except OSError as error:
            raise ValueError(f'{where}: cannot read the spec: {error.strerror}') from None
        except (ValueError, TypeError) as error:
            raise ValueError(f'{where}: {error}') from None
