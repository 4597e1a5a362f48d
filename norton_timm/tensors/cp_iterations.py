"""Iterations for the CPD on batches of factor matrices `(n, d, R)`: alternating least squares (ALS) and Newton's
method, with the small linear algebra that the solvers share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COLLINEAR = 1e-4  # sine of the angle between a component and the others below which they count as collinear
NEARLY_LOW_RANK = 0.02  # squared relative error below which ALS tends to crawl, but Newton's method does not
_HAND_OVER = 25  # ALS sweeps after which such a filter goes to Newton's method
_C_PULL = 1e-12  # weak enough that the error equals that of the best C to all significant digits
EXACT = 1e-24  # squared relative error that counts as zero


def compress_input_mode(x: Tensor, kh: int, kw: int) -> Tensor:
    """Tensor `(n, k, Kh, Kw)` with the same Gram matrix as `x (n, I, Kh*Kw)`; A and B depend on nothing else.

    Where I >= Kh*Kw the rows of its unfolding `(k, Kh*Kw)` are orthogonal.
    """
    n, i, k = x.shape
    if i >= k:
        values, vectors = torch.linalg.eigh(x.mT @ x)
        x = values.clamp_min(0).sqrt()[:, :, None] * vectors.mT
    return x.reshape(n, -1, kh, kw)


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Column-wise Kronecker product, `(n, Kh, R)` and `(n, Kw, R)` -> `(n, Kh*Kw, R)`."""
    return (a[:, :, None, :] * b[:, None, :, :]).flatten(1, 2)


def projection_error(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Squared error with the best C, computed from the residual; infinite where components are nearly collinear.

    Such components need a C of huge norm and cancel each other, so that rounding dominates (degeneracy of the CPD).
    """
    q, r = torch.linalg.qr(khatri_rao(a, b))
    error = (x - (x @ q) @ q.mT).square().sum((1, 2))
    return error.masked_fill(r.diagonal(dim1=1, dim2=2).abs().amin(1) < COLLINEAR, math.inf)


def unit(x: Tensor) -> Tensor:
    """Columns scaled to unit norm; a zero column becomes the first unit vector."""
    return split_norm(x)[0]


def split_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns scaled to unit norm, and their norms."""
    norm = (x * x).sum(-2, keepdim=True).sqrt_()
    tiny = norm < 1e-150
    unit = x / norm.where(~tiny, 1)
    if tiny.any():
        unit = unit.masked_fill(tiny, 0)
        unit[..., :1, :].masked_fill_(tiny, 1)
    return unit, norm


def als(x: Tensor, a: Tensor, b: Tensor, n_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Proximal ALS with extrapolation on tensors `x (n, k, Kh*Kw)` of unit energy.

    Returns A, B and the squared error of each tensor at the best point found; nearly collinear points do not count. A
    tensor is done when it has converged, when it is nearly of low rank, or after `n_iter` sweeps.

    Each sweep starts from an extrapolated point and is undone where the error did not fall (as in Ang et al., 2019).
    The error of the kept point therefore never rises, and swamps are crossed two to four times faster.
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
        product = khatri_rao(a, b)
        gram = _gram(a, b)
        c = _solve(gram, x @ product, c, _C_PULL)
        now = (x - c @ product.mT).square().sum((1, 2)).masked_fill(_is_degenerate(gram), math.inf)
        better = now <= error
        error = torch.where(better, now, error)
        better = better[:, None, None]
        best_a, best_b = torch.where(better, a, best_a), torch.where(better, b, best_b)
        if sweep == n_iter:
            break
        if sweep % 5 == 4:
            going = (previous - error > 5 * tol * error) & (error > 1e-15)
            if sweep + 1 >= _HAND_OVER:
                going &= error > NEARLY_LOW_RANK
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
        new_a, norm = split_norm(new_a)
        c, slices = c * norm, slices * norm.mT[..., None]
        new_b = _solve(_gram(c, new_a), (new_a.mT[:, :, None, :] @ slices)[:, :, 0].mT, b)
        new_b, norm = split_norm(new_b)
        kept_a, kept_b, kept_c = new_a, new_b, c * norm
        a, b = unit(new_a + step * (new_a - a)), unit(new_b + step * (new_b - b))
    found_a[todo], found_b[todo], found_error[todo] = best_a, best_b, error
    return found_a, found_b, found_error


def alternate_rank_one(x: Tensor, a: Tensor, b: Tensor, n_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rank-one `als`: a and b in turn become leading eigenvectors, found by repeated squaring.

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
                break  # out of sweeps between two checks of convergence
            going = previous - error > 3 * tol * error
            gram, a, b, error, todo = (v[going] for v in (gram, a, b, error, todo))
            if len(todo) == 0:
                break
    return found_a, found_b, found_error


def _leading_eigenvector(gram: Tensor, fixed: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Leading eigenvector of `gram (n, d*d, e*e)` contracted twice with `fixed (n, e)`, and its Rayleigh quotient.

    It is found by 16 power steps from `start`.
    """
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


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return (a.mT @ a) * (b.mT @ b)


def _is_degenerate(gram: Tensor) -> Tensor:
    """Whether components of unit norm are nearly collinear, by the same measure as in `projection_error`."""
    if gram.shape[1] == 1:
        return gram.new_zeros(len(gram), dtype=torch.bool)
    factor, failed = torch.linalg.cholesky_ex(gram)
    return (failed > 0) | ~(factor.diagonal(dim1=1, dim2=2).amin(1) >= COLLINEAR)


def _solve(gram: Tensor, product: Tensor, old: Tensor, strength: float = 1e-9) -> Tensor:
    """Least squares with a pull towards `old`: solvable for collinear factors, and the error still cannot rise."""
    pull = strength * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-300
    right = product + pull * old
    if gram.shape[1] == 1:
        return right / (gram + pull)
    gram = gram + pull * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return right @ torch.linalg.inv_ex(gram)[0]  # several times faster than solving, for matrices this small


def newton(x: Tensor, a: Tensor, b: Tensor, error: Tensor, n_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Damped Newton steps on A and B with C eliminated; steps that do not lower the error are not taken.

    ALS converges linearly at best and crawls where components are nearly collinear; Newton's method, started from its
    result, needs a handful of steps. With E = X - C M^T, M = khatri_rao(A, B) and D the derivatives of M's columns,
    the Hessian of |E|^2 / 2 with C at its optimum is a sum of Hadamard products of small Gram matrices.
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
        curved = (before > NEARLY_LOW_RANK)[:, None, None].to(x.dtype)
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
        new_a = unit(a0 + move[:, : rank * kh].reshape(n, rank, kh).mT)
        new_b = unit(b0 + move[:, rank * kh :].reshape(n, rank, kw).mT)
        new_error = projection_error(xs, new_a, new_b)
        better = new_error < before
        taken = todo[better]
        a[taken], b[taken], error[taken] = new_a[better], new_b[better], new_error[better]
        damping = (damping * torch.where(better, 0.1, 4.0)[:, None]).clamp(1e-12, 1e6)
        fell = before - error[todo]
        going = (error[todo] > EXACT) & torch.where(better, fell > tol * before, damping[:, 0] < 10)
        todo, damping = todo[going], damping[going]
    return a, b, error
