"""CPDs in closed form: ranks that represent anything, matrices, and ranks where the Eckart-Young bound is reached."""

from __future__ import annotations

import torch
from torch import Tensor

from norton_timm.cp_algebra import khatri_rao, projection_error, unit


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

    No rank-R approximation beats projecting the unfolding on its R leading right singular vectors. Its error is reached
    by R independent products a (x) b orthogonal to the other singular vectors, read as matrices N_1, N_2, ...: any `a`
    leaves fewer linear conditions N_k^T a on `b` than b has entries. Of many such pairs the best conditioned are taken.
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
