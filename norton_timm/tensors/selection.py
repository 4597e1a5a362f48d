"""Which filters to keep, given their distances (Algorithm 1 of NORTON and variants) or their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STRATEGIES = ('min_sum', 'min_min', 'sum', 'authors')


def select_filters(distance: Tensor | Sequence[Tensor], keep: int, strategy: str = 'min_sum') -> Tensor:
    """Indices of the filters to keep, sorted, int64 on the CPU.

    - `min_sum` is Algorithm 1 of NORTON: of the closest pair, it removes the filter with the smaller sum of distances
      to the remaining ones.
    - `min_min` removes the one with the nearer next neighbour; if that ties too, the sum decides.
    - `sum` removes the filters with the smallest sums, all at once.
    - `authors` is a control: their released code runs Algorithm 1, but stores the filter removed k-th as the importance
      of filter k, and keeps the filters of highest importance.

    Ties: the first pair (i, j) in row order, i < j, counts as the closest; of an equal pair j is removed, as the
    algorithm's `else` says; `sum` removes the highest index.

    Args:
        distance: `(O, O)` symmetric; or several, of layers that must keep the same indices (coupled selection): each
            is divided by its mean, so that layers weigh equally, and the average is used.
        keep: number of filters kept, 1 to O.
        strategy: see above.

    Raises:
        ValueError: unknown strategy, `keep` out of range, or matrices that are not square, symmetric and finite.

    Example:
        >>> kept = select_filters(filter_distance(weight, 'pabs'), keep=32)
    """
    if strategy not in STRATEGIES:
        raise ValueError(f'strategy: got {strategy!r}, expected one of {", ".join(STRATEGIES)}')
    d = _average([distance] if isinstance(distance, Tensor) else list(distance))
    n = d.shape[0]
    _check_keep(keep, n)
    if strategy == 'sum':
        sums = np.array([math.fsum(row) for row in d])
        kept = np.lexsort((np.arange(n), -sums))[:keep]
    elif strategy == 'authors':
        kept = np.argsort([*_closest_removed(d, n - 1, by_sum=True), n - 1], kind='stable')[n - keep :]
    else:
        kept = np.delete(np.arange(n), _closest_removed(d, n - keep, by_sum=strategy == 'min_sum'))
    return torch.from_numpy(np.sort(kept).astype(np.int64))


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


def _closest_removed(d: np.ndarray, count: int, by_sum: bool) -> list[int]:
    """The filters that Algorithm 1 removes, in its order.

    Row sums and each row's nearest later neighbour are kept up to date: about O(n^2) in all.
    """
    n = len(d)
    rest = d.copy()  # removed rows and columns become infinite
    rest[np.tril_indices(n)] = np.inf
    alive = np.ones(n, dtype=bool)
    sums = d.sum(1)
    nearest = rest.argmin(1)
    shortest = rest[np.arange(n), nearest]
    slack = 1e-12 * max(1.0, float(np.abs(d).sum(1).max()))
    removed: list[int] = []
    for _ in range(count):
        i = int(shortest.argmin())
        j = int(nearest[i])
        gone = i if _removes_first(d, alive, sums, i, j, slack, by_sum) else j
        removed.append(gone)
        alive[gone] = False
        sums -= d[:, gone]
        rest[gone], rest[:, gone] = np.inf, np.inf
        shortest[gone] = np.inf
        stale = np.flatnonzero((nearest == gone) & alive)
        if len(stale):
            nearest[stale] = rest[stale].argmin(1)
            shortest[stale] = rest[stale, nearest[stale]]
    return removed


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
