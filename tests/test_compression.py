"""Compressed detectors: exact surgery, training, and the way back from a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from families import silence
from test_rcnn import SMALL, batch
from torch import nn

import norton_timm
from detection.rcnn.build import build_detector
from detection.rcnn.compression import compress_detector, recipe_spec
from detection.tasks import TASKS
from detection.training.checkpoint import detector_from_config, load_detector, save_checkpoint
from detection.training.config import RunConfig, config_from_dict
from norton_timm import CompressionSpec, CPDConv2d
from norton_timm.checkpoints.rebuild import surgery_of
from norton_timm.compression import compress
from norton_timm.compression.plan import make_plan
from norton_timm.graph.groups import ChannelGraph
from norton_timm.layers.low_rank import LowRankLinear
from norton_timm.profiling.complexity import count_params
from norton_timm.utils.config import ConfigError

META = {'num_classes': 3, 'num_keypoints': 17}
NAMES = {'class_names': ['__background__', 'cup', 'dog'], 'label_to_category': {1: 1, 2: 2}, 'skeleton': []}


def example(task: str) -> dict[str, object]:
    return {**SMALL, 'num_classes': 3 if task != 'keypoint' else 2}


def equal(one: list[dict], other: list[dict], exactly: bool = True) -> None:
    for a, b in zip(one, other):
        assert a.keys() == b.keys() and len(a['boxes'])
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=0 if exactly else 1e-3, atol=0 if exactly else 1e-3)


@pytest.mark.parametrize('recipe', ['full', 'light'])
@pytest.mark.parametrize('task', TASKS)
def test_losses_gradients_and_a_step(task: str, recipe: str) -> None:
    model = build_detector(task, 'resnet18', recipe=recipe, **example(task)).train()
    dense = build_detector(task, 'resnet18', **example(task))
    assert count_params(model) < count_params(dense)
    assert isinstance(model.roi_heads.box_head.fc6, LowRankLinear)
    assert model.transform.min_size == dense.transform.min_size
    assert model.rpn._post_nms_top_n == dense.rpn._post_nms_top_n
    assert model.roi_heads.score_thresh == dense.roi_heads.score_thresh
    images, targets = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(3):
        torch.manual_seed(0)
        losses = model(images, targets)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        totals.append(float(total))
    assert totals[-1] < totals[0]


def test_a_fresh_compressed_detector_starts_at_the_scale_of_a_dense_one() -> None:
    spread = {}
    for recipe in ('backbone', 'full'):
        torch.manual_seed(0)
        model = build_detector('box', 'resnet18', recipe=recipe, num_classes=3).train()
        maps = model.backbone(torch.randn(1, 3, 128, 128))
        logits, _ = model.rpn.head(list(maps.values()))
        pooled = torch.randn(8, maps['0'].shape[1], 7, 7)
        spread[recipe] = [float(maps['0'].std()), float(logits[0].std()), float(model.roi_heads.box_head(pooled).std())]
    for dense, narrow in zip(spread['backbone'], spread['full']):
        assert 0.5 < narrow / dense < 2


@pytest.mark.parametrize('task', TASKS)
def test_surviving_weights_of_a_trained_detector_stay(task: str) -> None:
    """Where all channels that must go are silent, pruning by a recipe's rates changes no output."""
    torch.manual_seed(1)
    model = build_detector(task, 'resnet18', box_score_thresh=0.0, box_detections_per_img=4, **example(task)).eval()
    whole = recipe_spec(task, 'full')
    spec = CompressionSpec(rank=0, rates=whole.rates, criterion='l1', round_to=8, scope='detector')
    images, _ = batch(1)
    graph = ChannelGraph(model, images)
    gone = set()
    for group, keep in zip(graph.groups, make_plan(model, graph, spec).keep):
        free = [int(c) for k, c in enumerate(group.classes) if k not in group.frozen]
        gone.update(free[:: max(1, len(free) // (len(group.classes) - keep))][: len(group.classes) - keep]
                    if keep < len(group.classes) else [])  # fmt: skip
    silence(graph, gone)
    with torch.no_grad():  # filters without a way out have the least norm, so that l1 selects just those
        for slot in graph.slots:
            if slot.kind == 'out' and gone & set(slot.labels.tolist()):
                at = [k for k, c in enumerate(slot.labels.tolist()) if c in gone]
                weight = slot.module.weight
                (weight if not isinstance(slot.module, nn.ConvTranspose2d) else weight.transpose(0, 1))[at] *= 1e-4
        before = model(images)
        pruned = compress_detector(copy.deepcopy(model), spec).eval()
        after = pruned(images)
    assert count_params(pruned) < count_params(model)
    assert pruned.backbone.out_channels == 16  # 12 of 32, rounded up to a multiple of 8
    equal(before, after, exactly=False)


def test_backbone_scope_is_the_same_as_compressing_the_backbone_alone() -> None:
    torch.manual_seed(0)
    body = timm.create_model('resnet50', features_only=True, out_indices=(1, 2, 3, 4)).eval()
    spec = CompressionSpec(rank={'layer*': 1}, rates='[0.]+[0.1]*2+[0.4]*5+[0.75]*12')
    alone, report = compress(body, spec, torch.zeros(1, 3, 64, 64))
    whole = build_detector('box', copy.deepcopy(body), **example('box'))
    whole = compress_detector(whole, CompressionSpec.from_dict({**spec.to_dict(), 'scope': 'backbone'}))
    inside = whole.backbone.body
    assert inside.feature_info.channels() == alone.feature_info.channels() == [230, 460, 614, 2048]
    for (name, ours), theirs in zip(inside.state_dict().items(), alone.state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert report.after.params == count_params(inside)
    assert whole.backbone.fpn.layer_blocks[0][0].out_channels == SMALL['fpn_channels']
    whole.train()(*batch())


@pytest.mark.parametrize('name', ['convnext_atto', 'mobilenetv3_small_100', 'norton_resnet50.r078'])
def test_any_backbone(name: str) -> None:
    model = build_detector('box', name, recipe='full', **example('box'))
    assert model.backbone.fpn.layer_blocks[0][0].out_channels == 16
    images, targets = batch()
    sum(model.train()(images, targets).values()).backward()


# ---- starting from files, and coming back from a checkpoint


def settings(task: str = 'box', **model: object) -> RunConfig:
    return config_from_dict({'task': task, 'model': {'backbone': 'resnet18', **SMALL, **model}})


def saved(model: nn.Module, config: RunConfig, path: Path, meta: dict = META) -> Path:
    content = {'model': model.state_dict(), 'ema': None, 'config': config.to_dict(), 'surgery': surgery_of(model),
               'meta': {'task': config.task, **NAMES, **meta}}  # fmt: skip
    return save_checkpoint(path, content)


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('channels_last', [False, True])
def test_a_checkpoint_is_all_it_takes(task: str, channels_last: bool, tmp_path: Path) -> None:
    recipe = tmp_path / 'recipe.yaml'
    CompressionSpec(rank={'layer*': 1}, rates={'layer3.*': 0.3}).to_yaml(recipe)
    config = settings(task, recipe='full', compress=str(recipe), rcnn={'box_score_thresh': 0.0})
    model = detector_from_config(config, META).eval()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    path = saved(model, config, tmp_path / 'checkpoint.pt')
    recipe.unlink()
    loaded, meta = load_detector(path)
    assert meta['config'].model.recipe == 'full'
    assert any(isinstance(m, CPDConv2d) for m in loaded.backbone.body.modules())
    assert loaded.backbone.body.feature_info.channels() == model.backbone.body.feature_info.channels()
    images, _ = batch()
    with torch.no_grad():
        equal(model(images), loaded(images))


def test_a_dense_detector_is_compressed_on_the_fly(tmp_path: Path) -> None:
    dense = detector_from_config(settings(), META)
    path = saved(dense, settings(), tmp_path / 'dense.pt')
    model = detector_from_config(settings(recipe='full', weights=str(path), norm='train'), META)
    ours, theirs = model.rpn.head.conv[0][0].weight, dense.rpn.head.conv[0][0].weight
    rows = {tuple(f.flatten().tolist()) for f in theirs.flatten(0, 1)}
    assert ours.shape[0] == 16 and all(tuple(f.flatten().tolist()) in rows for f in ours.flatten(0, 1))
    assert torch.equal(model.roi_heads.box_predictor.cls_score.weight, dense.roi_heads.box_predictor.cls_score.weight)
    # once more from the compressed one: the recipe is not applied again, other classes get fresh last layers
    second = saved(model, settings(recipe='full'), tmp_path / 'full.pt')
    again = detector_from_config(settings(recipe='full', weights=str(second), norm='train'), {**META, 'num_classes': 7})
    assert torch.equal(again.rpn.head.conv[0][0].weight, ours)
    assert again.roi_heads.box_predictor.cls_score.out_features == 7
    with pytest.raises(ValueError, match=r"full\.pt was compressed by recipe 'full' already, got recipe 'light'"):
        detector_from_config(settings(recipe='light', weights=str(second)), META)
    with pytest.raises(ValueError, match=r'full\.pt is a detector for task box, got task mask'):
        detector_from_config(settings('mask', recipe='full', weights=str(second)), META)
    with pytest.raises(ValueError, match=r'full\.pt has another backbone: resnet18, got resnet34'):
        detector_from_config(settings(recipe='full', backbone='resnet34', weights=str(second)), META)


@pytest.mark.parametrize(
    'spec',
    [
        CompressionSpec(rank={'layer*': 2}, rates=0.3),
        CompressionSpec(rank=0, low_rank={'layer?.?.conv2': 0.4}, rates={'layer4.1.conv1': 0.5}, drop=('layer3.1',)),
    ],
)
def test_a_compressed_classifier_brings_its_shapes(spec: CompressionSpec, tmp_path: Path) -> None:
    net, _ = compress(timm.create_model('resnet18'), spec)
    path = norton_timm.save(net.eval(), tmp_path / 'net.safetensors')
    config = settings(weights=str(path), norm='train')
    model = detector_from_config(config, META).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = net.forward_intermediates(image, indices=[4], intermediates_only=True)[0]
        assert torch.equal(model.backbone.body(image)[-1], expected)
    assert model.backbone.body.feature_info.channels()[-1] == net.feature_info[-1]['num_chs']
    loaded, _ = load_detector(saved(model, config, tmp_path / 'checkpoint.pt'))
    with torch.inference_mode():
        assert torch.equal(loaded.backbone.body(image)[-1], expected)
    with pytest.raises(ValueError, match=r'net\.safetensors holds a compressed resnet18, expected resnet34'):
        detector_from_config(settings(backbone='resnet34', weights=str(path)), META)


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        (None, r'model\.compress: .*none\.yaml: cannot read the spec'),
        ('rnk: 1\n', r"model\.compress: .*recipe\.yaml: unknown field 'rnk', did you mean 'rank'"),
        ('scope: neck\n', r"model\.compress: .*recipe\.yaml: scope: got 'neck', expected one of backbone, detector"),
    ],
)
def test_a_bad_recipe_is_found_before_any_work(text: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / ('none.yaml' if text is None else 'recipe.yaml')
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        settings(compress=str(path), recipe='half')
    assert "model.recipe is 'half', expected one of backbone, full, light" in caught.value.problems
    assert len(caught.value.problems) == 2


def test_a_recipe_that_does_not_fit_names_the_layer() -> None:
    spec = CompressionSpec(rank={'layer9*': 1})
    with pytest.raises(ValueError, match=r"rank: pattern 'layer9\*' matches no layer"):
        build_detector('box', 'resnet18', compress=spec, **example('box'))
