"""Alternating least squares (ALS) for the CPD of many small tensors at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from norton_timm.cp_algebra import COLLINEAR, khatri_rao, split_norm, unit

NEARLY_LOW_RANK = 0.02  # squared relative error below which ALS tends to crawl and Newton's method not to
_HAND_OVER = 25  # ALS sweeps of such a filter
_C_PULL = 1e-12  # so weak that C leaves the error that the best C would, to all digits that count


def als(x: Tensor, a: Tensor, b: Tensor, n_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Proximal ALS with extrapolation on tensors `x (n, k, Kh*Kw)` of unit energy.

    Returns A, B and the squared error of each at the best point met, all but collinear ones left out. A tensor is done
    when it has converged, or is nearly of low rank, or after `n_iter` sweeps.

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
    """What `als` does, for one component: a and b in turn become leading eigenvectors, found by repeated squaring.

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
    return found_a, found_b, found_error


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


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return (a.mT @ a) * (b.mT @ b)


def _is_degenerate(gram: Tensor) -> Tensor:
    """Whether components of unit norm are all but collinear, by the same measure as in `projection_error`."""
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
