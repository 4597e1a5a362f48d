"""rcnn/restore.py: whole detectors to start from, of our own runs and of torchvision's, and files that are not."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from detection.rcnn.build import build_detector
from detection.rcnn.restore import detector_content, start_from, state_of

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
}


@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
def test_names_of_torchvisions_first_version_load_whole(tmp_path: Path, task: str) -> None:
    options = {**SMALL, 'mask_layers': (16, 16), 'keypoint_layers': (16,), 'num_classes': 2}
    torch.manual_seed(1)
    state = build_detector(task, 'resnet10t', **options).state_dict()
    old = {}
    for name, tensor in state.items():
        for today, first in FIRST.items():
            name = re.sub(today, first, name)
        old[name] = tensor
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


def test_boxes_alone_make_no_detector_of_masks(tmp_path: Path) -> None:
    torch.save(detector(1).state_dict(), tmp_path / 'box.pth')
    with pytest.raises(ValueError, match=r'the first is roi_heads\.mask_head\.0\.0\.weight'):
        build_detector('mask', 'resnet18', weights=tmp_path / 'box.pth', **SMALL)
    build_detector('mask', 'resnet18', weights=tmp_path / 'box.pth', partial=True, **SMALL)
