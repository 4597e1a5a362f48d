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
_TRIED = 64  # outputs on which the ridges are compared
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
        rows = torch.linspace(
            0, len(old) - 1, min(_TRIED, len(old)), device=old.device
        ).long()  # some outputs are enough
        fitted, tested = crosses[0][:, rows], crosses[1][:, rows]
        for ridge in RIDGES:
            weight = _ridge(grams[0], fitted, old[rows], ridge)
            errors.append(float(((weight @ grams[1]) * weight).sum() - 2 * (weight * tested.mT).sum()))
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


class OutputAxes:
    """The principal axes of a layer's weighted outputs; the first R of them are its best form of rank R.

    This is the low rank of Zhang et al. (2015), with a weight for the error of each output.

    Args:
        weight: (O, P).
        gram: (P, P).
        importance: weight (O,) of each output's error.
    """

    def __init__(self, weight: Tensor, gram: Tensor, importance: Tensor) -> None:
        self._importance = importance
        self._scaled = importance[:, None] * weight
        _, axes = torch.linalg.eigh((self._scaled @ gram @ self._scaled.mT).double())
        self._axes = axes.flip(1).to(weight.dtype)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors (O, R) and (R, P) whose product has the least weighted error of the outputs."""
        axes = self._axes[:, :rank]
        return axes / self._importance[:, None], axes.mT @ self._scaled


class WhiteFilters:
    """Filters whose inputs were made white, mode by mode; their CPD has nearly the least error of the outputs.

    The moments are taken as a Kronecker product over input, height and width. Each mode of the filters is multiplied by
    the root of its factor, all filters are decomposed at once, and the factors are brought back, which keeps the form
    of a CPD.

    Args:
        weight: (O, I, Kh, Kw).
        gram: (I * Kh * Kw, I * Kh * Kw).
    """

    def __init__(self, weight: Tensor, gram: Tensor) -> None:
        _, i, kh, kw = weight.shape
        parts = gram.view(i, kh, kw, i, kh, kw)
        modes = [torch.einsum(terms, parts) for terms in ('ihwjhw->ij', 'ihwigw->hg', 'ihwihv->wv')]
        self._roots = [cholesky(m, 1e-3) / m.diagonal().mean().clamp_min(1e-30).sqrt() for m in modes]
        self._white = torch.einsum('oihw,ij,hg,wv->ojgv', weight, *self._roots)

    def factors(self, rank: int, n_iter: int = 200, restarts: int = 3) -> CPFactors:
        """The CPD of each filter; its ``nmse`` is that of the white filters. Arguments as for ``cp_decompose``."""
        found = cp_decompose(self._white, rank, n_iter=n_iter, restarts=restarts)
        li, lh, lw = self._roots
        a, b, c = (_uncoloured(root, factor) for root, factor in ((lh, found.A), (lw, found.B), (li, found.C)))
        return CPFactors(a, b, c, found.nmse)


def _uncoloured(root: Tensor, factor: Tensor) -> Tensor:
    """Factors (O, n, R) of white filters as those of the filters: the root (n, n) of the mode is divided out."""
    filters, n, rank = factor.shape
    flat = factor.transpose(0, 1).reshape(n, -1)  # one system for all filters
    return torch.linalg.solve_triangular(root.mT, flat, upper=True).view(n, filters, rank).transpose(0, 1).contiguous()


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
    left = [_Left(reader) for reader in readers]
    found = {}
    for keep in sorted(set(keeps), reverse=True):
        while int(alive.sum()) > keep:
            at = (alive & may_go).nonzero().flatten()
            goes = max(1, min(int(alive.sum()) - keep, len(at) // _STEPS))
            errors = torch.stack([part.losses(at) for part in left]).sum(0)
            chosen = at[errors.topk(min(goes, len(at)), largest=False).indices.cpu()]
            for part in left:
                part.remove(chosen)
            alive[chosen] = False
        found[keep] = alive.nonzero().flatten(), [part.whole() for part in left]
    return found


class _Left:
    """What is left of a reader while classes leave: its weight, and the inverse of its moments, without the gone."""

    def __init__(self, reader: Reader) -> None:
        self._shape, self._columns = reader.weight.shape, reader.columns.to(reader.weight.device)
        # of a column of the whole weight among those left
        self._at = torch.arange(reader.weight.shape[1], device=reader.weight.device)
        self._weight, self._inverse = reader.weight.clone(), _inverse(reader.gram)

    def losses(self, classes: Tensor) -> Tensor:
        """Error (C,) that the removal of each class causes, with the others making up for it."""
        columns = self._at[self._columns[classes.to(self._columns.device)]]  # (C, Q)
        part = self._weight[:, columns].permute(1, 2, 0)  # (C, Q, O)
        block = self._inverse[columns[:, :, None], columns[:, None, :]]
        size = block.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        block = block + 1e-9 * size * torch.eye(block.shape[1], dtype=block.dtype, device=block.device)
        return (part * torch.linalg.solve(block, part)).sum((1, 2))

    def remove(self, classes: Tensor) -> None:
        """Remove classes: the others take over, and the inverse becomes that of their moments."""
        gone = self._at[self._columns[classes.to(self._columns.device)].flatten()]
        rest = torch.ones(self._weight.shape[1], dtype=torch.bool, device=gone.device)
        rest[gone] = False
        cross = self._inverse[rest][:, gone]
        gain = torch.linalg.solve(self._inverse[gone][:, gone], cross.mT)  # (gone, rest)
        self._weight = self._weight[:, rest] - self._weight[:, gone] @ gain
        self._inverse = self._inverse[rest][:, rest].addmm_(cross, gain, alpha=-1)
        places = torch.cumsum(rest, 0) - 1
        there = self._at >= 0
        self._at[there] = torch.where(rest, places, -1)[self._at[there]]

    def whole(self) -> Tensor:
        """The weight (O, P), with zeros for what is gone."""
        weight = self._weight.new_zeros(self._shape)
        there = self._at >= 0
        weight[:, there] = self._weight[:, self._at[there]]
        return weight


def _inverse(gram: Tensor) -> Tensor:
    return torch.cholesky_inverse(cholesky(gram.double(), 1e-3)).to(gram.dtype)
