"""The k-means comparison: data as described, representations and inertia against NumPy, the order of each rule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from norton_timm.studies.clustering import (
    INERTIAS,
    LEVELS,
    compare_clusterings,
    draw_filters,
    inertia,
    kmeans,
    representation,
)

RESULTS = Path(__file__).resolve().parents[1] / 'results'


@pytest.mark.parametrize('level', LEVELS)
def test_data_have_the_described_shape_and_variance(level: str) -> None:
    data = draw_filters(level, torch.Generator().manual_seed(0))
    assert data.filters.shape == (505, 64, 3, 3)
    assert torch.bincount(data.labels).tolist() == [101] * 5
    (c_low, c_high), (s_low, s_high) = LEVELS[level]
    noise = data.filters[5:].reshape(5, 100, -1) - data.filters[:5].reshape(5, 1, -1)
    assert s_low * 0.97 < noise.var() < s_high * 1.03
    assert c_low * 0.97 < data.filters[:5].max() ** 2 < c_high
    assert torch.equal(data.filters, draw_filters(level, torch.Generator().manual_seed(0)).filters)


def test_matrix_representation_is_the_leading_singular_pair() -> None:
    filters = torch.randn(4, 8, 3, 3, dtype=torch.float64)
    u, v = representation(filters, 'matrix')
    for k, w in enumerate(filters.numpy()):
        left, _, right = np.linalg.svd(w.transpose(1, 0, 2).reshape(3, -1), full_matrices=False)
        assert abs(left[:, 0] @ u[k].numpy()) == pytest.approx(1)
        assert abs(right[0] @ v[k].numpy()) == pytest.approx(1)


@pytest.mark.parametrize('method', ['tensor', 'matrix'])
def test_well_separated_clusters_are_found(method: str) -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, 3, 3, generator=g, dtype=torch.float64)
    centres = torch.stack([torch.einsum('i,h,w->ihw', c[:, 0, 0], c[0, :, 0], c[0, 0]) for c in centres])
    labels = torch.arange(3).repeat(20)
    filters = centres[labels] + 0.01 * centres.std() * torch.randn(60, 8, 3, 3, generator=g, dtype=torch.float64)
    found = kmeans(filters, method, 3, g)
    assert set(found) == set(INERTIAS)
    assert all(adjusted_rand_score(labels, own) == 1 for own in found.values())


def test_inertia_against_numpy() -> None:
    g = torch.Generator().manual_seed(0)
    differences, labels = torch.randn(30, 4, 3, 3, generator=g), torch.randint(5, (30,), generator=g)
    labels[labels == 2] = 3  # a cluster without filters
    blocks = [differences.numpy()[labels.numpy() == k] for k in range(5)]
    assert inertia(differences, labels, 'code') == pytest.approx(sum(np.sqrt((b**2).sum()) for b in blocks), rel=1e-5)
    each = [np.linalg.norm(d) for b in blocks for d in b]
    assert inertia(differences, labels, 'text') == pytest.approx(sum(each), rel=1e-5)


def test_the_rule_of_the_code_prefers_merged_clusters() -> None:
    """Two clusters as they were drawn, against one with all filters but one: only `text` prefers the first."""
    g = torch.Generator().manual_seed(0)
    filters = torch.randn(40, 2, 3, 3, generator=g, dtype=torch.float64)
    filters[20:] += 0.5
    drawn, merged = torch.arange(2).repeat_interleave(20), torch.zeros(40, dtype=torch.long)
    merged[0] = 1

    def least(rule: str, labels: torch.Tensor) -> float:
        means = torch.stack([filters[labels == k].mean(0) for k in (0, 1)])
        return inertia(filters - means[labels], labels, rule)

    assert least('text', drawn) < least('text', merged)
    assert least('code', drawn) > least('code', merged)


def test_rules_pick_among_the_same_starts() -> None:
    filters = draw_filters('hard', torch.Generator().manual_seed(1), satellites=30).filters

    def labels(*inertias: str) -> dict[str, torch.Tensor]:
        return kmeans(filters, 'matrix', 5, torch.Generator().manual_seed(1), starts=10, inertias=inertias)

    both = labels('text', 'code')
    assert not torch.equal(both['text'], both['code'])
    for rule, own in both.items():
        assert torch.equal(labels(rule)[rule], own)


@pytest.mark.parametrize('level', LEVELS)
def test_the_order_of_each_rule(level: str) -> None:
    scores = compare_clusterings(level, datasets=3, seed=0, starts=30, satellites=40)
    assert scores['text']['matrix'] >= scores['text']['tensor']
    assert scores['code']['tensor'] > scores['code']['matrix'] + 0.1


def test_the_measured_figures_have_the_order_of_each_rule() -> None:
    measured = json.loads((RESULTS / 'cluster_filters.json').read_text())
    assert set(measured['ari']) == set(LEVELS)
    for scores in measured['ari'].values():
        assert scores['text']['matrix'] >= scores['text']['tensor']
        assert scores['code']['tensor'] > scores['code']['matrix']


def test_comparison_is_reproducible() -> None:
    one, two = (compare_clusterings('normal', 2, seed=3, starts=3, satellites=20) for _ in range(2))
    assert one == two and set(one) == set(INERTIAS)
    assert all(set(scores) == {'tensor', 'matrix'} for scores in one.values())
    assert all(0.2 < score <= 1 for scores in one.values() for score in scores.values())


def test_tool(tool, tmp_path: Path) -> None:
    out = tmp_path / 'ari.json'
    done = tool('cluster_filters.py', '--levels', 'normal', '--datasets', 1, '--starts', 2, '--output', out)
    assert done.code == 0, done.err
    found = json.loads(out.read_text())
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ['level', 'inertia', 'tensor', 'matrix']
    for line, rule in zip(lines[1:], ('text', 'code'), strict=True):
        scores = found['ari']['normal'][rule]
        assert line == ['normal', rule, f'{scores["tensor"]:.3f}', f'{scores["matrix"]:.3f}']
    assert list(tmp_path.iterdir()) == [out]


def test_tool_with_one_rule(tool) -> None:
    arguments = ['--levels', 'hard', '--datasets', 1, '--starts', 2]
    both, one = tool('cluster_filters.py', *arguments), tool('cluster_filters.py', *arguments, '--inertia', 'code')
    assert both.code == one.code == 0, one.err
    first, text, code = both.out.splitlines()
    assert text.split()[1] == 'text' and one.out.splitlines() == [first, code]


@pytest.mark.parametrize(
    'wrong',
    [
        ['--levels', 'easy'],
        ['--inertia', 'mean'],
        ['--datasets', '0'],
        ['--output', '/nowhere/x.json'],
    ],
)
def test_tool_refuses_bad_arguments(wrong: list[str], tool) -> None:
    code, _, err = tool('cluster_filters.py', *wrong)
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_bad_names() -> None:
    with pytest.raises(ValueError, match=r'level.*normal, moderate, hard'):
        draw_filters('easy', torch.Generator())
    with pytest.raises(ValueError, match=r'method.*tensor, matrix'):
        representation(torch.ones(1, 2, 3, 3), 'vector')
    with pytest.raises(ValueError, match=r"inertia: got 'mean', expected one of text, code"):
        inertia(torch.ones(1, 2, 3, 3), torch.zeros(1, dtype=torch.long), 'mean')
