"""Networks as people write them: what cannot be followed is left alone, and what is followed is followed right."""

from __future__ import annotations

import types
from collections import UserDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import norton_timm
from norton_timm import CompressionSpec, compress
from norton_timm.inference import deploy

CORING = CompressionSpec(method='coring', rates=0.4, protect=())
NORTON = CompressionSpec(rank=2, rates=0.4, protect=())


class Net(nn.Module):
    """Layers given by name, and a forward function of the network and its input."""

    def __init__(self, run: Callable, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Tensor):
        return self.run(self, x)


def conv(inputs: int, outputs: int, k: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, k, padding=k // 2)


def gate(net: Net, x: Tensor) -> Tensor:
    y = net.b(net.a(x).relu())
    scale = net.squeeze(y.mean((2, 3)))
    return net.head(y * torch.sigmoid(scale.reshape(-1, 24, 1, 1)))


def wide_bias(net: Net, x: Tensor) -> Tensor:
    y = net.b(net.a(x).relu())
    return net.head(y + net.shift(x.mean((2, 3), keepdim=True)).expand(-1, 24, 8, 8))


def lambda_keys(net: Net, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    keys = net.b(y)
    n = y.shape[1]
    return net.head((keys.view(-1, n, 24 // 16, 64).sum(2)).view(-1, n, 8, 8))


LITERAL = {
    'reshape of a gate': Net(gate, a=conv(3, 16), b=conv(16, 24), squeeze=nn.Linear(24, 24), head=conv(24, 5, 1)),
    'expand of a bias': Net(wide_bias, a=conv(3, 16), b=conv(16, 24), shift=nn.Conv2d(3, 24, 1), head=conv(24, 5, 1)),
    'flatten by hand': Net(
        lambda net, x: net.head(torch.reshape(net.a(x).relu(), (x.shape[0], 16 * 64))),
        a=conv(3, 16),
        head=nn.Linear(16 * 64, 5),
    ),
    'view as another': Net(
        lambda net, x: net.head(net.a(x).view(-1, 16, 64).view(-1, 16, 8, 8) + net.b(x)),
        a=conv(3, 16),
        b=conv(3, 16),
        head=conv(16, 5, 1),
    ),
}


@pytest.mark.parametrize('name', LITERAL)
@pytest.mark.parametrize('spec', [CORING, NORTON], ids=['coring', 'norton'])
def test_a_channel_count_written_as_a_number_keeps_its_channels(name: str, spec: CompressionSpec) -> None:
    net = LITERAL[name].eval()
    x = torch.randn(2, 3, 8, 8)
    small, _ = compress(net, spec, x)
    assert small(x).shape == net(x).shape
    assert small(torch.randn(3, 3, 8, 8)).shape[0] == 3  # the batch is no channel count


def test_a_count_that_is_read_from_the_tensor_is_followed() -> None:
    """`y.shape[1]` is the number of channels whatever it is, so they may go."""
    net = Net(
        lambda net, x: (lambda y: net.head(y.view(y.size(0), y.shape[1] * 64)))(net.b(net.a(x)).relu()),
        a=conv(3, 8),
        b=conv(8, 16),
        head=nn.Linear(16 * 64, 5),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    small, _ = compress(net, CORING, x)
    assert small.b.out_channels < 16
    assert small(x).shape == (2, 5)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, 'weight', Halved())
    return layer


COMPUTED = {
    'weight_norm': weight_norm,
    'spectral_norm': spectral_norm,
    'prune': lambda layer: prune.l1_unstructured(layer, 'weight', amount=0.3),
    'parametrizations.weight_norm': parametrizations.weight_norm,
    'parametrizations.orthogonal': parametrizations.orthogonal,
    'an own parametrization': parametrized,
}


@pytest.mark.filterwarnings('ignore:.*weight_norm.*deprecated')
@pytest.mark.parametrize('backward', [False, True])
@pytest.mark.parametrize('name', COMPUTED)
def test_a_computed_weight_is_left_alone(name: str, backward: bool) -> None:
    net = nn.Sequential(conv(3, 16), nn.ReLU(), COMPUTED[name](conv(16, 24)), nn.ReLU(), conv(24, 4, 1))
    x = torch.randn(2, 3, 8, 8)
    if backward:
        net(x).sum().backward()
    small, report = compress(net.eval(), NORTON, x)
    assert small(x).shape == (2, 4, 8, 8)
    assert isinstance(small[2], nn.Conv2d) and small[2].weight.shape == net[2].weight.shape
    told = {layer.name: layer.dense_because for layer in report.layers}
    assert 'computed' in told['2']


TRAINED = {
    'inception': (lambda: torchvision.models.inception_v3(init_weights=False, aux_logits=True), (2, 3, 299, 299)),
    'fcn': (lambda: torchvision.models.segmentation.fcn_resnet50(weights_backbone=None, aux_loss=True), (2, 3, 64, 64)),
    'drawn by hand': (
        lambda: Net(
            lambda net, x: (lambda y: (net.head(y), net.aux(y)) if net.training else net.head(y))(net.b(net.a(x))),
            a=conv(3, 8),
            b=conv(8, 16),
            head=conv(16, 5, 1),
            aux=conv(16, 7),
        ),
        (2, 3, 8, 8),
    ),
}


@pytest.mark.parametrize('name', TRAINED)
def test_what_runs_only_in_training_still_trains(name: str) -> None:
    make, shape = TRAINED[name]
    net, x = make().eval(), torch.randn(shape)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    small, _ = compress(net, CORING, x[:1] if name == 'inception' else x)
    after = net.state_dict()
    assert not net.training and all(torch.equal(value, after[key]) for key, value in before.items())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    small.eval()(x)
    outputs = small.train()(x)
    tensors = outputs.values() if isinstance(outputs, dict) else outputs
    wide = net.train()(x)
    assert [t.shape for t in tensors] == [t.shape for t in (wide.values() if isinstance(wide, dict) else wide)]


OBJECTS = {
    'namespace': lambda seg, edge: types.SimpleNamespace(seg=seg, edge=edge),
    'user dict': lambda seg, edge: UserDict(seg=seg, edge=edge),
    'nested': lambda seg, edge: {'first': types.SimpleNamespace(seg=seg), 'rest': [UserDict(edge=edge)]},
}


@pytest.mark.parametrize('name', OBJECTS)
def test_outputs_in_objects_keep_their_classes(name: str) -> None:
    net = Net(
        lambda net, x: (lambda y: OBJECTS[name](net.seg(y), net.edge(y)))(net.b(net.a(x).relu()).relu()),
        a=conv(3, 16),
        b=conv(16, 24),
        seg=conv(24, 10, 1),
        edge=conv(24, 8, 1),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    small, _ = compress(net, CORING, x)
    assert (small.seg.out_channels, small.edge.out_channels) == (10, 8)
    assert small.b.out_channels < 24
    fast = deploy(small, x, autotune=False)
    assert type(fast(x)) is type(small(x))


def test_deploy_compares_no_tensors_with_nothing() -> None:
    class Count:
        def __init__(self, tensor: Tensor) -> None:
            self.count = int((tensor > 0).sum())

    net = Net(lambda net, x: Count(net.a(x)).count, a=conv(3, 4)).eval()
    with pytest.raises(ValueError, match='output'):
        deploy(net, torch.randn(1, 3, 8, 8), autotune=False)


@pytest.mark.parametrize('encoder', ['resnet10t', 'mobilenetv2_050'])
def test_feature_info_alone_makes_no_feature_extractor(encoder: str) -> None:
    features = timm.create_model(encoder, features_only=True)
    width = features.feature_info.channels()[-1]
    net = Net(lambda net, x: net.seg(net.neck(net.encoder(x)[-1]).relu()), encoder=features, neck=conv(width, 32, 1))
    net.seg = conv(32, 5, 1)
    net.feature_info = features.feature_info
    x = torch.randn(1, 3, 64, 64)
    small, _ = compress(net.eval(), CORING, x)
    assert small(x).shape[1] == 5 and small.neck.out_channels < 32
    assert small.encoder.feature_info.channels() == [f.shape[1] for f in small.encoder(x)]  # a nested encoder's too


def tied(net: Net, x: Tensor) -> Tensor:
    return F.conv_transpose2d(net.b(net.a(x).relu()).relu(), net.b.weight, padding=1)


OUTSIDE = {
    'tied autoencoder': Net(tied, a=conv(3, 16), b=conv(16, 24)),
    'in an einsum': Net(
        lambda net, x: (lambda y: net.head(net.b(y) + torch.einsum('oihw,nixy->noxy', net.b.weight, y)))(net.a(x)),
        a=conv(3, 16),
        b=conv(16, 24),
        head=conv(24, 4, 1),
    ),
    'its norm is an output': Net(
        lambda net, x: (net.b(net.a(x).relu()), net.a.weight.flatten(1).norm(dim=1)), a=conv(3, 16), b=conv(16, 4)
    ),
}


@pytest.mark.parametrize('spec', [CORING, NORTON], ids=['coring', 'norton'])
@pytest.mark.parametrize('name', OUTSIDE)
def test_a_weight_that_a_function_reads_stays_whole_and_dense(name: str, spec: CompressionSpec) -> None:
    net = OUTSIDE[name].eval()
    x = torch.randn(2, 3, 8, 8)
    small, _ = compress(net, spec, x)
    layer = 'a' if name == 'its norm is an output' else 'b'
    assert small.get_submodule(layer).weight.shape == net.get_submodule(layer).weight.shape
    wanted, got = net(x), small(x)
    for one, other in zip(*((t if isinstance(t, tuple) else (t,)) for t in (wanted, got)), strict=True):
        assert one.shape == other.shape


def test_a_weight_that_a_function_reads_absorbs_no_norm() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        return net.norm(net.a(x)) + F.conv2d(x, net.a.weight, padding=2, dilation=2)

    net = Net(run, a=conv(3, 16), norm=nn.BatchNorm2d(16)).eval()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 8, 8)
    fast = deploy(net, x, autotune=False)
    assert isinstance(fast.norm, nn.BatchNorm2d)
    torch.testing.assert_close(fast(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    'run',
    [
        lambda net, x: net.c(input=net.b(input=net.norm(input=net.a(x)))),
        lambda net, x: net.c(net.b(net.norm(input=net.a(input=x)).relu())),
    ],
)
@pytest.mark.parametrize('spec', [CORING, NORTON], ids=['coring', 'norton'])
def test_layers_called_by_keyword_are_followed(run: Callable, spec: CompressionSpec) -> None:
    net = Net(run, a=conv(3, 16), norm=nn.BatchNorm2d(16), b=conv(16, 24), c=conv(24, 4)).eval()
    x = torch.randn(2, 3, 8, 8)
    small, _ = compress(net, spec, x)
    assert small(x).shape == (2, 4, 8, 8)
    assert small.b.out_channels < 24
    torch.testing.assert_close(deploy(small, x, autotune=False)(x), small(x), atol=1e-5, rtol=1e-5)


def test_a_compiled_network_is_taken_for_the_network_it_compiles() -> None:
    plain = timm.create_model('resnet10t').eval()
    x = torch.randn(1, 3, 64, 64)
    wanted, _ = compress(plain, NORTON, x)
    compiled, _ = compress(torch.compile(plain, backend='eager'), NORTON, x)
    part = Net(lambda net, x: net.body(x), body=torch.compile(plain, backend='eager'))
    inside, _ = compress(part.eval(), NORTON, x)
    for small in (compiled, inside):
        assert torch.equal(small(x), wanted(x))


@pytest.mark.parametrize(
    'layers, shape',
    [
        ((nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 1)), (1, 3, 6, 6, 6)),
        ((nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1)), (2, 3, 16)),
    ],
)
def test_deploy_takes_other_dimensions(layers: tuple[nn.Module, ...], shape: tuple[int, ...]) -> None:
    net, x = nn.Sequential(*layers).eval(), torch.randn(shape)
    torch.testing.assert_close(deploy(net, x, autotune=False)(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name, kwargs', [
    ('convnext_atto', {'head_hidden_size': 48}),
    ('hgnetv2_b0', {}),
    ('efficientvit_b0', {}),
    ('mobilenetv3_small_050', {}),
])  # fmt: skip
def test_heads_between_pooling_and_classifier_stay_true(name: str, kwargs: dict, tmp_path: Path) -> None:
    x = torch.randn(1, 3, 64, 64)
    small, _ = compress(timm.create_model(name, **kwargs).eval(), CORING, x)
    with torch.inference_mode():
        assert small.forward_features(x).shape[1] == small.num_features
        assert (
            small.forward_head(small.forward_features(x), pre_logits=True).shape[1]
            == small.get_classifier().in_features
        )
        norton_timm.save(small, tmp_path / 'net.safetensors', model_kwargs=kwargs)
        assert torch.equal(norton_timm.load(tmp_path / 'net.safetensors').eval()(x), small(x))
    small.reset_classifier(7)
    assert small(x).shape == (1, 7)


def test_what_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    small, _ = compress(timm.create_model('resnet10t').eval(), CORING, torch.randn(1, 3, 64, 64))
    small.layer1[0].conv1.stride = (2, 2)
    path = tmp_path / 'net.safetensors'
    with pytest.raises(ValueError, match=r'stride|not resnet10t'):
        norton_timm.save(small, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', [np.int64, np.uint8, torch.tensor, np.array])
def test_numbers_of_other_libraries_are_numbers(kind: Callable) -> None:
    spec = CompressionSpec(rank=kind(2), rates=np.float32(0.25))
    assert spec.rank == 2 and type(spec.rank) is int and type(spec.rates) is float
    assert CompressionSpec.from_yaml(spec.to_yaml()) == spec


@pytest.mark.parametrize('wrong', [np.nan, np.array([1, 2]), torch.tensor([1.0, 2.0]), np.float64(2.5), True])
def test_what_is_no_number_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match='rank: got'):
        CompressionSpec(rank=wrong)


@pytest.mark.parametrize('text, rates', [('rates: 3e-1', 0.3), ('rates: 25e-2', 0.25), ('rates: 1E-1', 0.1)])
def test_yaml_numbers_are_read_as_they_look(text: str, rates: float) -> None:
    assert CompressionSpec.from_yaml(f'method: coring\n{text}\n').rates == rates


@pytest.mark.parametrize(
    'text, told', [('rank: 2\nrank: 3', r'twice|duplicate'), ('rank: 010\nrank: 010', r'twice|duplicate')]
)
def test_yaml_keys_given_twice_are_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CompressionSpec.from_yaml(text)


def test_ten_is_not_eight_in_yaml() -> None:
    assert CompressionSpec.from_yaml('rank: 010').rank == 10


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(3, 8)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.a(left) + self.b(right)


class Prompted(Pair):
    def forward(self, image: Tensor, *, prompt: Tensor) -> Tensor:
        return self.a(image) + self.b(prompt)


@pytest.mark.parametrize('make', [Pair, Prompted])
def test_several_inputs_get_one_clear_line(make: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match='one input') as caught:
        compress(make().eval(), CORING, torch.randn(1, 3, 8, 8))
    assert '\n' not in str(caught.value)
