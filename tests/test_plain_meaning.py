"""Annotations written otherwise than COCO's, whose meaning is plain: training, both evaluators and the doctor agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from detection.data.annotations import load_coco
from detection.data.coco import CocoDataset
from detection.data.doctor import check_data
from detection.evaluation.coco_metrics import BACKENDS, CocoEvaluator
from detection.training.config import load_config
from detection.training.loader import training_sets

Content = dict[str, Any]
LONG = 20230815123456780  # 17 digits: floats cannot tell it from the next one


def content() -> Content:
    """Two pictures, three objects with masks and keypoints, and a crowd."""
    boxes = [
        (1, 10.0, 5.0, 20.0, 10.0),
        (1, 40.0, 5.0, 10.0, 30.0),
        (2, 4.0, 4.0, 40.0, 36.0),
        (2, 46.0, 4.0, 10.0, 40.0),
    ]
    annotations = [
        {
            'id': number,
            'image_id': image,
            'category_id': 3,
            'bbox': [x, y, w, h],
            'area': w * h,
            'iscrowd': int(number == 4),
            'segmentation': [[x, y, x + w, y, x + w, y + h, x, y + h]],
            'keypoints': [x + 1, y + 1, 2, x + w - 1, y + h - 1, 1],
            'num_keypoints': 2,
        }
        for number, (image, x, y, w, h) in enumerate(boxes, 1)
    ]
    return {
        'images': [{'id': k, 'file_name': f'{k}.png', 'width': 64, 'height': 48} for k in (1, 2)],
        'annotations': annotations,
        'categories': [{'id': 3, 'name': 'bird', 'keypoints': ['head', 'tail']}],
    }


def write(root: Path, tree: Content) -> Path:
    (root / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (root / split).mkdir()
        for prefix in ('instances', 'person_keypoints'):
            (root / f'annotations/{prefix}_{split}.json').write_text(json.dumps(tree))
        for k in (1, 2):
            cv2.imwrite(str(root / split / f'{k}.png'), np.full((48, 64, 3), 90, np.uint8))
    return root


def every(key: str, **changes: Any) -> Callable[[Content], object]:
    return lambda tree: [record.update(changes) for record in tree[key]]


def ids(convert: Callable[[int], Any]) -> Callable[[Content], None]:
    """All ids and references to them, written otherwise."""

    def change(tree: Content) -> None:
        for key in ('images', 'annotations', 'categories'):
            for record in tree[key]:
                for name in ('id', 'image_id', 'category_id'):
                    if name in record:
                        record[name] = convert(record[name])

    return change


def crowds(yes: Any, no: Any) -> Callable[[Content], None]:
    def change(tree: Content) -> None:
        for record in tree['annotations']:
            record['iscrowd'] = yes if record['iscrowd'] else no

    return change


def without(key: str, name: str) -> Callable[[Content], object]:
    return lambda tree: [record.pop(name) for record in tree[key]]


def polygons(*others: list[float]) -> Callable[[Content], None]:
    def change(tree: Content) -> None:
        for record in tree['annotations']:
            record['segmentation'] = [*others, *record['segmentation'], *others]

    return change


WRITTEN = {
    'area null': every('annotations', area=None),
    'area 0': every('annotations', area=0),
    'no area': without('annotations', 'area'),
    'crowd true and false': crowds(True, False),
    'crowd 1.0 and 0.0': crowds(1.0, 0.0),
    'crowd 1 and null': crowds(1, None),
    'sizes 64.0': every('images', width=64.0, height=48.0),
    'sizes "64"': every('images', width='64', height='48'),
    'ids 1.0': ids(float),
    'ids "1"': ids(str),
    'ids "0001"': ids('{:04}'.format),
    'long ids': ids(lambda number: LONG + number),
    'long ids in text': ids(lambda number: str(LONG + number)),
    'annotation ids from 0': lambda tree: [r.update(id=r['id'] - 1) for r in tree['annotations']],
    'points and lines': polygons([3.0, 4.0], [1, 1, 9, 9]),
    'empty polygons': polygons([]),
    'keypoints uncounted': every('annotations', num_keypoints=None),
    'keypoints 2.0': every('annotations', num_keypoints=2.0),
}


def figures(root: Path, task: str, backend: str) -> dict[str, Any]:
    """What the evaluator says of detections that miss some objects and shift others."""
    data = CocoDataset(root, 'val', task)
    evaluator = CocoEvaluator(data.coco, task, data.label_to_category, backend=backend)
    for index in range(len(data)):
        target = data[index][1]
        count = len(target['labels'])
        found = {
            'boxes': target['boxes'] + torch.tensor([2.0, 0, 2, 0]),
            'labels': target['labels'],
            'scores': torch.linspace(0.9, 0.5, count),
            'masks': target.get('masks', torch.zeros(count, 48, 64))[:, None].float().roll(1, -1),
            'keypoints': target.get('keypoints', torch.zeros(count, 2, 3)) + torch.tensor([0.5, 0, 0]),
        }
        evaluator.process([target], [{k: torch.cat([v, v[:1]]) for k, v in found.items()}])
    return evaluator.evaluate()


@pytest.fixture(scope='module')
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp('sound'), content())


@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
@pytest.mark.parametrize('name', WRITTEN)
def test_another_way_to_write_it_means_the_same(name: str, task: str, sound: Path, tmp_path: Path) -> None:
    tree = content()
    WRITTEN[name](tree)
    root = write(tmp_path / 'data', tree)
    one, other = CocoDataset(root, 'train', task), CocoDataset(sound, 'train', task)
    for index in range(2):
        (image, target), (_, expected) = one[index], other[index]
        assert image.shape == (3, 48, 64)
        assert target.keys() == expected.keys()
        for key in target.keys() - {'image_id'}:
            assert torch.equal(target[key], expected[key]), key
    for backend in BACKENDS:
        got, expected = figures(root, task, backend), figures(sound, task, backend)
        assert got == expected
        assert 0 < got['bbox']['AP'] < 1
    report = check_data(root, task)
    assert report.ok, report.text()
    assert report.counts == check_data(sound, task).counts


def test_long_ids_come_out_digit_by_digit(tmp_path: Path) -> None:
    tree = content()
    WRITTEN['long ids'](tree)
    coco = load_coco(write(tmp_path / 'a', tree) / 'annotations/instances_val.json')
    evaluator = CocoEvaluator(coco, 'box')
    box = {'boxes': torch.tensor([[1.0, 2, 3, 4]]), 'labels': torch.tensor([1]), 'scores': torch.tensor([0.5])}
    evaluator.process([{'image_id': LONG + 1}, {'image_id': LONG + 2}], [box, box])
    assert [(r['image_id'], r['category_id']) for r in evaluator.results('bbox')] == [
        (LONG + 1, LONG + 3), (LONG + 2, LONG + 3),
    ]  # fmt: skip
    ids(lambda number: float(LONG + number))(lossy := content())
    with pytest.raises(ValueError, match=r"images\[0\] has no int 'id'"):
        load_coco(write(tmp_path / 'b', lossy) / 'annotations/instances_val.json')


@pytest.mark.parametrize(('outline', 'area'), [([[10, 10, 30, 10, 30, 30]], 200), (None, 100), ([[1, 'a']], 100)])
def test_a_missing_area_is_the_masks_or_else_the_boxs(outline: Any, area: float, tmp_path: Path) -> None:
    tree = content()
    tree['annotations'][0] |= {'area': None, 'segmentation': outline, 'bbox': [10, 10, 10, 10]}
    coco = load_coco(write(tmp_path / 'a', tree) / 'annotations/instances_val.json')
    assert coco.anns[1]['area'] == pytest.approx(area, abs=15 if area > 100 else 0)


def crowds_only(tree: Content) -> None:
    every('annotations', iscrowd=True)(tree)


def boxes_of_nothing(tree: Content) -> None:
    every('annotations', bbox=[5.0, 5.0, 0.0, 7.0])(tree)


def thin_boxes(tree: Content) -> None:
    every('annotations', bbox=[5.0, 5.0, 1e-5, 7.0])(tree)


def empty_masks(tree: Content) -> None:
    every('annotations', segmentation={'size': [48, 64], 'counts': [48 * 64]})(tree)


def masks_without_area(tree: Content) -> None:
    every('annotations', segmentation=[[3, 3, 3, 3, 3, 3, 3, 3]])(tree)


def only_short_polygons(tree: Content) -> None:
    every('annotations', segmentation=[[3, 3, 9, 9], []])(tree)


def other_categories(tree: Content) -> None:
    tree['categories'].append({'id': 4, 'name': 'tree'})
    every('annotations', category_id=4)(tree)
    for record in tree['annotations']:
        del record['keypoints'], record['num_keypoints']


NOTHING = [
    ('box', crowds_only), ('mask', crowds_only), ('box', boxes_of_nothing), ('keypoint', thin_boxes),
    ('mask', empty_masks), ('mask', masks_without_area), ('mask', only_short_polygons), ('keypoint', other_categories),
]  # fmt: skip


@pytest.mark.parametrize(('task', 'spoil'), NOTHING)
def test_nothing_to_train_on_is_told_by_doctor_and_run(task: str, spoil: Callable, tmp_path: Path) -> None:
    tree = content()
    spoil(tree)
    root = write(tmp_path / 'data', tree)
    assert 'no objects' in {problem.kind for problem in check_data(root, task).problems if problem.fatal}
    with pytest.raises(ValueError, match=f'has no object to train on for task {task}'):
        training_sets(load_config(None, [f'task={task}']), root)


MALFORMED = {
    'odd': ([[1, 2, 3, 4, 5, 6, 7]], 'polygon of 7 numbers'),
    'odd, the second': ([[10, 5, 30, 5, 30, 15], [1.5] * 9], 'polygon of 9 numbers'),
    'text': ([['1', '2', '3', '4', '5', '6']], 'malformed segmentation'),
    'NaN': ([[1, 2, float('nan'), 4, 5, 6]], 'malformed segmentation'),
    'infinite': ([[1, 2, 3, 4, 5, float('inf')]], 'malformed segmentation'),
    'flat': ([1, 2, 3, 4, 5, 6], 'malformed segmentation'),
    'no list': ('1 2 3 4 5 6', 'malformed segmentation'),
    'pairs of numbers': ([[[10, 5], [30, 5], [30, 15]]], 'malformed segmentation'),
    'a pair of texts': ([['1', '2'], [10, 5, 30, 5, 30, 15]], 'malformed segmentation'),
    'null in a short one': ([[None], [10, 5, 30, 5, 30, 15]], 'malformed segmentation'),
    'null inside': ([None, [10, 5, 30, 5, 30, 15]], 'malformed segmentation'),
    'code of another size': ({'size': [64, 48], 'counts': [48 * 64]}, r'a mask of \(64, 48\)'),
}


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('name', MALFORMED)
def test_a_malformed_mask_is_found_before_training(name: str, split: str, tmp_path: Path) -> None:
    outline, told = MALFORMED[name]
    root = write(tmp_path / 'data', content())
    tree = content()
    tree['annotations'][2]['segmentation'] = outline
    (root / f'annotations/instances_{split}.json').write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=rf'instances_{split}.json: annotation 3 has .*{told}'):
        training_sets(load_config(None, ['task=mask']), root)
    problems = [p for p in check_data(root, 'mask').problems if p.fatal]
    assert len(problems) == 1 and f'instances_{split}.json: annotation 3 has' in problems[0].message
    # boxes do not need it
    assert check_data(root, 'box').ok
    training_sets(load_config(None, ['task=box']), root)


def corners(tree: Content) -> None:
    for record in tree['annotations']:
        x, y, w, h = record['bbox']
        record['bbox'] = [x, y, x + w, y + h]


def shares(tree: Content) -> None:
    for record in tree['annotations']:
        x, y, w, h = record['bbox']
        record['bbox'] = [x / 64, y / 48, w / 64, h / 48]


def polygon_shares(tree: Content) -> None:
    for record in tree['annotations']:
        polygons = record['segmentation']
        record['segmentation'] = [[v / (64, 48)[k % 2] for k, v in enumerate(p)] for p in polygons]


@pytest.mark.parametrize('boxes', [((2, 3, 9, 5), (40, 20, 20, 25)), ((30, 22, 30, 20), (0, 0, 10, 10), (33, 1, 9, 9))])
@pytest.mark.parametrize(
    ('change', 'task', 'told'),
    [
        (corners, 'box', 'all would fit as x1, y1, x2, y2, such as .*; expected x, y, width, height'),
        (shares, 'keypoint', 'lie between 0 and 1, such as .*; expected pixels'),
        (polygon_shares, 'mask', 'polygons lie between 0 and 1, such as .*; expected pixels'),
    ],
    ids=['corners', 'shares', 'polygons'],
)
def test_numbers_in_other_terms_are_told(
    change: Callable, task: str, told: str, boxes: tuple[tuple[int, ...], ...], tmp_path: Path
) -> None:
    """All boxes of a file show what they are; nobody sees it in the figures."""
    tree = content()
    first = dict(tree['annotations'][0])
    tree['annotations'] = []
    for k in range(4):
        x, y, w, h = boxes[k % len(boxes)]
        outline = [[x, y, x + w, y, x + w, y + h]]
        record = {'id': k + 1, 'image_id': 1 + k % 2, 'bbox': [x, y, w, h], 'segmentation': outline, 'iscrowd': 0}
        tree['annotations'].append({**first, **record, 'area': w * h})
    sound = write(tmp_path / 'sound', tree)
    assert check_data(sound, task).ok
    training_sets(load_config(None, [f'task={task}']), sound)
    change(tree)
    root = write(tmp_path / 'data', tree)
    with pytest.raises(ValueError, match=rf'instances_train.json: .*{told}'.replace('instances', r'\w+')):
        training_sets(load_config(None, [f'task={task}']), root)
    assert sum(p.fatal and p.kind.startswith('malformed') for p in check_data(root, task).problems) == 2


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_missing_picture_is_found_before_training(split: str, tmp_path: Path) -> None:
    root = write(tmp_path / 'data', content())
    (root / split / '2.png').unlink()
    with pytest.raises(
        ValueError, match=rf"instances_{split}.json: 1 of 2 pictures are not in .*{split}, such as '2.png'"
    ):
        training_sets(load_config(None, ['task=box']), root)


def encoded(suffix: str, **options: int) -> bytes:
    noise = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8), (0, 0), 1)
    return cv2.imencode(suffix, noise, [v for pair in options.values() for v in pair])[1].tobytes()


def noise(data: bytes, start: int, length: int) -> bytes:
    return data[:start] + np.random.default_rng(1).bytes(length) + data[start + length :]


JPEG, PROGRESSIVE = encoded('.jpg'), encoded('.jpg', progressive=(cv2.IMWRITE_JPEG_PROGRESSIVE, 1))
DAMAGED = {
    'cut short': JPEG[:-300],
    'a byte short of its end': JPEG[:-2],
    'half': JPEG[: len(JPEG) // 2],
    'progressive, half': PROGRESSIVE[: len(PROGRESSIVE) // 2],
    'zeros at the end': JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2),
    'garbage at the end': noise(JPEG, len(JPEG) // 2, len(JPEG) // 2),
    'garbage only': noise(JPEG, 0, len(JPEG)),
    'header only': JPEG[:20],
    'empty': b'',
    'PNG, half': encoded('.png')[:4000],
    'PNG, garbage': noise(encoded('.png'), 2000, 100),
    'WebP, half': encoded('.webp')[:500],
    'text': b'<html>404 not found</html>',
}


@pytest.mark.parametrize('name', DAMAGED)
def test_a_damaged_picture_is_told_by_doctor_and_training_alike(name: str, tmp_path: Path) -> None:
    root = write(tmp_path / 'data', content())
    (root / 'train/2.png').write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=r'cannot read image .*2\.png: ') as caught:
        CocoDataset(root, 'train', 'box')[1]
    report = check_data(root, 'box')
    assert [p.message for p in report.problems if p.fatal] == [str(caught.value)]


@pytest.mark.parametrize('data', [JPEG, PROGRESSIVE, JPEG + b'\0' * 50, encoded('.png'), encoded('.webp')])
def test_a_sound_picture_is_read_as_opencv_reads_it(data: bytes, tmp_path: Path) -> None:
    root = write(tmp_path / 'data', content())
    (root / 'train/2.png').write_bytes(data)
    expected = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(CocoDataset(root, 'train', 'box').load(1)[0], expected)
    assert check_data(root, 'box').ok


def test_reading_changes_no_file(tmp_path: Path) -> None:
    tree = content()
    WRITTEN['long ids'](tree)
    before = copy.deepcopy(tree)
    root = write(tmp_path / 'data', tree)
    load_coco(root / 'annotations/instances_val.json')
    assert json.loads((root / 'annotations/instances_val.json').read_text()) == before
