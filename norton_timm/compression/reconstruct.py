"""Weights with the least error of a layer's outputs: least squares, low rank, CPD, and removal of inputs.

All work on second moments of what a layer reads (see :class:`Moments`): an error ``D`` (O, P) of the weight costs
``trace(D gram D^T)`` at the outputs. None solves a system per filter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from norton_timm.compression.moments import Moments
from norton_timm.tensors import CPFactors, cp_decompose

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_FLOOR = 1e-4  # least ridge, as a share of the mean energy of an input
_STEPS = 24  # at most this share of the inputs that are left goes at a time


def least_squares(first: Moments, second: Moments, old: Tensor, centred: bool) -> Tensor:
    """The weight (O, P) that gives the wanted outputs with the least error on unseen samples.

    A ridge pulls the weight to ``old``. Of ``RIDGES`` the best is chosen: fitted to the first half of the images and
    tried on the second.

    Args:
        first: moments of the first half of the images.
        second: of the second half.
        old: the present weight (O, P), in the moments' type.
        centred: whether a bias takes up the means.
    """
    grams, crosses, counts = [], [], []
    for half in (first, second):
        if half.count:
            grams.append(half.gram(centred))
            crosses.append(half.cross(centred))
            counts.append(half.count)
    ridge = RIDGES[-1]
    if len(grams) == 2:
        errors = []
        for ridge in RIDGES:
            weight = _ridge(grams[0], crosses[0], old, ridge)
            errors.append(float(((weight @ grams[1]) * weight).sum() - 2 * (weight * crosses[1].mT).sum()))
        ridge = RIDGES[min(range(len(RIDGES)), key=errors.__getitem__)]
    share = [count / sum(counts) for count in counts]
    gram = sum(s * g for s, g in zip(share, grams))
    cross = sum(s * c for s, c in zip(share, crosses))
    return _ridge(gram, cross, old, ridge)  # type: ignore[arg-type]


def _ridge(gram: Tensor, cross: Tensor, old: Tensor, ridge: float) -> Tensor:
    """``old`` and the change that lowers the error, pulled to zero."""
    change = cross - gram @ old.mT
    return old + torch.cholesky_solve(change, cholesky(gram, ridge)).mT


def cholesky(gram: Tensor, ridge: float) -> Tensor:
    """Lower factor (P, P) of ``gram`` with ``ridge`` times its mean diagonal added; in float64 where float32 fails.

    Raises:
        ValueError: moments with NaN or infinity.
    """
    if not gram.isfinite().all():
        raise ValueError('calibration: got images on which a layer reads NaN or infinity, expected finite numbers')
    size = float(gram.diagonal().mean().clamp_min(1e-30))
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * size * eye)
    if failed:
        factor = torch.linalg.cholesky((gram + max(ridge, _FLOOR) * size * eye).double()).to(gram.dtype)
    return factor


def low_rank_factors(weight: Tensor, gram: Tensor, importance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (O, R) and (R, P) whose product has the least weighted error of the outputs.

    The principal axes of the weighted outputs are kept (Zhang et al., 2015).

    Args:
        weight: (O, P).
        gram: (P, P).
        importance: weight (O,) of each output's error.
        rank: R.
    """
    scaled = importance[:, None] * weight
    _, axes = torch.linalg.eigh((scaled @ gram @ scaled.mT).double())
    axes = axes[:, -rank:].flip(1).to(weight.dtype)
    return axes / importance[:, None], axes.mT @ scaled


def cpd_factors(weight: Tensor, gram: Tensor, rank: int, generator: torch.Generator | None = None) -> CPFactors:
    """CPD of each filter with nearly the least error of the outputs.

    The moments are taken as a Kronecker product over input, height and width. Each mode of the filters is whitened by
    its factor, decomposed with all filters at once, and brought back, which keeps the form of a CPD.

    Args:
        weight: (O, I, Kh, Kw).
        gram: (I * Kh * Kw, I * Kh * Kw).
        rank: R.
        generator: of the random starts.
    """
    _, i, kh, kw = weight.shape
    parts = gram.view(i, kh, kw, i, kh, kw)
    modes = [torch.einsum(sum_, parts) for sum_ in ('ihwjhw->ij', 'ihwigw->hg', 'ihwihv->wv')]
    li, lh, lw = (cholesky(m, 1e-3) / m.diagonal().mean().clamp_min(1e-30).sqrt() for m in modes)
    white = torch.einsum('oihw,ij,hg,wv->ojgv', weight, li, lh, lw)
    found = cp_decompose(white, rank, generator=generator)
    a, b, c = (
        torch.linalg.solve_triangular(factor.mT, f, upper=True)
        for factor, f in ((lh, found.A), (lw, found.B), (li, found.C))
    )
    return CPFactors(a, b, c, found.nmse)


@dataclass
class Reader:
    """A layer that reads the channels of a group.

    Attributes:
        weight: (O, P), its rows scaled by the importance of the outputs.
        gram: (P, P).
        columns: (classes, Q) columns of the weight that read each channel class.
    """

    weight: Tensor
    gram: Tensor
    columns: Tensor


def removals(readers: list[Reader], free: Tensor, keeps: Iterable[int]) -> dict[int, tuple[Tensor, list[Tensor]]]:
    """Which channel classes to keep, at several numbers of them, so that what reads them changes least.

    Classes leave greedily. The error that each causes is exact for one at a time, with the remaining inputs making up
    for it (optimal brain surgeon, Hassibi and Stork, 1993, with a class in place of a weight).

    Args:
        readers: the layers that read the group.
        free: classes that may leave.
        keeps: numbers of classes to stop at.

    Returns:
        For each number: the classes kept, sorted, and the weight of each reader, which holds zeros for the others.
    """
    classes = readers[0].columns.shape[0]
    alive = torch.ones(classes, dtype=torch.bool)
    may_go = torch.zeros(classes, dtype=torch.bool)
    may_go[free] = True
    weights = [reader.weight.clone() for reader in readers]
    inverses = [_inverse(reader.gram) for reader in readers]
    found = {}
    for keep in sorted(set(keeps), reverse=True):
        while int(alive.sum()) > keep:
            at = (alive & may_go).nonzero().flatten()
            goes = max(1, min(int(alive.sum()) - keep, len(at) // _STEPS))
            errors = torch.stack([_loss(w, v, r.columns[at]) for w, v, r in zip(weights, inverses, readers)]).sum(0)
            chosen = at[errors.topk(min(goes, len(at)), largest=False).indices.cpu()]
            for weight, inverse, reader in zip(weights, inverses, readers):
                _remove(weight, inverse, reader.columns[chosen].flatten())
            alive[chosen] = False
        found[keep] = alive.nonzero().flatten(), [w.clone() for w in weights]
    return found


def _inverse(gram: Tensor) -> Tensor:
    return torch.cholesky_inverse(cholesky(gram.double(), 1e-3)).to(gram.dtype)


def _loss(weight: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """Error (C,) that the removal of each class causes, with the others making up for it; ``columns`` (C, Q)."""
    part = weight[:, columns].permute(1, 2, 0)  # (C, Q, O)
    block = inverse[columns[:, :, None], columns[:, None, :]]
    eye = torch.eye(block.shape[1], dtype=block.dtype, device=block.device)
    block = block + 1e-9 * eye * block.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return (part * torch.linalg.solve(block, part)).sum((1, 2))


def _remove(weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Remove inputs, in place: the others take over, and the inverse becomes that of their moments."""
    gain = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
    weight -= weight[:, columns] @ gain
    inverse -= inverse[:, columns] @ gain
    weight[:, columns] = 0
    inverse[columns] = 0
    inverse[:, columns] = 0
    inverse[columns, columns] = 1
