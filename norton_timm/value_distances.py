"""Distances of every pair of filters by their values: VBD, SNR, cosine, Pearson, Euclidean, Manhattan."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 2**21  # float64 values per temporary: 16 MiB


def value_distance(x: Tensor, criterion: str, free_sign: bool) -> Tensor:
    """`x (O, d, R)` -> `(O, O)`, upper half valid; with `free_sign` each column may be flipped."""
    if not free_sign or x.shape[2] == 1:
        return _pair_distance(x.flatten(1), criterion, free_sign)
    flips = x.unbind(2)
    if criterion == 'euclidean':
        return sum(_pair_distance(c, criterion, True).square_() for c in flips).sqrt_()  # type: ignore[union-attr]
    if criterion == 'manhattan':
        return sum(_pair_distance(c, criterion, True) for c in flips)  # type: ignore[return-value]
    return sum(_pair_distance(c, criterion, True) for c in flips) / len(flips)  # type: ignore[return-value]


def _pair_distance(x: Tensor, criterion: str, free_sign: bool) -> Tensor:
    o = len(x)
    if criterion == 'manhattan':
        plain = torch.cdist(x, x, p=1)
        return torch.minimum(plain, torch.cdist(x, -x, p=1)) if free_sign else plain
    peak = x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
    x = x / peak
    if criterion in ('vbd', 'snr', 'pearson'):
        x = x - x.mean(1, keepdim=True)
        x[torch.linalg.vector_norm(x, dim=1) <= 1e-15 * x.shape[1] ** 0.5] = 0  # a constant filter, up to rounding
    square = (x * x).sum(1)
    out = x.new_empty(o, o)
    for start in range(0, o, max(1, _CHUNK // o)):
        part = slice(start, min(start + max(1, _CHUNK // o), o))
        dot = x[part] @ x.T
        out[part] = _from_products(dot.abs_() if free_sign else dot, square[part, None], square[None, :], criterion)
    if criterion in ('euclidean', 'vbd', 'snr'):
        _refine_close_pairs(out, x, square, criterion, free_sign)
    return out.mul_(peak) if criterion == 'euclidean' else out


def _from_products(dot: Tensor, xx: Tensor, yy: Tensor, criterion: str) -> Tensor:
    if criterion in ('cosine', 'pearson'):
        norm = xx.sqrt() * yy.sqrt()
        cosine = (dot / norm.where(norm > 0, 1)).clamp_(-1, 1)
        return (1 - cosine).masked_fill_((xx == 0) & (yy == 0), 0)
    gap = (xx + yy - 2 * dot).clamp_min_(0)
    if criterion == 'euclidean':
        return gap.sqrt_()
    return _ratio(gap, xx, yy, criterion)


def _ratio(gap: Tensor, xx: Tensor, yy: Tensor, criterion: str) -> Tensor:
    if criterion == 'vbd':
        total = xx + yy
        return gap / total.where(total > 0, 1)
    x_ok, y_ok = xx > 0, yy > 0
    both = gap / xx.where(x_ok, 1) * x_ok + gap / yy.where(y_ok, 1) * y_ok
    return both / (x_ok.to(gap) + y_ok.to(gap)).clamp_min_(1)


def _refine_close_pairs(out: Tensor, x: Tensor, square: Tensor, criterion: str, free_sign: bool) -> None:
    """Near-duplicates lose all digits in |x|^2 + |y|^2 - 2xy: take their difference explicitly."""
    gap = (square[:, None] + square[None, :]).mul_(1e-4)
    if criterion == 'euclidean':
        close = out.square() < gap
    else:
        close = out < 1e-4
    i, j = torch.nonzero(close.triu_(1), as_tuple=True)
    for part in torch.arange(len(i), device=i.device).split(max(1, _CHUNK // x.shape[1])):
        a, b = x[i[part]], x[j[part]]
        exact = (a - b).square().sum(1)
        if free_sign:
            exact = torch.minimum(exact, (a + b).square().sum(1))
        xx, yy = square[i[part]], square[j[part]]
        out[i[part], j[part]] = exact.sqrt() if criterion == 'euclidean' else _ratio(exact, xx, yy, criterion)
