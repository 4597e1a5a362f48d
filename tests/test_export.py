"""export.py, export_check.py, quantise.py and the tool: files that compute the same, and none where they do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build, images
from PIL import Image
from torch import nn

import norton_timm
from detection.rcnn import OneImage, build_detector, exportable
from norton_timm.inference import export
from norton_timm.inference.export_check import (
    Agreement,
    compare_outputs,
    export_checked,
    find_pictures,
    read_images,
    size_mb,
)

PACKAGES = {'onnx': 'onnxruntime', 'openvino': 'openvino', 'pt2': 'torch'}
FILES = [pytest.param(f'net{ending}', id=kind) for kind, ending in export.FORMATS.items()]


def needs(path: Path) -> Path:
    pytest.importorskip(PACKAGES[export.format_of(path)])
    return path


@pytest.fixture(scope='module')
def small() -> nn.Module:
    model, x = build('resnet20_cifar'), images('resnet20_cifar')
    return norton_timm.compress(model, norton_timm.CompressionSpec(rank=2, rates=0.25), x)[0].eval()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f'{k}.png')
    return folder


@torch.no_grad()
@pytest.mark.parametrize('file', FILES)
def test_a_classifier_in_every_format_at_any_batch_size(small, tmp_path, file):
    path, x = needs(tmp_path / file), images('resnet20_cifar', 3)
    deployed = norton_timm.deploy(small, x)
    agreement = export_checked(deployed, path, [x[:1], x], small)
    assert (agreement.images, agreement.same) == (4, 4) and agreement.difference < 1e-4
    assert path.is_file() and size_mb(path) > 0.1
    expected = {path, path.with_suffix('.bin')} if path.suffix == '.xml' else {path}
    assert set(tmp_path.iterdir()) == expected, 'nothing else stays behind'
    torch.testing.assert_close(export.read_exported(path)(x)[0], small(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize('task, deployed', [('box', True), ('mask', True), ('keypoint', True), ('box', False)])
@pytest.mark.parametrize('file', FILES[:2])
def test_a_detector_at_its_size(tmp_path, file, task, deployed):
    path = needs(tmp_path / file)
    model = build_detector(task, 'norton_resnet18.r050', num_classes=2, min_size=96, max_size=128).eval()
    noise = [torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    scores = [model([x[0]])[0]['scores'] for x in noise]
    model.roi_heads.score_thresh = float(torch.cat(scores).quantile(0.9, interpolation='midpoint'))
    x = [torch.zeros(1, 3, 96, 128), *noise]
    assert not len(model([x[0][0]])[0]['scores']), 'a picture in which nothing is found'
    source = exportable(norton_timm.deploy(model, [x[0][0]], autotune=False) if deployed else model)
    agreement = export_checked(source, path, x, exportable(model))
    assert agreement.images == agreement.same == 3 and agreement.detections > 10
    assert agreement.box_px < 0.5 and agreement.score < 1e-3
    assert agreement.mask < 1e-3 * (task == 'mask') + 1e-9 and agreement.keypoint_px < 2 * (task == 'keypoint') + 1e-9
    # compared with itself: the exporter must not put it in training mode
    assert export_checked(source, path, x).same == 3 and not source.training


@torch.no_grad()
@pytest.mark.parametrize('file', FILES)
def test_a_file_that_computes_something_else_is_not_kept(small, tmp_path, file, monkeypatch):
    path, x = needs(tmp_path / file), images('resnet20_cifar')
    write = export.write_exported

    def wrong(model, example, target):
        with torch.no_grad():
            broken = norton_timm.deploy(small, example, autotune=False)
            broken.conv1.weight.mul_(1.05)
        write(broken, example, target)

    monkeypatch.setattr(export, 'write_exported', wrong)
    with pytest.raises(ValueError, match='no file was written'):
        export_checked(small, path, [x])
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
@pytest.mark.parametrize('file, package', [('net.onnx', 'onnxruntime'), ('net.xml', 'nncf')])
def test_int8_is_smaller_and_says_what_it_costs(small, tmp_path, file, package):
    pytest.importorskip(package)
    path, x = needs(tmp_path / file), [images('resnet20_cifar', 8)]
    export_checked(norton_timm.deploy(small, x[0], autotune=False), tmp_path / f'full{path.suffix}', x, small)
    agreement = export_checked(norton_timm.deploy(small, x[0], autotune=False), path, x, small, int8=True)
    assert size_mb(path) < size_mb(tmp_path / f'full{path.suffix}')
    assert agreement.images == 8 and 1e-4 < agreement.difference < 1
    assert compare_outputs(small, export.read_exported(path), x) == agreement


def test_what_cannot_be_done_is_said(small, tmp_path):
    x = [images('resnet20_cifar')]
    with pytest.raises(ValueError, match=r'\.onnx, \.xml, \.pt2'):
        export_checked(small, tmp_path / 'net.tflite', x)
    with pytest.raises(ValueError, match='does not exist'):
        export_checked(small, tmp_path / 'nowhere' / 'net.pt2', x)
    with pytest.raises(ValueError, match='at least one'):
        export_checked(small, tmp_path / 'net.pt2', [])
    with pytest.raises(ValueError, match='expected a classifier'):
        export_checked(small, tmp_path / 'net.pt2', x, int8=True)
    assert list(tmp_path.iterdir()) == []


def detections(boxes: list[list[float]], scores: list[float], label: int = 1) -> list[torch.Tensor]:
    return [torch.tensor(boxes).reshape(-1, 4), torch.full((len(boxes),), label), torch.tensor(scores)]


A, B = [0.0, 0, 10, 10], [50.0, 50, 90, 90]


@pytest.mark.parametrize(
    'found, same, box_px, score, problem',
    [
        (detections([A, B], [0.9, 0.8]), 1, 0, 0, None),
        (detections([B, A], [0.8, 0.9]), 1, 0, 0, None),  # the order of equal scores is free
        (detections([[0.0, 0, 10, 10.25], B], [0.9, 0.8]), 1, 0.25, 0, None),
        (detections([[0.0, 0, 10, 11], B], [0.9, 0.8]), 1, 1, 0, 'px'),
        (detections([A, B], [0.9, 0.75]), 1, 0, 0.05, 'scores'),
        (detections([A], [0.9]), 0, 0, 0, 'another answer'),
        (detections([A, B], [0.9, 0.8], label=2), 0, 0, 0, 'another answer'),
        (detections([], []), 0, 0, 0, 'another answer'),
    ],
)
def test_detections_compared_by_hand(found, same, box_px, score, problem):
    model = OneImage(build_detector('box', 'resnet18', num_classes=3, min_size=64))
    model.forward = lambda image: detections([A, B], [0.9, 0.8])
    agreement = compare_outputs(model, lambda image: found, [torch.zeros(1, 3, 8, 8)], model.agreement())
    assert (agreement.images, agreement.same, agreement.detections) == (1, same, 2)
    assert agreement.box_px == pytest.approx(box_px) and agreement.score == pytest.approx(score)
    assert agreement.problem() is None if problem is None else problem in agreement.problem()


@pytest.mark.parametrize(
    'task, values, change, field, limit',
    [('mask', (1, 1, 8, 8), 0.1, 'mask', 'masks'), ('keypoint', (1, 17, 3), 3.0, 'keypoint_px', 'keypoints')],
)
def test_masks_and_keypoints_compared_by_hand(task, values, change, field, limit):
    model = OneImage(build_detector(task, 'resnet18', num_classes=2, min_size=64))
    extra = torch.rand(values)
    model.forward = lambda image: [*detections([A], [0.9]), extra]
    agreement = compare_outputs(
        model, lambda image: [*detections([A], [0.9]), extra + change], [torch.zeros(1, 3, 8, 8)], model.agreement()
    )
    assert agreement.same == 1 and getattr(agreement, field) == pytest.approx(change, rel=1e-3)
    assert limit in agreement.problem()
    agreement = compare_outputs(
        model,
        lambda image: [*detections([A], [0.9]), extra * float('nan')],
        [torch.zeros(1, 3, 8, 8)],
        model.agreement(),
    )
    assert limit in agreement.problem()


def test_classifiers_compared_by_hand():
    logits = torch.tensor([[1.0, 4.0], [2.0, 0.0]])
    agreement = compare_outputs(nn.Identity(), lambda x: [x + torch.tensor([0.0, 0.004])], [logits])
    assert agreement == Agreement(2, 2, pytest.approx(0.001, rel=1e-3))
    for other in (lambda x: [x.flip(1)], lambda x: [x[:, :1]], lambda x: [x * float('nan')]):
        assert 'another answer' in compare_outputs(nn.Identity(), other, [logits]).problem()
    assert str(agreement) == '2 of 2 images get the same answer; outputs within 1.0e-03 of the largest'


def test_names_are_no_patterns(small, tmp_path):
    path = tmp_path / 'small[8]*.pt2'
    export_checked(small, path, [images('resnet20_cifar')])
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_are_read_as_they_are(pictures, tmp_path):
    paths = find_pictures(pictures, 2)
    assert [p.name for p in paths] == ['0.png', '1.png']
    image = read_images(paths[:1], (40, 48))[0]
    assert torch.equal((image * 255).round().byte(), torch.from_numpy(np.array(Image.open(paths[0]))).permute(2, 0, 1))
    (tmp_path / 'pictures' / 'bad.png').write_text('no')
    with pytest.raises(ValueError, match=r'bad\.png'):
        read_images([pictures / 'bad.png'], (8, 8))
    with pytest.raises(ValueError, match='no pictures'):
        find_pictures(tmp_path / 'empty', 2)


@torch.no_grad()
def test_a_global_average_is_one_node(tmp_path):
    onnx = pytest.importorskip('onnx')
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    export.write_exported(model.to(memory_format=torch.channels_last), torch.randn(1, 3, 9, 9), tmp_path / 'a.onnx')
    assert [n.op_type for n in onnx.load(tmp_path / 'a.onnx').graph.node] == ['Conv', 'AveragePool', 'Reshape']
    assert type(model[1]) is nn.AdaptiveAvgPool2d, 'the network that was given stays'


def test_the_tool(tool, small, pictures, tmp_path):
    norton_timm.save(small, tmp_path / 'small.safetensors')
    result = tool('export.py', '--weights', tmp_path / 'small.safetensors', '--images', pictures,
                  '--output', tmp_path / 'net.pt2', '--json', tmp_path / 'net.json')  # fmt: skip
    assert result.code == 0, result.err
    assert 'wrote' in result.out and '3 of 3 images' in result.out
    assert json.loads((tmp_path / 'net.json').read_text())['same'] == 3
    x = images('resnet20_cifar', 3)
    with torch.no_grad():
        torch.testing.assert_close(export.read_exported(tmp_path / 'net.pt2')(x)[0], small(x), rtol=1e-3, atol=1e-3)


def test_the_tool_tunes_in_the_runtime(tool, small, pictures, tmp_path):
    pytest.importorskip('onnxruntime')
    norton_timm.save(small, tmp_path / 'small.safetensors')
    arguments = ['--weights', tmp_path / 'small.safetensors', '--images', pictures]
    result = tool('export.py', *arguments, '--output', tmp_path / 'net.onnx')
    assert result.code == 0, result.err
    assert 'merged (widened)' in result.err and '3 of 3 images' in result.out


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--model', 'resnet20_cifar', '--output', 'a.onnx'], 'one of --pretrained and --random-weights'),
        (['--output', 'a.onnx'], 'both or none'),
        (['--model', 'resnet20_cifar', '--random-weights', '--output', 'a.h5'], '.onnx, .xml, .pt2'),
        (['--model', 'resnet20_cifar', '--random-weights', '--output', 'a.pt2', '--count', '0'], '1 or more'),
        (['--model', 'resnet20_cifar', '--random-weights', '--output', 'nowhere/a.pt2'], 'a folder that exists'),
        (['--model', 'resnet20_cifar', '--random-weights', '--output', 'a.pt2', '--json', 'nowhere/a'], 'nowhere/a'),
        (['--model', 'resnet20_cifar', '--random-weights', '--output', 'a.pt2', '--int8'], '--int8 quantises'),
        (
            ['--model', 'vgg16_bn_cifar', '--random-weights', '--output', 'a.pt2', '--size', '8', '8'],
            'does not take these images',
        ),
    ],
)
def test_the_tool_says_what_is_wrong_in_one_line(tool, pictures, arguments, message):
    result = tool('export.py', '--images', pictures, *arguments)
    assert result.code == 2 and message in result.err
    assert len(result.err.strip().splitlines()) == 1
