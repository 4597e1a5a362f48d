"""Tuning without labels, agreement with the dense network, and the whole way from images to a small network."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import timm
import torch
from test_choices import network, pictures
from torch import nn

from norton_timm import CompressionSpec
from norton_timm.compression import compress
from norton_timm.models.dense import dense_model
from norton_timm.training.data import ArrayData, Preprocessing
from norton_timm.training.features import balance, classifier_of, read_by, shared_maps
from norton_timm.training.label_free import LabelFreeConfig, agreement, scores, tune_without_labels
from norton_timm.training.shrink import lower_resolution, shrink, sizes_for
from norton_timm.training.sources import read_archive

shrink_module = importlib.import_module('norton_timm.training.shrink')  # the room has a function of this name


@pytest.fixture(scope='module')
def photographs(data_dir) -> dict[str, torch.Tensor]:
    """Normalised CIFAR-10 images: 256 to tune on, 128 held out, 512 to test on."""
    archive = data_dir / 'cifar10-jpeg.tar.xz'
    if not archive.is_file():
        pytest.skip(f'{archive} is missing')
    wanted = Preprocessing((32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    data = ArrayData(*read_archive(archive), wanted, torch.device('cpu'))
    train = torch.cat([x for x, _ in data.calibration_batches(384)])
    return {'tune': train[:256], 'held': train[256:], 'test': next(data.test_batches(512))[0]}


@pytest.fixture(scope='module')
def pair(data_dir) -> tuple[nn.Module, nn.Module]:
    """A trained network, and one that was compressed without repair."""
    weights = data_dir / 'resnet20_cifar10.th'
    if not weights.is_file():
        pytest.skip(f'{weights} is missing')
    dense = dense_model('resnet20_cifar', checkpoint=weights).eval()
    small, _ = compress(dense, CompressionSpec(rank=0, low_rank={'layer*conv*': 0.7}), pictures(1))
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


def test_tuning_brings_the_network_nearer_and_leaves_the_statistics(pair: tuple, photographs: dict) -> None:
    dense, small = copy.deepcopy(pair)
    balanced = copy.deepcopy(small)
    assert balance(balanced, pictures(1))
    images, held, test = (photographs[k] for k in ('tune', 'held', 'test'))
    config = LabelFreeConfig(batch_size=32)
    tuned = tune_without_labels(small, dense, images, held, steps=30, config=config)
    assert tuned.steps == 30 and tuned.best > 0
    assert tuned.after.divergence < tuned.before.divergence
    assert len(tuned.history) >= 8 and tuned.history[0][0] == 0
    start = copy.deepcopy(pair[1])
    wanted = scores(dense, test)
    assert agreement(scores(small, test), wanted).divergence < 0.8 * agreement(scores(start, test), wanted).divergence
    for name, value in small.state_dict().items():
        if 'running' in name:
            assert torch.equal(value, balanced.state_dict()[name])


@pytest.mark.parametrize('name', ['resnet20_cifar', 'mobilenetv2_cifar', 'vgg16_bn_cifar'])
def test_scales_move_from_norms_to_weights_and_the_outputs_stay(name: str) -> None:
    model, images = network(name), pictures(8, 3)
    small, _ = compress(model, CompressionSpec(rank=1, rates=0.3), pictures(1))
    for one in (model, small):
        wanted = scores(one, images)
        assert balance(one, images[:1])
        torch.testing.assert_close(scores(one, images), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        norms = [m for m in one.modules() if isinstance(m, nn.BatchNorm2d)]
        assert sum(bool((m.weight == 1).all()) for m in norms) > len(norms) / 3


def test_weights_that_are_used_twice_keep_their_scale() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(self.bn(self.conv(x)), self.conv.weight).mean((2, 3))

    torch.manual_seed(0)
    model = Tied().eval()
    model.bn.running_var.fill_(0.01)
    before = copy.deepcopy(model.state_dict())
    assert not balance(model, pictures(1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_maps_of_blocks_are_shared_where_their_width_is_kept() -> None:
    model = timm.create_model('resnet20_cifar').eval()
    small, _ = compress(model, CompressionSpec(method='coring', rates={'layer1.0.conv1': 0.5}), pictures(1))
    names = shared_maps(small, model, pictures(1))
    assert {'layer1', 'layer1.0', 'layer2.2', 'layer3'} <= set(names)
    narrow, _ = compress(model, CompressionSpec(method='coring', rates={'layer2.0.conv2': 0.5}), pictures(1))
    left = shared_maps(narrow, model, pictures(1))
    assert 'layer1.0' in left and not any(name.startswith('layer2') for name in left)


def test_features_are_what_the_classifier_reads() -> None:
    model, images = timm.create_model('resnet20_cifar').eval(), pictures(2)
    assert classifier_of(model, images) == 'fc'
    with read_by(model, 'fc') as found, torch.no_grad():
        out = model(images)
        torch.testing.assert_close(model.fc(found[0]), out)

    class Scaled(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert classifier_of(Scaled(model), images) is None
    with read_by(Scaled(model), None) as found, torch.no_grad():
        Scaled(model)(images)


@pytest.mark.parametrize('wide', [True, False], ids=['features', 'scores'])
def test_tuning_for_smaller_images(wide: bool, pair: tuple, photographs: dict) -> None:
    dense, _ = pair
    small = copy.deepcopy(dense)
    if not wide:  # the features of another width cannot be compared
        small, _ = compress(dense, CompressionSpec(method='coring', rates={'layer3*': 0.1}, protect=()), pictures(1))
    images, held = photographs['tune'], photographs['held']
    tuned = tune_without_labels(small, dense, images, held, steps=24, size=(24, 24))
    assert tuned.best > 0 and tuned.after.divergence < tuned.before.divergence


def test_a_start_that_is_best_is_kept(pair: tuple) -> None:
    dense, small = copy.deepcopy(pair)
    before = scores(small, pictures(16, 5))
    tuned = tune_without_labels(
        small, dense, pictures(32), pictures(32, 1), steps=4, config=LabelFreeConfig(lr=0.5, batch_size=8)
    )
    assert tuned.best == 0 and tuned.after == tuned.before
    torch.testing.assert_close(scores(small, pictures(16, 5)), before, rtol=1e-3, atol=1e-3)


def test_stopped_and_started_again_it_ends_alike(pair: tuple, tmp_path) -> None:
    images, held, file = pictures(48, 2), pictures(16, 3), tmp_path / 'tuning.pt'
    config = LabelFreeConfig(lr=1e-3, batch_size=16)
    dense, whole = copy.deepcopy(pair)
    tune_without_labels(whole, dense, images, held, steps=16, config=config)
    dense, parts = copy.deepcopy(pair)
    look, original = [], torch.optim.Adam.step

    def stop(self, *args, **kwargs):
        look.append(0)
        if len(look) == 11:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    torch.optim.Adam.step = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            tune_without_labels(parts, dense, images, held, steps=16, config=config, checkpoint=file)
    finally:
        torch.optim.Adam.step = original
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


def test_smaller_images_are_one_of_the_choices() -> None:
    dense = network()
    assert sizes_for(dense, pictures(1), {'macs': 0.5}) == [(24, 24), (28, 28), (32, 32)]
    result = shrink(dense, pictures(96, 5), {'macs': 0.56}, steps=2, latency=True, allow_resolution=True)
    assert result.rows[1].macs / result.rows[0].macs == pytest.approx(0.56, rel=0.02)
    assert result.size in [(24, 24), (28, 28), (32, 32)] and result.rows[1].size == result.size[1]
    assert result.model.pretrained_cfg['input_size'] == (3, *result.size)
    assert all(row.ms > 0 for row in result.rows)
    with pytest.raises(ValueError, match='allow_resolution: got a budget of params, expected macs'):
        shrink(dense, pictures(16), {'params': 0.5}, allow_resolution=True)


@pytest.mark.parametrize(('good', 'side'), [(True, 28), (False, 24)])
def test_the_size_that_diverges_least_is_taken(good: bool, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 24 of 32 pixels a network has 0.5625 of its MACs, and stays as it is."""
    dense, real, tried = network(), shrink_module._compressed, []

    def compressed(model: nn.Module, image: torch.Tensor, *rest: Any) -> Any:
        tried.append(image.shape[-1])
        if image.shape[-1] == 24:
            return real(model, image, *rest)
        copied = copy.deepcopy(model)
        if image.shape[-1] == 32 or not good:
            copied.get_classifier().weight.data.neg_()
        return shrink_module._Try(copied, CompressionSpec(rank=0), None, image)

    monkeypatch.setattr(shrink_module, '_compressed', compressed)
    result = shrink(dense, pictures(40), {'macs': 0.57}, allow_resolution=True, latency=False)
    assert result.size == (side, side) and tried == ([24, 28, 32] if good else [24, 28])


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
