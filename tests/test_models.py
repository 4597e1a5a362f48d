"""One sweep over every registered network of ours: what timm asks of a model, on a few in CI, on all with `-m slow`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import norton_timm.models  # noqa: F401
from norton_timm.layers.channel_map import ChannelMap
from norton_timm.layers.cpd_conv import CPDConv2d

MODULES = ('vgg_cifar', 'resnet_cifar', 'densenet_cifar', 'googlenet_cifar', 'mobilenetv2_cifar', 'entrypoints')
ALL = timm.list_models(module=MODULES, include_tags=True)
FEW = [
    'vgg16_bn_cifar',
    'resnet20_cifar',
    'densenet40_cifar',
    'googlenet_cifar',
    'mobilenetv2_cifar',
    'norton_vgg16_bn_cifar.r099',
    'norton_resnet56_cifar.r089',
    'norton_densenet40_cifar.r058',
    'norton_resnet50.r078',
    'norton_resnet18.r075',
    'coring_mobilenetv2_cifar.r060',
    'coring_mobilenetv2_100.r047',
    'norton_vgg19_bn_cifar.r099',
]
SWEEP = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
EXPORTS = ['norton_resnet56_cifar.r042', 'norton_resnet50.r078', 'coring_googlenet_cifar.r074', 'vgg16_bn_cifar']
EXPORT_SWEEP = [name if name in EXPORTS else pytest.param(name, marks=pytest.mark.slow) for name in ALL]

every_model = pytest.mark.parametrize('name', SWEEP)


def test_the_sweep_sees_every_network() -> None:
    assert len(ALL) == 10 + 39 + 20 + 10
    assert set(FEW + EXPORTS) <= set(ALL)


def image(model: nn.Module, size: tuple[int, int] | int = 64, batch: int = 1) -> torch.Tensor:
    chans = model.in_chans
    return torch.randn(batch, chans, *((size, size) if isinstance(size, int) else size))


@every_model
@torch.no_grad()
def test_forward_at_several_sizes(name: str) -> None:
    model = timm.create_model(name).eval()
    for size in (32, 64, (40, 72)):
        logits = model(image(model, size))
        assert logits.shape == (1, model.num_classes) and torch.isfinite(logits).all()
    x = image(model)
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)


@every_model
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = timm.create_model(name).train()
    # zero-initialised last norms would leave the branches before them without any
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    model(image(model, 32 if model.num_classes == 10 else 64, batch=2)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


@every_model
@torch.no_grad()
def test_head_can_be_taken_off_and_replaced(name: str) -> None:
    model = timm.create_model(name, num_classes=7).eval()
    x = image(model)
    assert model(x).shape == (1, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(x).shape == (1, model.head_hidden_size)
    model.reset_classifier(0, '')
    assert model(x).shape[:2] == (1, model.num_features) and model(x).dim() == 4
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (1, 3)
    assert timm.create_model(name, num_classes=0).eval()(x).shape == (1, model.head_hidden_size)
    bare = timm.create_model(name, num_classes=0, global_pool='').eval()
    assert bare(x).shape[:2] == (1, model.num_features) and bare(x).dim() == 4
    assert timm.create_model(name, num_classes=5, global_pool='catavgmax').eval()(x).shape == (1, 5)


@every_model
@torch.no_grad()
def test_other_image_channels(name: str) -> None:
    model = timm.create_model(name, in_chans=1).eval()
    assert model(torch.randn(1, 1, 48, 48)).shape == (1, model.num_classes)


@every_model
@torch.no_grad()
def test_features_are_what_feature_info_says(name: str) -> None:
    whole = timm.create_model(name, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    maps = whole(x)
    assert len(maps) == len(whole.feature_info.channels()) >= 4
    for found, chs, reduction in zip(maps, whole.feature_info.channels(), whole.feature_info.reduction()):
        assert found.shape == (1, chs, 64 // reduction, 64 // reduction)
    some = timm.create_model(name, features_only=True, out_indices=(1, 3)).eval()
    assert [m.shape[1] for m in some(x)] == some.feature_info.channels() == whole.feature_info.channels([1, 3])
    last = timm.create_model(name, features_only=True, out_indices=(-1,)).eval()
    assert last(x)[0].shape[1] == last.feature_info.channels()[-1]


@every_model
@torch.no_grad()
def test_intermediates_agree_with_the_forward_pass(name: str) -> None:
    model = timm.create_model(name).eval()
    x = image(model)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [info['num_chs'] for info in model.feature_info]
    assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
    kept = model.prune_intermediate_layers([1])
    assert kept == [1]
    pruned = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    torch.testing.assert_close(pruned[0], maps[1])
    getter = timm.create_model(name, features_only=True, feature_cls='getter', out_indices=(0, 2)).eval()
    assert [m.shape[1] for m in getter(x)] == getter.feature_info.channels()


@every_model
def test_state_dict_round_trip(name: str) -> None:
    first, second = timm.create_model(name).eval(), timm.create_model(name).eval()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    x = image(first, 32)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))


@every_model
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = timm.create_model(name, drop_rate=0.0).train()
    x = image(model, 32, batch=2)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
                module.reset_running_stats()
        model(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-3, atol=1e-5)


@every_model
def test_configuration_names_real_layers(name: str) -> None:
    model = timm.create_model(name)
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert f'{cfg["classifier"]}.weight' in state and len(state[f'{cfg["classifier"]}.weight']) == cfg['num_classes']
    if cfg['first_conv'] is not None:
        assert state[f'{cfg["first_conv"]}.weight'].shape[1] == cfg['input_size'][0]
    else:
        assert isinstance(next(m for m in model.modules() if isinstance(m, (nn.Conv2d, CPDConv2d))), CPDConv2d)
    with torch.no_grad():
        features = model.eval().forward_features(image(model, cfg['input_size'][1]))
    assert tuple(features.shape[-2:]) == tuple(cfg['pool_size'])


@pytest.mark.parametrize('name', EXPORT_SWEEP)
@torch.no_grad()
def test_torch_export(name: str) -> None:
    model = timm.create_model(name).eval()
    x = image(model, 32)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', EXPORT_SWEEP)
@torch.no_grad()
def test_onnx(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    model = timm.create_model(name).eval()
    x = image(model, 32)
    path = tmp_path / 'model.onnx'
    torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('name', ['resnet20_cifar', 'vgg16_bn_cifar', 'googlenet_cifar', 'mobilenetv2_cifar'])
@torch.no_grad()
def test_torchscript_of_the_dense_networks(name: str) -> None:
    model = timm.create_model(name).eval()
    x = image(model, 32)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('name', ['norton_resnet56_cifar.r042', 'norton_resnet50.r078'])
@torch.no_grad()
def test_torch_jit_trace_of_compressed_networks(name: str) -> None:
    model = timm.create_model(name).eval()
    x = image(model, 32)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_compressed_features_only_has_no_stale_widths() -> None:
    backbone = timm.create_model('norton_resnet50.r078', features_only=True, out_indices=(1, 2, 3, 4))
    # int(256 * 0.9), int(512 * 0.9), int(1024 * 0.6), 2048
    assert backbone.feature_info.channels() == [230, 460, 614, 2048]


def test_shortcut_of_pruned_stages() -> None:
    model = timm.create_model('norton_resnet56_cifar.r042')  # stem 16, stages 14, 28 and 64
    maps = [m for m in model.modules() if isinstance(m, ChannelMap)]
    assert [(m.in_channels, m.out_channels, m.stride) for m in maps] == [(16, 14, 1), (14, 28, 2), (28, 64, 2)]


def test_output_stride_and_device_arguments_reach_the_base() -> None:
    backbone = timm.create_model('norton_resnet50.r078', features_only=True, output_stride=16)
    assert backbone.feature_info.reduction()[-1] == 16
    half = timm.create_model('norton_resnet56_cifar.r089', dtype=torch.float64)
    assert {p.dtype for p in half.parameters()} == {torch.float64}
