"""Distances between the filters of a layer, scores used as controls, and the selection of filters to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

CRITERIA = ('pabs', 'csa', 'vbd', 'snr', 'cosine', 'euclidean', 'manhattan', 'pearson')
STRATEGIES = ('min_sum', 'min_min', 'sum')
SCORES = ('l1', 'l2', 'geometric_median', 'random')
_CHUNK = 2**21  # float64 values per temporary: 16 MiB


class Factors(Protocol):
    """What `cp_decompose` and `hosvd` return: mode factors of every filter."""

    @property
    def A(self) -> Tensor: ...
    @property
    def B(self) -> Tensor: ...
    @property
    def C(self) -> Tensor: ...


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
    Bjorck and Golub, 1973) between the column spaces of A, B and C. `csa` puts sin^2 (one minus the squared cosine) of
    the angle in its place. A component with a zero column in any mode counts in none; the span of an all-zero filter
    is at angle 0 to another one and at pi/2 to everything else. Both ignore order, sign and scale of components.

    The others compare values: `vbd` Var(x-y) / (Var x + Var y); `snr` Var(x-y) / Var x, averaged over both orders
    as it is not symmetric; `cosine` 1 - cos; `pearson` 1 - correlation; `euclidean`, `manhattan`. x and y are:

    - a raw weight `(O, ...)`: the flattened filters (for `pabs` and `csa`, the lines they span);
    - CPD factors: the low-rank filters they stand for, so that order, sign and scale of the components cannot matter;
    - HOSVD factors (they have a `core`): CORING's way, the mean over the modes (weights as above) of the distance
      of the factors, with each column's sign, which the SVD leaves open, chosen for the smallest distance.

    Where a ratio is 0/0 (both filters zero, or both of zero variance) the distance is 0; where only one is, 1 for
    `cosine` and `pearson`, and `snr` takes the ratio that is defined. Computed in float64, returned in the
    input's type.

    Raises:
        ValueError: unknown criterion, weights that do not sum to 1, NaN or infinity (names the filter).
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
            modes = _drop_empty_components(modes)
        eps = torch.finfo(dtype).eps
        kind: Callable[[Tensor], Tensor] = lambda m: _largest_angle(m, eps, squared_sine=criterion == 'csa')  # noqa: E731
    elif isinstance(factors, Tensor) or hasattr(factors, 'core'):
        free_sign = not isinstance(factors, Tensor)
        kind = lambda m: _value_distance(m, criterion, free_sign)  # noqa: E731
    else:
        dense = torch.einsum('ohr,owr,oir->oihw', *modes)
        modes, weights = [dense.flatten(1)[:, :, None]], (1.0,)
        kind = lambda m: _value_distance(m, criterion, False)  # noqa: E731
    total = None
    for mode, weight in zip(modes, weights):
        part = kind(mode).mul_(weight)
        total = part if total is None else total.add_(part)
    assert total is not None
    total = total.triu_(1)
    return (total + total.T).to(dtype)


def select_filters(distance: Tensor | Sequence[Tensor], keep: int, strategy: str = 'min_sum') -> Tensor:
    """Indices of the filters to keep, sorted, int64 on the CPU.

    `min_sum` is Algorithm 1 of NORTON: of the closest pair, remove the filter whose distances to the remaining ones
    have the smaller sum. `min_min` removes the one whose next neighbour is nearer (the sum where that ties too).
    `sum` removes, at once, the filters with the smallest sums. Ties are settled the same way everywhere: the first pair
    (i, j) in row order, i < j, and of an equal pair j, as the algorithm's `else` says; for `sum` the highest index.

    Args:
        distance: `(O, O)` symmetric; or several, of layers that must keep the same indices (coupled selection): each
            is divided by its mean, so that layers weigh equally, and the average is used.
        keep: number of filters kept, 1 to O.
        strategy: see above.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f'strategy: got {strategy!r}, expected one of {", ".join(STRATEGIES)}')
    d = _average([distance] if isinstance(distance, Tensor) else list(distance))
    n = d.shape[0]
    _check_keep(keep, n)
    if strategy == 'sum':
        sums = np.array([math.fsum(row) for row in d])
        kept = np.lexsort((np.arange(n), -sums))[:keep]
    else:
        kept = _remove_closest(d, keep, by_sum=strategy == 'min_sum')
    return torch.from_numpy(np.sort(kept).astype(np.int64))


def filter_scores(weight: Tensor, criterion: str, generator: torch.Generator | None = None) -> Tensor:
    """Importance `(O,)` of single filters, the usual controls; the larger the more worth keeping.

    `l1`, `l2`: norms (Li et al., 2017). `geometric_median`: sum of Euclidean distances to the other filters (FPGM,
    He et al., 2019). `random`: uniform, from `generator`.
    """
    if criterion not in SCORES:
        raise ValueError(f'criterion: got {criterion!r}, expected one of {", ".join(SCORES)}')
    flat = weight.detach().flatten(1)
    _check_finite(flat)
    if criterion == 'random':
        device = generator.device if generator is not None else flat.device
        return torch.rand(len(flat), generator=generator, device=device).to(flat)
    if criterion == 'geometric_median':
        return filter_distance(flat, 'euclidean').to(torch.float64).sum(1).to(flat.dtype)
    return torch.linalg.vector_norm(flat.to(torch.float64), ord=1 if criterion == 'l1' else 2, dim=1).to(flat.dtype)


def select_top(scores: Tensor, keep: int) -> Tensor:
    """Sorted indices of the `keep` largest scores; of equal ones the first."""
    if scores.ndim != 1 or not torch.isfinite(scores).all():
        raise ValueError(f'scores: expected finite values (O,), got shape {tuple(scores.shape)}')
    _check_keep(keep, len(scores))
    return torch.sort(scores.detach().cpu(), descending=True, stable=True).indices[:keep].sort().values


# ---------------------------------------------------------------------------------------------- principal angles


def _largest_angle(factor: Tensor, eps: float, squared_sine: bool = False) -> Tensor:
    """Largest principal angle of every pair of column spaces; `factor (O, d, R)` -> `(O, O)`, upper half valid."""
    basis, rank = _orthonormal(factor, eps)
    o, d, r = basis.shape
    out = basis.new_zeros(o, o)
    whole = rank == d  # such a span holds every other one: no angle
    if whole.all():
        return out
    rows = max(1, _CHUNK // (o * r * r))
    flat = basis.mT.reshape(o * r, d)
    for start in range(0, o, rows):
        stop = min(start + rows, o)
        cross = flat[start * r : stop * r] @ flat[start * r :].T
        cosine = _smallest_cosine(cross, stop - start, r, rank[start:stop], rank[start:])
        angle = torch.arccos(cosine.clamp_(0, 1))
        # the cosine is blind to small angles; the sine, from the explicit residual, is not
        i, j = torch.nonzero(cosine > 1 - 5e-7, as_tuple=True)
        ask = (j > i) & ~whole[i + start] & ~whole[j + start]
        i, j = i[ask], j[ask]
        for part in torch.arange(len(i), device=i.device).split(max(1, _CHUNK // (d * r))):
            sine = _largest_sine(
                basis[i[part] + start], basis[j[part] + start], rank[i[part] + start], rank[j[part] + start]
            )
            angle[i[part], j[part]] = torch.arcsin(sine.clamp_(0, 1))
        out[start:stop, start:] = angle
    both_empty = (rank[:, None] == 0) & (rank[None, :] == 0)
    one_empty = (rank[:, None] == 0) ^ (rank[None, :] == 0)
    out.masked_fill_(whole[:, None] | whole[None, :] | both_empty, 0).masked_fill_(one_empty, math.pi / 2)
    return out.sin_().square_() if squared_sine else out


def _orthonormal(factor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Orthonormal bases `(O, d, r)` of the column spaces, zero-padded, and their dimensions `(O,)`."""
    peak = factor.abs().amax(1, keepdim=True)
    factor = factor / peak.where(peak > 0, 1)  # columns of any scale count alike, without over- or underflow
    norm = torch.linalg.vector_norm(factor, dim=1, keepdim=True)
    factor = factor / norm.where(norm > 0, 1)
    if factor.shape[2] == 1:
        return factor, (norm[:, 0, 0] > 0).long()
    u, s, _ = torch.linalg.svd(factor, full_matrices=False)
    significant = s > max(factor.shape[1:]) * eps * s[:, :1]
    return u * significant[:, None, :], significant.sum(1)


def _smallest_cosine(cross: Tensor, rows: int, r: int, rank_i: Tensor, rank_j: Tensor) -> Tensor:
    """Cosine of the largest angle from the products of the bases, `(rows*r, cols*r)` -> `(rows, cols)`."""
    if r == 1:
        return cross.abs_()
    blocks = cross.reshape(rows, r, -1, r).transpose(1, 2)
    values = torch.linalg.svdvals(blocks)
    last = torch.minimum(rank_i[:, None], rank_j[None, :]).clamp_min(1) - 1
    return values.gather(2, last[:, :, None])[:, :, 0]


def _largest_sine(x: Tensor, y: Tensor, rank_x: Tensor, rank_y: Tensor) -> Tensor:
    """Sine of the largest angle of pairs of bases `(n, d, r)`, exact for tiny angles (Bjorck-Golub)."""
    swap = (rank_y > rank_x)[:, None, None]
    x, y = torch.where(swap, y, x), torch.where(swap, x, y)  # the larger space first
    rest = y - x @ (x.mT @ y)
    if rest.shape[2] == 1:
        return torch.linalg.vector_norm(rest[:, :, 0], dim=1)
    return torch.linalg.svdvals(rest)[:, 0]


def _drop_empty_components(modes: list[Tensor]) -> list[Tensor]:
    present = torch.stack([(m != 0).any(1) for m in modes]).all(0)[:, None, :]
    return [m * present for m in modes]


# ------------------------------------------------------------------------------------------------ value distances


def _value_distance(x: Tensor, criterion: str, free_sign: bool) -> Tensor:
    """`x (O, d, R)` -> `(O, O)`, upper half valid; with `free_sign` each column may be flipped."""
    if not free_sign or x.shape[2] == 1:
        return _pair_distance(x.flatten(1), criterion, free_sign)
    flips = x.unbind(2)
    if criterion == 'euclidean':
        return sum(_pair_distance(c, criterion, True).square_() for c in flips).sqrt_()  # type: ignore[union-attr]
    if criterion == 'manhattan':
        return sum(_pair_distance(c, criterion, True) for c in flips)  # type: ignore[return-value]
    return sum(_pair_distance(c, criterion, True) for c in flips) / len(flips)  # type: ignore[return-value]


def _pair_distance(x: Tensor, criterion: str, free_sign: bool) -> Tensor:
    o = len(x)
    if criterion == 'manhattan':
        plain = torch.cdist(x, x, p=1)
        return torch.minimum(plain, torch.cdist(x, -x, p=1)) if free_sign else plain
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


# ------------------------------------------------------------------------------------------------------- selection


def _average(distances: list[Tensor]) -> np.ndarray:
    if not distances:
        raise ValueError('distance: expected at least one (O, O) matrix, got none')
    total = None
    for d in distances:
        if d.ndim != 2 or d.shape[0] != d.shape[1] or d.shape != distances[0].shape:
            shapes = [tuple(x.shape) for x in distances]
            raise ValueError(f'distance: expected square matrices of one size, got {shapes}')
        array = d.detach().to('cpu', torch.float64).numpy().copy()
        np.fill_diagonal(array, 0)
        if not np.isfinite(array).all():
            i, j = np.argwhere(~np.isfinite(array))[0]
            raise ValueError(f'distance: expected finite values, got {array[i, j]} at ({i}, {j})')
        if not np.allclose(array, array.T, rtol=1e-5, atol=1e-12):
            raise ValueError('distance: expected a symmetric matrix')
        if len(distances) > 1:
            mean = array.mean()
            array /= mean if mean > 0 else 1
        total = array if total is None else total + array
    assert total is not None
    return total if len(distances) == 1 else total / len(distances)


def _remove_closest(d: np.ndarray, keep: int, by_sum: bool) -> np.ndarray:
    """Algorithm 1. Row sums and each row's nearest later neighbour are kept up to date: about O(n^2) in all."""
    n = len(d)
    rest = d.copy()  # removed rows and columns become infinite
    rest[np.tril_indices(n)] = np.inf
    alive = np.ones(n, dtype=bool)
    sums = d.sum(1)
    nearest = rest.argmin(1)
    shortest = rest[np.arange(n), nearest]
    slack = 1e-12 * max(1.0, float(np.abs(d).sum(1).max()))
    for _ in range(n - keep):
        i = int(shortest.argmin())
        j = int(nearest[i])
        gone = i if _removes_first(d, alive, sums, i, j, slack, by_sum) else j
        alive[gone] = False
        sums -= d[:, gone]
        rest[gone], rest[:, gone] = np.inf, np.inf
        shortest[gone] = np.inf
        stale = np.flatnonzero((nearest == gone) & alive)
        if len(stale):
            nearest[stale] = rest[stale].argmin(1)
            shortest[stale] = rest[stale, nearest[stale]]
    return np.flatnonzero(alive)


def _removes_first(
    d: np.ndarray, alive: np.ndarray, sums: np.ndarray, i: int, j: int, slack: float, by_sum: bool
) -> bool:
    if not by_sum:
        others = alive.copy()
        others[[i, j]] = False
        if others.any():
            next_i, next_j = d[i, others].min(), d[j, others].min()
            if next_i != next_j:
                return bool(next_i < next_j)
    if abs(sums[i] - sums[j]) > slack:
        return bool(sums[i] < sums[j])
    # running sums carry rounding errors, which must not decide a tie
    return math.fsum(d[i, alive]) < math.fsum(d[j, alive])


def _check_keep(keep: int, n: int) -> None:
    if isinstance(keep, bool) or not isinstance(keep, (int, np.integer)) or not 1 <= keep <= n:
        raise ValueError(f'keep: expected an integer from 1 to {n}, got {keep!r}')


def _check_finite(x: Tensor) -> None:
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bad.any():
        raise ValueError(f'filter {int(bad.nonzero()[0])} has NaN or infinite values')
