"""Class-activation and feature maps against the textbook formula, and tools/visualize.py as a user runs it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn import functional as F

import norton_timm
from norton_timm.studies.activation_maps import compare_looks, look, match_channels, stage_names

pytest.importorskip('pytorch_grad_cam', reason='class-activation maps need the extra `visualize`')


@pytest.fixture(scope='module')
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('photo') / 'flower.png'
    Image.fromarray(load_sample_image('flower.jpg')).save(path)
    return path


@pytest.fixture(scope='module')
def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = timm.create_model('resnet20_cifar', num_classes=4).eval()
    small, _ = norton_timm.compress(dense, norton_timm.CompressionSpec(rank=4, rates=0.25))
    return dense, small


def grad_cam(model: nn.Module, image: torch.Tensor, layer: str, target: int) -> np.ndarray:
    """Selvaraju et al., eq. 1 and 2: maps weighed by the mean gradient of the class's score, without negative parts."""
    taken: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _, __, output: taken.append(output))
    score = model(image)[0, target]
    hook.remove()
    (gradient,) = torch.autograd.grad(score, taken[0])
    found = F.relu((gradient.mean((2, 3), keepdim=True) * taken[0]).sum(1))[0]
    large = cv2.resize(found.detach().numpy(), image.shape[:1:-1])
    return (large - large.min()) / (large.max() - large.min())


@pytest.mark.parametrize('which', [0, 1], ids=['dense', 'compressed'])
def test_class_activation_map_is_the_papers(networks, which: int) -> None:
    image = torch.randn(1, 3, 32, 32)
    model = networks[which]
    with torch.no_grad():
        logits = model(image)[0]
    target = int(logits.argmax())  # of a random network, the class that something surely speaks for
    assert logits[target] > model.fc.bias[target]
    found = look('it', model, image, target, 'layer3', 'layer1')
    np.testing.assert_allclose(found.activation, grad_cam(model, image, 'layer3', target), atol=1e-4)
    assert found.activation.max() > 0.9
    chances = logits.softmax(0)
    assert found.label == int(chances.argmax()) and found.confidence == pytest.approx(float(chances.max()))
    assert found.features.shape == (16 if which == 0 else 12, 32, 32)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_network_compared_with_itself_agrees(networks, photo: Path) -> None:
    dense, small = networks
    same = compare_looks(('a', dense), ('b', dense), photo)
    assert same.agreement == pytest.approx(1)
    assert same.nearest.tolist() == list(range(16)) and same.correlation.min() > 0.999
    other = compare_looks(('a', dense), ('b', small), photo, features='layer3')
    assert other.target == other.dense.label == same.target and other.agreement < 0.9999
    assert compare_looks(('a', dense), ('b', small), photo, target=3).target == 3
    assert other.picture.shape == (32, 32, 3) and other.picture.std() > 10


def test_channels_are_matched_by_their_patterns() -> None:
    dense = torch.randn(6, 5, 7)
    compressed = torch.stack([3 * dense[4] + 1, dense[2] + 0.01 * torch.randn(5, 7), torch.ones(5, 7)])
    nearest, correlation = match_channels(dense, compressed)
    assert nearest[:2].tolist() == [4, 2]
    assert correlation[0] == pytest.approx(1) and 0.99 < correlation[1] < 1 and correlation[2] == 0
    with pytest.raises(ValueError, match='expected \\(C, h, w\\) of one size'):
        match_channels(dense, torch.zeros(2, 5, 6))


@pytest.mark.parametrize('name', ['mobilenetv3_small_050', 'vgg11_bn', 'densenet40_cifar', 'repvgg_a0'])
def test_stages_of_other_families(name: str, photo: Path) -> None:
    """Activations that are changed in place, and stages of other names."""
    model = timm.create_model(name, num_classes=3).eval()
    assert len(stage_names(model)) >= 3
    found = compare_looks(('a', model), ('b', model), photo, size=64)
    assert found.agreement == pytest.approx(1) or np.isnan(found.agreement)
    assert found.dense.activation.shape == (64, 64) and found.picture.shape == (64, 64, 3)


@pytest.fixture
def files(networks, tmp_path: Path) -> Path:
    dense, small = networks
    save_file(dense.state_dict(), tmp_path / 'dense.safetensors')
    norton_timm.save(small, tmp_path / 'small.safetensors')
    return tmp_path


def test_the_tool_writes_a_picture(files: Path, photo: Path, tool) -> None:
    common = ['resnet20_cifar', 'small.safetensors', '--weights', 'dense.safetensors', '--image', photo]
    code, out, err = tool(
        'visualize.py', *common, '--output', 'maps.png', '--class', '1', '--classes', 'a', 'b', 'c',
        '--features', 'layer1',
    )  # fmt: skip
    assert code == 0, err
    assert 'resnet20_cifar: class' in out and 'class-activation maps of class 1: correlation' in out
    assert '16 feature maps' in out and '12 feature maps' in out
    drawn = cv2.imread('maps.png')
    assert drawn.shape[0] > 500 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 1000
    norton_timm.save(norton_timm.load('small.safetensors'), 'other.safetensors')
    code, out, err = tool('visualize.py', 'other.safetensors', *common[1:2], '--image', photo, '--output', 'b.png')
    assert code == 0 and 'nearest dense one 1.000' in out, err


BAD = {
    'no weights': (['resnet20_cifar', 'small.safetensors'], 'resnet20_cifar needs one of --pretrained and --weights'),
    'no network': (['resnet2', 'small.safetensors', '--weights', 'dense.safetensors'], "got model 'resnet2'"),
    'no file': (['small.safetensors', 'none.safetensors'], 'none.safetensors'),
    'layer': (['small.safetensors', 'small.safetensors', '--layer', 'layer9'], 'such as act1, layer1, layer2, layer3'),
    'class': (['small.safetensors', 'small.safetensors', '--class', '4'], 'class: got 4, expected 0 to 3'),
    'size': (['small.safetensors', 'small.safetensors', '--size', '3'], '--size is 3, expected 8 or more'),
    'picture': (['small.safetensors', 'small.safetensors', '--image', 'dense.safetensors'], 'not an image'),
    'ending': (['small.safetensors', 'small.safetensors', '--output', 'maps.jpg'], '.png'),
}


@pytest.mark.parametrize('case', BAD)
def test_wrong_arguments_get_one_line(case: str, files: Path, photo: Path, tool) -> None:
    arguments, message = BAD[case]
    extra = [] if '--image' in arguments else ['--image', photo]
    extra += [] if '--output' in arguments else ['--output', 'maps.png']
    code, _, err = tool('visualize.py', *arguments, *extra)
    assert code == 2, err
    assert message in err and 'Traceback' not in err and len(err.strip().splitlines()) == 1
    assert not list(files.glob('maps*'))
