"""The surface of COCO annotation files: read, checked by the doctor, loaded as items, and evaluated."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .pictures import pictures
from .surface import NUMBERS, VALUES, Surface, edits_of, mutations, swapped


@lru_cache
def content() -> dict[str, Any]:
    """A small valid file: two images, three annotations, polygons and run-length codes, keypoints, a crowd."""
    from pycocotools import mask as mask_utils

    filled = np.zeros((24, 32), np.uint8, order='F')
    filled[4:12, 4:12] = 1
    packed = mask_utils.encode(filled)
    counts = packed['counts'].decode()
    points = [5, 5, 2, 10, 10, 1]
    return {
        'images': [{'id': k, 'file_name': f'{k}.jpg', 'width': 32, 'height': 24} for k in (1, 2)],
        'categories': [
            {'id': 1, 'name': 'a', 'keypoints': ['left', 'right'], 'skeleton': [[1, 2]], 'sigmas': [0.1, 0.1]}
        ],
        'annotations': [
            {
                'id': 1,
                'image_id': 1,
                'category_id': 1,
                'bbox': [4, 4, 8, 8],
                'area': 64,
                'iscrowd': 0,
                'keypoints': points,
                'num_keypoints': 2,
                'segmentation': [[4, 4, 12, 4, 12, 12, 4, 12]],
            },
            {
                'id': 2,
                'image_id': 2,
                'category_id': 1,
                'bbox': [4, 4, 8, 8],
                'area': 64,
                'iscrowd': 0,
                'keypoints': points,
                'num_keypoints': 2,
                'segmentation': {'size': [24, 32], 'counts': counts},
            },
            {
                'id': 3,
                'image_id': 2,
                'category_id': 1,
                'bbox': [0, 0, 9, 9],
                'area': 81,
                'iscrowd': 1,
                'keypoints': [0] * 6,
                'num_keypoints': 0,
                'segmentation': {'size': [24, 32], 'counts': [100, 10, 658]},
            },
        ],
    }


_NAMES = st.sampled_from(
    [
        '../../../../etc/passwd',
        '/etc/passwd',
        '/dev/zero',
        '.',
        '',
        'a/../1.jpg',
        '1.jpg',
        '\0',
        'x' * 5000,
        'fifo',
        'link',
    ]
)
_MASKS = st.one_of(
    st.lists(st.lists(NUMBERS, max_size=9), max_size=3),
    st.fixed_dictionaries(
        {
            'size': st.lists(st.integers(-1, 2**33) | st.just(24) | st.just(32), min_size=1, max_size=3)
            | st.just([24, 32]),
            'counts': st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
            | st.lists(NUMBERS, max_size=6)
            | st.lists(st.integers(-5, 2**33), max_size=6),
        }
    ),
)
_BOX = st.lists(NUMBERS, min_size=4, max_size=4)


def _files() -> st.SearchStrategy[bytes]:
    values = st.one_of(VALUES, NUMBERS, _NAMES, _MASKS, _BOX)
    trees = st.builds(lambda edits: json.dumps(swapped(content(), edits)).encode(), edits_of(values, 3))
    fields = st.builds(
        _with,
        st.sampled_from(
            [
                'file_name',
                'width',
                'segmentation',
                'bbox',
                'keypoints',
                'area',
                'iscrowd',
                'skeleton',
                'sigmas',
                'id',
                'image_id',
                'num_keypoints',
            ]
        ),
        values,
        st.integers(0, 5),
    )
    raw = st.sampled_from(
        [b'[' * 100_000, b'{"a":' * 50_000, b'', b'null', b'[]', b'1', b'\xff\xfe', b'{"images": NaN}', b'1' * 5000]
    )
    return st.one_of(trees, fields, fields, mutations(json.dumps(content()).encode()), raw)


def _with(field: str, value: Any, number: int) -> bytes:
    """The valid file with one field of one record changed."""
    tree = json.loads(json.dumps(content()))
    records = [r for key in ('images', 'annotations', 'categories') for r in tree[key] if field in r]
    records[number % len(records)][field] = value
    return json.dumps(tree).encode()


def _use(data: bytes, folder: Path) -> None:
    """All that is done with a data set; the first refusal is passed on at the end."""
    import os

    from detection.data.coco import CocoDataset, collate
    from detection.data.doctor import check_data
    from detection.data.transforms import build_transforms
    from detection.evaluation.coco_metrics import CocoEvaluator

    (folder / 'annotations').mkdir()
    (folder / 'images').mkdir()
    for name in ('1.jpg', '2.jpg'):
        (folder / 'images' / name).write_bytes(pictures()[0])
    os.mkfifo(folder / 'images' / 'fifo')
    os.symlink('/dev/zero', folder / 'images' / 'link')
    for prefix in ('instances', 'person_keypoints'):
        (folder / 'annotations' / f'{prefix}_train.json').write_bytes(data)
    refused: list[Exception] = []
    for task in ('box', 'mask', 'keypoint'):
        report = check_data(folder, task, ('train',), workers=1)
        assert str(report)
        json.dumps(report.to_dict(), default=str)
        try:
            dataset = CocoDataset(folder, 'train', task, build_transforms(task, True), seed=0)
            items = [dataset[k] for k in range(len(dataset))]
            _, targets = collate(items)
            outputs = [_found(target, task) for target in targets]
            evaluator = CocoEvaluator(dataset.coco, task, dataset.label_to_category)
            evaluator.process(targets, outputs)
            evaluator.evaluate()
        except (ValueError, FloatingPointError) as error:
            refused.append(error)
        else:
            if not report.ok and any(p.kind in ('format', 'missing field') for p in report.problems):
                raise AssertionError('the doctor refuses what the data set takes')
    if refused:
        raise refused[0]


def _found(target: dict[str, Any], task: str) -> dict[str, Any]:
    """Detections equal to the ground truth."""
    import torch

    found = {'boxes': target['boxes'], 'labels': target['labels'], 'scores': torch.ones(len(target['labels']))}
    if task == 'mask':
        found['masks'] = target['masks'][:, None].float()
    if task == 'keypoint':
        found['keypoints'] = target['keypoints']
    return found


def _import() -> None:

    content(), pictures()


SURFACES = [Surface('COCO annotations', st.deferred(_files), _use, 3000, _import)]
