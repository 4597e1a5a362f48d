"""Tuning without labels, agreement with the dense network, and the whole way from images to a small network."""

from __future__ import annotations

import copy

import pytest
import torch
from test_choices import network, pictures
from torch import nn

from norton_timm import CompressionSpec
from norton_timm.compression import compress
from norton_timm.training.label_free import LabelFreeConfig, agreement, scores, tune_without_labels
from norton_timm.training.shrink import lower_resolution, shrink


@pytest.fixture(scope='module')
def pair() -> tuple[nn.Module, nn.Module]:
    """A dense network, and one that was compressed without repair."""
    dense = network()
    small, _ = compress(dense, CompressionSpec(rank=0, low_rank={'layer*conv*': 0.4}), pictures(1))
    return dense, small


def test_agreement_counts_first_classes_and_what_their_change_costs() -> None:
    wanted = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0], [1.0, 0.9, 0.0]])
    found = wanted.clone()
    found[0] = torch.tensor([0.0, 5.0, 0.0])  # a sure class is lost
    found[3] = torch.tensor([0.9, 1.0, 0.0])  # an unsure one
    told = agreement(found, wanted)
    p = wanted.softmax(1)
    assert told.top1 == 0.5 and told.images == 4
    assert told.expected_loss == pytest.approx(float((p[0, 0] - p[0, 1] + p[3, 0] - p[3, 1]) / 4))
    assert told.interval[0] < told.expected_loss < told.interval[1]
    same = agreement(wanted, wanted)
    assert same.top1 == 1 and same.divergence == pytest.approx(0, abs=1e-6) and same.expected_loss == 0


def test_the_expected_loss_covers_the_real_one_where_the_truth_is_drawn_from_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(40):
        wanted = 2 * torch.randn(200, 10, generator=generator)
        found = wanted + torch.randn(200, 10, generator=generator)
        truth = torch.multinomial(wanted.softmax(1), 1, generator=generator).flatten()
        real = float((wanted.argmax(1) == truth).double().mean() - (found.argmax(1) == truth).double().mean())
        low, high = agreement(found, wanted).interval
        covered += low <= real <= high
    assert covered >= 36


def test_tuning_brings_the_network_nearer_and_leaves_the_statistics(pair: tuple) -> None:
    dense, small = copy.deepcopy(pair)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    images, held, test = pictures(128, 2), pictures(64, 3), pictures(256, 4)
    config = LabelFreeConfig(lr=3e-4, batch_size=32, scale=0.9)
    tuned = tune_without_labels(small, dense, images, held, steps=30, config=config)
    assert tuned.steps == 30 and tuned.best > 0
    assert tuned.after.expected_loss < tuned.before.expected_loss
    assert len(tuned.history) >= 8 and tuned.history[0][0] == 0
    start = copy.deepcopy(pair[1])
    wanted = scores(dense, test)
    assert agreement(scores(small, test), wanted).divergence < agreement(scores(start, test), wanted).divergence
    for name, value in small.state_dict().items():
        if 'running' in name:
            assert torch.equal(value, before[name])


def test_a_start_that_is_best_is_kept(pair: tuple) -> None:
    dense, small = copy.deepcopy(pair)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    tuned = tune_without_labels(
        small, dense, pictures(32), pictures(32, 1), steps=4, config=LabelFreeConfig(lr=0.02, batch_size=8)
    )
    assert tuned.best == 0 and tuned.after == tuned.before
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_stopped_and_started_again_it_ends_alike(pair: tuple, tmp_path) -> None:
    images, held, file = pictures(48, 2), pictures(16, 3), tmp_path / 'tuning.pt'
    config = LabelFreeConfig(lr=1e-3, batch_size=16)
    dense, whole = copy.deepcopy(pair)
    tune_without_labels(whole, dense, images, held, steps=16, config=config)
    dense, parts = copy.deepcopy(pair)
    look, original = [], torch.optim.AdamW.step

    def stop(self, *args, **kwargs):
        look.append(0)
        if len(look) == 11:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    torch.optim.AdamW.step = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            tune_without_labels(parts, dense, images, held, steps=16, config=config, checkpoint=file)
    finally:
        torch.optim.AdamW.step = original
    dense, parts = copy.deepcopy(pair)
    tuned = tune_without_labels(parts, dense, images, held, steps=16, config=config, checkpoint=file)
    assert tuned.steps == 16
    for a, b in zip(parts.state_dict().values(), whole.state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match='of another tuning'):
        tune_without_labels(parts, dense, images, held, steps=16, config=config, checkpoint=file, seed=1)
    file.write_bytes(b'damaged')
    with pytest.raises(ValueError, match=r'tuning\.pt'):
        tune_without_labels(parts, dense, images, held, steps=16, config=config, checkpoint=file)


@pytest.mark.parametrize('limits', [{}, {'minutes': 1.0, 'steps': 3}])
def test_one_limit_is_given(pair: tuple, limits: dict) -> None:
    with pytest.raises(ValueError, match='minutes and steps'):
        tune_without_labels(pair[1], pair[0], pictures(8), pictures(8), **limits)


def test_from_images_to_a_measured_small_network() -> None:
    dense = network()
    kept = copy.deepcopy(dense.state_dict())
    result = shrink(dense, pictures(96, 5), {'macs': 0.5}, steps=4, latency=False)
    names = [row.name for row in result.rows]
    assert names == ['dense', 'compressed', 'compressed and tuned', 'dense, lower resolution']
    dense_row, small_row, _, lower_row = result.rows
    assert small_row.macs / dense_row.macs == pytest.approx(0.5, rel=0.011)
    assert lower_row.size == 24 and lower_row.macs / dense_row.macs == pytest.approx((24 / 32) ** 2, rel=0.01)
    assert all(row.agreement.images == 19 for row in result.rows[1:])
    text = str(result)
    assert 'expected loss' in text and 'dense, lower resolution' in text
    assert result.to_dict()['rows'][1]['agreement']['images'] == 19
    assert all(torch.equal(v, kept[k]) for k, v in dense.state_dict().items())
    loses = [row.agreement.expected_loss for row in result.rows[2:]]
    assert any('lower' in told or 'pixels' in told for told in result.warnings) == (loses[1] < loses[0])


def test_few_images_are_told_and_too_few_refused() -> None:
    dense = network()
    result = shrink(dense, pictures(20), {'macs': 0.8}, latency=False)
    assert any('20 images are few' in told for told in result.warnings)
    with pytest.raises(ValueError, match='got 3 images, expected at least 8'):
        shrink(dense, pictures(3), {'macs': 0.8})


@pytest.mark.parametrize(
    ('size', 'share', 'expected'),
    [
        ((224, 224), 0.73, (192, 192)),
        ((224, 224), 0.5, (160, 160)),
        ((224, 224), 0.99, None),
        ((32, 64), 0.5, (24, 48)),
    ],
)
def test_the_resolution_of_equal_macs(size: tuple, share: float, expected: tuple | None) -> None:
    assert lower_resolution(size, share) == expected
