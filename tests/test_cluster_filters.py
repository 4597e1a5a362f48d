"""The k-means comparison: data as described, representations against NumPy, the tool end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from norton_timm.studies.clustering import LEVELS, compare_clusterings, draw_filters, kmeans, representation


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
    assert adjusted_rand_score(labels, kmeans(filters, method, 3, g)) == 1


def test_comparison_is_reproducible() -> None:
    one, two = (compare_clusterings('normal', 2, seed=3, starts=3, satellites=20) for _ in range(2))
    assert one == two and set(one) == {'tensor', 'matrix'}
    assert all(0.2 < score <= 1 for score in one.values())


def test_tool(tool, tmp_path: Path) -> None:
    out = tmp_path / 'ari.json'
    done = tool('cluster_filters.py', '--levels', 'normal', '--datasets', 1, '--starts', 2, '--output', out)
    assert done.code == 0, done.err
    found = json.loads(out.read_text())
    assert f'{found["ari"]["normal"]["tensor"]:.3f}' in done.out
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize('wrong', [['--levels', 'easy'], ['--datasets', '0'], ['--output', '/nowhere/x.json']])
def test_tool_refuses_bad_arguments(wrong: list[str], tool) -> None:
    code, _, err = tool('cluster_filters.py', *wrong)
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_bad_names() -> None:
    with pytest.raises(ValueError, match=r'level.*normal, moderate, hard'):
        draw_filters('easy', torch.Generator())
    with pytest.raises(ValueError, match=r'method.*tensor, matrix'):
        representation(torch.ones(1, 2, 3, 3), 'vector')
