"""Distances against the papers' formulas written out with NumPy and SciPy; selection against brute force."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from norton_timm.tensors.cp import CPFactors, cp_decompose, cp_reconstruct
from norton_timm.tensors.distances import CRITERIA, SCORES, filter_distance, filter_scores
from norton_timm.tensors.hosvd import HOSVDFactors, hosvd
from norton_timm.tensors.selection import STRATEGIES, select_filters

VALUES = [c for c in CRITERIA if c not in ('pabs', 'csa')]


def snr(x: np.ndarray, y: np.ndarray) -> float:
    return np.var(x - y) / np.var(x)


FORMULAS = {
    'vbd': lambda x, y: np.var(x - y) / (np.var(x) + np.var(y)),
    'snr': lambda x, y: (snr(x, y) + snr(y, x)) / 2,
    'cosine': lambda x, y: 1 - x @ y / (np.linalg.norm(x) * np.linalg.norm(y)),
    'pearson': lambda x, y: 1 - np.corrcoef(x, y)[0, 1],
    'euclidean': lambda x, y: np.linalg.norm(x - y),
    'manhattan': lambda x, y: np.abs(x - y).sum(),
}


def pairwise(items: list, distance) -> np.ndarray:
    out = np.zeros((len(items), len(items)))
    for i, j in itertools.combinations(range(len(items)), 2):
        out[i, j] = out[j, i] = distance(items[i], items[j])
    return out


def check(found: Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert found.dtype == dtype
    assert torch.equal(found, found.T) and not found.diagonal().any()
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('criterion', VALUES)
def test_value_distances_of_raw_filters(criterion: str, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 6, 3, 3, dtype=dtype)
    weight[1] = weight[0] * (1 + 1e-4)
    flat = list(weight.flatten(1).double().numpy())
    check(filter_distance(weight, criterion), pairwise(flat, FORMULAS[criterion]), dtype)


@pytest.mark.parametrize('criterion', VALUES)
def test_cp_factors_are_compared_as_the_filters_they_stand_for(criterion: str) -> None:
    factors = cp_decompose(torch.randn(7, 6, 3, 3, dtype=torch.float64), 2)
    flat = list(cp_reconstruct(factors).flatten(1).numpy())
    check(filter_distance(factors, criterion), pairwise(flat, FORMULAS[criterion]), torch.float64)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('criterion', VALUES)
def test_hosvd_factors_are_compared_mode_by_mode_with_free_signs(criterion: str, dtype: torch.dtype) -> None:
    factors = hosvd(torch.randn(7, 6, 3, 3, dtype=dtype), 1)

    def reference(x: list[np.ndarray], y: list[np.ndarray]) -> float:
        return np.mean([min(FORMULAS[criterion](u, v), FORMULAS[criterion](u, -v)) for u, v in zip(x, y)])

    items = [[f[k, :, 0].double().numpy() for f in factors[:3]] for k in range(7)]
    check(filter_distance(factors, criterion), pairwise(items, reference), dtype)
    flipped = HOSVDFactors(-factors.A, factors.B, factors.C, factors.core)
    torch.testing.assert_close(filter_distance(flipped, criterion), filter_distance(factors, criterion))


def pabs(x: list[np.ndarray], y: list[np.ndarray], weights: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)) -> float:
    return sum(w * subspace_angles(u, v)[0] for w, u, v in zip(weights, x, y))


def csa(x: list[np.ndarray], y: list[np.ndarray]) -> float:
    return float(np.mean([math.sin(subspace_angles(u, v)[0]) ** 2 for u, v in zip(x, y)]))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('rank', [1, 2, 3, 4])
def test_pabs_and_csa_against_scipy(rank: int, dtype: torch.dtype) -> None:
    factors = cp_decompose(torch.randn(8, 10, 3, 5, dtype=dtype), rank)
    items = [[f[k].double().numpy() for f in factors[:3]] for k in range(8)]
    check(filter_distance(factors, 'pabs'), pairwise(items, pabs), dtype)
    check(filter_distance(factors, 'csa'), pairwise(items, csa), dtype)
    weights = {'alpha': 0.5, 'beta': 0.2, 'gamma': 0.3}
    expected = pairwise(items, lambda x, y: pabs(x, y, (0.5, 0.2, 0.3)))
    check(filter_distance(factors, 'pabs', **weights), expected, dtype)


def test_pabs_of_hosvd_factors_and_raw_filters() -> None:
    weight = torch.randn(6, 8, 3, 3, dtype=torch.float64)
    factors = hosvd(weight, 2)
    items = [[f[k].numpy() for f in factors[:3]] for k in range(6)]
    check(filter_distance(factors, 'pabs'), pairwise(items, pabs), torch.float64)
    lines = [w.reshape(-1, 1) for w in weight.numpy()]
    check(filter_distance(weight, 'pabs'), pairwise(lines, lambda u, v: subspace_angles(u, v)[0]), torch.float64)


@pytest.mark.parametrize('rank', [1, 2, 3])
@pytest.mark.parametrize('angle', [1e-3, 1e-5, 1e-7, 1e-9])
def test_pabs_resolves_tiny_angles(angle: float, rank: int) -> None:
    basis = torch.linalg.qr(torch.randn(30, rank + 1, dtype=torch.float64))[0]
    c = basis[:, :rank].clone()
    turned = c.clone()
    turned[:, 0] = math.cos(angle) * c[:, 0] + math.sin(angle) * basis[:, rank]
    same = torch.randn(3, rank, dtype=torch.float64).expand(2, -1, -1)
    factors = CPFactors(same, same, torch.stack([c, turned]), torch.zeros(2))
    assert filter_distance(factors, 'pabs', alpha=0, beta=0, gamma=1)[0, 1].item() == pytest.approx(angle, rel=1e-5)
    assert filter_distance(factors, 'pabs')[0, 1].item() == pytest.approx(angle / 3, rel=1e-5, abs=1e-15)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('rank', [1, 2, 3])
def test_pabs_ignores_order_and_scale_of_components(rank: int, dtype: torch.dtype) -> None:
    f = cp_decompose(torch.randn(5, 12, 3, 3, dtype=dtype), rank)
    order = torch.randperm(rank)
    s, t = 0.5 + torch.rand(5, 1, rank, dtype=dtype), -0.5 - torch.rand(5, 1, rank, dtype=dtype)
    other = CPFactors(*(x[:, :, order] for x in (f.A * s, f.B * t, f.C / (s * t))), f.nmse)
    both = CPFactors(*(torch.cat(pair) for pair in zip(f, other)))
    distance = filter_distance(both, 'pabs')
    assert distance.diagonal(5).abs().max() < 1e-6  # a filter and itself, rewritten
    torch.testing.assert_close(distance[:5, 5:].triu(1), distance[:5, :5].triu(1), rtol=1e-4, atol=1e-6)


def test_rank_deficient_and_zero_factors() -> None:
    weight = torch.randn(5, 8, 3, 3, dtype=torch.float64)
    weight[1] = weight[3] = 0
    f = cp_decompose(weight, 2)
    doubled = f.C[4, :, :1].expand(-1, 2).clone()
    f.C[4] = doubled  # collinear components span a line
    d = filter_distance(f, 'pabs')
    assert torch.isfinite(d).all()
    assert d[1, 3] == 0
    assert d[0, 1].item() == pytest.approx(math.pi / 2)
    line = subspace_angles(f.C[4, :, :1].numpy(), f.C[0].numpy())
    assert filter_distance(f, 'pabs', alpha=0, beta=0, gamma=1)[0, 4].item() == pytest.approx(line[0], abs=1e-10)


@pytest.mark.parametrize('criterion', CRITERIA)
def test_zero_and_constant_filters_have_finite_distances(criterion: str) -> None:
    weight = torch.randn(7, 4, 3, 3)
    weight[0] = weight[1] = 0
    weight[2] = weight[3] = 0.7
    for factors in (weight, cp_decompose(weight, 1), hosvd(weight, 1), hosvd(weight, 2)):
        d = filter_distance(factors, criterion)
        assert torch.isfinite(d).all() and (d >= 0).all()
        assert d[0, 1] == 0
        assert d[2, 3] < 1e-6
    assert torch.isfinite(filter_distance(torch.randn(4, 8, 1, 1), criterion)).all()
    scaled = filter_distance(weight * 1e-25, criterion)
    plain = filter_distance(weight, criterion) * (1e-25 if criterion in ('euclidean', 'manhattan') else 1)
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-6)


def test_chunks_do_not_change_distances(monkeypatch) -> None:
    factors = cp_decompose(torch.randn(21, 8, 3, 3, dtype=torch.float64), 2)
    whole = {c: filter_distance(factors, c) for c in CRITERIA}
    for module in ('principal_angles', 'distances'):
        monkeypatch.setattr(f'norton_timm.tensors.{module}._CHUNK', 300)
    for criterion, expected in whole.items():
        torch.testing.assert_close(filter_distance(factors, criterion), expected, rtol=1e-10, atol=1e-12)


def test_near_duplicates_keep_their_digits() -> None:
    weight = torch.randn(2, 16, 3, 3, dtype=torch.float64) + 100
    weight[1] = weight[0] + 1e-9 * torch.randn(16, 3, 3, dtype=torch.float64)
    x, y = weight.flatten(1).numpy()
    for criterion in ('euclidean', 'manhattan', 'vbd', 'snr'):
        expected = FORMULAS[criterion](x, y)
        assert filter_distance(weight, criterion)[0, 1].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'criterion': 'pab'}, "criterion.*'pab'.*pabs, csa"),
        ({'alpha': 0.5}, 'alpha, beta, gamma'),
        ({'alpha': -1.0, 'beta': 1.0, 'gamma': 1.0}, 'alpha, beta, gamma'),
        ({'factors': torch.tensor([[1.0], [float('nan')]])}, 'filter 1'),
        ({'factors': torch.ones(3)}, 'weight'),
    ],
)
def test_bad_distance_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        filter_distance(**({'factors': torch.ones(2, 3), 'criterion': 'pabs'} | arguments))
    assert '\n' not in str(error.value)


# ------------------------------------------------------------------------------------------------------- selection


def algorithm_1(distance: np.ndarray, keep: int) -> list[int]:
    """The paper's listing, word for word."""
    left = list(range(len(distance)))
    while len(left) > keep:
        i, j = min(((a, b) for a in left for b in left if a < b), key=lambda p: (distance[p], p))
        sum_i = math.fsum(distance[i, k] for k in left if k != i)
        sum_j = math.fsum(distance[j, k] for k in left if k != j)
        left.remove(i if sum_i < sum_j else j)
    return left


def random_distance(g: np.random.Generator, ties: bool) -> np.ndarray:
    n = int(g.integers(2, 24))
    d = g.integers(0, 6, (n, n)) * 0.1 if ties else g.random((n, n))
    d = np.triu(d, 1)
    return d + d.T


@pytest.mark.parametrize('ties', [False, True])
def test_min_sum_is_algorithm_1(ties: bool) -> None:
    g = np.random.default_rng(0)
    for _ in range(200):
        d = random_distance(g, ties)
        keep = int(g.integers(1, len(d) + 1))
        assert select_filters(torch.from_numpy(d), keep).tolist() == algorithm_1(d, keep)


@pytest.mark.parametrize('ties', [False, True])
def test_other_strategies_against_brute_force(ties: bool) -> None:
    g = np.random.default_rng(1)
    for _ in range(50):
        d = random_distance(g, ties)
        n, keep = len(d), int(g.integers(1, len(d) + 1))
        sums = [math.fsum(row) for row in d]
        expected = sorted(sorted(range(n), key=lambda k: (-sums[k], k))[:keep])
        assert select_filters(torch.from_numpy(d), keep, 'sum').tolist() == expected
        left = list(range(n))
        while len(left) > keep:
            i, j = min(((a, b) for a in left for b in left if a < b), key=lambda p: (d[p], p))
            rest = [k for k in left if k not in (i, j)]
            key_i, key_j = (
                ((min(d[x, k] for k in rest), math.fsum(d[x, k] for k in left)) for x in (i, j)) if rest else (0, 0)
            )
            left.remove(i if key_i < key_j else j)
        assert select_filters(torch.from_numpy(d), keep, 'min_min').tolist() == left
        removed = [(set(algorithm_1(d, k + 1)) - set(algorithm_1(d, k))).pop() for k in range(n - 1, 0, -1)]
        importance = [*removed, n - 1]
        expected = sorted(sorted(range(n), key=lambda k: (importance[k], k))[n - keep :])
        assert select_filters(torch.from_numpy(d), keep, 'authors').tolist() == expected


@pytest.mark.parametrize('strategy', ['min_sum', 'min_min'])
def test_planted_near_duplicates_are_removed(strategy: str) -> None:
    weight = torch.randn(40, 32, 3, 3)
    pairs = [(3, 17), (8, 30), (21, 22), (0, 39)]
    for i, j in pairs:
        weight[j] = 2.5 * weight[i] + 1e-3 * torch.randn(32, 3, 3)
    kept = set(select_filters(filter_distance(cp_decompose(weight, 1), 'pabs'), 36, strategy).tolist())
    assert all((i in kept) != (j in kept) for i, j in pairs)


def test_selection_is_quick_even_when_one_filter_is_everybodys_neighbour() -> None:
    points = torch.randn(2048, 2, dtype=torch.float64)
    points[0] = 0
    hub = torch.cdist(points, points)
    hub[0], hub[:, 0] = hub[0] * 1e-3, hub[:, 0] * 1e-3
    seconds = []
    for distances in (torch.cdist(points, points), hub):
        start = time.perf_counter()
        kept = select_filters(distances, 512)
        seconds.append(time.perf_counter() - start)
        assert len(kept) == 512 and (kept.diff() > 0).all()
    assert seconds[1] < 20 * seconds[0]


def test_coupled_selection_weighs_layers_equally() -> None:
    g = np.random.default_rng(2)
    layers = []
    for scale in (1.0, 1e6):
        d = np.triu(g.random((12, 12)), 1) * scale
        layers.append(torch.from_numpy(d + d.T))
    together = select_filters(layers, 5)
    mean = sum(d / d.mean() for d in layers) / 2
    assert together.tolist() == algorithm_1(mean.numpy(), 5)
    assert torch.equal(select_filters([layers[0], layers[1] * 1e-9], 5), together)
    assert torch.equal(select_filters([layers[0]], 5), select_filters(layers[0], 5))


def test_scores() -> None:
    weight = torch.randn(10, 4, 3, 3, dtype=torch.float64)
    flat = weight.flatten(1)
    torch.testing.assert_close(filter_scores(weight, 'l1'), flat.abs().sum(1))
    torch.testing.assert_close(filter_scores(weight, 'l2'), flat.norm(dim=1))
    torch.testing.assert_close(filter_scores(weight, 'geometric_median'), torch.cdist(flat, flat).sum(1))
    one, two = (filter_scores(weight, 'random', torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (10,)
    assert set(SCORES) == {'l1', 'l2', 'geometric_median', 'random'}


@pytest.mark.parametrize(
    ('distance', 'keep', 'strategy', 'message'),
    [
        (torch.zeros(3, 3), 0, 'min_sum', 'keep'),
        (torch.zeros(3, 3), 4, 'min_sum', 'keep'),
        (torch.zeros(3, 3), 1.5, 'min_sum', 'keep'),
        (torch.zeros(3, 3), 1, 'max', "strategy.*'max'.*min_sum, min_min, sum"),
        (torch.zeros(3, 2), 1, 'min_sum', 'distance'),
        (torch.tensor([[0.0, float('nan')], [float('nan'), 0.0]]), 1, 'min_sum', 'finite'),
        (torch.tensor([[0.0, 1.0], [2.0, 0.0]]), 1, 'min_sum', 'symmetric'),
        ([], 1, 'min_sum', 'distance'),
        ([torch.zeros(3, 3), torch.zeros(2, 2)], 1, 'min_sum', 'one size'),
    ],
)
def test_bad_selection_arguments(distance, keep, strategy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        select_filters(distance, keep, strategy)
    assert '\n' not in str(error.value)


def test_bad_scores() -> None:
    with pytest.raises(ValueError, match='criterion'):
        filter_scores(torch.ones(2, 3), 'l3')
    assert STRATEGIES == ('min_sum', 'min_min', 'sum', 'authors')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('criterion', CRITERIA)
def test_cuda_gives_the_same_distances(criterion: str) -> None:
    factors = cp_decompose(torch.randn(16, 8, 3, 3), 2)
    there = CPFactors(*(f.cuda() for f in factors))
    torch.testing.assert_close(filter_distance(there, criterion).cpu(), filter_distance(factors, criterion))
