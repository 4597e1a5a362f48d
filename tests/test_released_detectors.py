"""Detectors that torchvision trained on COCO, by name; files of random tensors lie where torchvision keeps its own."""

from __future__ import annotations

import hashlib
import io
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.ops import FrozenBatchNorm2d

from detection.data.sample import write_sample
from detection.rcnn import MOBILENET, RELEASED, build_detector
from detection.rcnn.released import released_file
from detection.training import detector_from_config, load_config, load_detector, save_checkpoint
from norton_timm import count, deploy
from norton_timm.checkpoints import surgery_of
from norton_timm.compression import CompressionSpec, compress

V2 = {'num_classes': 3, 'fpn_channels': 16, 'box_head': 32, 'mask_layers': (16, 16), 'keypoint_layers': (16,),
      'min_size': 64, 'version': 2}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


def refuse(*_: object, **__: object) -> None:
    raise urllib.error.URLError('no network here')


def put(home: Path, name: str) -> Path:
    """A file as torchvision's of that name, but with random weights and statistics."""
    torch.manual_seed(0)
    model = get_model(name, weights=None, weights_backbone=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 1e-3, 2e-3)
            nn.init.uniform_(module.weight, 0.01, 0.04)
    home.mkdir(parents=True, exist_ok=True)
    path = home / get_model_weights(name).DEFAULT.url.rpartition('/')[2]
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize('name', sorted(RELEASED))
def test_by_name_it_is_torchvisions_own(name: str, home: Path) -> None:
    put(home, name)
    theirs = get_model(name, weights='DEFAULT', box_score_thresh=0.0, rpn_score_thresh=0.0).eval()
    ours, meta = load_detector(name)
    assert meta['task'] == RELEASED[name].task and meta['config'].model.backbone == RELEASED[name].shapes['backbone']
    assert meta['class_names'][1] == 'person'
    for part in ('min_size', 'max_size'):
        assert [*_listed(getattr(ours.transform, part))][-1] == [*_listed(getattr(theirs.transform, part))][-1]
    assert ours.rpn.pre_nms_top_n() == theirs.rpn.pre_nms_top_n()
    assert ours.rpn.post_nms_top_n() == theirs.rpn.post_nms_top_n()
    assert ours.rpn.score_thresh == get_model(name, weights='DEFAULT').rpn.score_thresh
    image = [torch.rand(3, 96, 128)]
    ours.roi_heads.score_thresh = ours.rpn.score_thresh = 0.0
    for model in (ours, theirs):
        model.transform.min_size, model.transform.max_size, model.roi_heads.detections_per_img = (96,), 128, 5
    with torch.no_grad():
        found, expected = ours(image)[0], theirs(image)[0]
    assert len(expected['boxes']) == 5
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)


def _listed(value: object) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def test_without_a_network_one_line_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    monkeypatch.setattr(torch.hub, 'urlopen', refuse)
    for name in RELEASED:
        url = get_model_weights(name).DEFAULT.url
        with pytest.raises(ConnectionError, match='no network here') as error:
            load_detector(name)
        assert url in str(error.value) and str(home / url.rpartition('/')[2]) in str(error.value)
        assert '\n' not in str(error.value) and not [p for p in home.iterdir() if p.suffix != '.lock']


class Answer(io.BytesIO):
    """What a server sends; it does not say how long it is."""

    def info(self) -> dict:
        return _NoLength()


class _NoLength(dict):
    def get_all(self, _: str) -> None:
        return None


def test_a_download_is_checked_by_the_digits_in_its_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, 'urlopen', lambda *_: Answer(b'something else'))
    with pytest.raises(ValueError, match='was refused and removed: invalid hash value') as error:
        released_file('fasterrcnn_resnet50_fpn')
    assert hashlib.sha256(b'something else').hexdigest() in str(error.value)
    assert not [p for p in home.iterdir() if p.suffix != '.lock']


def test_what_differs_is_told_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, 'urlopen', refuse)
    name = 'maskrcnn_resnet50_fpn_v2'
    for arguments, told in (
        (('box', 'resnet50'), "task is 'box', expected 'mask' with weights maskrcnn_resnet50_fpn_v2"),
        (('mask', 'resnet18'), "backbone is 'resnet18', expected 'resnet50'"),
    ):
        with pytest.raises(ValueError, match=told):
            build_detector(*arguments, weights=name)
    with pytest.raises(ValueError, match='version is 1, expected 2'):
        build_detector('mask', 'resnet50', weights=name, version=1)
    with pytest.raises(ValueError, match='give --task mask'):
        load_detector(name, 'box')
    with pytest.raises(ValueError, match="backbone is 'resnet18', expected 'resnet50'"):
        load_detector(name, None, 'resnet18')
    with pytest.raises(ValueError, match=r"model\.backbone is 'resnet18', expected 'resnet50'"):
        load_config(None, ['model.backbone=resnet18'], {'model.weights': name})
    with pytest.raises(ValueError, match="task is 'box', expected 'mask'"):
        load_config(None, [], {'task': 'box', 'model.weights': name})
    config = load_config(None, [], {'model.weights': name})
    assert (config.task, config.model.backbone, config.model.version) == ('mask', 'resnet50', 2)
    with pytest.raises(ValueError, match=r'model\.version is 3, expected one of 1, 2'):
        load_config(None, ['model.version=3'])
    with pytest.raises(ValueError, match='no file maskrcnn_resnet50_v2, did you mean maskrcnn_resnet50_fpn_v2'):
        load_config(None, [], {'model.weights': 'maskrcnn_resnet50_v2'})


def test_a_damaged_file_is_told(home: Path) -> None:
    home.mkdir(parents=True)
    file = home / 'fasterrcnn_resnet50_fpn_coco-258fb6c6.pth'
    for content, told in ((b'half of it', 'cannot be read|can be read'), (None, 'holds no detector')):
        if content is None:
            torch.save({'fc.weight': torch.zeros(2, 2)}, file)
        else:
            file.write_bytes(content)
        for read in (load_detector, lambda name: build_detector('box', 'resnet50', weights=name)):
            with pytest.raises(ValueError, match=told) as error:
                read('fasterrcnn_resnet50_fpn')
            assert str(file) in str(error.value) and 'remove the file to get it again' in str(error.value)


def test_a_detector_of_boxes_starts_one_for_keypoints(home: Path, caplog) -> None:
    theirs = torch.load(put(home, 'fasterrcnn_resnet50_fpn'))
    with pytest.raises(ValueError, match="task is 'keypoint', expected 'box'"):
        build_detector('keypoint', 'resnet50', weights='fasterrcnn_resnet50_fpn')
    model = build_detector('keypoint', 'resnet50', weights='fasterrcnn_resnet50_fpn', partial=True)
    assert 'roi_heads.keypoint_head.0.weight' in caplog.text
    assert torch.equal(model.roi_heads.box_head.fc6.weight, theirs['roi_heads.box_head.fc6.weight'])


LAST = {
    'fasterrcnn_resnet50_fpn_v2': ['box_predictor.bbox_pred', 'box_predictor.cls_score'],
    'maskrcnn_resnet50_fpn_v2': [
        'box_predictor.bbox_pred', 'box_predictor.cls_score', 'mask_predictor.mask_fcn_logits',
    ],
    'keypointrcnn_resnet50_fpn': ['box_predictor.bbox_pred', 'box_predictor.cls_score'],
}  # fmt: skip


@pytest.mark.parametrize('name', sorted(LAST))
def test_layers_of_other_classes_start_anew_and_are_named(name: str, home: Path, caplog) -> None:
    theirs = torch.load(put(home, name))
    model = build_detector(RELEASED[name].task, 'resnet50', num_classes=5, weights=name)
    state = model.state_dict()
    anew = [f'roi_heads.{layer}.{leaf}' for layer in LAST[name] for leaf in ('bias', 'weight')]
    assert all(key in caplog.text for key in anew) and f'{len(anew)} tensors keep their random start' in caplog.text
    assert state['roi_heads.box_predictor.cls_score.weight'].shape[0] == 5
    for key, tensor in theirs.items():
        if key not in anew and not key.endswith(('running_var', 'num_batches_tracked')):
            assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize('recipe', ['full', 'light'])
@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
def test_recipes_narrow_the_heads_of_version_2(task: str, recipe: str) -> None:
    dense, small = (build_detector(task, 'resnet10t', recipe=r, **V2) for r in ('backbone', recipe))
    convs = [(dense.roi_heads.box_head[k][0], small.roi_heads.box_head[k][0]) for k in range(4)]
    assert all(b.out_channels < a.out_channels and b.in_channels < a.in_channels for a, b in convs)
    norms = [small.roi_heads.box_head[k][1].num_features for k in range(4)]
    assert norms == [conv.out_channels for _, conv in convs]
    first, second = small.roi_heads.box_head[5]
    assert first.in_features == 49 * norms[-1] and first.out_features < min(first.in_features, second.out_features)
    assert (second.out_features < 32) == (recipe == 'light')
    assert [block[0].out_channels for block in small.rpn.head.conv] == norms[:2]
    image, box = [torch.rand(3, 64, 64)], torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    target = {'boxes': box, 'labels': torch.ones(1, dtype=torch.long), 'masks': torch.ones(1, 64, 64).byte(),
              'keypoints': torch.full((1, 17, 3), 20.0)}  # fmt: skip
    losses = small.train()(image, [target])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in small.roi_heads.box_head.parameters())


def test_a_trained_head_of_version_2_is_pruned_exactly() -> None:
    """Channels that nothing reads are cut, and the outputs stay: convolutions, their norms, and the layer after."""
    torch.manual_seed(0)
    model = build_detector('box', 'resnet10t', **V2).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    head = model.roi_heads.box_head
    with torch.no_grad():
        for k in range(4):
            head[k][0].weight[::2] *= 1e-3  # the smallest filters go first
            if k < 3:
                head[k + 1][0].weight[:, ::2] = 0
        head[5].weight.view(32, 16, 49)[:, ::2] = 0
    spec = CompressionSpec(rank=0, rates={'roi_heads.box_head.?.0': 0.5}, criterion='l1', scope='detector')
    small = compress(model, spec, [torch.rand(3, 64, 64)])[0]
    assert [small.roi_heads.box_head[k][0].out_channels for k in range(4)] == [8] * 4
    x = torch.rand(5, 16, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(small.roi_heads.box_head(x), head(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('recipe', ['backbone', 'full'])
def test_a_checkpoint_of_version_2_comes_back(recipe: str, tmp_path: Path) -> None:
    options = {f'model.{key}': value for key, value in V2.items() if key not in ('num_classes', 'min_size')}
    config = load_config(None, [], {'task': 'mask', 'model.backbone': 'resnet10t', 'model.recipe': recipe, **options})
    meta = {'task': 'mask', 'num_classes': 3, 'class_names': ['__background__', 'a', 'b'],
            'label_to_category': {1: 1, 2: 2}, 'num_keypoints': 0, 'keypoint_names': [], 'skeleton': []}  # fmt: skip
    model = detector_from_config(config, meta).eval()
    content = {'model': model.state_dict(), 'ema': None, 'config': config.to_dict(), 'meta': meta}
    save_checkpoint(tmp_path / 'a.pt', {**content, 'surgery': surgery_of(model) if recipe == 'full' else None})
    loaded, _ = load_detector(tmp_path / 'a.pt')
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    again = build_detector('mask', 'resnet10t', recipe=recipe, weights=tmp_path / 'a.pt', **V2).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in state.items() if key in again)


def test_the_tools(tool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_sample(tmp_path / 'sample', train=2, val=1, size=(96, 96))
    name = 'fasterrcnn_resnet50_fpn_v2'
    train = ('train_det.py', '--weights', name, '--data', data, '--iterations', 1, '--workers', 0, '--device', 'cpu',
             '--set', 'model.min_size=[64]', '--set', 'data.batch_size=2', '--output', 'run')  # fmt: skip
    monkeypatch.setattr(torch.hub, 'urlopen', refuse)
    for command in (train, ('eval_det.py', '--weights', name), ('demo_video.py', '--weights', name, '--headless')):
        done = tool(*command)
        assert done.code == 1 and len(done.error_lines()) == 1 and 'fpn_v2_coco-dd69338a.pth' in done.err, done.err
        done = tool(*command, '--task', 'mask')
        assert done.code == 2 and len(done.error_lines()) == 1 and 'box' in done.err, done.err
        done = tool(*command, '--backbone', 'resnet18')
        assert done.code == 2 and "backbone is 'resnet18', expected 'resnet50'" in done.err, done.err
    put(home, name)
    done = tool(*train)
    assert done.code == 0 and f'weights from {name}' in done.out and 'cls_score.weight' in done.err, done.err
    content = torch.load(tmp_path / 'run' / 'checkpoint.pt')
    model = content['config']['model']
    assert (model['backbone'], model['version'], model['fpn_channels']) == ('resnet50', 2, 256)
    assert list(model['anchor_sizes']) == [32, 64, 128, 256, 512]  # not those that the sample set is trained with
    for file in (data / 'annotations').glob('instances_*.json'):  # COCO's names
        file.write_text(file.read_text().replace('"ball"', '"sports ball"').replace('"box"', '"suitcase"'))
    done = tool('eval_det.py', '--weights', name, '--data', data, '--workers', 0, '--device', 'cpu')
    assert done.code == 0 and 'AP' in json.loads((tmp_path / 'eval_val.json').read_text())['bbox'], done.err
    done = tool('demo_video.py', '--weights', name, '--headless', '--frames', 1, '--warmup', 0, '--imgsz', 64)
    assert done.code == 0 and name in done.out, done.err


@pytest.mark.parametrize('recipe', ['backbone', 'full'])
def test_a_pyramid_of_three_levels_is_trained_and_compressed(recipe: str, home: Path, tmp_path: Path) -> None:
    name = 'fasterrcnn_mobilenet_v3_large_320_fpn'
    put(home, name)
    config = load_config(None, [f'model.recipe={recipe}'], {'model.weights': name})
    assert (config.task, config.model.backbone, config.model.min_size) == ('box', MOBILENET, (320,))
    other = load_config(None, ['model.rcnn.rpn_score_thresh=0.1', 'model.max_size=500'], {'model.weights': name})
    assert (other.model.rcnn['rpn_score_thresh'], other.model.max_size) == (0.1, 500)
    assert other.model.rcnn['rpn_pre_nms_top_n_test'] == 150
    assert load_config(None, [], {'model.weights': name}).model.rcnn['rpn_score_thresh'] == 0.05
    meta = {'task': 'box', 'num_classes': 3, 'class_names': ['__background__', 'a', 'b'],
            'label_to_category': {1: 1, 2: 2}, 'num_keypoints': 0, 'keypoint_names': [], 'skeleton': []}  # fmt: skip
    model = detector_from_config(config, meta)
    assert isinstance(model.backbone.body[0][1], FrozenBatchNorm2d) and model.transform.min_size == (320,)
    assert (model.backbone.out_channels < 256) == (recipe == 'full')
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    losses = model.train()([torch.rand(3, 64, 64)], [{'boxes': box, 'labels': torch.ones(1, dtype=torch.long)}])
    sum(losses.values()).backward()
    content = {'model': model.state_dict(), 'ema': None, 'config': config.to_dict(), 'meta': meta}
    save_checkpoint(tmp_path / 'a.pt', {**content, 'surgery': surgery_of(model) if recipe == 'full' else None})
    loaded, _ = load_detector(tmp_path / 'a.pt')
    image = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), model.eval()(image))


def test_the_body_of_mobilenet_takes_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='frozen_stages is 3, expected 0 to 2'):
        build_detector('box', MOBILENET, frozen_stages=3)
    with pytest.raises(ValueError, match='takes weights of whole detectors only'):
        build_detector('box', MOBILENET, pretrained=True)
    body = build_detector('box', MOBILENET, frozen_stages=1).backbone.body
    assert [p.requires_grad for p in (body[13].block[0][0].weight, body[14].block[0][0].weight)] == [False, True]


@pytest.mark.parametrize('name', ['fasterrcnn_resnet50_fpn', 'fasterrcnn_resnet50_fpn_v2'])
def test_a_trained_detector_is_compressed_whole(name: str, home: Path) -> None:
    put(home, name)
    dense, small = (build_detector('box', 'resnet50', weights=name, recipe=r).eval() for r in ('backbone', 'full'))
    macs = [count(model, [torch.rand(3, 128, 128)]).macs for model in (dense, small)]
    parts = [sum(p.numel() for n, p in m.named_parameters() if 'backbone.body' not in n) for m in (dense, small)]
    assert macs[1] < macs[0] and parts[1] < 0.4 * parts[0]
    assert torch.equal(small.backbone.body.conv1.weight, dense.backbone.body.conv1.weight)
    biases = [model.roi_heads.box_predictor.cls_score.bias for model in (dense, small)]
    assert torch.equal(*biases)


def test_version_2_keeps_its_outputs_when_deployed() -> None:
    torch.manual_seed(0)
    model = build_detector('mask', 'resnet10t', recipe='full', box_score_thresh=0.0, box_detections_per_img=5, **V2)
    image = [torch.rand(3, 64, 64)]
    fast = deploy(model.eval(), image, autotune=False)
    assert not [n for n, m in fast.named_modules() if isinstance(m, nn.BatchNorm2d) and n.startswith('roi_heads')]
    with torch.no_grad():
        torch.testing.assert_close(fast(image), model(image), rtol=1e-3, atol=1e-3)
