"""deploy.py and fold.py: equal outputs over families, who may be folded, the choice of forms."""

from __future__ import annotations

import copy
import importlib
import json
import math
import pickle

import pytest
import timm
import torch
from fake_clock import FakeClock
from families import FAMILIES, build, images, relative_error
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import nn
from torch.nn.utils import prune
from torchvision.ops.misc import FrozenBatchNorm2d

import norton_timm
from detection import build_detector
from detection.rcnn import exportable
from norton_timm.inference.deploy import relative_difference
from norton_timm.inference.export_check import compare_outputs
from norton_timm.inference.fold import FOLDED_NORMS, fold_batch_norm
from norton_timm.inference.forms import FIXED_FORMS
from norton_timm.layers.cpd_conv import CPDConv2d, set_form

SPEC = norton_timm.CompressionSpec(rank=2, rates=0.25)


def norms(model: nn.Module) -> int:
    return sum(type(m) in FOLDED_NORMS for m in model.modules())


def matter(norm: nn.Module) -> nn.Module:
    """Statistics and affine parameters that change something."""
    for tensor, low, high in (
        (norm.running_mean, -1, 1), (norm.running_var, 0.5, 2), (norm.weight, 0.5, 2), (norm.bias, -1, 1),
    ):  # fmt: skip
        if tensor is not None:
            nn.init.uniform_(tensor, low, high)
    return norm.eval()


@pytest.fixture(scope='module')
def compressed() -> nn.Module:
    """ResNet-20 with every kind of thing to deploy: CPD layers of rank 2, channel maps, batch norms that matter."""
    model = build('resnet20_cifar')
    return norton_timm.compress(model, SPEC, images('resnet20_cifar'))[0].eval()


@torch.no_grad()
@pytest.mark.parametrize('name', FAMILIES)
def test_families_keep_their_outputs(name):
    """Slow ones: pytest tests/test_deploy.py -m slow."""
    model, x = build(name), images(name)
    small, _ = norton_timm.compress(model, SPEC, x)
    deployed = norton_timm.deploy(small, x, autotune=False)
    report = norton_timm.deployment_report(deployed)
    assert relative_error(deployed(x), small.eval()(x)) < 1e-4
    assert report.error < 1e-4
    assert len(report.folded) + len(report.norms_left) == norms(small)
    assert not any(isinstance(m, CPDConv2d) for m in deployed.modules())


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2_100', 'resnet20_cifar', 'inception_v3'])
def test_a_network_with_norms_after_convolutions_loses_them_all(name):
    model, x = build(name), images(name)
    folded = fold_batch_norm(model, x)
    assert folded and norms(model) == 0
    assert all('conv' in layer or 'downsample' in layer for layer in folded.values())


def test_pre_activation_norms_stay():
    model, x = build('densenet40_cifar'), images('densenet40_cifar')
    before = norms(model)
    assert fold_batch_norm(model, x) == {} and norms(model) == before


@torch.no_grad()
@pytest.mark.parametrize(
    'norm', [nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), FrozenBatchNorm2d(8, eps=1e-3), BatchNormAct2d(8),
             freeze_batch_norm_2d(BatchNormAct2d(8, act_layer=nn.Hardswish))],
    ids=['plain', 'no affine', 'frozen', 'with ReLU', 'frozen with Hardswish'],
)  # fmt: skip
@pytest.mark.parametrize(
    'layer',
    [nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.ConvTranspose2d(4, 8, 2), CPDConv2d(4, 8, 3, 2),
     CPDConv2d(4, 8, (3, 5), 1, bias=False, groups=2)],
    ids=['bias', 'grouped', 'transposed', 'CPD', 'grouped CPD'],
)  # fmt: skip
def test_every_norm_into_every_layer(layer, norm):
    model = nn.Sequential(copy.deepcopy(layer), matter(copy.deepcopy(norm))).eval()
    x = torch.randn(2, 4, 9, 9)
    expected = model(x)
    assert fold_batch_norm(model, x) == {'1': '0'}
    torch.testing.assert_close(model(x), expected)


class Shared(nn.Module):
    """A convolution and a norm; the way they are joined is the test's."""

    def __init__(self, join) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(4, 4, 1), matter(nn.BatchNorm2d(4)), matter(nn.BatchNorm2d(4))
        self.join = join

    def forward(self, x):
        return self.join(self, x)


def read_twice(m, x):
    y = m.conv(x)
    return m.norm(y) + y


def returned_too(m, x):
    y = m.conv(x)
    return m.norm(y), y


def activated_between(m, x):
    return m.norm(m.conv(x).relu())


def changed_in_place(m, x):
    y = m.conv(x)
    y.relu_()
    return m.norm(y)


def two_norms(m, x):
    y = m.conv(x)
    return m.norm(y) + m.other(y)


def norm_of_two(m, x):
    return m.norm(m.conv(x)) + m.norm(x)


@torch.no_grad()
@pytest.mark.parametrize(
    'join', [read_twice, returned_too, activated_between, changed_in_place, two_norms, norm_of_two]
)
def test_a_norm_that_is_not_alone_is_left(join):
    model, x = Shared(join).eval(), torch.randn(1, 4, 5, 5)
    expected = model(x)
    assert fold_batch_norm(model, x) == {}
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_a_pair_that_is_called_twice_is_folded():
    model, x = Shared(lambda m, x: m.norm(m.conv(m.norm(m.conv(x))))).eval(), torch.randn(1, 4, 5, 5)
    expected = model(x)
    assert fold_batch_norm(model, x) == {'norm': 'conv'}
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_autotune_takes_the_fastest_candidate(compressed):
    x = images('resnet20_cifar')
    before = {k: v.clone() for k, v in compressed.state_dict().items()}
    deployed = norton_timm.deploy(compressed, x)
    report = norton_timm.deployment_report(deployed)
    assert relative_error(deployed(x), compressed(x)) < 1e-4
    assert report.network_ms[report.chosen] == min(report.network_ms.values())
    assert {'dense, channels_last', 'dense, contiguous'} <= set(report.network_ms)
    # the mixture is left out where it is one of the fixed forms
    assert set(FIXED_FORMS) <= set(report.form_ms) <= {*FIXED_FORMS, 'mixed'}
    names = [n for n, m in compressed.named_modules() if isinstance(m, CPDConv2d)]
    assert list(report.forms) == names and list(report.layer_ms) == names
    for ms in report.layer_ms.values():
        assert set(ms) == set(FIXED_FORMS) and min(ms.values()) > 0
    for name, form in report.forms.items():
        convs = [m for m in deployed.get_submodule(name).modules() if isinstance(m, nn.Conv2d)]
        assert len(convs) == {'factored': 3, 'merged': 2, 'separable': 4, 'dense': 1}[form]
    if report.chosen.startswith('mixed'):
        assert report.forms == {n: min(ms, key=ms.get) for n, ms in report.layer_ms.items()}
    assert json.loads(report.to_json())['forms'] == report.forms
    assert report.chosen in str(report) and names[0] in str(report)
    # the original is as it was, and a copy carries the report
    assert all(torch.equal(v, before[k]) for k, v in compressed.state_dict().items())
    assert not hasattr(compressed, 'deployment') and norms(compressed)
    again = pickle.loads(pickle.dumps(deployed))
    assert torch.equal(again(x), deployed(x)) and norton_timm.deployment_report(again).forms == report.forms


@pytest.fixture
def slow_convolutions(monkeypatch):
    """A function that lets each convolution take the seconds that it is told to; all else takes none."""
    clock = FakeClock().install(monkeypatch, 'norton_timm.inference.deploy', 'norton_timm.profiling.timing')
    # fused convolutions would not take part; the package has a function of the module's name
    monkeypatch.setattr(importlib.import_module('norton_timm.inference.deploy'), 'onednn_available', lambda: False)
    forward = nn.Conv2d.forward

    def let(seconds):
        def slow(self, x):
            clock.sleep(seconds(self))
            return forward(self, x)

        monkeypatch.setattr(nn.Conv2d, 'forward', slow)

    return let


def test_a_slow_form_is_not_taken(slow_convolutions):
    """The clock decides, not a rule: a form that takes long loses, whatever its MACs."""
    model = nn.Sequential(CPDConv2d(8, 8, 3, 1), nn.ReLU(), CPDConv2d(8, 8, 3, 1)).eval()
    x = torch.randn(1, 8, 16, 16)
    for slow in ('dense', 'merged'):

        def seconds(conv, slow=slow):
            return 0.05 if (slow == 'dense') == (conv.groups == 1 and conv.kernel_size == (3, 3)) else 0.01

        slow_convolutions(seconds)
        report = norton_timm.deployment_report(norton_timm.deploy(model, x))
        assert all((form == 'dense') == (slow == 'merged') for form in report.forms.values())
        assert 'separable' not in report.form_ms  # the same as merged at rank 1


@torch.no_grad()
def test_layers_called_several_times_count_as_their_sum(slow_convolutions):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = CPDConv2d(4, 4, 3, 1, padding=1)

        def forward(self, x):
            return self.layer(self.layer(x))

    slow_convolutions(lambda conv: 0.01)
    report = norton_timm.deployment_report(norton_timm.deploy(Twice().eval(), torch.randn(1, 4, 8, 8)))
    expected = {'factored': 60, 'merged': 40, 'dense': 20}  # of three, two and one convolutions, called twice
    assert report.layer_ms['layer'] == pytest.approx(expected)
    assert report.forms == {'layer': 'dense'}


@torch.no_grad()
def test_without_autotune_layers_keep_their_form(compressed):
    x = images('resnet20_cifar')
    for form in ('factored', 'merged', 'dense'):
        report = norton_timm.deployment_report(norton_timm.deploy(set_form(copy.deepcopy(compressed), form), x, False))
        assert set(report.forms.values()) == {form} and report.layer_ms == {} and report.chosen == ''


@torch.no_grad()
def test_one_form_for_all_layers(compressed):
    x = images('resnet20_cifar')
    for form in FIXED_FORMS:
        deployed = norton_timm.deploy(compressed, x, autotune=False, form=form)
        assert set(norton_timm.deployment_report(deployed).forms.values()) == {form}
        assert relative_error(deployed(x), compressed(x)) < 1e-4
    for options in ({'form': 'merged'}, {'form': 'auto', 'autotune': False}):
        with pytest.raises(ValueError, match='expected one of factored, merged, separable, dense with autotune=False'):
            norton_timm.deploy(compressed, x, **options)


@torch.no_grad()
def test_weights_that_hooks_compute_are_left_alone():
    class Pruned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.utils.spectral_norm(nn.Conv2d(3, 6, 3)), matter(nn.BatchNorm2d(6))
            self.b, self.last = nn.Conv2d(6, 6, 1), matter(nn.BatchNorm2d(6))
            prune.l1_unstructured(self.b, 'weight', 0.3)

        def forward(self, x):
            return self.last(self.b(self.norm(self.a(x)).relu()))

    model, x = Pruned().eval(), torch.randn(2, 3, 9, 9)
    model(x)
    deployed = norton_timm.deploy(model, x, channel_multiple=8)
    report = norton_timm.deployment_report(deployed)
    assert report.folded == {} and report.widened == {} and len(report.norms_left) == 2
    for _ in range(2):
        torch.testing.assert_close(deployed(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_result_can_be_exported_and_compiled(compressed):
    x = images('resnet20_cifar')
    deployed = norton_timm.deploy(compressed, x, autotune=False)
    exported = torch.export.export(deployed, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},)).module()
    more = torch.cat([x, x, x])
    torch.testing.assert_close(exported(more), deployed(more), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(deployed, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), deployed(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('task', ['box', 'keypoint'])
def test_whole_detectors_keep_their_detections(task):
    options = {'num_classes': 2, 'min_size': 96, 'keypoint_layers': (32,), 'box_detections_per_img': 20}
    model = build_detector(task, 'norton_resnet18.r050', **options).eval()
    for module in model.modules():
        if type(module) in FOLDED_NORMS:
            matter(module)
    x = [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(1))]
    deployed = norton_timm.deploy(model, x, autotune=False)
    report = norton_timm.deployment_report(deployed)
    assert norms(model) and not report.norms_left and report.forms
    agreement = compare_outputs(exportable(model), exportable(deployed), [x[0][None]], exportable(model).agreement())
    assert agreement.detections == 20 and agreement.problem() is None


def test_relative_difference_by_hand():
    assert relative_difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == 0.25
    assert relative_difference([{'a': torch.ones(2)}], [{'a': torch.ones(3)}]) is None
    assert relative_difference([torch.ones(0)], [torch.ones(0)]) == 0
    assert relative_difference('nothing', 'nothing') is None
    assert relative_difference([torch.ones(1), torch.tensor([math.nan])], [torch.ones(1), torch.ones(1)]) == math.inf


def test_bad_input_is_said():
    model = timm.create_model('resnet20_cifar')
    with pytest.raises(ValueError, match='without a tensor'):
        norton_timm.deploy(model, 224)
    with pytest.raises(ValueError, match=r'meta.*cpu'):
        norton_timm.deploy(model, torch.zeros(1, 3, 32, 32, device='meta'))
    with pytest.raises(ValueError, match='deploy'):
        norton_timm.deployment_report(model)
