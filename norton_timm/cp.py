"""Canonical polyadic decomposition (CPD) of every filter of a layer at once, by alternating least squares (ALS)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 2**23  # float64 values of the weight handled at a time: 64 MiB


class CPFactors(NamedTuple):
    """Factor matrices of each filter (NORTON, eq. 2): `W[o, i, m, n] ~ sum_r C[o, i, r] A[o, m, r] B[o, n, r]`.

    The norms of a component are balanced over its three columns. A component that contributes nothing has unit
    columns in A and B and a zero column in C, so that fine-tuning can revive it.
    """

    A: Tensor  # (O, Kh, R)
    B: Tensor  # (O, Kw, R)
    C: Tensor  # (O, I, R)
    nmse: Tensor  # (O,) squared relative error of each filter, 0 for an all-zero filter


def cp_decompose(
    weight: Tensor,
    rank: int,
    *,
    n_iter: int = 100,
    restarts: int = 2,
    tol: float = 1e-5,
    generator: torch.Generator | None = None,
    covariance: Tensor | None = None,
) -> CPFactors:
    """Rank-`rank` CPD of each filter of a convolution.

    The input mode is compressed exactly first: a filter's unfolding `(I, Kh*Kw)` has rank at most Kh*Kw, so ALS runs
    on a `(min(I, Kh*Kw), Kh, Kw)` tensor, and C follows from A and B by least squares on the weight itself. All
    filters and all starts (one from the HOSVD, `restarts` random ones) iterate together; converged ones drop out; the
    best start of each filter is returned. Filters that are matrices (a mode of size 1) are solved by the SVD, and a
    rank at which any filter is exact (`min(I*Kh, I*Kw, Kh*Kw)`, eq. 8) without iterating.

    Args:
        weight: `(O, I, Kh, Kw)`, float32 or float64 (half types are computed in float64 too); any memory layout.
        rank: R >= 1, number of components.
        n_iter: bound on ALS sweeps.
        restarts: random starts beside the HOSVD's.
        tol: a start has converged when its squared relative error fell by less than this fraction in a sweep.
        generator: source of the random starts; without one, a fixed seed, so that results repeat.
        covariance: `(I, I)` positive semi-definite second moment of the layer's input channels: the error (and
            `nmse`) is then measured on what the filter makes of its input rather than on the weight.

    Raises:
        ValueError: wrong shape, type or argument; NaN or infinity (names the filter).
    """
    _check(weight, rank, n_iter, restarts, tol, covariance)
    filters, i, kh, kw = weight.shape
    if generator is None:
        generator = torch.Generator(weight.device).manual_seed(0)
    root = None if covariance is None else _square_root(covariance.detach().to(weight.device, torch.float64))
    shape = (restarts, filters, kh + kw, rank)
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64).to(weight.device)
    size = max(1, _CHUNK // (i * kh * kw))
    parts = []
    for start in range(0, filters, size):
        part = slice(start, min(start + size, filters))
        parts.append(_decompose(weight.detach()[part], rank, noise[:, part], n_iter, tol, root))
    return CPFactors(*(torch.cat(field) for field in zip(*parts)))


def cp_reconstruct(factors: CPFactors) -> Tensor:
    """Filters `(O, I, Kh, Kw)` that the factors stand for."""
    return torch.einsum('ohr,owr,oir->oihw', factors.A, factors.B, factors.C)


def _check(weight: Tensor, rank: int, n_iter: int, restarts: int, tol: float, covariance: Tensor | None) -> None:
    if weight.ndim != 4 or not weight.is_floating_point() or weight.numel() == 0:
        got = f'{weight.dtype} {tuple(weight.shape)}'
        raise ValueError(f'weight: expected a non-empty floating-point tensor (O, I, Kh, Kw), got {got}')
    for name, value, low in (('rank', rank, 1), ('n_iter', n_iter, 0), ('restarts', restarts, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f'{name}: expected an integer >= {low}, got {value!r}')
    if not 0 <= tol < 1:
        raise ValueError(f'tol: expected a number in [0, 1), got {tol!r}')
    bad = ~torch.isfinite(weight).flatten(1).all(1)
    if bad.any():
        raise ValueError(f'weight: filter {int(bad.nonzero()[0])} has NaN or infinite values')
    if covariance is not None:
        i = weight.shape[1]
        if covariance.shape != (i, i) or not torch.isfinite(covariance).all():
            raise ValueError(f'covariance: expected finite values ({i}, {i}), got shape {tuple(covariance.shape)}')


def _square_root(covariance: Tensor) -> Tensor:
    """`L^T` with `L L^T` the symmetric covariance, scaled to a largest eigenvalue of 1."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    top = values[-1]
    if top <= 0 or values[0] < -1e-6 * top:
        raise ValueError(f'covariance: expected positive semi-definite, got eigenvalues {values[0]:.3g} to {top:.3g}')
    return (values.clamp_min(0) / top).sqrt()[:, None] * vectors.mT


def _decompose(
    weight: Tensor, rank: int, noise: Tensor, n_iter: int, tol: float, root: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors and NMSE of some filters; `noise (restarts, n, Kh + Kw, R)` seeds the random starts."""
    n, i, kh, kw = weight.shape
    x = weight.reshape(n, i, kh * kw).to(torch.float64)
    scale = x.abs().amax((1, 2), keepdim=True)
    x = x / scale.where(scale > 0, 1)
    seen = x if root is None else root @ x
    if rank >= min(i * kh, i * kw, kh * kw):
        a, b = _exact(seen, kh, kw, rank)
    else:
        core = _compress(seen, kh, kw)
        if kh == 1 or kw == 1 or i == 1:
            a, b = _matrix(core, rank)
        else:
            a, b = _als(core, rank, noise, n_iter, tol)
    design = _khatri_rao(a, b)
    c = x @ _pseudo_inverse(design).mT
    a, b, c = _balance(a, b, c, scale)
    a, b, c = (f.to(weight.dtype) for f in (a, b, c))
    # the error of what is returned, rounding included, from the residual itself
    rest = x - (c.to(torch.float64) / scale.where(scale > 0, 1)) @ _khatri_rao(a.double(), b.double()).mT
    rest = rest if root is None else root @ rest
    energy = seen.square().sum((1, 2))
    nmse = rest.square().sum((1, 2)) / energy.where(energy > 0, 1)
    return a, b, c, nmse.to(weight.dtype)


def _compress(x: Tensor, kh: int, kw: int) -> Tensor:
    """Tensor `(n, k, Kh, Kw)` with the Gram matrix of `x (n, I, Kh*Kw)`; all that A and B depend on."""
    n, i, k = x.shape
    if i > k:
        values, vectors = torch.linalg.eigh(x.mT @ x)
        x = values.clamp_min(0).sqrt()[:, :, None] * vectors.mT
    return x.reshape(n, -1, kh, kw)


def _khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Column-wise Kronecker product, `(n, Kh, R)` and `(n, Kw, R)` -> `(n, Kh*Kw, R)`."""
    return (a[:, :, None, :] * b[:, None, :, :]).flatten(1, 2)


def _exact(x: Tensor, kh: int, kw: int, rank: int) -> tuple[Tensor, Tensor]:
    """A and B at a rank that represents anything: unit vectors for the two smallest modes, fibres for the third."""
    n, i, _ = x.shape
    r = torch.arange(rank, device=x.device)
    rows, cols = torch.eye(kh, dtype=x.dtype, device=x.device), torch.eye(kw, dtype=x.dtype, device=x.device)
    fibres = x.reshape(n, i, kh, kw)
    if rank >= kh * kw:
        r = r % (kh * kw)
        return rows[:, r // kw].expand(n, -1, -1), cols[:, r % kw].expand(n, -1, -1)
    if rank >= i * kh:
        r = r % (i * kh)
        return rows[:, r % kh].expand(n, -1, -1), _unit(fibres[:, r // kh, r % kh].mT)
    r = r % (i * kw)
    return _unit(fibres[:, r // kw, :, r % kw].permute(1, 2, 0)), cols[:, r % kw].expand(n, -1, -1)


def _matrix(core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best A and B of filters with one mode of size 1, by the SVD (Eckart and Young)."""
    n, k, kh, kw = core.shape
    u, _, vh = torch.linalg.svd(core.reshape(n, kh, kw) if k == 1 else core.flatten(2), full_matrices=False)
    ones = core.new_ones(n, 1, rank)
    if k == 1:
        return u[:, :, :rank], vh[:, :rank].mT
    right = vh[:, :rank].mT
    return (right, ones) if kw == 1 else (ones, right)


def _als(core: Tensor, rank: int, noise: Tensor, n_iter: int, tol: float) -> tuple[Tensor, Tensor]:
    """Best A `(n, Kh, R)` and B `(n, Kw, R)` over all starts, columns of unit norm.

    Proximal ALS with extrapolation: each sweep starts beyond the last step and is undone where the error did not fall
    (as in Ang et al., 2019), so the error of what is kept never rises, and swamps are crossed two to four times faster.
    """
    n, k, kh, _ = core.shape
    x = core.flatten(2)
    energy = x.square().sum((1, 2), keepdim=True)
    x = x / energy.where(energy > 0, 1).sqrt()
    a0, b0 = _hosvd_start(x.reshape(core.shape), rank)
    a = torch.cat([a0, *_unit(noise[:, :, :kh])])
    b = torch.cat([b0, *_unit(noise[:, :, kh:])])
    x = x.repeat(len(noise) + 1, 1, 1)
    found_a, found_b, found_error = a.clone(), b.clone(), x.new_full((len(x),), math.inf)
    todo = torch.arange(len(x), device=x.device)
    c = x.new_zeros(len(x), k, rank)
    error = previous = found_error.clone()
    best_a, best_b, kept_a, kept_b, kept_c = a, b, a, b, c
    step = x.new_full((len(x), 1, 1), 0.5)
    for sweep in range(n_iter + 1):
        # C, and with it the error, at the extrapolated point
        design = _khatri_rao(a, b)
        product = x @ design
        gram = _gram(a, b)
        c = _solve(gram, product, c)
        now = 1 - 2 * (product * c).sum((1, 2)) + ((c.mT @ c) * gram).sum((1, 2))
        better = (now <= error)[:, None, None]
        error = torch.where(better[:, 0, 0], now, error)
        best_a, best_b = torch.where(better, a, best_a), torch.where(better, b, best_b)
        if sweep == n_iter:
            break
        if sweep % 5 == 4:
            going = (previous - error > 5 * tol * error) & (error > 1e-15)
            previous = error
            if not going.all():
                done = todo[~going]
                found_a[done], found_b[done], found_error[done] = best_a[~going], best_b[~going], error[~going]
                if len(done) == len(todo):
                    return _best_start(found_a, found_b, found_error, n)
                state = (x, a, b, c, best_a, best_b, kept_a, kept_b, kept_c, error, previous, step, better, todo)
                x, a, b, c, best_a, best_b, kept_a, kept_b, kept_c, error, previous, step, better, todo = (
                    v[going] for v in state
                )
        a, b, c = torch.where(better, a, kept_a), torch.where(better, b, kept_b), torch.where(better, c, kept_c)
        step = torch.where(better, (step * 1.1).clamp_max(3), step * 0.5)
        new_a = _solve(_gram(c, b), (_contract(c, x, kh) * b.mT[:, :, None, :]).sum(3).mT, a)
        new_a, c = _normalise(new_a, c)
        new_b = _solve(_gram(c, new_a), (_contract(c, x, kh) * new_a.mT[:, :, :, None]).sum(2).mT, b)
        new_b, c = _normalise(new_b, c)
        kept_a, kept_b, kept_c = new_a, new_b, c
        a, b = _unit(new_a + step * (new_a - a)), _unit(new_b + step * (new_b - b))
    found_a[todo], found_b[todo], found_error[todo] = best_a, best_b, error
    return _best_start(found_a, found_b, found_error, n)


def _best_start(a: Tensor, b: Tensor, error: Tensor, n: int) -> tuple[Tensor, Tensor]:
    best = error.reshape(-1, n).argmin(0) * n + torch.arange(n, device=a.device)
    return a[best], b[best]


def _hosvd_start(core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pairs of left singular vectors of the two spatial modes, those with the most energy first."""
    kh, kw = core.shape[2:]
    rows = torch.linalg.eigh(torch.einsum('nkhw,nkgw->nhg', core, core))[1]
    cols = torch.linalg.eigh(torch.einsum('nkhw,nkhg->nwg', core, core))[1]
    energy = (rows.mT[:, None] @ core @ cols[:, None]).square().sum(1).flatten(1)
    pair = energy.sort(dim=1, descending=True, stable=True).indices[:, None, :rank]
    a = rows.gather(2, (pair // kw).expand(-1, kh, -1))
    b = cols.gather(2, (pair % kw).expand(-1, kw, -1))
    return a, b


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return (a.mT @ a) * (b.mT @ b)


def _contract(c: Tensor, x: Tensor, kh: int) -> Tensor:
    """Input mode contracted with C: `(n, R, Kh, Kw)`."""
    product = c.mT @ x
    return product.reshape(*product.shape[:2], kh, -1)


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
    norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    first = torch.zeros_like(x)
    first[..., 0, :] = 1
    return torch.where(norm > 0, x / norm.where(norm > 0, 1), first)


def _normalise(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Unit columns, their norms moved to `c`."""
    return _unit(x), c * torch.linalg.vector_norm(x, dim=1, keepdim=True)


def _pseudo_inverse(design: Tensor) -> Tensor:
    if design.shape[2] == 1:
        return design.mT / design.square().sum(1, keepdim=True)
    return torch.linalg.pinv(design, rtol=1e-6)


def _balance(a: Tensor, b: Tensor, c: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spread the norm of each component evenly over its columns; `a` and `b` come with unit columns."""
    norm = torch.linalg.vector_norm(c, dim=1, keepdim=True)
    size = norm * scale
    share = size ** (1 / 3)
    live = size > 0
    return a * share.where(live, 1), b * share.where(live, 1), torch.where(live, c / norm.where(live, 1) * share, 0)
