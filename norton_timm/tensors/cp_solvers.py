"""The solvers behind `cp_decompose`: the schedule of starts and iterations, and closed forms where there are any.

Each returns A and B of every filter; C follows from them by least squares.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from norton_timm.tensors.cp_iterations import (
    EXACT,
    als,
    alternate_rank_one,
    khatri_rao,
    newton,
    projection_error,
    unit,
)

_TRIAL = 10  # ALS sweeps after which only the best start of each filter goes on
_ALS = 60  # sweeps after which Newton's method takes over
_POLISH = 60  # steps of Newton's method for filters with a small error; it converges in fewer
_SMALL = 0.25  # squared relative error that counts as small
_WHOLE = 200  # iterations of the whole schedule; after them come new starts, and ALS again
_RESCUES = 10  # rounds of new starts, three each
_RECOVERED = 5e-13  # squared relative error below which a filter of rank R counts as recovered


def solve_iteratively(core: Tensor, rank: int, noise: Tensor, n_iter: int, tol: float) -> tuple[Tensor, Tensor]:
    """Best A `(n, Kh, R)` and B `(n, Kw, R)` over all starts; columns have unit norm, or are zero where not needed.

    The schedule is fixed, and `n_iter` cuts off its end: ALS on all starts, ALS on the best start of each filter,
    Newton steps; from 200 iterations on, new starts for filters of exact low rank that were not recovered, and ALS
    again. A larger bound continues the run of a smaller one, so the error cannot rise. It cannot rise with the rank
    either: where the Eckart-Young bound allows R - 1 components to do better, they are tried.

    Args:
        core: `(n, k, Kh, Kw)` from `compress_input_mode`.
        rank: R, below the rank at which every filter is exact.
        noise: `(restarts, n, Kh + Kw, R)` random starts; the HOSVD gives one more. The first columns are the starts
            at a lower rank.
        n_iter: bound on the iterations.
        tol: relative fall of the error in a sweep below which a start has converged.
    """
    x = core.flatten(2)
    energy = x.square().sum((1, 2), keepdim=True)
    x = x / energy.where(energy > 0, 1).sqrt()
    kh, kw = core.shape[2:]
    return _solve(x, (kh, kw), rank, noise, n_iter, tol)[:2]


def _solve(
    x: Tensor, kernel: tuple[int, int], rank: int, noise: Tensor, n_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and squared error of tensors `x (n, k, Kh*Kw)` of unit energy."""
    kh, kw = kernel
    tails = _tails(x)
    a, b, error = x.new_zeros(len(x), kh, rank), x.new_zeros(len(x), kw, rank), x.new_full((len(x),), math.inf)
    if kh * kw - rank < max(kh, kw):
        a, b, solved = solve_high_rank(x, kh, kw, rank)
        error[solved] = tails[solved, min(rank, tails.shape[1] - 1)]
    rest = torch.nonzero(error == math.inf)[:, 0]
    if len(rest):
        a[rest], b[rest], error[rest] = _from_all_starts(x[rest], tails[rest], kernel, noise[:, rest], n_iter, tol)
    if rank > 1:
        # no `rank - 1` components can do better than the bound
        todo = torch.nonzero(error > tails[:, min(rank, tails.shape[1]) - 1])[:, 0]
        if len(todo):
            lower_a, lower_b, lower = _solve(x[todo], kernel, rank - 1, noise[:, todo, :, : rank - 1], n_iter, tol)
            better = lower < error[todo]
            at = todo[better]
            a[at], b[at] = (torch.nn.functional.pad(f[better], (0, 1)) for f in (lower_a, lower_b))
            error[at] = lower[better]
    return a, b, error


def _tails(x: Tensor) -> Tensor:
    """Least squared error `(n, k + 1)` of any matrix of rank 0, 1, ..., k (Eckart and Young); k rows in `x`."""
    if x.shape[1] == x.shape[2]:  # orthogonal rows, as `compress_input_mode` leaves them
        energy = x.square().sum(2).sort(dim=1).values
    else:
        energy = torch.linalg.eigvalsh(x @ x.mT).clamp_min(0)
    return torch.nn.functional.pad(energy.cumsum(1), (1, 0)).flip(1)


def _from_all_starts(
    x: Tensor, tails: Tensor, kernel: tuple[int, int], noise: Tensor, n_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    kh, rank = kernel[0], noise.shape[3]
    a, b = _hosvd_start(x.unflatten(2, kernel), rank)
    alternate, trial = (alternate_rank_one, 5 * _TRIAL) if rank == 1 else (als, _TRIAL)
    trial = min(n_iter, trial) if len(noise) else 0
    if len(noise):
        a, b = torch.cat([a, *unit(noise[:, :, :kh])]), torch.cat([b, *unit(noise[:, :, kh:])])
        found = alternate(x.repeat(len(noise) + 1, 1, 1), a, b, trial, tol)
        a, b, _ = _best(found, len(x))
    a, b, error = _search(x, a, b, n_iter - trial, _ALS - trial, tol)
    if n_iter >= _WHOLE:
        a, b, error = _rescue(x, tails, a, b, error, tol)
    if n_iter > _WHOLE:
        again = alternate(x, a, b, n_iter - _WHOLE, tol)
        a, b, error = _better((a, b, error), again)
    return a, b, error


def _search(x: Tensor, a: Tensor, b: Tensor, n_iter: int, sweeps: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """At most `sweeps` of ALS, then a few Newton steps, and further ones where the error is small."""
    rank = a.shape[2]
    a, b, error = (alternate_rank_one if rank == 1 else als)(x, a, b, min(n_iter, sweeps), tol)
    first = max(2, 5 // rank)
    for limit, start, stop in ((math.inf, sweeps, sweeps + first), (_SMALL, sweeps + first, sweeps + first + _POLISH)):
        todo = torch.nonzero((error < limit) & (error > EXACT))[:, 0]
        steps = min(n_iter, stop) - start
        if steps > 0 and len(todo):
            a[todo], b[todo], error[todo] = newton(x[todo], a[todo], b[todo], error[todo], steps, 1e-3 * tol)
    return a, b, error


def _rescue(x: Tensor, tails: Tensor, a: Tensor, b: Tensor, error: Tensor, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """More random starts for filters that have an unfolding of rank R, but that no start recovered.

    Such a filter very likely has a CPD of rank R (the unfolding of a random filter has full rank), so a start with an
    error above zero sits in a local minimum.
    """
    kh, kw, rank = a.shape[1], b.shape[1], a.shape[2]
    if x.shape[1] <= rank:
        return a, b, error
    low = tails[:, rank] < 1e-10
    noise = torch.randn(_RESCUES, 3, 1, kh + kw, rank, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    for starts in noise.to(x.device):
        todo = torch.nonzero(low & (error > _RECOVERED))[:, 0]
        if len(todo) == 0:
            break
        unit_starts = unit(starts[:, :, :kh]), unit(starts[:, :, kh:])
        start_a, start_b = (f.expand(-1, len(todo), -1, -1).flatten(0, 1) for f in unit_starts)
        found = _best(_search(x[todo].repeat(3, 1, 1), start_a, start_b, _WHOLE, _ALS, tol), len(todo))
        a[todo], b[todo], error[todo] = _better((a[todo], b[todo], error[todo]), found)
    return a, b, error


def _best(found: tuple[Tensor, Tensor, Tensor], n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best start of each of n tensors; `found` holds the first start of all tensors, then the second, ..."""
    best = found[2].reshape(-1, n).argmin(0) * n + torch.arange(n, device=found[2].device)
    return found[0][best], found[1][best], found[2][best]


def _better(old: tuple[Tensor, Tensor, Tensor], new: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    better = new[2] < old[2]
    pick = better[:, None, None]
    return torch.where(pick, new[0], old[0]), torch.where(pick, new[1], old[1]), torch.where(better, new[2], old[2])


def _hosvd_start(core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pairs of left singular vectors of the two spatial modes, those with the most energy first."""
    kh, kw = core.shape[2:]
    rows = torch.linalg.eigh(torch.einsum('nkhw,nkgw->nhg', core, core))[1]
    cols = torch.linalg.eigh(torch.einsum('nkhw,nkhg->nwg', core, core))[1]
    energy = (rows.mT[:, None] @ core @ cols[:, None]).square().sum(1).flatten(1)
    pair = energy.sort(dim=1, descending=True, stable=True).indices[:, None, :rank]
    return rows.gather(2, (pair // kw).expand(-1, kh, -1)), cols.gather(2, (pair % kw).expand(-1, kw, -1))


def solve_exact(core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B at a rank that represents anything: unit vectors for the two smallest modes, fibres for the third."""
    n, k, kh, kw = core.shape
    r = torch.arange(rank, device=core.device)
    rows, cols = (torch.eye(d, dtype=core.dtype, device=core.device) for d in (kh, kw))
    if rank >= kh * kw:
        r = r % (kh * kw)
        return rows[:, r // kw].expand(n, -1, -1), cols[:, r % kw].expand(n, -1, -1)
    if rank >= k * kh:  # fewer input channels than kernel columns: the core is the filter itself
        r = r % (k * kh)
        return rows[:, r % kh].expand(n, -1, -1), unit(core[:, r // kh, r % kh].mT)
    r = r % (k * kw)
    return unit(core[:, r // kw, :, r % kw].permute(1, 2, 0)), cols[:, r % kw].expand(n, -1, -1)


def solve_matrix(core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best A and B of filters with one mode of size 1, by the SVD (Eckart and Young)."""
    n, k, kh, kw = core.shape
    u, _, vh = torch.linalg.svd(core.reshape(n, kh, kw) if k == 1 else core.flatten(2), full_matrices=False)
    ones = core.new_ones(n, 1, rank)
    if k == 1:
        return u[:, :, :rank], vh[:, :rank].mT
    right = vh[:, :rank].mT
    return (right, ones) if kw == 1 else (ones, right)


def solve_high_rank(x: Tensor, kh: int, kw: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Closed form for `Kh*Kw - R < max(Kh, Kw)`, for 3x3 kernels ranks 7 and 8: A, B, and where they are optimal.

    No rank-R approximation beats the projection of the unfolding on its R leading right singular vectors. Any R
    independent products a (x) b orthogonal to the other singular vectors reach its error. With these vectors read as
    matrices N_1, N_2, ..., any `a` gives fewer linear conditions N_k^T a on `b` than `b` has entries, so such products
    exist. Of many the best conditioned are taken.
    """
    if kw < kh:
        swapped = x.unflatten(2, (kh, kw)).mT.flatten(2)
        b, a, solved = solve_high_rank(swapped, kw, kh, rank)
        return a, b, solved
    n = len(x)
    values, vectors = torch.linalg.eigh(x.mT @ x)
    free = kh * kw - rank
    null = vectors[:, :, :free].unflatten(1, (kh, kw))
    candidates = 6 * rank
    noise = torch.randn(kh + kw, candidates, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    a = unit(noise[:kh]).expand(n, -1, -1)
    b = noise[kh:].expand(n, -1, -1)
    conditions = torch.einsum('nhwf,nhm->fnwm', null, a).clone()
    for k in range(free):  # Gram-Schmidt, one condition after the other
        conditions[k] = unit(conditions[k])
        for later in (*conditions[k + 1 :], *conditions[k + 1 :], b := b.clone(), b):
            later -= conditions[k] * (conditions[k] * later).sum(1, keepdim=True)
    b = unit(b)
    pick = _independent_columns(khatri_rao(a, b), rank)[:, None, :]
    a, b = a.gather(2, pick.expand(-1, kh, -1)), b.gather(2, pick.expand(-1, kw, -1))
    bound = values[:, :free].clamp_min(0).sum(1)
    return a, b, projection_error(x, a, b) <= bound + 1e-12


def _independent_columns(columns: Tensor, count: int) -> Tensor:
    """Indices `(n, count)` of well-conditioned columns of `(n, d, m)`, by pivoted Gram-Schmidt."""
    rest, picked = columns.clone(), []
    for _ in range(count):
        best = torch.linalg.vector_norm(rest, dim=1).argmax(1)
        picked.append(best)
        direction = unit(rest.gather(2, best[:, None, None].expand(-1, rest.shape[1], 1)))
        rest = rest - direction * (direction.mT @ rest)
    return torch.stack(picked, 1)
