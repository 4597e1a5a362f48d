"""rcnn/restore.py: whole detectors to start from, of our own runs and of torchvision's, and files that are not."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from authors_networks import ImageNetResNet50
from torch import nn

from detection.data.sample import write_sample
from detection.rcnn.build import build_detector
from detection.rcnn.restore import detector_content, start_from, state_of
from detection.training.checkpoint import detector_from_config, import_detector, load_detector, save_checkpoint
from detection.training.config import load_config
from detection.training.imported import imported_checkpoint
from norton_timm.compression.spec import parse_rates
from norton_timm.models.compressed import tags

SMALL = {'num_classes': 3, 'fpn_channels': 16, 'box_head': 32, 'min_size': 64}


def detector(seed: int = 0, name: str = 'resnet18', **options) -> nn.Module:
    torch.manual_seed(seed)
    return build_detector('box', name, **{**SMALL, **options})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """As torchvision's reference training writes it, and as a bare state dict."""
    model = detector(1)
    torch.save({'model': model.state_dict(), 'epoch': 25}, tmp_path / 'model_25.pth')
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    return tmp_path


@pytest.mark.parametrize('name', ['model_25.pth', 'bare.pth'])
def test_a_detector_starts_from_another(trained: Path, name: str) -> None:
    expected = detector(1).state_dict()
    tensors = state_of(detector_content(trained / name))
    assert tensors.keys() == expected.keys()
    model = detector(2)
    start_from(model, tensors, trained / name)
    assert all(torch.equal(t, expected[k]) for k, t in model.state_dict().items())


def test_averaged_weights_go_first(tmp_path: Path) -> None:
    last, averaged = detector(1).state_dict(), detector(2).state_dict()
    torch.save({'model': last, 'ema': averaged}, tmp_path / 'a.pt')
    torch.save({'model': last, 'ema': None}, tmp_path / 'b.pt')
    key = 'backbone.body.conv1.weight'
    assert torch.equal(state_of(detector_content(tmp_path / 'a.pt'))[key], averaged[key])
    assert torch.equal(state_of(detector_content(tmp_path / 'b.pt'))[key], last[key])


def test_other_classes_keep_their_random_start_and_are_named(trained: Path, caplog) -> None:
    tensors, model = state_of(detector_content(trained / 'model_25.pth')), detector(2, num_classes=7)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        start_from(model, tensors, 'model_25.pth')
    kept = [k for k, t in model.state_dict().items() if t.shape != tensors[k].shape]
    assert sorted(kept) == [f'roi_heads.box_predictor.{k}' for k in
                            ('bbox_pred.bias', 'bbox_pred.weight', 'cls_score.bias', 'cls_score.weight')]  # fmt: skip
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in kept)
    assert '4 tensors keep their random start' in caplog.text and 'cls_score.weight' in caplog.text


def test_torchvisions_own_detector_fits_ours(tmp_path: Path) -> None:
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    torch.save(OrderedDict(theirs.state_dict()), tmp_path / 'theirs.pth')
    ours = build_detector('box', 'resnet50', num_classes=3, weights=tmp_path / 'theirs.pth').eval()
    image = [torch.rand(3, 96, 96)]
    with torch.no_grad():
        for key, expected in theirs.eval()(image)[0].items():
            torch.testing.assert_close(ours(image)[0][key], expected)


@pytest.mark.parametrize('name', ['resnet34', 'norton_resnet50.r078'])
def test_another_backbone_is_refused(trained: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r'bare\.pth has another backbone: backbone\.body\.'):
        start_from(detector(2, name), state_of(detector_content(trained / 'bare.pth')), trained / 'bare.pth')


def test_what_is_no_detector_is_left_to_other_readers(tmp_path: Path) -> None:
    (tmp_path / 'text.pth').write_text('no weights')
    (tmp_path / 'empty.pth').write_bytes(b'')
    torch.save({'conv1.weight': torch.zeros(2)}, tmp_path / 'classifier.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    torch.save(nn.Linear(2, 2), tmp_path / 'pickled.pth')  # a whole module: unpickling it would run its code
    for path in tmp_path.iterdir():
        assert detector_content(path) is None, path.name
    with pytest.raises(FileNotFoundError, match='no file with backbone weights at'):
        detector_content(tmp_path / 'nowhere.pth')


FIRST = {  # today's name, the one of torchvision's first version
    r'(fpn\.(?:inner|layer)_blocks\.\d)\.0\.': r'\1.',
    r'rpn\.head\.conv\.0\.0\.': 'rpn.head.conv.',
    r'mask_head\.0\.0\.': 'mask_head.mask_fcn1.',
    r'mask_head\.1\.0\.': 'mask_head.mask_fcn2.',
    r'mask_head\.2\.0\.': 'mask_head.mask_fcn3.',
    r'mask_head\.3\.0\.': 'mask_head.mask_fcn4.',
}


def first_version(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict by the names of torchvision's first version."""
    old = {}
    for name, tensor in state.items():
        for today, first in FIRST.items():
            name = re.sub(today, first, name)
        old[name] = tensor
    return old


@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
def test_names_of_torchvisions_first_version_load_whole(tmp_path: Path, task: str) -> None:
    options = {**SMALL, 'mask_layers': (16, 16), 'keypoint_layers': (16,), 'num_classes': 2}
    torch.manual_seed(1)
    state = build_detector(task, 'resnet10t', **options).state_dict()
    old = first_version(state)
    assert len(old.keys() - state.keys()) == (22 if task == 'mask' else 18)
    torch.save({'model': old}, tmp_path / 'old.pth')
    model = build_detector(task, 'resnet10t', weights=tmp_path / 'old.pth', **options)
    for name, tensor in state.items():
        assert name.endswith('num_batches_tracked') or torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize('change, told', [
    ('roi_heads.box_head.fc6.weight', 'roi_heads.box_head.fc6.weight, which is not in the file'),
    ('rpn.head.cls_logits.bias', 'rpn.head.cls_logits.bias, which has another shape there'),
])  # fmt: skip
def test_what_would_stay_random_is_refused_unless_asked_for(tmp_path: Path, change: str, told: str, caplog) -> None:
    state = detector(1).state_dict()
    if 'not in' in told:
        del state[change]
    else:
        state[change] = torch.zeros(7)
    torch.save(state, tmp_path / 'part.pth')
    with pytest.raises(ValueError, match=f'1 tensors would keep their random start, the first is {told}'):
        detector(2, weights=tmp_path / 'part.pth')
    detector(2, weights=tmp_path / 'part.pth', partial=True)
    assert f'1 tensors keep their random start: {change}' in caplog.text


@pytest.mark.parametrize(('task', 'asked'), [('box', 'mask'), ('mask', 'box'), ('keypoint', 'box')])
def test_a_detector_for_another_task_is_refused_unless_asked_for(task: str, asked: str, tmp_path: Path) -> None:
    options = {**SMALL, 'mask_layers': (16,), 'keypoint_layers': (16,), 'num_classes': 2}
    torch.save(build_detector(task, 'resnet18', **options).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=f'for task {task}, got task {asked}: give --task {task}, or --partial'):
        build_detector(asked, 'resnet18', weights=tmp_path / 'other.pth', **options)
    build_detector(asked, 'resnet18', weights=tmp_path / 'other.pth', partial=True, **options)


def of_the_reference_training(state: dict[str, torch.Tensor], **args: object) -> dict[str, object]:
    """What torchvision's `references/detection/train.py` writes, with its options, optimiser and schedule."""
    weight = nn.Parameter(torch.zeros(2))
    sgd = torch.optim.SGD([weight], lr=0.02, momentum=0.9)
    steps = torch.optim.lr_scheduler.MultiStepLR(sgd, [16, 22])
    options = argparse.Namespace(
        dataset='coco', rank=0, aspect_ratio_group_factor=3, lr_steps=[16, 22], amp=None, **args
    )
    return {
        'model': state, 'optimizer': sgd.state_dict(), 'lr_scheduler': steps.state_dict(), 'args': options, 'epoch': 25,
    }  # fmt: skip


def authors_body(name: str) -> dict[str, torch.Tensor]:
    """The backbone of a published tag in the authors' layout."""
    method, _, tag = name.partition('_resnet50.')
    row = tags()[method]['resnet50'][tag]
    state = ImageNetResNet50(parse_rates(row['rates']), row.get('rank', 0)).state_dict()
    return {f'backbone.body.{key}': tensor for key, tensor in state.items() if not key.startswith('fc.')}


def heads(task: str, classes: int, points: int = 17) -> dict[str, torch.Tensor]:
    """As much of the heads as says what they find."""
    found = {'roi_heads.box_predictor.cls_score.weight': torch.zeros(classes, 4)}
    if task == 'mask':
        found['roi_heads.mask_predictor.mask_fcn_logits.weight'] = torch.zeros(classes, 4, 1, 1)
    if task == 'keypoint':
        found['roi_heads.keypoint_predictor.kps_score_lowres.weight'] = torch.zeros(4, points, 4, 4)
    return found


@pytest.mark.parametrize('name', [f'{m}_resnet50.{tag}' for m, bases in tags().items() for tag in bases['resnet50']])
def test_every_published_detector_gets_its_tag(name: str, tmp_path: Path) -> None:
    content = of_the_reference_training({**authors_body(name), **heads('box', 91)})
    torch.save(content, tmp_path / 'model_25.pth')
    made = imported_checkpoint(tmp_path / 'model_25.pth')
    assert made['config']['model']['backbone'] == name and made['surgery'] is None
    assert made['meta']['class_names'][18] == 'dog' and 12 not in made['meta']['label_to_category']


@pytest.mark.parametrize(('task', 'classes', 'points', 'names'), [
    ('mask', 91, 0, ['person', 'bicycle']), ('mask', 3, 0, ['class 1', 'class 2']), ('box', 2, 0, ['class 1']),
    ('keypoint', 2, 17, ['person']), ('keypoint', 3, 4, ['class 1', 'class 2']),
])  # fmt: skip
def test_labels_mean_cocos_classes_or_are_numbered(
    task: str, classes: int, points: int, names: list[str], tmp_path: Path, caplog
) -> None:
    torch.save({**authors_body('coring_resnet50.r077'), **heads(task, classes, points)}, tmp_path / 'a.pth')
    meta = imported_checkpoint(tmp_path / 'a.pth')['meta']
    assert meta['task'] == task and meta['class_names'][1 : 1 + len(names)] == names
    assert meta['num_keypoints'] == len(meta['keypoint_names']) == points
    assert meta['keypoint_names'][:1] == {17: ['nose'], 4: ['keypoint 1'], 0: []}[points]
    assert bool(meta['skeleton']) == (points == 17)
    assert ('does not say what its' in caplog.text) == (names[0] == 'class 1')


@pytest.mark.parametrize('form', ['bare', 'reference', 'first version'])
@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
def test_torchvisions_own_files_are_taken_as_they_are(task: str, form: str, tmp_path: Path) -> None:
    tv = torchvision.models.detection
    make = {'box': tv.fasterrcnn_resnet50_fpn, 'mask': tv.maskrcnn_resnet50_fpn,
            'keypoint': tv.keypointrcnn_resnet50_fpn}[task]  # fmt: skip
    theirs = make(weights=None, weights_backbone=None, box_score_thresh=0.0, box_detections_per_img=5).eval()
    state = theirs.state_dict()
    content = {'bare': state, 'reference': of_the_reference_training(state),
               'first version': {k: v for k, v in first_version(state).items() if 'num_batches' not in k}}  # fmt: skip
    torch.save(content[form], tmp_path / 'theirs.pth')
    ours, meta = load_detector(tmp_path / 'theirs.pth')
    assert meta['task'] == task and meta['config'].model.backbone == 'resnet50'
    ours.roi_heads.score_thresh, ours.roi_heads.detections_per_img = 0.0, 5
    image = [torch.rand(3, 96, 128)]
    for model in (ours, theirs):
        model.transform.min_size, model.transform.max_size = (96,), 128
    with torch.no_grad():
        found, expected = ours(image)[0], theirs(image)[0]
    assert len(expected['boxes']) == 5
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('rates', ['[0.]+[0.2]*3+[0.55]*16', '[0.1]+[0.]*19'])
def test_a_detector_of_no_tag_is_rebuilt_from_its_widths(rates: str, tmp_path: Path) -> None:
    body = ImageNetResNet50(parse_rates(rates), 1).eval()
    state = build_detector('box', norm='train').state_dict()
    widths = [len(body.layer1[0].conv3.weight), len(body.layer2[0].conv3.weight), len(body.layer3[0].conv3.weight)]
    for k, width in enumerate(widths):
        state[f'backbone.fpn.inner_blocks.{k}.0.weight'] = torch.randn(256, width, 1, 1)
    state = {key: t for key, t in state.items() if not key.startswith('backbone.body.')}
    state |= {f'backbone.body.{key}': t for key, t in body.state_dict().items() if not key.startswith('fc.')}
    torch.save(of_the_reference_training(state, compress_rate=rates), tmp_path / 'model_25.pth')
    content = import_detector(tmp_path / 'model_25.pth')
    assert content['config']['model']['backbone'] == 'norton_resnet50'
    torch.save(content, tmp_path / 'ours.pt')
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    for name in ('model_25.pth', 'ours.pt'):
        model, _ = load_detector(tmp_path / name)
        with torch.no_grad():
            for mine, expected in zip(model.double().backbone.body(image)[-4:], body.double().body(image)):
                torch.testing.assert_close(mine, expected, rtol=0, atol=1e-8)


def test_raw_files_in_the_tools(tool, tmp_path: Path) -> None:
    """Evaluated and shown without an import, and a training run can start from them."""
    name = 'norton_resnet50.r078'
    data = write_sample(tmp_path / 'sample', train=1, val=1, size=(96, 96))
    file = data / 'annotations' / 'instances_val2017.json'
    file.write_text(file.read_text().replace('"ball"', '"sports ball"').replace('"box"', '"suitcase"'))  # COCO's names
    rest = {k: t for k, t in build_detector('box', name).state_dict().items() if 'backbone.body' not in k}
    torch.save(of_the_reference_training({**authors_body(name), **rest}), tmp_path / 'model_45.pth')
    done = tool('eval_det.py', 'model_45.pth', '--data', data, '--workers', 0, '--device', 'cpu')
    assert done.code == 0, done.err
    assert json.loads((tmp_path / 'eval_val.json').read_text())['bbox'].keys() >= {'AP', 'AP50'}
    done = tool('demo_video.py', '--weights', 'model_45.pth', '--headless', '--frames', 2, '--warmup', 0, '--imgsz', 64)
    assert done.code == 0 and name in done.out, done.err
    ours = load_detector(tmp_path / 'model_45.pth')[0].state_dict()
    start = build_detector('box', name, weights=tmp_path / 'model_45.pth')  # what train_det.py starts from
    assert all(torch.equal(tensor, ours[key]) for key, tensor in start.state_dict().items())
    missing = of_the_reference_training({**authors_body(name), **heads('box', 91)})
    torch.save(missing, tmp_path / 'part.pth')
    done = tool('eval_det.py', 'part.pth', '--data', data)
    assert done.code == 2 and len(done.error_lines()) == 1
    assert f'part.pth does not fit a box detector on {name}' in done.err


@pytest.mark.parametrize('task', ['mask', 'keypoint'])
def test_the_tools_name_the_task_of_weights_for_another(task: str, tool, tmp_path: Path) -> None:
    options = {'model.fpn_channels': 16, 'model.box_head': 16, 'model.mask_layers': [8], 'model.keypoint_layers': [8]}
    values = {'task': task, 'model.backbone': 'resnet10t', **options}
    config, points = load_config(None, [], values), 3 if task == 'keypoint' else 0
    meta = {'task': task, 'num_classes': 2, 'class_names': ['__background__', 'person'], 'label_to_category': {1: 1},
            'num_keypoints': points, 'keypoint_names': list('abc')[:points], 'skeleton': []}  # fmt: skip
    model = detector_from_config(config, meta)
    save_checkpoint('w.pt', {'model': model.state_dict(), 'ema': None, 'config': config.to_dict(), 'meta': meta})
    data = write_sample(tmp_path / 'sample', train=1, val=1, size=(96, 96))
    for name, *arguments in (
        ('train_det.py', '--weights', 'w.pt', '--backbone', 'resnet10t', '--data', data),
        ('eval_det.py', 'w.pt', '--data', data),
        ('demo_video.py', '--weights', 'w.pt', '--headless'),
        ('export.py', '--weights', 'w.pt', '--images', data / 'val2017', '--output', 'x.onnx'),
    ):
        done = tool(name, '--task', 'box', *arguments)
        assert (done.code, done.out) == (2, '') and len(done.error_lines()) == 1, done.err
        assert f'w.pt is a detector for task {task}, got task box: give --task {task}' in done.err
    assert not (tmp_path / 'runs').exists() and not (tmp_path / 'x.onnx').exists()
    done = tool('demo_video.py', '--task', 'box', '--weights', 'maskrcnn_resnet50_fpn', '--headless')
    assert done.code == 2 and 'give --task mask' in done.err  # told before anything is downloaded
