"""Repair on images without labels, against exact solutions.

Accuracy on CIFAR-10, a few minutes: ``pytest tests/test_calibrate.py -m slow -s``.
"""

from __future__ import annotations

import copy
import time

import pytest
import torch
from families import build, images, relative_error
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn

from norton_timm import CompressionSpec
from norton_timm.compression import compress
from norton_timm.compression.fitting import refit
from norton_timm.compression.repair import reestimate_batch_norm
from norton_timm.models.dense import dense_model
from norton_timm.training.data import ArrayData, Preprocessing
from norton_timm.training.sources import read_archive


class Chain(nn.Module):
    """Two convolutions in a row; the first makes channel 5 as a multiple of channel 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        with torch.no_grad():
            self.a.weight[5] = 2 * self.a.weight[1]
            self.a.bias[5] = 2 * self.a.bias[1]

    def forward(self, x):
        return self.b(self.a(x))


def test_refit_makes_up_exactly_for_a_channel_that_others_can_stand_in_for():
    dense = Chain().double()
    batches = [torch.randn(8, 3, 10, 10, dtype=torch.float64) for _ in range(4)]
    pruned = copy.deepcopy(dense)
    keep = [0, 1, 2, 3, 4]
    pruned.a = nn.Conv2d(3, 5, 3, padding=1).double()
    pruned.b = nn.Conv2d(5, 4, 3, padding=1).double()
    with torch.no_grad():
        pruned.a.weight.copy_(dense.a.weight[keep])
        pruned.a.bias.copy_(dense.a.bias[keep])
        pruned.b.weight.copy_(dense.b.weight[:, keep])
        pruned.b.bias.copy_(dense.b.bias)
        x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
        before = relative_error(pruned(x), dense(x))
        names = refit(pruned, dense, {'a': torch.tensor(keep)}, batches)
        assert names == ['a', 'b']
        assert before > 0.1 and relative_error(pruned(x)[..., 1:-1, 1:-1], dense(x)[..., 1:-1, 1:-1]) < 0.01


def test_refit_makes_up_for_a_block_that_was_left_out():
    """The last layer before the next sum is fitted to the sum, which holds what the block added."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x)

    dense = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Residual(), Residual())
    batches = [nn.functional.avg_pool2d(torch.randn(16, 3, 14, 14), 3, 1) for _ in range(4)]
    small, report = compress(dense, CompressionSpec(rank=0, drop=('1',)), batches[0][:1], calibration=batches)
    bare, _ = compress(dense, CompressionSpec(rank=0, drop=('1',)), batches[0][:1])
    test = nn.functional.avg_pool2d(torch.randn(16, 3, 14, 14), 3, 1)
    with torch.no_grad():
        left, before = relative_error(small(test), dense(test)), relative_error(bare(test), dense(test))
    assert report.refitted == ['2.conv'] and left < 0.5 * before
    with pytest.raises(ValueError, match="drop: got '0', expected blocks with an identity shortcut, such as 1, 2"):
        compress(dense, CompressionSpec(drop=('0',)), batches[0][:1])


def test_calibration_brings_a_network_nearer_to_the_dense_one():
    model, x = build('resnet20_cifar'), images('resnet20_cifar')
    # images with some structure: neighbours are alike, as in photographs
    batches = [nn.functional.avg_pool2d(torch.randn(32, 3, 36, 36), 5, 1) * 5 for _ in range(2)]
    test = nn.functional.avg_pool2d(torch.randn(32, 3, 36, 36), 5, 1) * 5
    for spec, share in ((CompressionSpec(rank={'*': 2}), 0.8), (CompressionSpec(method='coring', rates=0.3), 1.0)):
        plain, _ = compress(model, spec, x)
        repaired, report = compress(model, spec, x, calibration=[(b, torch.zeros(32)) for b in batches])
        with torch.no_grad():
            expected = model(test)
            assert relative_error(repaired(test), expected) < share * relative_error(plain(test), expected)
        assert [p.shape for p in repaired.parameters()] == [p.shape for p in plain.parameters()]
        assert report.after.params == sum(p.numel() for p in repaired.parameters())


def test_batch_norm_statistics_are_the_averages_over_the_batches():
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.train()
    model[2].eval()
    batches = [torch.randn(8, 3, 5, 5) + 2 for _ in range(3)]
    reestimate_batch_norm(model, batches)
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    var = torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, var)
    assert model[0].momentum == 0.3 and model[0].training and not model[2].training


@pytest.mark.parametrize(
    'options',
    [
        {'rates': 0.5},
        {'rates': {'layer1.*.conv2': 0.25, 'conv1': 0.25}, 'rank': 0},  # as many on both sides of a sum, but others
        {'rates': 0.5, 'drop': ('layer1.1', 'layer3.2')},
        {'rates': 0.3, 'low_rank': {'layer2.*': 0.5}},
    ],
    ids=['half', 'other channels', 'blocks left out', 'low rank'],
)
def test_sums_with_a_shortcut_that_selects_channels(options: dict):
    """The first shortcut of a ResNet for CIFAR passes its input on in the dense network only."""
    torch.manual_seed(0)
    model, x = build('resnet20_cifar'), images('resnet20_cifar')
    batches = [nn.functional.avg_pool2d(torch.randn(32, 3, 36, 36), 5, 1) * 5]
    spec = CompressionSpec(**{'rank': {'*': 2}, **options})
    plain, _ = compress(model, spec, x)
    repaired, _ = compress(model, spec, x, calibration=batches)
    with torch.no_grad():
        assert relative_error(repaired(batches[0]), model(batches[0])) < relative_error(
            plain(batches[0]), model(batches[0])
        )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('criterion', [None, 'output_error'])
def test_networks_of_other_precision(dtype: torch.dtype, criterion: str | None):
    """The sums are held in float32 at least."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1),
    )  # fmt: skip
    x = torch.randn(16, 3, 12, 12)
    spec = CompressionSpec(rank=0, rates=0.25, criterion=criterion, low_rank={'6': 4}, protect=())
    expected, _ = compress(model, spec, x[:1], [x])
    made, _ = compress(model.to(dtype), spec, x[:1].to(dtype), [x.to(dtype)])
    with torch.no_grad():
        assert made(x.to(dtype)).dtype == dtype
        assert relative_error(made(x.to(dtype)).float(), expected(x)) < 0.1


@pytest.mark.parametrize('kind', [StdConv2d, ScaledStdConv2d])
def test_layers_that_change_their_weight_in_each_pass_keep_it(kind: type[nn.Conv2d]):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), kind(8, 8, 3), nn.Conv2d(8, 4, 1)).double()
    x = torch.randn(16, 3, 9, 9, dtype=torch.float64)
    spec = CompressionSpec(rank={'0': 1}, protect=())
    repaired, _ = compress(model, spec, x, [x])
    plain, _ = compress(model, spec, x)
    with torch.no_grad():
        assert torch.equal(repaired[2].weight, model[2].weight)
        assert relative_error(repaired(x), model(x)) < relative_error(plain(x), model(x))


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
@pytest.mark.parametrize('criterion', [None, 'output_error'])
def test_calibration_images_are_finite(number: float, criterion: str | None):
    batch = torch.randn(4, 3, 10, 10)
    batch[1, 0, 3, 3] = number
    with pytest.raises(ValueError, match='calibration: got NaN or infinity as'):
        compress(Chain(), CompressionSpec(rates=0.3, criterion=criterion), batch[:1], [batch])


def test_output_error_needs_images():
    with pytest.raises(ValueError, match=r'calibration=BATCHES\), or --calibration FOLDER'):
        compress(Chain(), CompressionSpec(rates=0.5, criterion='output_error', protect=()), torch.randn(1, 3, 10, 10))


def test_layers_that_read_infinity_are_told():
    class Logarithm(nn.Module):
        def forward(self, x):
            return x.clamp(min=0).log()

    batch = torch.randn(4, 3, 10, 10)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Logarithm(), nn.Conv2d(6, 4, 3))
    with pytest.raises(ValueError, match='a layer reads NaN or infinity'):
        compress(model, CompressionSpec(rates=0.5, protect=()), batch[:1], [batch])


@pytest.mark.parametrize(('batches', 'told'), [([], 'no batch'), ([3], 'got int'), ([torch.zeros(3, 4)], 'expected')])
def test_bad_calibration_data(batches, told):
    with pytest.raises(ValueError, match=told):
        reestimate_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), batches)


@pytest.fixture(scope='module')
def cifar(data_dir) -> ArrayData:
    """The JPEG copies of CIFAR-10, normalised as the network was trained."""
    archive = data_dir / 'cifar10-jpeg.tar.xz'
    if not archive.is_file():
        pytest.skip(f'{archive} is missing')
    wanted = Preprocessing((32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return ArrayData(*read_archive(archive), wanted, torch.device('cpu'))


@torch.no_grad()
def accuracy(model: nn.Module, data: ArrayData) -> float:
    """Per cent of the test images."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.test_batches(250))
    return 100 * right / data.test_size


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(('rank', 'least'), [(1, 45), (2, 78), (3, 85)])
def test_accuracy_without_labels(rank, least, cifar, data_dir):
    """All convolutions of ResNet-56 at one rank, repaired on 512 training images; 89.42 % before compression."""
    weights = data_dir / 'resnet56_cifar10_jpeg.safetensors'
    if not weights.is_file():
        pytest.skip(f'{weights} is missing')
    dense = dense_model('resnet56_cifar', checkpoint=weights)
    began = time.perf_counter()
    model, report = compress(
        dense, CompressionSpec(rank={'*': rank}), images('resnet56_cifar', 1), cifar.calibration_batches(512)
    )
    seconds = time.perf_counter() - began
    found = accuracy(model.eval(), cifar)
    print(f'\nrank {rank}: {found:.2f} %, decomposed and refitted in {seconds:.0f} s')
    assert found >= least and len(report.refitted) == 55
