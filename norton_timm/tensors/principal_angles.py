"""Largest principal angle between the column spaces of every pair of filters (Bjorck and Golub, 1973)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 2**21  # float64 values per temporary: 16 MiB


def largest_angle(factor: Tensor, eps: float, squared_sine: bool = False) -> Tensor:
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


def drop_empty_components(modes: list[Tensor]) -> list[Tensor]:
    """Zero a component in all modes `(O, d, R)` if its column is zero in any of them."""
    present = torch.stack([(m != 0).any(1) for m in modes]).all(0)[:, None, :]
    return [m * present for m in modes]
