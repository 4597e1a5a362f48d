"""Distances between the filters of a layer, by principal angles or by values, and scores of single filters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from norton_timm.tensors.principal_angles import drop_empty_components, largest_angle

CRITERIA = ['pabs', 'csa']  # names of all distances: `value_criterion` adds to these two
SCORES: list[str] = []  # names of all scores, see `score_criterion`

ValueDistance = Callable[[Tensor, bool], Tensor]
Score = Callable[[Tensor, torch.Generator | None], Tensor]
_CHUNK = 2**21  # float64 values per temporary: 16 MiB
_DISTANCES: dict[str, ValueDistance] = {}
_SCORES: dict[str, Score] = {}


class Factors(Protocol):
    """What `cp_decompose` and `hosvd` return: mode factors of every filter."""

    @property
    def A(self) -> Tensor: ...
    @property
    def B(self) -> Tensor: ...
    @property
    def C(self) -> Tensor: ...


def value_criterion(name: str) -> Callable[[ValueDistance], ValueDistance]:
    """Make a distance between filters known by a name; a decorator.

    The function takes filters `(O, d)` in float64, and whether a filter counts as equal to its negative. It returns
    `(O, O)`, of which the upper half is read.
    """

    def register(function: ValueDistance) -> ValueDistance:
        _DISTANCES[name] = function
        CRITERIA.append(name)
        return function

    return register


def score_criterion(name: str) -> Callable[[Score], Score]:
    """Make a score of single filters known by a name; a decorator.

    The function takes filters `(O, d)` in float64 and a generator. It returns `(O,)`; large scores are worth keeping.
    """

    def register(function: Score) -> Score:
        _SCORES[name] = function
        SCORES.append(name)
        return function

    return register


def filter_distance(
    factors: Factors | Tensor,
    criterion: str = 'pabs',
    *,
    alpha: float = 1 / 3,
    beta: float = 1 / 3,
    gamma: float = 1 / 3,
) -> Tensor:
    """Distance of every pair of filters, `(O, O)`, symmetric with a diagonal of exact zeros.

    `pabs` is NORTON's eq. (11): `alpha`, `beta`, `gamma` weigh the largest principal angle (radians, in [0, pi/2],
    Bjorck and Golub, 1973) between the column spaces of A, B and C. `csa` takes sin^2 of the angle (one minus the
    squared cosine) instead. A component with a zero column in one mode counts in no mode. An all-zero filter is at
    angle 0 to another one and at pi/2 to any other filter. Both ignore order, sign and scale of components.

    The others compare values: `vbd` Var(x-y) / (Var x + Var y); `snr` Var(x-y) / Var x, averaged over both orders
    as it is not symmetric; `cosine` 1 - cos; `pearson` 1 - correlation; `euclidean`, `manhattan`. x and y are:

    - a raw weight `(O, ...)`: the flattened filters (for `pabs` and `csa`, the lines they span);
    - CPD factors: the low-rank filters they stand for, so that order, sign and scale of the components cannot matter;
    - HOSVD factors (they have a `core`): CORING's distance, the mean over the modes (weights as above) of the distance
      of the factors. The SVD leaves the sign of each column open; the sign with the smallest distance counts.

    Where a ratio is 0/0 (both filters zero, or both of zero variance) the distance is 0. Where only one filter is,
    `cosine` and `pearson` give 1, and `snr` takes the ratio that is defined. Computed in float64, returned in the
    input's type.

    Raises:
        ValueError: unknown criterion, weights that do not sum to 1, NaN or infinity (names the filter).

    Example:
        >>> distance = filter_distance(cp_decompose(weight, rank=1), 'pabs')  # NORTON, (O, O)
        >>> distance = filter_distance(hosvd(weight, rank=1), 'vbd')  # CORING
    """
    if criterion not in CRITERIA:
        raise ValueError(f'criterion: got {criterion!r}, expected one of {", ".join(CRITERIA)}')
    weights: tuple[float, ...] = (alpha, beta, gamma)
    if any(not 0 <= w <= 1 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f'alpha, beta, gamma: expected three weights in [0, 1] that sum to 1, got {weights}')
    angles = criterion in ('pabs', 'csa')
    if isinstance(factors, Tensor):
        if factors.ndim < 2:
            raise ValueError(f'weight: expected filters (O, ...), got shape {tuple(factors.shape)}')
        modes, weights = [factors.detach().flatten(1)[:, :, None]], (1.0,)
    else:
        modes = [f.detach() for f in (factors.A, factors.B, factors.C)]
    dtype = modes[0].dtype
    for mode in modes:
        _check_finite(mode)
    modes = [m.to(torch.float64) for m in modes]
    if angles:
        if not isinstance(factors, Tensor) and not hasattr(factors, 'core'):
            modes = drop_empty_components(modes)
        eps = torch.finfo(dtype).eps
        kind: Callable[[Tensor], Tensor] = lambda m: largest_angle(m, eps, squared_sine=criterion == 'csa')  # noqa: E731
    elif isinstance(factors, Tensor) or hasattr(factors, 'core'):
        free_sign = not isinstance(factors, Tensor)
        kind = lambda m: value_distance(m, criterion, free_sign)  # noqa: E731
    else:
        dense = torch.einsum('ohr,owr,oir->oihw', *modes)
        modes, weights = [dense.flatten(1)[:, :, None]], (1.0,)
        kind = lambda m: value_distance(m, criterion, False)  # noqa: E731
    total = None
    for mode, weight in zip(modes, weights):
        part = kind(mode).mul_(weight)
        total = part if total is None else total.add_(part)
    assert total is not None
    total = total.triu_(1)
    return (total + total.T).to(dtype)


def filter_scores(weight: Tensor, criterion: str, generator: torch.Generator | None = None) -> Tensor:
    """Importance `(O,)` of single filters, the usual controls; the larger the more worth keeping.

    `l1`, `l2`: norms (Li et al., 2017). `geometric_median`: sum of Euclidean distances to the other filters (FPGM,
    He et al., 2019). `random`: uniform, from `generator`.
    """
    if criterion not in SCORES:
        raise ValueError(f'criterion: got {criterion!r}, expected one of {", ".join(SCORES)}')
    flat = weight.detach().flatten(1)
    _check_finite(flat)
    return _SCORES[criterion](flat.to(torch.float64), generator).to(flat.dtype)


score_criterion('l1')(lambda filters, _: torch.linalg.vector_norm(filters, ord=1, dim=1))
score_criterion('l2')(lambda filters, _: torch.linalg.vector_norm(filters, dim=1))


@score_criterion('geometric_median')
def _geometric_median(filters: Tensor, generator: torch.Generator | None) -> Tensor:
    return filter_distance(filters, 'euclidean').sum(1)


@score_criterion('random')
def _random(filters: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else filters.device
    return torch.rand(len(filters), generator=generator, device=device)


def _check_finite(x: Tensor) -> None:
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bad.any():
        raise ValueError(f'filter {int(bad.nonzero()[0])} has NaN or infinite values')


def value_distance(x: Tensor, criterion: str, free_sign: bool) -> Tensor:
    """`x (O, d, R)` -> `(O, O)`, upper half valid; with `free_sign` each column may be flipped."""
    distance = _DISTANCES[criterion]
    if not free_sign or x.shape[2] == 1:
        return distance(x.flatten(1), free_sign)
    columns = [distance(column, True) for column in x.unbind(2)]
    if criterion == 'euclidean':
        return sum(column.square_() for column in columns).sqrt_()  # type: ignore[union-attr]
    total: Tensor = sum(columns)  # type: ignore[assignment]
    return total if criterion == 'manhattan' else total / len(columns)


@value_criterion('manhattan')
def _manhattan(x: Tensor, free_sign: bool) -> Tensor:
    plain = torch.cdist(x, x, p=1)
    return torch.minimum(plain, torch.cdist(x, -x, p=1)) if free_sign else plain


def _product_distance(x: Tensor, free_sign: bool, criterion: str) -> Tensor:
    """A distance that follows from the inner products of all pairs, in pieces that stay in cache."""
    o = len(x)
    peak = x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
    x = x / peak
    if criterion in ('vbd', 'snr', 'pearson'):
        x = x - x.mean(1, keepdim=True)
        x[torch.linalg.vector_norm(x, dim=1) <= 1e-15 * x.shape[1] ** 0.5] = 0  # a constant filter, up to rounding
    square = (x * x).sum(1)
    out = x.new_empty(o, o)
    for start in range(0, o, max(1, _CHUNK // o)):
        part = slice(start, min(start + max(1, _CHUNK // o), o))
        dot = x[part] @ x.T
        out[part] = _from_products(dot.abs_() if free_sign else dot, square[part, None], square[None, :], criterion)
    if criterion in ('euclidean', 'vbd', 'snr'):
        _refine_close_pairs(out, x, square, criterion, free_sign)
    return out.mul_(peak) if criterion == 'euclidean' else out


for _name in ('vbd', 'snr', 'cosine', 'euclidean', 'pearson'):
    value_criterion(_name)(partial(_product_distance, criterion=_name))


def _from_products(dot: Tensor, xx: Tensor, yy: Tensor, criterion: str) -> Tensor:
    if criterion in ('cosine', 'pearson'):
        norm = xx.sqrt() * yy.sqrt()
        cosine = (dot / norm.where(norm > 0, 1)).clamp_(-1, 1)
        return (1 - cosine).masked_fill_((xx == 0) & (yy == 0), 0)
    gap = (xx + yy - 2 * dot).clamp_min_(0)
    if criterion == 'euclidean':
        return gap.sqrt_()
    return _ratio(gap, xx, yy, criterion)


def _ratio(gap: Tensor, xx: Tensor, yy: Tensor, criterion: str) -> Tensor:
    if criterion == 'vbd':
        total = xx + yy
        return gap / total.where(total > 0, 1)
    x_ok, y_ok = xx > 0, yy > 0
    both = gap / xx.where(x_ok, 1) * x_ok + gap / yy.where(y_ok, 1) * y_ok
    return both / (x_ok.to(gap) + y_ok.to(gap)).clamp_min_(1)


def _refine_close_pairs(out: Tensor, x: Tensor, square: Tensor, criterion: str, free_sign: bool) -> None:
    """Near-duplicates lose all digits in |x|^2 + |y|^2 - 2xy: take their difference explicitly."""
    gap = (square[:, None] + square[None, :]).mul_(1e-4)
    if criterion == 'euclidean':
        close = out.square() < gap
    else:
        close = out < 1e-4
    i, j = torch.nonzero(close.triu_(1), as_tuple=True)
    for part in torch.arange(len(i), device=i.device).split(max(1, _CHUNK // x.shape[1])):
        a, b = x[i[part]], x[j[part]]
        exact = (a - b).square().sum(1)
        if free_sign:
            exact = torch.minimum(exact, (a + b).square().sum(1))
        xx, yy = square[i[part]], square[j[part]]
        out[i[part], j[part]] = exact.sqrt() if criterion == 'euclidean' else _ratio(exact, xx, yy, criterion)
