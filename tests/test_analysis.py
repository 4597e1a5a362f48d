"""Errors of a detector, by hand-made detections on drawn images."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detection.data.coco import CocoDataset
from detection.evaluation.analysis import ImageErrors, draw_errors, image_errors, mean_curves, write_report
from detection.evaluation.coco_metrics import CocoEvaluator

# id: category, x, y, width, height, crowd
OBJECTS = {
    1: [(1, 20, 40, 30, 30, 0), (2, 100, 40, 40, 40, 0), (2, 10, 100, 20, 20, 0)],
    2: [(1, 30, 30, 60, 60, 0), (1, 100, 0, 50, 120, 1)],
    3: [],
}
# x1, y1, x2, y2, label, score
FOUND = {
    1: [(21, 40, 50, 70, 1, 0.9), (100, 42, 140, 80, 1, 0.8), (60, 100, 80, 140, 2, 0.7), (0, 0, 9, 9, 2, 0.3)],
    2: [(30, 30, 90, 90, 1, 0.6), (105, 5, 140, 40, 1, 0.9)],
    3: [],
}


@pytest.fixture
def data(tmp_path: Path) -> CocoDataset:
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'val2017').mkdir()
    images, annotations = [], []
    for image, objects in OBJECTS.items():
        cv2.imwrite(str(tmp_path / 'val2017' / f'{image}.png'), np.full((160, 160, 3), 128, np.uint8))
        images.append({'id': image, 'file_name': f'{image}.png', 'width': 160, 'height': 160})
        for category, x, y, w, h, crowd in objects:
            annotations.append({'id': len(annotations) + 1, 'image_id': image, 'category_id': category,
                                'bbox': [x, y, w, h], 'area': w * h, 'iscrowd': crowd,
                                'segmentation': [[x, y, x + w, y, x + w, y + h]]})  # fmt: skip
    content = {'images': images, 'annotations': annotations,
               'categories': [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'dog'}]}  # fmt: skip
    (tmp_path / 'annotations' / 'instances_val2017.json').write_text(json.dumps(content))
    return CocoDataset(tmp_path, 'val', 'box')


@pytest.fixture
def evaluator(data: CocoDataset) -> CocoEvaluator:
    evaluator = CocoEvaluator(data.coco, 'box')
    for image, rows in FOUND.items():
        table = torch.tensor(rows).reshape(-1, 6)
        output = {'boxes': table[:, :4], 'labels': table[:, 4].long(), 'scores': table[:, 5]}
        evaluator.process([{'image_id': image}], [output])
    evaluator.evaluate()
    return evaluator


def test_errors_are_false_confused_and_missed(evaluator: CocoEvaluator) -> None:
    first, *rest = image_errors(evaluator)
    assert (first.image_id, first.count) == (1, 4)
    assert [(e['category_id'], round(e['score'], 2), e.get('is_category')) for e in first.false] == [
        (1, 0.8, 2),
        (2, 0.7, None),
    ]
    assert [m['bbox'] for m in first.missed] == [[100, 40, 40, 40], [10, 100, 20, 20]]
    assert [(e.image_id, e.count) for e in rest] == [(2, 0), (3, 0)]  # what lies in a crowd region is no error


def test_bounds_on_score_and_overlap_decide(evaluator: CocoEvaluator) -> None:
    assert [e.count for e in image_errors(evaluator, score=0.2)] == [5, 0, 0]
    assert {e.image_id: e.count for e in image_errors(evaluator, score=0.65)} == {1: 4, 2: 1, 3: 0}
    # the first cat is 29 of 30 pixels wide; now nothing lies on the dog either
    strict = image_errors(evaluator, iou=0.98)[0]
    assert (len(strict.false), len(strict.missed)) == (3, 3)
    assert not any('is_category' in e for e in strict.false)
    with pytest.raises(ValueError, match='score is 2, expected 0 to 1'):
        image_errors(evaluator, score=2)


def test_picture_shows_every_error_in_its_colour(data: CocoDataset, evaluator: CocoEvaluator, tmp_path: Path) -> None:
    path = draw_errors(data, image_errors(evaluator), tmp_path / 'worst.png')
    picture = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert picture.shape == (3 * 160 + 8, 3 * 160 + 8, 3)  # one image, enlarged; the others are right

    def colour(x: float, y: float) -> list[int]:
        return picture[4 + round(3 * y), 4 + round(3 * x)].tolist()

    assert colour(70, 140) == [255, 0, 0]  # lower edges: nothing is written over them
    assert colour(120, 80) in ([255, 140, 0], [255, 255, 0])  # on the missed dog
    assert colour(15, 120) == [255, 255, 0]
    assert colour(35, 70) == [128, 128, 128]  # the cat that was found
    with pytest.raises(ValueError, match=r'expected \.jpg or \.png'):
        draw_errors(data, [ImageErrors(3)], tmp_path / 'worst.nothing')


def test_curves_have_the_evaluators_precision(evaluator: CocoEvaluator) -> None:
    curves = mean_curves(evaluator.precision['bbox'])
    assert curves.shape == (10, 101)
    assert curves.mean() == pytest.approx(evaluator.evaluate()['bbox']['AP'])
    assert mean_curves(np.full((10, 101, 2), -1.0)).sum() == 0


def test_report_is_complete(data: CocoDataset, evaluator: CocoEvaluator, tmp_path: Path) -> None:
    paths = write_report(evaluator, data, tmp_path / 'report')
    table, errors, curves, worst = paths
    with table.open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ['category', 'bbox AP']
    assert {name: float(ap) for name, ap in rows[1:]} == pytest.approx(evaluator.per_category(), abs=1e-4)
    assert [(e['image_id'], len(e['false']), len(e['missed'])) for e in json.loads(errors.read_text())] == [(1, 2, 2)]
    assert cv2.imread(str(curves)).std() > 5
    assert cv2.imread(str(worst)).std() > 5
    assert sorted(p.name for p in (tmp_path / 'report').iterdir()) == sorted(p.name for p in paths)
