"""The data doctor: sound data pass, each of many broken data sets gets its one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from detection.data.coco import CocoDataset
from detection.data.doctor import check_data
from detection.data.sample import write_sample
from detection.tasks import TASKS

Content = dict[str, Any]


def valid() -> Content:
    """One image, one object with mask and keypoints."""
    record = {
        'id': 1,
        'image_id': 7,
        'category_id': 3,
        'bbox': [10.0, 5.0, 20.0, 10.0],
        'area': 200.0,
        'iscrowd': 0,
        'segmentation': [[10.0, 5.0, 30.0, 5.0, 30.0, 15.0, 10.0, 15.0]],
        'keypoints': [12, 6, 2, 0, 0, 0],
        'num_keypoints': 1,
    }
    return {
        'images': [{'id': 7, 'file_name': 'a.jpg', 'width': 64, 'height': 48}],
        'annotations': [record],
        'categories': [{'id': 3, 'name': 'bird', 'keypoints': ['head', 'tail'], 'skeleton': [[1, 2]]}],
    }


def write(root: Path, content: Content, split: str) -> None:
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    (root / f'{split}2017').mkdir(exist_ok=True)
    for prefix in ('instances', 'person_keypoints'):
        (root / 'annotations' / f'{prefix}_{split}2017.json').write_text(json.dumps(content))
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(root / f'{split}2017/a.jpg'), noise)


def annotation(**changes: Any) -> Callable[[Content], None]:
    return lambda content: content['annotations'][0].update(changes)


def picture(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda root: change(root / 'train2017/a.jpg')


def twice(key: str, **changes: Any) -> Callable[[Content], None]:
    return lambda content: content[key].append({**content[key][0], **changes})


# what is done to the annotations of the training split, the kind it is filed under, a part of the message
BROKEN_CONTENT = {
    'list missing': (lambda c: c.pop('categories'), 'format', "there is no list 'categories'"),
    'image without size': (lambda c: c['images'][0].pop('height'), 'missing field', "images[0] has no int 'height'"),
    'image id twice': (twice('images', file_name='b.jpg'), 'duplicate id', 'images[1] has id 7 again'),
    'annotation id twice': (twice('annotations'), 'duplicate id', 'annotations[1] has id 1 again'),
    'category id twice': (twice('categories', name='fish'), 'duplicate id', 'categories[1] has id 3 again'),
    'image file twice': (twice('images', id=8), 'image listed twice', 'a.jpg is listed 2 times'),
    'category name twice': (twice('categories', id=4), 'category twice', "'bird' has 2 categories"),
    'unknown image': (annotation(image_id=70), 'unknown image', 'annotation 1 refers to image 70'),
    'unknown category': (annotation(category_id=30), 'unknown category', 'annotation 1 refers to category 30'),
    'box of three numbers': (annotation(bbox=[1, 2, 3]), 'malformed box', 'annotation 1 has bbox [1, 2, 3]'),
    'box with NaN': (annotation(bbox=[1, 2, float('nan'), 3]), 'malformed box', 'expected four finite numbers'),
    'corners for a box': (annotation(bbox=[30, 20, -10, -5]), 'negative box', 'box of -10x-5 pixels'),
    'box outside': (annotation(bbox=[70, 5, 10, 10]), 'box outside', 'outside its image of 64x48 pixels'),
    'negative area': (annotation(area=-1), 'malformed area', 'area -1; expected a number of 0 or more'),
    'crowd flag': (annotation(iscrowd='no'), 'malformed crowd flag', "iscrowd 'no'; expected 0 or 1"),
    'odd polygon': (annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), 'malformed polygon', 'polygon of 7 numbers'),
    'run lengths of another size': (
        annotation(segmentation={'size': [5, 5], 'counts': [25]}),
        'malformed mask',
        'annotation 1 has a mask of (5, 5)',
    ),
    'keypoint count': (annotation(keypoints=[1, 1, 2]), 'keypoint count', '3 keypoint numbers; expected 6'),
    'keypoint visibility': (annotation(keypoints=[12, 6, 3, 0, 0, 0]), 'keypoint visibility', 'visibility 3'),
    'keypoint number': (annotation(num_keypoints=2), 'keypoint number', 'num_keypoints 2, but 1 labelled'),
    'keypoint outside': (annotation(keypoints=[99, 6, 2, 0, 0, 0]), 'keypoint outside', 'keypoint at (99, 6)'),
    'skeleton': (lambda c: c['categories'][0].update(skeleton=[[0, 1]]), 'skeleton', 'edge [0, 1]; expected'),
    'no objects': (lambda c: c.update(annotations=[]), 'no objects', "there is no object in split 'train'"),
    'crowds only': (annotation(iscrowd=1), 'no objects', 'not crowds or empty boxes only'),
    'empty boxes only': (annotation(bbox=[10.0, 5.0, 0.0, 10.0]), 'no objects', "no object in split 'train'"),
}
BROKEN_FILES = {
    'annotation file missing': (
        lambda root: [f.unlink() for f in (root / 'annotations').glob('*_train*')],
        'annotation file',
        'splits found',
    ),
    'no JSON': (
        lambda root: [f.write_text('{"images": [') for f in (root / 'annotations').glob('*_train*')],
        'annotation file',
        'is not valid JSON',
    ),
    'image folder missing': (lambda r: (r / 'train2017').rename(r / 'x'), 'image folder', 'no image folder'),
    'image missing': (picture(Path.unlink), 'missing image', 'a.jpg does not exist'),
    'image empty': (picture(lambda p: p.write_bytes(b'')), 'unreadable image', 'a.jpg: 0 bytes that are no JPEG'),
    'image cut short': (
        picture(lambda p: p.write_bytes(p.read_bytes()[:1500])),
        'unreadable image',
        'image file is truncated',
    ),
    'image of another size': (
        picture(lambda p: cv2.imwrite(str(p), np.zeros((64, 48, 3), np.uint8))),
        'image size',
        'is 48x64 pixels; the annotations say 64x48; it may be turned',
    ),
}
KEYPOINT_ONLY = ('keypoint visibility', 'keypoint number', 'keypoint outside', 'skeleton')
MASK_ONLY = ('odd polygon', 'run lengths of another size')


def task_for(name: str) -> str:
    return 'keypoint' if name in KEYPOINT_ONLY else 'mask' if name in MASK_ONLY else 'box'


@pytest.mark.parametrize('name', [*BROKEN_CONTENT, *BROKEN_FILES])
def test_every_broken_set_gets_one_clear_message(tmp_path: Path, name: str) -> None:
    write(tmp_path, valid(), 'val')
    content = valid()
    if name in BROKEN_CONTENT:
        spoil, kind, part = BROKEN_CONTENT[name]
        spoil(content)
        write(tmp_path, content, 'train')
        cv2.imwrite(str(tmp_path / 'train2017/b.jpg'), np.zeros((48, 64, 3), np.uint8))
    else:
        write(tmp_path, content, 'train')
        BROKEN_FILES[name][0](tmp_path)
        _, kind, part = BROKEN_FILES[name]
    report = check_data(tmp_path, task_for(name))
    assert not report.ok
    fatal = [p for p in report.problems if p.fatal]
    assert [p.kind for p in fatal] == [kind], report.text()
    assert part in fatal[0].message
    assert '\n' not in fatal[0].message
    assert f'ERROR: {kind} (1)' in str(report)


def test_splits_must_have_the_same_categories(tmp_path: Path) -> None:
    write(tmp_path, valid(), 'train')
    other = valid()
    other['categories'][0]['name'] = 'fish'
    write(tmp_path, other, 'val')
    report = check_data(tmp_path, 'box')
    assert [p.kind for p in report.problems] == ['categories']


@pytest.mark.parametrize('task', TASKS)
def test_sound_data_pass(tiny_coco: Path, tmp_path: Path, task: str) -> None:
    write(tmp_path / 'own', valid(), 'train')
    write(tmp_path / 'own', valid(), 'val')
    write_sample(tmp_path / 'sample', train=20, val=8, size=(96, 96))
    for root in (tmp_path / 'own', tmp_path / 'sample', tiny_coco):
        report = check_data(root, task)
        assert report.ok and not report.problems, report.text()
    assert report.counts['val']['images'] == 50


def test_counts_are_those_of_the_files(tiny_coco: Path) -> None:
    content = json.loads((tiny_coco / 'annotations/instances_val2017.json').read_text())
    counts = check_data(tiny_coco, 'box', ('val',)).counts['val']
    used = {a['image_id'] for a in content['annotations']}
    crowds = sum(a['iscrowd'] for a in content['annotations'])
    assert counts == {
        'images': 50,
        'objects': len(content['annotations']) - crowds,
        'crowds': crowds,
        'empty images': 50 - len(used),
    }


@pytest.mark.parametrize(
    ('change', 'kind'),
    [
        ({'bbox': [10, 5, 0, 10]}, 'box without area'),
        ({'bbox': [-20, 5, 40, 10]}, 'box sticks out'),
        ({'segmentation': []}, 'no mask'),
        ({'segmentation': [[1, 2, 3, 4], [10, 5, 30, 5, 30, 15]]}, 'short polygon'),
        ({'segmentation': [[10, 5, 30, 5, 30, 15], []]}, 'short polygon'),
        ({'segmentation': {'size': [48, 64], 'counts': [48 * 64]}}, 'empty mask'),
    ],
)
def test_what_training_copes_with_is_a_note(tmp_path: Path, change: dict[str, Any], kind: str) -> None:
    content = valid()
    content['annotations'].append({**content['annotations'][0], 'id': 2})
    content['annotations'][0].update(change)
    for split in ('train', 'val'):
        write(tmp_path, content if split == 'train' else valid(), split)
    report = check_data(tmp_path, 'mask')
    assert report.ok
    assert [(p.kind, p.fatal) for p in report.problems] == [(kind, False)]
    assert f'note: {kind} (1)' in str(report)
    CocoDataset(tmp_path, 'train', 'mask')[0]


def test_many_problems_are_counted_and_cut_short(tmp_path: Path) -> None:
    content = valid()
    content['annotations'] = [{**content['annotations'][0], 'id': i, 'bbox': [99, 0, 5, 5]} for i in range(1, 30)]
    write(tmp_path, content, 'train')
    report = check_data(tmp_path, 'box', ('train',))
    assert 'ERROR: box outside (29)' in report.text()
    assert '... and 24 more' in report.text()
    assert len(json.loads(json.dumps(report.to_dict()))['problems']) == 29


def test_progress_sees_every_image(tiny_coco: Path) -> None:
    seen = []

    def progress(items: Any, split: str, total: int) -> Any:
        for item in items:
            seen.append((split, total))
            yield item

    check_data(tiny_coco, 'box', ('val',), progress=progress)
    assert seen == [('val', 50)] * 50
