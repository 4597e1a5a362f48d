"""Detectors: torchvision's own models are the oracle, the published totals the measure."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torchvision.models import detection as tv
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

from detection.rcnn.backbone import build_backbone, create_features
from detection.rcnn.build import build_detector
from detection.tasks import TASKS
from norton_timm.profiling.complexity import count_params

SMALL = {
    'min_size': 64,
    'max_size': 128,
    'fpn_channels': 32,
    'box_head': 32,
    'mask_layers': (16, 16),
    'keypoint_layers': (16, 16),
    'anchor_sizes': (8, 16, 32, 48, 64),
}


def batch(count: int = 2, side: int = 64) -> tuple[list[torch.Tensor], list[dict]]:
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, side, side + 16 * i, generator=generator) for i in range(count)]
    keypoints = torch.rand(2, 17, 3, generator=generator) * 20 + 10
    keypoints[..., 2] = 2
    masks = torch.zeros(2, side, side, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    target = {
        'boxes': torch.tensor([[8.0, 8.0, 40.0, 40.0], [10.0, 12.0, 60.0, 50.0]]),
        'labels': torch.tensor([1, 1]),
        'keypoints': keypoints,
        'masks': masks,
    }
    targets = []
    for image in images:
        wide = torch.zeros(2, side, image.shape[2], dtype=torch.uint8)
        wide[..., :side] = masks
        targets.append({**target, 'masks': wide})
    return images, targets


@pytest.mark.parametrize(
    ('task', 'backbone', 'params'),
    [
        ('box', 'resnet50', 41_808_406),
        ('box', 'norton_resnet50.r078', 22_012_182),
        ('box', 'norton_resnet50.r043', 30_738_471),
        ('mask', 'norton_resnet50.r078', 24_658_289),
        ('mask', 'norton_resnet50.r043', 33_384_578),
        ('keypoint', 'norton_resnet50.r078', 39_394_154),
        ('keypoint', 'norton_resnet50.r043', 48_120_443),
    ],
)
def test_parameter_totals_are_the_published_ones(task: str, backbone: str, params: int) -> None:
    model = build_detector(task, backbone)
    assert count_params(model) == params
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ('task', 'reference'),
    [
        ('box', tv.fasterrcnn_resnet50_fpn),
        ('mask', tv.maskrcnn_resnet50_fpn),
        ('keypoint', tv.keypointrcnn_resnet50_fpn),
    ],
)
def test_equals_torchvision_with_its_weights(task: str, reference) -> None:
    options = {
        'min_size': 64,
        'max_size': 128,
        'box_score_thresh': 0.0,
        'box_detections_per_img': 4,
        'box_batch_size_per_image': 16,
    }
    theirs = reference(weights=None, weights_backbone=None, **options)
    ours = build_detector(task, 'resnet50', **options)
    ours.load_state_dict(theirs.state_dict())
    images, targets = batch()
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(model.train()(images, targets))
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for one, other in zip(theirs.eval()(images), ours.eval()(images)):
            assert one.keys() == other.keys()
            assert len(one['boxes'])
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-3)


def test_keypoint_loss_in_channels_last_equals_the_plain_layout() -> None:
    model = build_detector('keypoint', 'resnet18', **SMALL)
    images, targets = batch()
    totals = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=layout)
        torch.manual_seed(0)
        losses = model.train()(images, targets)
        sum(losses.values()).backward()
        totals.append(losses['loss_keypoint'].item())
    assert totals[1] == pytest.approx(totals[0], rel=1e-4)


@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
def test_images_without_objects_can_be_trained_on(task: str) -> None:
    model = build_detector(task, 'resnet18', **SMALL).train()
    images, targets = batch()
    empty = {name: value[:0] for name, value in targets[0].items()}
    total = sum(model(images, [empty, {**empty, 'masks': targets[1]['masks'][:0]}]).values())
    total.backward()
    assert torch.isfinite(total)


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('size', [(2, 700), (900, 1)])
def test_a_very_thin_picture_is_trained_on_and_looked_at(task: str, size: tuple[int, int]) -> None:
    """Torchvision resizes the shorter side to nothing and fails."""
    torch.manual_seed(0)
    model = build_detector(task, 'resnet10t', num_classes=2, num_keypoints=2, **SMALL)
    height, width = size
    image, other = torch.rand(3, height, width), torch.rand(3, 64, 80)
    assert model.eval().transform([image])[0].image_sizes == [(1, 128) if width > height else (128, 1)]
    with pytest.raises(RuntimeError, match='greater than 0'):
        GeneralizedRCNNTransform(64, 128, [0.5] * 3, [0.2] * 3).eval()([image])
    for picture, expected in ((other, (64, 80)), (torch.rand(3, 3, 300), (1, 128))):
        assert model.transform([picture])[0].image_sizes == [expected]
    box = torch.tensor([[0.0, 0.0, width / 2, height]] if width > height else [[0.0, 0.0, width, height / 2]])
    target = {'boxes': box, 'labels': torch.tensor([1]), 'masks': torch.ones(1, height, width, dtype=torch.uint8)}
    target['keypoints'] = torch.tensor([[[0.5, 0.5, 2.0], [width - 0.5, height - 0.5, 2.0]]])
    losses = model.train()([image], [target])
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        found = model.eval()([image, other])
    assert (found[0]['boxes'] <= torch.tensor([width, height] * 2)).all()
    if task == 'mask':
        assert found[0]['masks'].shape[-2:] == size


def test_widths_come_from_the_features() -> None:
    for name in ('mobilenetv3_small_100', 'convnext_atto', 'norton_resnet50.r078'):
        fpn = build_backbone(name, out_channels=24).eval()
        maps = fpn(torch.zeros(1, 3, 64, 96))
        assert [tuple(m.shape) for m in maps.values()] == [
            (1, 24, 16, 24), (1, 24, 8, 12), (1, 24, 4, 6), (1, 24, 2, 3), (1, 24, 1, 2),
        ]  # fmt: skip


def test_a_module_of_features_is_taken_as_it_is() -> None:
    body = timm.create_model('resnet18', features_only=True, out_indices=(1, 2, 3, 4))
    assert build_detector('box', body, **SMALL).backbone.body is body


def test_weights_of_the_classifier_start_the_backbone(tmp_path: Path) -> None:
    net = timm.create_model('resnet18')
    path = tmp_path / 'resnet18.pth'
    torch.save(net.state_dict(), path)
    model = build_detector('box', 'resnet18', weights=path, **SMALL)
    body = model.backbone.body
    torch.testing.assert_close(body['layer4']['1'].conv2.weight if isinstance(body['layer4'], dict)
                               else body['layer4'][1].conv2.weight, net.layer4[1].conv2.weight)  # fmt: skip
    assert isinstance(body['bn1'], FrozenBatchNorm2d)  # torchvision's rule: weights there, norms frozen
    with pytest.raises(FileNotFoundError, match='no file with backbone weights'):
        create_features('resnet18', weights=tmp_path / 'none.pth')


def test_frozen_stages_stay_in_training() -> None:
    body = build_backbone('resnet18', frozen_stages=2).body
    trained = {name.split('.')[0] for name, p in body.named_parameters() if p.requires_grad}
    assert trained == {'layer3', 'layer4'}
    before = {name: value.clone() for name, value in body.state_dict().items()}
    body.train()(torch.rand(2, 3, 64, 64))
    changed = {name.split('.')[0] for name, value in body.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {'layer3', 'layer4'}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'task': 'boxes'}, "task is 'boxes', expected one of box, mask, keypoint"),
        ({'recipe': 'half'}, "recipe is 'half', expected one of backbone"),
        ({'colour': 1}, 'unknown arguments colour, expected some of rpn_pre_nms'),
        ({'norm': 'none'}, "norm is 'none', expected one of train, frozen, sync"),
        ({'norm': 'frozen'}, "norm='frozen' needs backbone weights"),
        ({'num_classes': 1}, 'num_classes is 1, expected 2 or more'),
        ({'anchor_sizes': (8, 16)}, 'anchor_sizes has 2 entries, expected 5'),
        ({'frozen_stages': 9}, 'frozen_stages is 9, expected 0 to 4'),
        ({'backbone': 'resnet19'}, "unknown backbone 'resnet19'.*near: resnet"),
        ({'backbone': 'vit_tiny_patch16_224'}, r'features at strides \[16, 16, 16\], an FPN needs \[4, 8, 16, 32\]'),
        ({'backbone': torch.nn.Identity()}, 'backbone Identity has no feature_info'),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_detector(**{'task': 'box', 'backbone': 'resnet18', **arguments})
