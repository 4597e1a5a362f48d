"""Solvers behind `cp_decompose`: A and B of every filter; C follows from them by least squares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TRIAL = 10  # ALS sweeps after which only the best start of each filter goes on
_NEARLY_LOW_RANK = 0.02  # squared relative error below which ALS tends to crawl and Newton's method not to
_HAND_OVER = 25  # ALS sweeps of such a filter
_SMALL = 0.25  # squared relative error below which Newton's method runs to convergence
_MAX_NEWTON = 96  # entries of A and B together up to which Newton's matrices are cheap
_EXACT = 1e-24  # squared relative error that counts as none


def compress_input_mode(x: Tensor, kh: int, kw: int) -> Tensor:
    """Tensor `(n, k, Kh, Kw)` with the Gram matrix of `x (n, I, Kh*Kw)`; all that A and B depend on."""
    n, i, k = x.shape
    if i > k:
        values, vectors = torch.linalg.eigh(x.mT @ x)
        x = values.clamp_min(0).sqrt()[:, :, None] * vectors.mT
    return x.reshape(n, -1, kh, kw)


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Column-wise Kronecker product, `(n, Kh, R)` and `(n, Kw, R)` -> `(n, Kh*Kw, R)`."""
    return (a[:, :, None, :] * b[:, None, :, :]).flatten(1, 2)


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
        return rows[:, r % kh].expand(n, -1, -1), _unit(core[:, r // kh, r % kh].mT)
    r = r % (k * kw)
    return _unit(core[:, r // kw, :, r % kw].permute(1, 2, 0)), cols[:, r % kw].expand(n, -1, -1)


def solve_matrix(core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best A and B of filters with one mode of size 1, by the SVD (Eckart and Young)."""
    n, k, kh, kw = core.shape
    u, _, vh = torch.linalg.svd(core.reshape(n, kh, kw) if k == 1 else core.flatten(2), full_matrices=False)
    ones = core.new_ones(n, 1, rank)
    if k == 1:
        return u[:, :, :rank], vh[:, :rank].mT
    right = vh[:, :rank].mT
    return (right, ones) if kw == 1 else (ones, right)


def solve_iteratively(core: Tensor, rank: int, noise: Tensor, n_iter: int, tol: float) -> tuple[Tensor, Tensor]:
    """Best A `(n, Kh, R)` and B `(n, Kw, R)` over all starts, columns of unit norm.

    Args:
        core: `(n, k, Kh, Kw)` from `compress_input_mode`.
        rank: R, below the rank at which every filter is exact.
        noise: `(restarts, n, Kh + Kw, R)` random starts; the HOSVD gives one more.
        n_iter: bound on the sweeps.
        tol: relative fall of the error in a sweep below which a start has converged.
    """
    kh, kw = core.shape[2:]
    x = core.flatten(2)
    energy = x.square().sum((1, 2), keepdim=True)
    x = x / energy.where(energy > 0, 1).sqrt()
    if kh * kw - rank < max(kh, kw):
        a, b, solved = _solve_high_rank(x, kh, kw, rank)
    else:
        a, b = x.new_zeros(len(x), kh, rank), x.new_zeros(len(x), kw, rank)
        solved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if solved.all():
        return a, b
    rest = ~solved
    x, noise = x[rest], noise[:, rest]
    a0, b0 = _hosvd_start(x.unflatten(2, (kh, kw)), rank)
    starts_a, starts_b = torch.cat([a0, *_unit(noise[:, :, :kh])]), torch.cat([b0, *_unit(noise[:, :, kh:])])
    alternate, trial = (_alternate_rank_one, min(n_iter, 5 * _TRIAL)) if rank == 1 else (_als, min(n_iter, _TRIAL))
    if len(noise):
        repeated = x.repeat(len(noise) + 1, 1, 1)
        starts_a, starts_b, error, _ = alternate(repeated, starts_a, starts_b, trial, tol)
        best = error.reshape(-1, len(x)).argmin(0) * len(x) + torch.arange(len(x), device=x.device)
        starts_a, starts_b = starts_a[best], starts_b[best]
    a[rest], b[rest], error = _search(x, starts_a, starts_b, max(0, n_iter - trial), tol)
    _rescue(x, a, b, error, rest, n_iter, tol)
    return a, b


def _search(x: Tensor, a: Tensor, b: Tensor, n_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """ALS; where it came to its end, some steps of Newton's method, and for what is nearly of low rank all it takes."""
    rank = a.shape[2]
    alternate = _alternate_rank_one if rank == 1 else _als
    a, b, error, finished = alternate(x, a, b, n_iter, tol)
    if rank * (a.shape[1] + b.shape[1]) <= _MAX_NEWTON:
        for limit, steps in ((math.inf, max(2, 5 // rank)), (_SMALL, 60)):
            todo = torch.nonzero(finished & (error < limit) & (error > _EXACT))[:, 0]
            a[todo], b[todo], error[todo] = _newton(x[todo], a[todo], b[todo], error[todo], steps, 1e-3 * tol)
    return a, b, error


def _rescue(x: Tensor, a: Tensor, b: Tensor, error: Tensor, rows: Tensor, n_iter: int, tol: float) -> None:
    """More random starts, in place, for filters whose unfolding has rank R although no start was exact.

    Such a filter very likely has a CPD of rank R (at random a filter's unfolding has full rank), so a start that stays
    above zero error sits in a local minimum.
    """
    kh, kw, rank = a.shape[1], b.shape[1], a.shape[2]
    if n_iter < _HAND_OVER or x.shape[1] <= rank:
        return
    leading = torch.linalg.eigvalsh(x @ x.mT)[:, -rank:].sum(1)
    todo = torch.nonzero((1 - leading < 1e-10) & (error > 1e-11))[:, 0]
    rows = torch.nonzero(rows)[:, 0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        if len(todo) == 0:
            return
        noise = torch.randn(3 * len(todo), kh + kw, rank, generator=generator, dtype=x.dtype).to(x.device)
        found = _search(x[todo].repeat(3, 1, 1), _unit(noise[:, :kh]), _unit(noise[:, kh:]), n_iter, tol)
        best = found[2].reshape(3, -1).argmin(0) * len(todo) + torch.arange(len(todo), device=x.device)
        new_a, new_b, new_error = (f[best] for f in found)
        better = new_error < error[todo]
        at = todo[better]
        a[rows[at]], b[rows[at]], error[at] = new_a[better], new_b[better], new_error[better]
        todo = todo[error[todo] > 1e-11]


def _als(x: Tensor, a: Tensor, b: Tensor, n_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Proximal ALS with extrapolation on tensors `x (n, k, Kh*Kw)` of unit energy.

    Returns A, B, the squared error of each, and whether it came to its end (it converged, or is nearly of low rank)
    rather than ran out of sweeps.

    Each sweep starts beyond the last step and is undone where the error did not fall (as in Ang et al., 2019), so the
    error of what is kept never rises, and swamps are crossed two to four times faster.
    """
    kh = a.shape[1]
    found_a, found_b, found_error = a.clone(), b.clone(), x.new_full((len(x),), math.inf)
    todo = torch.arange(len(x), device=x.device)
    c = x.new_zeros(len(x), x.shape[1], a.shape[2])
    error = previous = found_error.clone()
    best_a, best_b, kept_a, kept_b, kept_c = a, b, a, b, c
    step = x.new_full((len(x), 1, 1), 0.5)
    for sweep in range(n_iter + 1):
        # C, and with it the error, at the extrapolated point
        gram = _gram(a, b)
        product = x @ khatri_rao(a, b)
        c = _solve(gram, product, c)
        now = 1 + (c * (c @ gram - 2 * product)).sum((1, 2))
        better = now <= error
        error = torch.where(better, now, error)
        better = better[:, None, None]
        best_a, best_b = torch.where(better, a, best_a), torch.where(better, b, best_b)
        if sweep == n_iter:
            break
        if sweep % 5 == 4:
            going = (previous - error > 5 * tol * error) & (error > 1e-15)
            if sweep + 1 >= _HAND_OVER:
                going &= error > _NEARLY_LOW_RANK
            previous = error
            if not going.all():
                done = todo[~going]
                found_a[done], found_b[done], found_error[done] = best_a[~going], best_b[~going], error[~going]
                state = (x, a, b, c, best_a, best_b, kept_a, kept_b, kept_c, error, previous, step, better, todo)
                x, a, b, c, best_a, best_b, kept_a, kept_b, kept_c, error, previous, step, better, todo = (
                    v[going] for v in state
                )
                if len(todo) == 0:
                    break
        a, b, c = torch.where(better, a, kept_a), torch.where(better, b, kept_b), torch.where(better, c, kept_c)
        step = step * torch.where(better, 1.1, 0.5)
        slices = (c.mT @ x).unflatten(2, (kh, -1))
        new_a = _solve(_gram(c, b), (slices @ b.mT[:, :, :, None])[..., 0].mT, a)
        new_a, norm = _split_norm(new_a)
        c, slices = c * norm, slices * norm.mT[..., None]
        new_b = _solve(_gram(c, new_a), (new_a.mT[:, :, None, :] @ slices)[:, :, 0].mT, b)
        new_b, norm = _split_norm(new_b)
        kept_a, kept_b, kept_c = new_a, new_b, c * norm
        a, b = _unit(new_a + step * (new_a - a)), _unit(new_b + step * (new_b - b))
    found_a[todo], found_b[todo], found_error[todo] = best_a, best_b, error
    finished = torch.ones_like(found_error, dtype=torch.bool)
    finished[todo] = False
    return found_a, found_b, found_error, finished


def _alternate_rank_one(
    x: Tensor, a: Tensor, b: Tensor, n_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_als` does, for one component: a and b in turn become leading eigenvectors, found by repeated squaring.

    For a of unit norm the best b is the leading eigenvector of the Gram matrix of `x` contracted with a on both sides.
    """
    kh, kw = a.shape[1], b.shape[1]
    found_a, found_b, found_error = a.clone(), b.clone(), 1 - (x @ khatri_rao(a, b)).square().sum((1, 2))
    todo = torch.arange(len(x), device=x.device)
    gram = (x.mT @ x).unflatten(2, (kh, kw)).unflatten(1, (kh, kw)).transpose(2, 3).flatten(3).flatten(1, 2)
    a, b, error = a[:, :, 0], b[:, :, 0], found_error
    for sweep in range(n_iter):
        b, _ = _leading_eigenvector(gram.mT, a, b)
        a, value = _leading_eigenvector(gram, b, a)
        if sweep % 3 == 2 or sweep == n_iter - 1:
            previous, error = error, torch.minimum(error, 1 - value)
            found_a[todo, :, 0], found_b[todo, :, 0], found_error[todo] = a, b, error
            if sweep % 3 < 2:
                break  # out of sweeps: nobody has come to an end
            going = previous - error > 3 * tol * error
            gram, a, b, error, todo = (v[going] for v in (gram, a, b, error, todo))
            if len(todo) == 0:
                break
    finished = torch.ones_like(found_error, dtype=torch.bool)
    finished[todo] = False
    return found_a, found_b, found_error, finished


def _leading_eigenvector(gram: Tensor, fixed: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Of `gram (n, d*d, e*e)` contracted twice with `fixed (n, e)`: 17 power steps from `start`; Rayleigh quotients."""
    d = start.shape[1]
    outer = (fixed[:, :, None] * fixed[:, None, :]).flatten(1)[:, :, None]
    matrix = (gram @ outer).reshape(-1, d, d)
    power = matrix
    for _ in range(4):
        power = power / power.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(1e-300)
        power = power @ power
    vector = power @ start[:, :, None]
    norm = (vector * vector).sum(1, keepdim=True).sqrt()
    vector = torch.where(norm > 1e-100, vector / norm.clamp_min(1e-100), start[:, :, None])
    return vector[:, :, 0], (vector * (matrix @ vector)).sum((1, 2))


def _newton(x: Tensor, a: Tensor, b: Tensor, error: Tensor, n_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Damped Newton steps on A and B with C eliminated; steps that do not lower the error are not taken.

    ALS converges linearly at best and crawls where components are nearly collinear; from where it has come, Newton's
    method needs a handful of steps. With E = X - C M^T, M = khatri_rao(A, B) and D the derivatives of M's columns, the
    Hessian of |E|^2 / 2 with C at its optimum is a sum of Hadamard products of small Gram matrices.
    """
    a, b, error = a.clone(), b.clone(), error.clone()
    todo = torch.arange(len(x), device=x.device)
    kh, kw, rank = a.shape[1], b.shape[1], a.shape[2]
    p = rank * (kh + kw)
    component = torch.cat([torch.arange(rank).repeat_interleave(k) for k in (kh, kw)]).to(x.device)
    one_h, one_w = torch.eye(kh, dtype=x.dtype, device=x.device), torch.eye(kw, dtype=x.dtype, device=x.device)
    small = 1e-12 * torch.eye(rank, dtype=x.dtype, device=x.device)
    damping = x.new_full((len(todo), 1), 1e-3)
    for _ in range(n_iter):
        n = len(todo)
        if n == 0:
            break
        xs, a0, b0, before = x[todo], a[todo], b[todo], error[todo]
        q, r = torch.linalg.qr(khatri_rao(a0, b0))
        seen = xs @ q
        inverse = torch.linalg.solve_triangular(r + small, torch.eye(rank, dtype=x.dtype, device=x.device), upper=True)
        c = seen @ inverse.mT
        rest = xs - seen @ q.mT
        # column (r, m) of `change`: how component r of M moves with entry m of A, then of B
        by_a = (one_h[:, None, None, :] * b0[:, None, :, :, None]).flatten(3).flatten(1, 2)
        by_b = (a0[:, :, None, :, None] * one_w[:, None, :]).flatten(3).flatten(1, 2)
        change = torch.cat([by_a, by_b], 2)
        inside = q.mT @ change
        outside = change - q @ inside
        slopes = c.mT @ rest  # (n, R, Kh*Kw)
        by_component = slopes @ change  # (n, R, p)
        gradient = by_component[:, component, torch.arange(p, device=x.device)]
        hessian = (outside.mT @ outside) * (c.mT @ c)[:, component][:, :, component]
        # second-order terms: the curvature of M, and how C follows
        curved = (before > _NEARLY_LOW_RANK)[:, None, None].to(x.dtype)
        moved = rest @ change
        cross = by_component[:, component] * (inverse @ inside)[:, component].mT
        hessian += curved * (
            cross + cross.mT - (moved.mT @ moved) * (inverse @ inverse.mT)[:, component][:, :, component]
        )
        pair = x.new_zeros(n, rank, kh, rank, kw)
        pair.diagonal(dim1=1, dim2=3).copy_((curved * slopes).unflatten(2, (kh, kw)).permute(0, 2, 3, 1))
        block = pair.flatten(3).flatten(1, 2)
        hessian[:, : rank * kh, rank * kh :] -= block
        hessian[:, rank * kh :, : rank * kh] -= block.mT
        ridge = damping * hessian.diagonal(dim1=1, dim2=2).amax(1, keepdim=True).clamp_min(1e-300)
        move = torch.linalg.solve_ex(hessian + torch.diag_embed(ridge.expand(n, p)), gradient[:, :, None])[0][..., 0]
        new_a = _unit(a0 + move[:, : rank * kh].reshape(n, rank, kh).mT)
        new_b = _unit(b0 + move[:, rank * kh :].reshape(n, rank, kw).mT)
        new_error = _projection_error(xs, new_a, new_b)
        better = new_error < before
        taken = todo[better]
        a[taken], b[taken], error[taken] = new_a[better], new_b[better], new_error[better]
        damping = (damping * torch.where(better, 0.1, 4.0)[:, None]).clamp(1e-12, 1e6)
        fell = before - error[todo]
        going = (error[todo] > _EXACT) & torch.where(better, fell > tol * before, damping[:, 0] < 10)
        todo, damping = todo[going], damping[going]
    return a, b, error


def _projection_error(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Squared error left by the best C, from the residual itself; infinite where components are all but collinear.

    Such components need a C of huge norm, cancel each other, and would drown in rounding (degeneracy of the CPD).
    """
    q, r = torch.linalg.qr(khatri_rao(a, b))
    error = (x - (x @ q) @ q.mT).square().sum((1, 2))
    return error.masked_fill(r.diagonal(dim1=1, dim2=2).abs().amin(1) < 1e-4, math.inf)


def _solve_high_rank(x: Tensor, kh: int, kw: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Closed form for `Kh*Kw - R < max(Kh, Kw)`, for 3x3 kernels ranks 7 and 8: A, B, and where they are optimal.

    No rank-R approximation beats projecting the unfolding on its R leading right singular vectors. Its error is reached
    by R independent products a (x) b orthogonal to the other singular vectors, read as matrices N_1, N_2, ...: any `a`
    leaves fewer linear conditions N_k^T a on `b` than b has entries. Of many such pairs the best conditioned are taken.
    """
    if kw < kh:
        swapped = x.unflatten(2, (kh, kw)).mT.flatten(2)
        b, a, solved = _solve_high_rank(swapped, kw, kh, rank)
        return a, b, solved
    n = len(x)
    values, vectors = torch.linalg.eigh(x.mT @ x)
    free = kh * kw - rank
    null = vectors[:, :, :free].unflatten(1, (kh, kw))
    candidates = 6 * rank
    noise = torch.randn(kh + kw, candidates, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    a = _unit(noise[:kh]).expand(n, -1, -1)
    b = noise[kh:].expand(n, -1, -1)
    conditions = torch.einsum('nhwf,nhm->fnwm', null, a).clone()
    for k in range(free):  # Gram-Schmidt, one condition after the other
        conditions[k] = _unit(conditions[k])
        for later in (*conditions[k + 1 :], *conditions[k + 1 :], b := b.clone(), b):
            later -= conditions[k] * (conditions[k] * later).sum(1, keepdim=True)
    b = _unit(b)
    pick = _independent_columns(khatri_rao(a, b), rank)[:, None, :]
    a, b = a.gather(2, pick.expand(-1, kh, -1)), b.gather(2, pick.expand(-1, kw, -1))
    bound = values[:, :free].clamp_min(0).sum(1)
    return a, b, _projection_error(x, a, b) <= bound + 1e-12


def _independent_columns(columns: Tensor, count: int) -> Tensor:
    """Indices `(n, count)` of well-conditioned columns of `(n, d, m)`, by pivoted Gram-Schmidt."""
    rest, picked = columns.clone(), []
    for _ in range(count):
        best = torch.linalg.vector_norm(rest, dim=1).argmax(1)
        picked.append(best)
        direction = _unit(rest.gather(2, best[:, None, None].expand(-1, rest.shape[1], 1)))
        rest = rest - direction * (direction.mT @ rest)
    return torch.stack(picked, 1)


def _hosvd_start(core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pairs of left singular vectors of the two spatial modes, those with the most energy first."""
    kh, kw = core.shape[2:]
    rows = torch.linalg.eigh(torch.einsum('nkhw,nkgw->nhg', core, core))[1]
    cols = torch.linalg.eigh(torch.einsum('nkhw,nkhg->nwg', core, core))[1]
    energy = (rows.mT[:, None] @ core @ cols[:, None]).square().sum(1).flatten(1)
    pair = energy.sort(dim=1, descending=True, stable=True).indices[:, None, :rank]
    return rows.gather(2, (pair // kw).expand(-1, kh, -1)), cols.gather(2, (pair % kw).expand(-1, kw, -1))


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return (a.mT @ a) * (b.mT @ b)


def _solve(gram: Tensor, product: Tensor, old: Tensor) -> Tensor:
    """Least squares with a pull towards `old`: solvable for collinear factors, and the error still cannot rise."""
    pull = 1e-9 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-300
    right = product + pull * old
    if gram.shape[1] == 1:
        return right / (gram + pull)
    gram = gram + pull * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_ex(gram, right, left=False)[0]


def _unit(x: Tensor) -> Tensor:
    """Columns scaled to unit norm; a zero column becomes the first unit vector."""
    return _split_norm(x)[0]


def _split_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns scaled to unit norm, and their norms."""
    norm = (x * x).sum(-2, keepdim=True).sqrt_()
    tiny = norm < 1e-150
    unit = x / norm.where(~tiny, 1)
    if tiny.any():
        unit = unit.masked_fill(tiny, 0)
        unit[..., :1, :].masked_fill_(tiny, 1)
    return unit, norm
