"""Damped Newton steps for the CPD of many small tensors at once."""

from __future__ import annotations

import torch
from torch import Tensor

from norton_timm.cp_algebra import khatri_rao, projection_error, unit
from norton_timm.cp_als import NEARLY_LOW_RANK

EXACT = 1e-24  # squared relative error that counts as none


def newton(x: Tensor, a: Tensor, b: Tensor, error: Tensor, n_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
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
