"""Batched HOSVD and HOOI against NumPy and TensorLy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import tucker as tensorly_tucker

from norton_timm.tensors.hosvd import hosvd, tucker, tucker_reconstruct


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', [(5, 12, 3, 3), (4, 3, 7, 7), (4, 6, 1, 5), (3, 1, 3, 3), (3, 8, 1, 1), (3, 4, 5, 3)])
def test_factors_are_left_singular_vectors_of_the_unfoldings(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(*shape, dtype=dtype)
    found = hosvd(weight, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for k, w in enumerate(weight.double().numpy()):
        for factor, mode in ((found.C, 0), (found.A, 1), (found.B, 2)):
            u = np.linalg.svd(tensorly.unfold(w, mode))[0][:, : factor.shape[2]]
            overlap = np.abs(u.T @ factor[k].double().numpy())
            np.testing.assert_allclose(overlap, np.eye(factor.shape[2]), atol=tolerance)


def test_full_rank_is_exact_and_signs_are_fixed() -> None:
    weight = torch.randn(6, 12, 3, 3, dtype=torch.float64)
    found = hosvd(weight, 12)
    torch.testing.assert_close(tucker_reconstruct(found), weight)
    flipped = hosvd(-weight, 12)
    for x, y in zip(found[:3], flipped[:3]):
        torch.testing.assert_close(x, y)
        assert (x.gather(1, x.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(found.core, -flipped.core)


def test_hooi_lowers_the_error_to_tensorlys() -> None:
    weight = torch.randn(4, 10, 3, 3, dtype=torch.float64)
    ranks = (2, 2, 3)

    def errors(n_iter: int) -> torch.Tensor:
        rest = weight - tucker_reconstruct(tucker(weight, ranks, n_iter))
        return rest.square().sum((1, 2, 3)) / weight.square().sum((1, 2, 3))

    runs = [errors(n) for n in (0, 1, 3, 10, 100)]
    assert all((after <= before + 1e-12).all() for before, after in pairwise(runs))
    for w, ours in zip(weight.numpy(), runs[-1]):
        core, factors = tensorly_tucker(w, rank=[3, 2, 2], init='svd', n_iter_max=300, tol=1e-12)
        theirs = ((w - tensorly.tucker_to_tensor((core, factors))) ** 2).sum() / (w**2).sum()
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_degenerate_filters() -> None:
    weight = torch.randn(5, 6, 3, 3)
    weight[1] = 0
    weight[2] = 1e-30
    weight[3] *= 1e30
    found = hosvd(weight, 3)
    assert all(torch.isfinite(f).all() for f in found)
    assert not found.A[1].any() and not found.core[1].any()
    assert found.C[2].norm(dim=0).tolist() == pytest.approx([1, 0, 0])  # a constant filter has mode rank one
    torch.testing.assert_close(hosvd(weight.to(memory_format=torch.channels_last), 3).C, found.C)


@pytest.mark.parametrize('rank', [0, 2.0, True, (1, 2), (1, 1, 0)])
def test_bad_rank(rank) -> None:
    with pytest.raises(ValueError, match='rank'):
        hosvd(torch.ones(2, 3, 3, 3), rank)


def test_bad_weight() -> None:
    with pytest.raises(ValueError, match='weight'):
        hosvd(torch.ones(2, 3, 3))
    bad = torch.ones(3, 2, 3, 3)
    bad[1, 0, 0, 0] = float('nan')
    with pytest.raises(ValueError, match='filter 1'):
        hosvd(bad)
