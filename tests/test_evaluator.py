"""COCO metrics against pycocotools used by hand, hand-computed values, and several processes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.data.annotations import load_coco
from detection.data.coco import CocoDataset
from detection.data.sample import write_sample
from detection.evaluation.coco_metrics import CocoEvaluator, metric_names
from detection.tasks import TASKS

BACKENDS = ['pycocotools', 'faster']


@pytest.fixture(scope='module')
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp('sample'), train=1, val=24, size=(160, 160))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == 'faster':
        pytest.importorskip('faster_coco_eval')
    return request.param


def as_output(target: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Ground truth in the shape of a detector's output."""
    output = {k: v for k, v in target.items() if k in ('boxes', 'labels', 'keypoints')}
    output['scores'] = torch.linspace(1, 0.5, len(target['boxes']))
    if 'masks' in target:
        output['masks'] = target['masks'][:, None].float()
    return output


def noisy(target: dict[str, Any], rng: np.random.Generator, classes: list[int]) -> dict[str, torch.Tensor]:
    """Ground truth with jitter, misses, doubles, wrong labels and tied scores."""
    keep = torch.from_numpy(np.flatnonzero(rng.random(len(target['boxes'])) < 0.9))
    keep = torch.cat([keep, keep[rng.random(len(keep)) < 0.4]])
    output = {k: v[keep].clone() for k, v in as_output(target).items()}
    count = len(keep)
    size = (output['boxes'][:, 2:] - output['boxes'][:, :2]).repeat(1, 2)
    output['boxes'] += torch.from_numpy(rng.normal(0, 0.08, (count, 4))).float() * size
    output['boxes'][:, 2:] = torch.maximum(output['boxes'][:, 2:], output['boxes'][:, :2] + 0.5)
    wrong = torch.from_numpy(rng.random(count) < 0.2)
    output['labels'][wrong] = torch.from_numpy(rng.choice(classes, count))[wrong]
    output['scores'] = torch.from_numpy(rng.choice(np.linspace(0.05, 1, 12), count)).float()
    if 'masks' in output:
        output['masks'] = torch.roll(output['masks'], (int(rng.integers(-3, 4)), int(rng.integers(-3, 4))), (2, 3))
    if 'keypoints' in output:
        output['keypoints'][..., :2] += torch.from_numpy(rng.normal(0, 4, (count, 17, 2))).float()
        output['keypoints'][..., 2] = 1
    return output


def fill(evaluator: CocoEvaluator, data: CocoDataset, seed: int | None = None) -> CocoEvaluator:
    """Process the whole set: the ground truth, or with a seed noisy copies of it."""
    for index in range(len(data)):
        target = data[index][1]
        rng = np.random.default_rng([seed or 0, index])
        output = as_output(target) if seed is None else noisy(target, rng, list(data.label_to_category))
        evaluator.process([target], [output])
    return evaluator


def by_hand(data: CocoDataset, iou_type: str, seed: int) -> np.ndarray:
    """COCO's figures with pycocotools as its documentation shows it, from results built here."""
    results = []
    for index in range(len(data)):
        target = data[index][1]
        output = noisy(target, np.random.default_rng([seed, index]), list(data.label_to_category))
        for i in range(len(output['boxes'])):
            label = int(output['labels'][i])
            result = {'image_id': target['image_id'], 'category_id': data.label_to_category[label]}
            result['score'] = float(output['scores'][i])
            x0, y0, x1, y1 = output['boxes'][i].double().tolist()
            if iou_type == 'bbox':
                result['bbox'] = [x0, y0, x1 - x0, y1 - y0]
            elif iou_type == 'segm':
                result['segmentation'] = mask_utils.encode(np.asfortranarray(output['masks'][i, 0].numpy() > 0.5))
            else:
                result['keypoints'] = output['keypoints'][i].double().flatten().tolist()
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data.annotation_file))
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('source', ['tiny_coco', 'sample'])
def test_ground_truth_fed_back_scores_one(source: str, task: str, backend: str, request: Any) -> None:
    data = CocoDataset(request.getfixturevalue(source), 'val', task)
    metrics = fill(CocoEvaluator(data.coco, task, data.label_to_category, backend=backend), data).evaluate()
    assert list(metrics) == {'box': ['bbox'], 'mask': ['bbox', 'segm'], 'keypoint': ['bbox', 'keypoints']}[task]
    for iou_type, figures in metrics.items():
        assert tuple(figures) == metric_names(iou_type)
        assert [figures[name] for name in ('AP', 'AP50', 'AP75')] == pytest.approx([1.0] * 3)
        # -1: pictures of 160 pixels have no large objects
        assert all(figures[name] in (pytest.approx(1.0), -1.0) for name in ('APm', 'APl', 'ARm', 'ARl'))


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('source', ['tiny_coco', 'sample'])
def test_noisy_detections_score_as_with_pycocotools_by_hand(source: str, task: str, backend: str, request: Any) -> None:
    data = CocoDataset(request.getfixturevalue(source), 'val', task)
    metrics = fill(CocoEvaluator(data.coco, task, data.label_to_category, backend=backend), data, seed=1).evaluate()
    for iou_type, figures in metrics.items():
        expected = by_hand(data, iou_type, seed=1)
        np.testing.assert_allclose(list(figures.values()), expected[: len(figures)], rtol=0, atol=1e-12)
        assert 0.05 < figures['AP'] < 0.95


def square(x: float, y: float, side: float = 10) -> list[float]:
    return [x, y, x + side, y + side]


def tiny(**category: Any) -> COCO:
    """One image with two objects of one category, built without files."""
    points = {'keypoints': [5, 5, 2, 12, 12, 2], 'num_keypoints': 2} if 'keypoints' in category else {}
    coco = COCO()
    coco.dataset = {
        'images': [{'id': 1, 'width': 100, 'height': 100, 'file_name': 'a'}, {'id': 2, 'width': 9, 'height': 9}],
        'categories': [{'id': 5, 'name': 'thing', **category}],
        'annotations': [
            {'id': i, 'image_id': 1, 'category_id': 5, 'bbox': [x, x, 10, 10], 'area': 100, 'iscrowd': 0, **points}
            for i, x in ((1, 10), (2, 50))
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def boxes(*corners: list[float], labels: list[int] | None = None) -> dict[str, torch.Tensor]:
    return {
        'boxes': torch.tensor(corners).reshape(-1, 4),
        'labels': torch.tensor(labels or [1] * len(corners)),
        'scores': torch.linspace(0.9, 0.1, len(corners)),
    }


def test_values_computed_by_hand(backend: str) -> None:
    evaluator = CocoEvaluator(tiny(), 'box', backend=backend)
    # one of two found: precision 1 up to recall 0.5, which is 51 of COCO's 101 recall values
    evaluator.process([{'image_id': 1}], [boxes(square(10, 10))])
    figures = evaluator.evaluate()['bbox']
    assert figures['AP50'] == pytest.approx(51 / 101)
    assert figures['AR100'] == pytest.approx(0.5)
    # both found, with a false alarm between them: precision 1, then 2/3
    evaluator.reset()
    evaluator.process([{'image_id': 1}], [boxes(square(10, 10), square(80, 80), square(50, 50))])
    assert evaluator.evaluate()['bbox']['AP50'] == pytest.approx((51 + 50 * 2 / 3) / 101)
    # overlap 9x10 / (2 * 100 - 90) = 0.818: right for the thresholds 0.5 to 0.8, seven of ten
    evaluator.reset()
    evaluator.process([{'image_id': 1}], [boxes([11.0, 10.0, 21.0, 20.0], square(50, 50))])
    figures = evaluator.evaluate()['bbox']
    assert figures['AP75'] == pytest.approx(1.0)
    assert figures['AR100'] == pytest.approx((7 * 1 + 3 * 0.5) / 10)


@pytest.mark.parametrize('task', TASKS)
def test_no_detections_give_zero(sample: Path, task: str, backend: str) -> None:
    data = CocoDataset(sample, 'val', task)
    evaluator = CocoEvaluator(data.coco, task, data.label_to_category, backend=backend)
    nothing = {
        'boxes': torch.zeros(0, 4),
        'labels': torch.zeros(0, dtype=torch.int64),
        'scores': torch.zeros(0),
        'masks': torch.zeros(0, 1, 160, 160),
        'keypoints': torch.zeros(0, 17, 3),
    }
    for index in range(len(data)):
        evaluator.process([data[index][1]], [nothing])
    for figures in evaluator.evaluate().values():
        assert figures['AP'] == figures['AP50'] == 0.0
        assert set(figures.values()) <= {0.0, -1.0}
    assert evaluator.results('bbox') == []


def test_a_set_without_ground_truth_gives_minus_one(backend: str) -> None:
    coco = tiny()
    coco.dataset['annotations'] = []
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    evaluator = CocoEvaluator(coco, 'box', backend=backend)
    evaluator.process([{'image_id': 1}], [boxes(square(10, 10))])
    assert set(evaluator.evaluate()['bbox'].values()) == {-1.0}


def test_every_image_counts_once(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    coco = tiny()
    evaluator = CocoEvaluator(coco, 'box', backend=backend)
    for _ in range(3):
        evaluator.process([{'image_id': torch.tensor(1)}], [boxes(square(10, 10), square(50, 50))])
    assert evaluator.evaluate()['bbox']['AP'] == 1.0
    assert '1 of 2 images were not evaluated' in caplog.text
    # a false alarm in the other image, with a higher score than all, costs precision
    evaluator.process([{'image_id': 2}], [{**boxes(square(0, 0)), 'scores': torch.ones(1)}])
    assert evaluator.evaluate()['bbox']['AP'] == pytest.approx(2 / 3)
    only = CocoEvaluator(coco, 'box', backend=backend, image_ids=[2])
    only.process([{'image_id': 1}], [boxes(square(10, 10))])
    assert only.results('bbox') == []


def test_crowds_neither_help_nor_hurt(backend: str) -> None:
    coco = tiny()
    coco.dataset['annotations'][1] |= {'iscrowd': 1, 'bbox': [50, 50, 40, 40], 'area': 1600}
    evaluator = CocoEvaluator(coco, 'box', backend=backend)
    evaluator.process([{'image_id': 1}], [boxes(square(52, 52), square(70, 70), square(10, 10))])
    assert evaluator.evaluate()['bbox']['AP'] == pytest.approx(1.0)


def test_labels_without_a_category_are_dropped(backend: str) -> None:
    evaluator = CocoEvaluator(tiny(), 'box', {1: 5}, backend=backend)
    evaluator.process([{'image_id': 1}], [boxes(square(0, 0), square(10, 10), square(50, 50), labels=[7, 1, 1])])
    assert evaluator.evaluate()['bbox']['AP'] == pytest.approx(1.0)


def test_other_keypoints_need_their_own_sigmas(backend: str) -> None:
    coco = tiny(keypoints=['a', 'b'], sigmas=[0.1, 0.2])
    output = {**boxes(square(10, 10), square(50, 50)), 'keypoints': torch.tensor([[[5.0, 5, 1], [12, 14, 1]]] * 2)}

    def score(**options: Any) -> float:
        evaluator = CocoEvaluator(coco, 'keypoint', backend=backend, **options)
        evaluator.process([{'image_id': 1}], [output])
        return evaluator.evaluate()['keypoints']['AP']

    # similarity (1 + exp(-d^2 / (2 area (2 sigma)^2))) / 2 with d = 2 and area 100: right for the thresholds below it
    for sigma, similarity in ((0.2, 0.9412), (0.1, 0.8033), (0.05, 0.5677)):
        assert (1 + np.exp(-4 / (2 * 100 * (2 * sigma) ** 2))) / 2 == pytest.approx(similarity, abs=1e-4)
        right = sum(threshold < similarity for threshold in np.linspace(0.5, 0.95, 10))
        assert score(sigmas=[0.1, sigma]) == pytest.approx(right / 10)
    assert score() == score(sigmas=[0.1, 0.2])
    with pytest.raises(ValueError, match='got 3 sigmas for 2 keypoints'):
        score(sigmas=[0.1, 0.1, 0.1])


def test_per_category_ap_is_that_of_each_category_alone(tiny_coco: Path, backend: str) -> None:
    data = CocoDataset(tiny_coco, 'val', 'box')
    evaluator = fill(CocoEvaluator(data.coco, 'box', data.label_to_category, backend=backend), data, seed=2)
    overall = evaluator.evaluate()['bbox']['AP']
    table = evaluator.per_category('bbox')
    assert len(table) == 80
    present = [v for v in table.values() if not np.isnan(v)]
    assert np.mean(present) == pytest.approx(overall)
    for category in (1, 3, 62):
        alone = CocoEvaluator(data.coco, 'box', {category: category}, backend='pycocotools')
        expected = fill(alone, data, seed=2).evaluate()['bbox']['AP']
        assert table[data.class_names[category]] == pytest.approx(expected)


@pytest.mark.parametrize('task', ['mask', 'keypoint'])
def test_written_results_are_what_coco_takes(sample: Path, tmp_path: Path, task: str) -> None:
    data = CocoDataset(sample, 'val', task)
    evaluator = fill(CocoEvaluator(data.coco, task, data.label_to_category, backend='pycocotools'), data, seed=3)
    metrics = evaluator.evaluate()
    paths = evaluator.write_results(tmp_path / 'out')
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == sorted(p.name for p in paths)
    for iou_type, path in zip(metrics, paths):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(data.annotation_file))
            evaluation = COCOeval(truth, truth.loadRes(str(path)), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert evaluation.stats[0] == metrics[iou_type]['AP']
        assert {'image_id', 'category_id', 'score'} < set(json.loads(path.read_text())[0])


def test_evaluating_prints_nothing_and_leaves_the_annotations_usable(
    tiny_coco: Path, backend: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = CocoDataset(tiny_coco, 'val', 'mask')
    before = data[3][1]['masks']
    evaluator = fill(CocoEvaluator(data.coco, 'mask', data.label_to_category, backend=backend), data)
    first = evaluator.evaluate()
    assert evaluator.evaluate() == first
    assert torch.equal(data[3][1]['masks'], before)
    assert capfd.readouterr().out == ''


def test_wrong_use_is_named(sample: Path) -> None:
    data = CocoDataset(sample, 'val', 'mask')
    with pytest.raises(ValueError, match='unknown task'):
        CocoEvaluator(data.coco, 'segm')
    with pytest.raises(ValueError, match="unknown backend 'fast'; expected one of auto, pycocotools, faster"):
        CocoEvaluator(data.coco, 'mask', backend='fast')
    with pytest.raises(ValueError, match=r'image ids \[999\] are not in the annotations'):
        CocoEvaluator(data.coco, 'mask', image_ids=[1, 999])
    evaluator = CocoEvaluator(data.coco, 'mask')
    with pytest.raises(ValueError, match='image id 999 is not in the annotations'):
        evaluator.process([{'image_id': 999}], [boxes()])
    with pytest.raises(ValueError, match="output has no masks; task 'mask' expects boxes, labels, masks, scores"):
        evaluator.process([{'image_id': 1}], [boxes()])
    with pytest.raises(ValueError, match='got 1 targets and 2 outputs'):
        evaluator.process([{'image_id': 1}], [boxes(), boxes()])
    with pytest.raises(ValueError, match='expected evaluate'):
        evaluator.per_category('bbox')


def _worker(rank: int, folder: str, root: str) -> None:
    """Evaluates with three processes, then with the first two of them: starting one costs more than its work."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    data = CocoDataset(root, 'val', 'mask')
    for world in (3, 2):
        if rank >= world:
            continue
        dist.init_process_group('gloo', init_method=f'file://{folder}/store{world}', rank=rank, world_size=world)
        evaluator = CocoEvaluator(data.coco, 'mask', data.label_to_category)
        # as DistributedSampler does: the first images come twice, so that all processes get as many
        indices = list(range(len(data)))
        indices += indices[: -len(data) % world]
        for index in indices[rank::world]:
            target = data[index][1]
            rng = np.random.default_rng([4, index])
            evaluator.process([target], [noisy(target, rng, list(data.label_to_category))])
        Path(folder, f'{world}-{rank}.json').write_text(json.dumps(evaluator.evaluate()))
        dist.destroy_process_group()


def test_any_number_of_processes_gives_the_same_figures(tiny_coco: Path, tmp_path: Path) -> None:
    data = CocoDataset(tiny_coco, 'val', 'mask')
    alone = fill(CocoEvaluator(data.coco, 'mask', data.label_to_category), data, seed=4).evaluate()
    torch.multiprocessing.spawn(_worker, (str(tmp_path), str(tiny_coco)), nprocs=3)
    for world, rank in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)):
        assert json.loads((tmp_path / f'{world}-{rank}.json').read_text()) == alone
    assert 0.05 < alone['segm']['AP'] < 0.95


@pytest.mark.slow
def test_fast_backend_is_faster_with_equal_figures_on_5000_images() -> None:
    """5,000 images, 100 detections each; prints the times (``-s``)."""
    pytest.importorskip('faster_coco_eval')
    coco, outputs = synthetic(5000, 100)
    seconds, figures = {}, {}
    for backend in BACKENDS:
        evaluator = CocoEvaluator(coco, 'box', backend=backend)
        for image_id, output in outputs.items():
            evaluator.process([{'image_id': image_id}], [output])
        start = time.perf_counter()
        figures[backend] = evaluator.evaluate()['bbox']
        seconds[backend] = time.perf_counter() - start
    print(seconds, seconds['pycocotools'] / seconds['faster'], figures['faster'], file=sys.stderr)
    assert figures['faster'] == pytest.approx(figures['pycocotools'], abs=1e-12)
    assert seconds['pycocotools'] > 8 * seconds['faster']


def synthetic(images: int, detections: int) -> tuple[COCO, dict[int, dict[str, torch.Tensor]]]:
    """Random objects of 80 categories and detections scattered around them."""
    rng = np.random.default_rng(0)
    records, outputs = [], {}
    for image_id in range(1, images + 1):
        count = 8
        corner, size = rng.uniform(0, 500, (count, 2)), np.exp(rng.uniform(2, 5, (count, 2)))
        labels = rng.integers(1, 81, count)
        for c, s, label in zip(corner.tolist(), size.tolist(), labels.tolist()):
            record = {'id': len(records) + 1, 'image_id': image_id, 'category_id': label, 'bbox': [*c, *s]}
            records.append({**record, 'area': s[0] * s[1], 'iscrowd': 0})
        pick = rng.integers(0, count, detections)
        low = corner[pick] + rng.normal(0, 0.1, (detections, 2)) * size[pick]
        high = low + size[pick] * np.exp(rng.normal(0, 0.15, (detections, 2)))
        wrong = rng.random(detections) < 0.5
        outputs[image_id] = {
            'boxes': torch.from_numpy(np.concatenate([low, high], 1)).float(),
            'labels': torch.from_numpy(np.where(wrong, rng.integers(1, 81, detections), labels[pick])),
            'scores': torch.from_numpy(rng.random(detections)).float(),
        }
    coco = COCO()
    coco.dataset = {
        'images': [{'id': i, 'width': 640, 'height': 640} for i in range(1, images + 1)],
        'categories': [{'id': i, 'name': f'category {i}'} for i in range(1, 81)],
        'annotations': records,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco, outputs


def test_fast_and_reference_backends_agree_on_synthetic_images() -> None:
    pytest.importorskip('faster_coco_eval')
    coco, outputs = synthetic(60, 100)
    figures = []
    for backend in BACKENDS:
        evaluator = CocoEvaluator(coco, 'box', backend=backend)
        evaluator.process([{'image_id': i} for i in outputs], list(outputs.values()))
        figures.append(evaluator.evaluate()['bbox'])
    assert figures[0] == pytest.approx(figures[1], abs=1e-12)
    assert 0.05 < figures[0]['AP'] < 0.95


def test_annotation_ids_of_zero_are_matched(tmp_path: Path) -> None:
    """COCOeval takes a match with id 0 for none; ``load_coco`` renumbers."""
    content = tiny().dataset
    content['images'][1]['file_name'] = 'b'
    for record in content['annotations']:
        record['id'] -= 1
    (tmp_path / 'a.json').write_text(json.dumps(content))
    evaluator = CocoEvaluator(load_coco(tmp_path / 'a.json'), 'box', backend='pycocotools')
    evaluator.process([{'image_id': 1}], [boxes(square(10, 10), square(50, 50))])
    assert evaluator.evaluate()['bbox']['AP'] == 1.0
