"""Small linear algebra that the CPD solvers share: batches of factor matrices `(n, d, R)`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COLLINEAR = 1e-4  # sine of the angle of a component to others below which they are all but collinear


def compress_input_mode(x: Tensor, kh: int, kw: int) -> Tensor:
    """Tensor `(n, k, Kh, Kw)` with the Gram matrix of `x (n, I, Kh*Kw)`; all that A and B depend on.

    Where I >= Kh*Kw the rows of the unfolding `(k, Kh*Kw)` come out orthogonal.
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
    """Squared error left by the best C, from the residual itself; infinite where components are all but collinear.

    Such components need a C of huge norm, cancel each other, and would drown in rounding (degeneracy of the CPD).
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
