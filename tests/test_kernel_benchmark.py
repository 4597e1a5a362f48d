"""The kernel benchmark on small inputs, and its tool's arguments and output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from norton_timm import CPDConv2d
from norton_timm.studies import kernels
from norton_timm.studies.steps import RankMajorCPD, with_authors_block


def test_resnet50_has_sixteen_3x3_layers() -> None:
    weights = kernels.resnet50_weights(0)
    assert len(weights) == 16
    assert sorted({w.shape[0] for w in weights}) == [64, 128, 256, 512]


def test_sampled_loop_is_extrapolated_and_compared_on_the_same_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(8, 6, 3, 3), torch.randn(4, 8, 3, 3)]
    seen = []
    monkeypatch.setattr('tensorly.decomposition.parafac', _spy(seen))
    (row,) = kernels.benchmark_cpd([2], 2, 0, weights)
    assert seen == [weights[0][0].tolist(), weights[0][4].tolist(), weights[1][0].tolist(), weights[1][2].tolist()]
    assert row['speedup'] == pytest.approx(row['parafac_s'] / row['ours_s'])
    assert 0 < row['ours_nmse'] <= row['parafac_nmse'] * 1.01


def _spy(seen: list):
    from tensorly.decomposition import parafac

    def call(tensor, *args, **kwargs):
        seen.append(tensor.tolist())
        return parafac(tensor, *args, **kwargs)

    return call


def test_memory_is_the_own_process_s() -> None:
    kept = torch.ones(100_000_000)  # 400 MB that a process started from here does not have
    own = kernels._peak_mb()
    (row,) = kernels.benchmark_pabs([8], 4)
    assert len(kept) and row['peak_mb'] < own - 100
    assert row['added_mb'] >= 0 and row['ours_s'] > 0


def test_goals_judge_both_ways() -> None:
    row = {'rank': 1, 'speedup': 99.0, 'ours_nmse': 0.5, 'parafac_nmse': 0.6}
    met = {what: ok for what, _, _, ok in kernels.goals({'cpd': [row], 'r078': [{'ours_s': 1.9}]})}
    assert list(met.values()) == [False, True, True]


def test_authors_block_computes_what_our_layer_does() -> None:
    layer = CPDConv2d(6, 8, (3, 5), 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    model = torch.nn.Sequential(layer, torch.nn.ReLU()).double()
    block = with_authors_block(model)
    x = torch.randn(2, 6, 11, 13, dtype=torch.float64)
    torch.testing.assert_close(block(x), model(x))
    assert isinstance(block[0], RankMajorCPD) and model[0] is layer
    # component r of filter o is row r * O + o
    torch.testing.assert_close(block[0].pointwise.view(3, 8, 6)[2, 5], layer.factors().C[5, :, 2])
    with pytest.raises(ValueError, match='groups'):
        RankMajorCPD(CPDConv2d(6, 8, 3, 1, groups=2))


def test_training_goals_name_both_baselines() -> None:
    row = {'model': 'norton_resnet56_cifar.r071', 'precision': 'float32', 'dense_over_uncompressed': 1.0}
    row |= {'authors_block_over_dense': 3.1, 'factored_over_dense': 1.5}
    met = {what: ok for what, _, _, ok in kernels.goals({'training': [row]})}
    assert list(met.values()) == [True, True, False]
    assert [('authors' in what, 'own' in what) for what in list(met)[1:]] == [(True, False), (False, True)]


def test_tool_writes_what_it_prints(tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, 'resnet50_weights', lambda seed: [torch.randn(4, 6, 3, 3)])
    out = tmp_path / 'kernels.json'
    done = tool('benchmark.py', 'kernels', '--only', 'cpd', '--ranks', 1, 2, '--sample', 1, '--output', out)
    assert done.code == 0, done.err
    content = json.loads(out.read_text())
    assert [row['rank'] for row in content['cpd']] == [1, 2] and len(content['goals']) == 4
    assert f'{content["cpd"][0]["ours_nmse"]:.4g}' in done.out
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    'wrong',
    [[], ['kernel'], ['kernels', '--only', 'x'], ['kernels', '--sample', '0'], ['kernels', '--output', '/no/x.json']],
)
def test_tool_refuses_bad_arguments(wrong: list[str], tool) -> None:
    code, _, err = tool('benchmark.py', *wrong)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
