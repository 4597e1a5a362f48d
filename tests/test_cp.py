"""Batched CPD against TensorLy, closed forms and Eckart-Young bounds."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac
from torch import Tensor

from norton_timm.tensors import cp_solvers
from norton_timm.tensors.cp import CPFactors, cp_decompose, cp_reconstruct
from norton_timm.tensors.cp_iterations import als, compress_input_mode


def low_rank(
    filters: int, i: int, kh: int, kw: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(filters, n, rank, generator=g, dtype=dtype) for n in (kh, kw, i))
    return torch.einsum('ohr,owr,oir->oihw', a, b, c)


def true_nmse(weight: Tensor, factors: CPFactors) -> Tensor:
    """Slow reference: filter by filter with TensorLy, in float64."""
    errors = []
    for k, w in enumerate(weight.double()):
        modes = [f[k].double().numpy() for f in (factors.C, factors.A, factors.B)]
        rest = w.numpy() - tensorly.cp_to_tensor((None, modes))
        errors.append((rest**2).sum() / max((w.numpy() ** 2).sum(), 1e-300))
    return torch.tensor(errors)


@pytest.mark.parametrize(
    'shape',
    [(6, 16, 3, 3), (5, 3, 7, 7), (4, 8, 1, 5), (4, 8, 5, 1), (3, 1, 3, 3), (4, 32, 1, 1), (4, 2, 3, 5), (4, 2, 5, 3)],
)
@pytest.mark.parametrize('rank', [1, 2, 4])
def test_shapes_and_nmse_match_the_reference(shape: tuple[int, ...], rank: int) -> None:
    weight = torch.randn(*shape, dtype=torch.float64)
    factors = cp_decompose(weight, rank)
    o, i, kh, kw = shape
    assert factors.A.shape == (o, kh, rank) and factors.B.shape == (o, kw, rank) and factors.C.shape == (o, i, rank)
    torch.testing.assert_close(factors.nmse, true_nmse(weight, factors), rtol=1e-8, atol=1e-20)
    error = (weight - cp_reconstruct(factors)).square().sum((1, 2, 3)) / weight.square().sum((1, 2, 3))
    torch.testing.assert_close(factors.nmse, error, rtol=1e-8, atol=1e-20)


@pytest.mark.parametrize('rank', [1, 2, 4, 8])
def test_mean_nmse_is_no_higher_than_tensorlys_on_trained_filters(data_dir, rank: int) -> None:
    state = torch.load(data_dir / 'resnet56_cifar10.th', map_location='cpu', weights_only=False)['state_dict']
    weight = state['module.layer2.4.conv1.weight'].double()
    theirs = []
    for w in weight.numpy():
        cp = parafac(w, rank, n_iter_max=300, init='random', random_state=0)
        theirs.append(((w - tensorly.cp_to_tensor(cp)) ** 2).sum() / (w**2).sum())
    assert cp_decompose(weight, rank).nmse.mean() <= (sum(theirs) / len(theirs)) * (
        1 + 1e-6
    )  # local optima this close are luck


def test_random_filters_reach_what_tensorly_reaches_from_many_starts() -> None:
    weight = torch.randn(3, 24, 3, 3, dtype=torch.float64)
    for rank in (1, 2, 3):
        ours = cp_decompose(weight, rank, restarts=8, tol=1e-7, n_iter=1000).nmse
        for w, error in zip(weight.numpy(), ours):
            runs = [parafac(w, rank, n_iter_max=300, init='random', random_state=s) for s in range(6)]
            best = min(((w - tensorly.cp_to_tensor(cp)) ** 2).sum() / (w**2).sum() for cp in runs)
            assert error <= best * (1 + 1e-4)


@pytest.mark.parametrize('rank', range(1, 10))
def test_error_is_at_least_the_eckart_young_bound_and_reaches_it_where_that_is_possible(rank: int) -> None:
    weight = torch.randn(16, 20, 3, 3, dtype=torch.float64)
    nmse = cp_decompose(weight, rank).nmse
    energy = torch.linalg.svdvals(weight.flatten(2)).square()
    bound = energy[:, rank:].sum(1) / energy.sum(1)
    assert (nmse >= bound - 1e-12).all()
    if rank >= 7:
        torch.testing.assert_close(nmse, bound, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize('shape', [(6, 30, 3, 3), (4, 40, 3, 5), (4, 40, 5, 3), (2, 60, 5, 5)])
def test_high_ranks_are_optimal_for_other_kernels(shape: tuple[int, ...]) -> None:
    weight = torch.randn(*shape, dtype=torch.float64)
    rank = shape[2] * shape[3] - max(shape[2:]) + 1
    energy = torch.linalg.svdvals(weight.flatten(2)).square()
    torch.testing.assert_close(
        cp_decompose(weight, rank).nmse, energy[:, rank:].sum(1) / energy.sum(1), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize('rank', range(1, 9))
def test_exact_low_rank_filters_are_recovered(rank: int) -> None:
    weight = low_rank(24, 32, 3, 3, rank, seed=rank)
    assert cp_decompose(weight, rank).nmse.max() < 1e-10
    assert cp_decompose(weight.float(), rank).nmse.max() < 1e-9


@pytest.mark.parametrize('rank', [2, 3, 5, 8, 9, 12])
def test_rank_above_the_true_one_stays_exact(rank: int) -> None:
    assert cp_decompose(low_rank(12, 16, 3, 3, 2), rank).nmse.max() < 1e-10


def test_recovered_components_are_the_true_ones() -> None:
    g = torch.Generator().manual_seed(0)
    c = torch.randn(5, 12, 2, generator=g, dtype=torch.float64)
    a, b = (torch.randn(5, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    found = cp_decompose(torch.einsum('ohr,owr,oir->oihw', a, b, c), 2)
    unit = [torch.nn.functional.normalize(f, dim=1) for f in (c, found.C)]
    overlap = (unit[0].mT @ unit[1]).abs()  # a permutation matrix if the components agree
    torch.testing.assert_close(overlap.amax(1), torch.ones(5, 2, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def kinds_of_filters(data_dir, rank: int) -> Tensor:
    """Random, trained, of decaying spectrum, of low rank with and without noise, and with nearly collinear factors."""
    random = torch.randn(5, 16, 3, 3, dtype=torch.float64)
    state = torch.load(data_dir / 'resnet56_cifar10.th', map_location='cpu', weights_only=False)['state_dict']
    u, s, vh = torch.linalg.svd(random.flatten(2), full_matrices=False)
    decaying = (u * torch.logspace(0, -2, 9, dtype=s.dtype) @ vh).reshape(random.shape)
    low = low_rank(5, 16, 3, 3, rank)
    g = torch.Generator().manual_seed(rank)
    a, b = (torch.randn(5, 3, 1, generator=g).double() + 1e-3 * torch.randn(5, 3, rank, generator=g) for _ in range(2))
    collinear = torch.einsum('ohr,owr,oir->oihw', a, b, torch.randn(5, 16, rank, generator=g).double())
    scaled = random * torch.logspace(0, -8, 16, dtype=torch.float64)[:, None, None]
    trained = state['module.layer1.3.conv2.weight'][:5].double()
    return torch.cat(
        [random, trained, decaying, low, low + 1e-3 * random, collinear, collinear + 1e-5 * random, scaled]
    )


@pytest.mark.parametrize('rank', range(1, 9))
def test_error_never_rises_with_iterations(data_dir, rank: int) -> None:
    weight = kinds_of_filters(data_dir, rank)
    bounds = (0, 1, 5, 10, 11, 24, 25, 26, 30, 45, 60, 100, 119, 120, 121, 130, 199, 200, 201, 400)
    runs = [cp_decompose(weight, rank, n_iter=n).nmse for n in bounds]
    assert all((after <= before + 1e-12).all() for before, after in pairwise(runs))
    if rank < 7:  # above, the closed form needs no iterations
        assert (runs[-1] < 0.99 * runs[0]).any()


@pytest.mark.parametrize('rank', [1, 2, 5])
def test_als_itself_never_raises_the_error(data_dir, rank: int) -> None:
    core = compress_input_mode(kinds_of_filters(data_dir, rank).flatten(2), 3, 3).flatten(2)
    core = core / core.square().sum((1, 2), keepdim=True).sqrt()
    start = torch.nn.functional.normalize(torch.randn(2, len(core), 3, rank, dtype=torch.float64), dim=2)
    errors = [als(core, *start, n, 0.0)[2] for n in (0, 1, 2, 3, 5, 8, 12, 20, 30, 45, 70, 110, 200)]
    assert all((after <= before + 1e-12).all() for before, after in pairwise(errors))


@pytest.mark.parametrize('true_rank', [2, 3, 5])
def test_error_never_rises_with_rank(data_dir, true_rank: int) -> None:
    for weight in (kinds_of_filters(data_dir, true_rank), torch.randn(8, 3, 5, 5, dtype=torch.float64)):
        runs = [cp_decompose(weight, r).nmse for r in range(1, 10)]
        assert all((after <= before + 1e-12).all() for before, after in pairwise(runs))


def test_a_component_that_is_not_needed_has_unit_columns_and_no_weight(monkeypatch) -> None:
    # were ALS and Newton's method to find nothing at rank 2, the rank-1 solution would stand
    weight = torch.randn(4, 12, 3, 3, dtype=torch.float64)
    search = cp_solvers._search

    def hopeless(x, a, b, *args):
        found = search(x, a, b, *args)
        return found if a.shape[2] == 1 else (a * 0 + a[:, :, :1], b * 0 + b[:, :, :1], found[2] * 0 + 1)

    monkeypatch.setattr(cp_solvers, '_search', hopeless)
    two, one = cp_decompose(weight, 2), cp_decompose(weight, 1)
    torch.testing.assert_close(two.nmse, one.nmse)
    assert not two.C[:, :, 1].any()
    for factor in (two.A, two.B):
        torch.testing.assert_close(factor[:, :, 1].norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_same_seed_same_result_and_restarts_help() -> None:
    weight = torch.randn(32, 16, 3, 3, dtype=torch.float64)
    one, two = (cp_decompose(weight, 3, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, two))
    assert all(torch.equal(x, y) for x, y in zip(cp_decompose(weight, 3), cp_decompose(weight, 3)))
    other = cp_decompose(weight, 3, generator=torch.Generator().manual_seed(8))
    assert not torch.equal(one.A, other.A)
    assert one.nmse.mean() < cp_decompose(weight, 3, restarts=0).nmse.mean()


@pytest.mark.parametrize('scale', [1e20, 1e-20, 1e-38])
@pytest.mark.parametrize('rank', [1, 3, 8, 9])
def test_huge_and_tiny_filters_in_float32(scale: float, rank: int) -> None:
    weight = torch.randn(4, 12, 3, 3)
    plain, scaled = cp_decompose(weight, rank), cp_decompose(weight * scale, rank)
    assert all(torch.isfinite(f).all() for f in scaled)
    torch.testing.assert_close(scaled.nmse, plain.nmse, rtol=1e-3, atol=1e-8)
    rest = (weight.double() * scale - cp_reconstruct(CPFactors(*(f.double() for f in scaled)))).flatten(1)
    error = (rest.norm(dim=1) / (weight.double() * scale).flatten(1).norm(dim=1)) ** 2
    torch.testing.assert_close(error, scaled.nmse.double(), rtol=1e-3, atol=1e-8)


def test_zero_constant_and_rank_deficient_filters() -> None:
    weight = torch.randn(6, 8, 3, 3)
    weight[1] = 0
    weight[2] = 0.3
    weight[3, :, 0] = 0  # a zero kernel row
    weight[4, 1:] = 0  # one input channel only
    for rank in (1, 2, 4, 7, 8, 9):
        factors = cp_decompose(weight, rank)
        assert all(torch.isfinite(f).all() for f in factors)
        assert factors.nmse[1] == 0 and not factors.C[1].any()
        assert factors.A[1].any() and factors.B[1].any()  # so that fine-tuning can revive the filter
        assert factors.nmse[2] < 1e-10
        assert torch.equal(cp_reconstruct(factors)[1], torch.zeros(8, 3, 3))
        if rank >= 6:
            assert factors.nmse[3] < 1e-10
        if rank >= 3:
            assert factors.nmse[4] < 1e-10


def test_matrices_are_solved_by_the_svd() -> None:
    weight = torch.randn(5, 12, 1, 5, dtype=torch.float64)
    s = torch.linalg.svdvals(weight[:, :, 0]).square()
    torch.testing.assert_close(cp_decompose(weight, 2).nmse, s[:, 2:].sum(1) / s.sum(1))
    torch.testing.assert_close(cp_decompose(weight.mT, 2).nmse, s[:, 2:].sum(1) / s.sum(1))
    depthwise = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    s = torch.linalg.svdvals(depthwise[:, 0]).square()
    torch.testing.assert_close(cp_decompose(depthwise, 1).nmse, s[:, 1:].sum(1) / s.sum(1))
    pointwise = torch.randn(5, 12, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(cp_reconstruct(cp_decompose(pointwise, 1)), pointwise)


def test_norms_are_balanced_and_layout_does_not_matter() -> None:
    weight = torch.randn(6, 8, 3, 3)
    factors = cp_decompose(weight, 2)
    for other in (factors.B, factors.C):
        torch.testing.assert_close(factors.A.norm(dim=1), other.norm(dim=1))
    for view in (weight.to(memory_format=torch.channels_last), weight.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(cp_decompose(view, 2).A, factors.A)
    assert cp_decompose(weight.requires_grad_(), 2).A.requires_grad is False


def test_half_precision_weights() -> None:
    weight = torch.randn(4, 8, 3, 3).to(torch.bfloat16)
    factors = cp_decompose(weight, 2)
    assert factors.A.dtype == torch.bfloat16
    assert factors.nmse.mean() < cp_decompose(weight.float(), 2).nmse.mean() * 1.1


def test_chunks_do_not_change_the_result(monkeypatch) -> None:
    weight = torch.randn(9, 8, 3, 3, dtype=torch.float64)
    whole = cp_decompose(weight, 2)
    monkeypatch.setattr('norton_timm.tensors.cp._CHUNK', 2 * 8 * 9)
    for x, y in zip(whole, cp_decompose(weight, 2)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'rank': 0}, 'rank'),
        ({'rank': 1.5}, 'rank'),
        ({'rank': True}, 'rank'),
        ({'n_iter': -1}, 'n_iter'),
        ({'restarts': -1}, 'restarts'),
        ({'tol': 1.0}, 'tol'),
        ({'weight': torch.ones(2, 3, 3)}, 'weight'),
        ({'weight': torch.ones(2, 3, 3, 3, dtype=torch.int64)}, 'weight'),
        ({'weight': torch.ones(0, 3, 3, 3)}, 'weight'),
        ({'weight': torch.ones(4, 3, 3, 3).index_fill(0, torch.tensor([2]), float('nan'))}, 'filter 2'),
        ({'weight': torch.ones(4, 3, 3, 3).index_fill(0, torch.tensor([3]), float('inf'))}, 'filter 3'),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {'weight': torch.ones(4, 3, 3, 3), 'rank': 1} | change
    with pytest.raises(ValueError, match=message) as error:
        cp_decompose(**arguments)
    assert '\n' not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('rank', [1, 4, 6, 8])
def test_cuda_gives_the_same_error(rank: int) -> None:
    weight = torch.randn(16, 32, 3, 3)
    there = cp_decompose(weight.cuda(), rank, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        there.nmse.cpu(),
        cp_decompose(weight, rank, generator=torch.Generator().manual_seed(0)).nmse,
        rtol=1e-3,
        atol=1e-6,
    )
