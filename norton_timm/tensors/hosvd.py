"""Higher-order SVD of every filter of a layer at once (CORING's decomposition), and Tucker by HOOI."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor


class HOSVDFactors(NamedTuple):
    """Orthonormal mode factors of each filter; `Ra`, `Rb`, `Rc` are the mode ranks.

    Columns beyond a filter's numerical mode rank are zero. The entry of largest magnitude of every column is
    positive, which fixes the sign that the SVD leaves open; `core` absorbs it.
    """

    A: Tensor  # (O, Kh, Ra)
    B: Tensor  # (O, Kw, Rb)
    C: Tensor  # (O, I, Rc)
    core: Tensor  # (O, Rc, Ra, Rb)


def hosvd(weight: Tensor, rank: int | tuple[int, int, int] = 1) -> HOSVDFactors:
    """Left singular vectors of the three unfoldings of each filter (De Lathauwer et al., 2000).

    Args:
        weight: `(O, I, Kh, Kw)`, every filter a third-order tensor.
        rank: columns kept per mode, or `(Ra, Rb, Rc)` for height, width and input mode; cut to what the mode can have.

    Raises:
        ValueError: wrong number of dimensions, rank below 1, NaN or infinity (names the filter).

    Example:
        >>> factors = hosvd(torch.randn(64, 32, 3, 3), rank=1)
        >>> factors.A.shape, factors.core.shape  # (64, 3, 1), (64, 1, 1, 1)
    """
    return tucker(weight, rank, n_iter=0)


def tucker(weight: Tensor, rank: int | tuple[int, int, int], n_iter: int = 10) -> HOSVDFactors:
    """Tucker decomposition of each filter by higher-order orthogonal iteration, started from the HOSVD.

    Args:
        weight: `(O, I, Kh, Kw)`.
        rank: as in `hosvd`.
        n_iter: HOOI sweeps; 0 gives the truncated HOSVD itself.
    """
    ra, rb, rc = _check(weight, rank)
    filters, i, kh, kw = weight.shape
    x = weight.detach().reshape(filters, i, kh * kw).to(torch.float64)
    scale = x.abs().amax((1, 2), keepdim=True)
    x = x / scale.where(scale > 0, 1)
    # exact compression: the input mode has rank at most Kh*Kw, so the other modes are read from the small tensor s*vh
    basis, s, vh = torch.linalg.svd(x, full_matrices=False)
    small = (s[:, :, None] * vh).reshape(filters, -1, kh, kw)
    eps = torch.finfo(weight.dtype).eps if weight.dtype.is_floating_point else torch.finfo(torch.float32).eps
    c = torch.eye(small.shape[1], dtype=torch.float64, device=x.device).expand(filters, -1, -1)[:, :, :rc]
    c = c * _is_significant(s, eps * max(i, kh * kw))[:, None, :rc]
    a = _left_vectors(_unfold(small, 2), ra, eps)
    b = _left_vectors(_unfold(small, 3), rb, eps)
    for _ in range(n_iter):
        c = _left_vectors(_unfold(_project(_project(small, a, 2), b, 3), 1), rc, eps)
        a = _left_vectors(_unfold(_project(_project(small, c, 1), b, 3), 2), ra, eps)
        b = _left_vectors(_unfold(_project(_project(small, c, 1), a, 2), 3), rb, eps)
    core = _project(_project(_project(small, c, 1), a, 2), b, 3) * scale[..., None]
    c = basis @ c
    signs = [_signs(f) for f in (a, b, c)]
    core = core * signs[2][:, :, None, None] * signs[0][:, None, :, None] * signs[1][:, None, None, :]
    a, b, c = (f * sign[:, None, :] for f, sign in zip((a, b, c), signs))
    dtype = weight.dtype
    return HOSVDFactors(a.to(dtype), b.to(dtype), c.to(dtype), core.to(dtype))


def tucker_reconstruct(factors: HOSVDFactors) -> Tensor:
    """Filters `(O, I, Kh, Kw)` that the factors stand for."""
    return torch.einsum('ocab,oic,oha,owb->oihw', factors.core, factors.C, factors.A, factors.B)


def _check(weight: Tensor, rank: int | tuple[int, int, int]) -> tuple[int, int, int]:
    if weight.ndim != 4 or not weight.is_floating_point():
        raise ValueError(
            f'weight: expected a floating-point tensor (O, I, Kh, Kw), got {weight.dtype} {tuple(weight.shape)}'
        )
    if weight.numel() == 0:
        raise ValueError(f'weight: expected at least one filter and value, got shape {tuple(weight.shape)}')
    ranks = tuple(rank) if isinstance(rank, (tuple, list)) else (rank,) * 3
    if len(ranks) != 3 or any(isinstance(r, bool) or not isinstance(r, Integral) or r < 1 for r in ranks):
        raise ValueError(f'rank: expected an integer >= 1 or three of them, got {rank!r}')
    bad = ~torch.isfinite(weight).flatten(1).all(1)
    if bad.any():
        raise ValueError(f'weight: filter {int(bad.nonzero()[0])} has NaN or infinite values')
    _, i, kh, kw = weight.shape
    return min(int(ranks[0]), kh), min(int(ranks[1]), kw), min(int(ranks[2]), i, kh * kw)


def _unfold(x: Tensor, mode: int) -> Tensor:
    """Mode-`mode` unfolding of each filter: `(O, n, ...)` -> `(O, n_mode, rest)`."""
    return x.movedim(mode, 1).flatten(2)


def _project(x: Tensor, factor: Tensor, mode: int) -> Tensor:
    """Multiply mode `mode` of each filter by the transposed factor `(O, n, R)`."""
    rest = x.movedim(mode, 1)
    product = factor.mT @ rest.flatten(2)
    return product.reshape(x.shape[0], -1, *rest.shape[2:]).movedim(1, mode)


def _is_significant(s: Tensor, tolerance: float) -> Tensor:
    return (s > tolerance * s[:, :1]).to(s.dtype)


def _left_vectors(unfolding: Tensor, rank: int, eps: float) -> Tensor:
    u, s, _ = torch.linalg.svd(unfolding, full_matrices=False)
    u = u * _is_significant(s, eps * max(unfolding.shape[1:]))[:, None, :]
    if u.shape[2] < rank:
        u = torch.nn.functional.pad(u, (0, rank - u.shape[2]))
    return u[:, :, :rank]


def _signs(factor: Tensor) -> Tensor:
    """`(O, R)`: +1 or -1, the sign of the entry of largest magnitude of each column."""
    top = factor.gather(1, factor.abs().argmax(1, keepdim=True))[:, 0]
    return torch.where(top < 0, -1.0, 1.0).to(factor.dtype)
