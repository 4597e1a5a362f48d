"""Canonical polyadic decomposition (CPD) of all filters of a layer at once: checks, scaling, and choice of solver."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from norton_timm.tensors.cp_iterations import compress_input_mode, khatri_rao, unit
from norton_timm.tensors.cp_solvers import solve_exact, solve_iteratively, solve_matrix

_CHUNK = 2**18  # float64 values of the weight handled at a time: 2 MiB, which stays in cache


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
    n_iter: int = 200,
    restarts: int = 3,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
) -> CPFactors:
    """Rank-`rank` CPD of each filter of a convolution.

    The input mode is compressed exactly first: a filter's unfolding `(I, Kh*Kw)` has rank at most Kh*Kw, so alternating
    least squares (ALS) runs on a `(min(I, Kh*Kw), Kh, Kw)` tensor, and C follows from A and B by least squares on the
    weight itself. All filters and all starts (one from the HOSVD, `restarts` random ones) iterate together; converged
    ones drop out; the best start of each filter is returned. Two cases need no iteration: filters that are matrices (a
    mode of size 1) are solved by the SVD, and from rank `min(I*Kh, I*Kw, Kh*Kw)` on (eq. 8) a closed form is exact.

    Args:
        weight: `(O, I, Kh, Kw)`, float32 or float64 (half types are computed in float64 too); any memory layout.
        rank: R >= 1, number of components.
        n_iter: bound on the iterations (ALS sweeps, then Newton steps); the error never rises with it.
        restarts: random starts beside the HOSVD's.
        tol: a start has converged when its squared relative error fell by less than this fraction in a sweep.
        generator: source of the random starts; without one, a fixed seed, so that results repeat.

    Raises:
        ValueError: wrong shape, type or argument; NaN or infinity (names the filter).

    Example:
        >>> factors = cp_decompose(torch.randn(64, 32, 3, 3), rank=2)
        >>> low_rank = cp_reconstruct(factors)  # (64, 32, 3, 3)
        >>> error = factors.nmse.mean()
    """
    _check(weight, rank, n_iter, restarts, tol)
    rank, n_iter, restarts = int(rank), int(n_iter), int(restarts)
    filters, i, kh, kw = weight.shape
    if generator is None:
        generator = torch.Generator().manual_seed(0)  # on the CPU, so that every device starts alike
    # all filters share their starts, so that equal filters get equal factors; lower ranks use the first columns
    draw: dict[str, Any] = {'generator': generator, 'device': generator.device, 'dtype': torch.float64}
    columns = [torch.randn((restarts, 1, kh + kw), **draw) for _ in range(rank)]
    noise = torch.stack(columns, 3).to(weight.device).expand(-1, filters, -1, -1)
    peak = _peak(weight)
    bad = ~torch.isfinite(peak)
    if bad.any():
        raise ValueError(f'weight: filter {int(bad.nonzero()[0])} has NaN or infinite values')
    scale = peak.to(torch.float64)[:, None, None]
    chunks = torch.arange(filters).split(max(1, _CHUNK // (i * kh * kw)))
    chunks = [slice(int(c[0]), int(c[-1]) + 1) for c in chunks]
    weight = weight.detach().flatten(2)
    cores = [compress_input_mode(_scaled(weight[c], scale[c]), kh, kw) for c in chunks]
    core = torch.cat(cores)
    if rank >= min(i * kh, i * kw, kh * kw):
        a, b = solve_exact(core, rank)
    elif min(i, kh, kw) == 1:
        a, b = solve_matrix(core, rank)
    else:
        a, b = solve_iteratively(core, rank, noise, n_iter, tol)
    parts = [_finish(weight[c], scale[c], a[c], b[c]) for c in chunks]
    return CPFactors(*(torch.cat(field) for field in zip(*parts)))


def cp_reconstruct(factors: CPFactors) -> Tensor:
    """Filters `(O, I, Kh, Kw)` that the factors stand for."""
    return torch.einsum('ohr,owr,oir->oihw', factors.A, factors.B, factors.C)


def _check(weight: Tensor, rank: int, n_iter: int, restarts: int, tol: float) -> None:
    if weight.ndim != 4 or not weight.is_floating_point() or weight.numel() == 0:
        got = f'{weight.dtype} {tuple(weight.shape)}'
        raise ValueError(f'weight: expected a non-empty floating-point tensor (O, I, Kh, Kw), got {got}')
    for name, value, low in (('rank', rank, 1), ('n_iter', n_iter, 0), ('restarts', restarts, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
            raise ValueError(f'{name}: expected an integer >= {low}, got {value!r}')
    if not 0 <= tol < 1:
        raise ValueError(f'tol: expected a number in [0, 1), got {tol!r}')


def _peak(weight: Tensor) -> Tensor:
    """Largest magnitude in each filter `(O,)`; NaN where there is one."""
    return torch.linalg.vector_norm(weight.detach().flatten(1), ord=float('inf'), dim=1)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Filters in float64, scaled to a largest magnitude of 1."""
    return weight.to(torch.float64, copy=True).div_(scale.where(scale > 0, 1))


def _finish(weight: Tensor, scale: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """C by least squares, norms balanced, and the NMSE of what is returned, rounding included."""
    x = _scaled(weight, scale)
    design = khatri_rao(a, b)
    c = (x @ _pseudo_inverse(design).mT).masked_fill(~design.any(1, keepdim=True), 0)
    a, b = unit(a), unit(b)  # a component that was not needed has zero columns
    a, b, c = (f.to(weight.dtype) for f in _balance(a, b, c, scale))
    energy = _energy(x)
    design = khatri_rao(a.double(), b.double())
    rest = x.baddbmm_(c.double() / scale.where(scale > 0, 1), design.mT, alpha=-1)
    nmse = _energy(rest) / energy.where(energy > 0, 1)
    return a, b, c, nmse.to(weight.dtype)


def _energy(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1).square()


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
