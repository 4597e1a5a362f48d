"""Surfaces of whole data sets: label maps of two splits and a checkpoint, and where annotations and pictures lie.

Whatever is not refused must be right: an object keeps the name that its own file gives it, and a picture is the one
that its file name means.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .surface import Surface

_SIZE = (24, 32)
_POINTS = st.sampled_from([['left', 'right'], ['right', 'left'], ['tip'], [], None])
_CATEGORIES = st.lists(
    st.fixed_dictionaries(
        {
            'id': st.sampled_from([0, 1, 2, 3, 90, 20230815123456789, '4', 5.0]),
            'name': st.sampled_from(['cat', 'dog', 'ant', 'Cat', 'cat ', '', 'N/A', '__background__']),
        },
        optional={'supercategory': st.sampled_from(['none', 'cat', 'dog', '', None])},
    ),
    max_size=4,
    unique_by=lambda category: float(category['id']),
)
_OBJECTS = st.lists(st.integers(0, 5), min_size=1, max_size=4)
_SPLIT = st.tuples(_CATEGORIES, _OBJECTS)
_KNOWN = st.none() | st.lists(st.sampled_from(['cat', 'dog', 'ant', 'N/A']), max_size=4)


@st.composite
def _label_map_cases(draw: st.DrawFn) -> tuple[str, dict[str, Any], list[str] | None]:
    """A task, the two splits, and the names that a checkpoint knows.

    The second split has other categories, or the same ones in another order, with other ids, or more of them.
    """
    task = draw(st.sampled_from(['box', 'box', 'keypoint']))
    train, objects = draw(_SPLIT)
    val, seen = draw(_SPLIT)
    if draw(st.booleans()):
        keys = draw(st.permutations([category['id'] for category in train]))
        turned = [{**category, 'id': key} for category, key in zip(train, keys)]
        taken = {float(key) for key in keys}
        more = [category for category in val if float(category['id']) not in taken] if draw(st.booleans()) else []
        val = draw(st.permutations(turned + more))
    if task == 'keypoint':
        points, other = draw(_POINTS), draw(st.none() | _POINTS)
        train = [{**category, 'keypoints': points} for category in train]
        val = [{**category, 'keypoints': other or points} for category in val]
    return task, {'train': _tree(train, objects), 'val': _tree(val, seen)}, draw(_KNOWN)


def _tree(categories: list[dict[str, Any]], objects: list[int]) -> dict[str, Any]:
    """Two pictures; object `k` stands at a place of its own and is of the category that its number picks."""
    annotations = []
    for k, number in enumerate(objects):
        if categories:
            category = categories[number % len(categories)]
            points = [4 + 6 * k, 6, 2] * len(category.get('keypoints') or ())
            record = {'id': k + 1, 'image_id': 1 + k % 2, 'category_id': category['id'], 'bbox': [2 + 6 * k, 2, 5, 10]}
            annotations.append({**record, 'area': 50, 'iscrowd': 0, **({'keypoints': points} if points else {})})
    images = [{'id': k, 'file_name': f'{k}.png', 'width': _SIZE[1], 'height': _SIZE[0]} for k in (1, 2)]
    return {'images': images, 'annotations': annotations, 'categories': categories}


def _picture(path: Path, value: int = 0) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*_SIZE, 3), value, np.uint8)).save(path)


def _label_maps(value: Any, folder: Path) -> None:
    """The doctor's word, the run's two sets, their objects' names, and the figures of perfect detections."""
    from detection.data import CocoDataset, check_data
    from detection.training import load_config, training_sets

    task, trees, known = value
    for split, tree in trees.items():
        for prefix in ('instances', 'person_keypoints'):
            path = folder / 'annotations' / f'{prefix}_{split}.json'
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(tree))
        for image in tree['images']:
            _picture(folder / split / image['file_name'])
    report = check_data(folder, task, workers=1)
    try:
        sets = training_sets(load_config(None, [f'task={task}']), folder)
    except ValueError as error:
        if report.ok:
            raise AssertionError(f'the doctor takes what the run refuses: {error}') from error
        raise
    for split, data in zip(('train', 'val'), sets):
        assert data.class_names == sets[0].class_names and data.keypoint_names == sets[0].keypoint_names
        _check_names(data, trees[split])
    _check_figures(sets[1])
    if known is not None:
        _check_names(CocoDataset(folder, 'val', task, class_names=['__background__', *known]), trees['val'])


def _check_names(data: Any, tree: dict[str, Any]) -> None:
    """Every object has the name that its own file gives it."""
    names = {float(category['id']): category['name'] for category in tree['categories']}
    owners = {tuple(a['bbox'][:2]): names[float(a['category_id'])] for a in tree['annotations']}
    for index in range(len(data)):
        _, target = data.load(index)
        found = {tuple(box[:2]): data.class_names[label] for box, label in zip(target['boxes'], target['labels'])}
        for place, name in found.items():
            assert owners[place] == name, f'an object called {owners[place]!r} is trained on as {name!r}'


def _check_figures(data: Any) -> None:
    """Perfect detections have the figure 1."""
    import torch

    from detection.evaluation import CocoEvaluator

    evaluator = CocoEvaluator(data.coco, data.task, data.label_to_category)
    for index in range(len(data)):
        target = data[index][1]
        found = {key: target[key] for key in ('boxes', 'labels', 'keypoints') if key in target}
        evaluator.process([target], [{**found, 'scores': torch.ones(len(target['labels']))}])
    for kind, rows in evaluator.evaluate().items():
        assert rows['AP'] == -1 or abs(rows['AP'] - 1) < 1e-6, f'perfect detections have {kind} AP {rows["AP"]}'


_FILES = [
    'annotations/instances_{}.json', 'annotations/instances_{}2017.json', 'annotations/{}.json', '{}.json',
    '{}/_annotations.coco.json', '{}/labels.json', '{}/result.json', '{}/annotations/instances_default.json',
    '{}/annotations.json', '{}/via_export_coco.json', '{}/annotations/instances_{}.json', 'labels.json',
]  # fmt: skip
_FOLDERS = [
    '{}', '{}2017', 'images/{}', 'images', '{}/images', '{}/data', '{}/JPEGImages', 'data', '.', '{}/images/default',
    'pictures/{}', 'pictures', 'images/{}/cam1', '{}/a b',
]  # fmt: skip
_NAMES = [
    '{name}', '{name}', 'images/{name}', 'images\\{name}', '{split}/{name}', 'images/{split}/{name}',
    '/home/a/{split}/{name}', 'C:\\a\\{name}', '/x/{name}', '../{name}', '../{split}/{name}', './{name}', 'cam1/{name}',
    'cam2/{name}', 'a%20b/{name}', 'https://host/{split}/{name}?x=1', '/data/local-files/?d=images/{name}',
    '/etc/passwd', '{name}/..', '%2e%2e/{name}', 'images//{name}', '', '{name}%00', 'file:///{name}',
]  # fmt: skip
_SPLIT_NAMES = (('train', 'training', 'Train'), ('val', 'valid', 'validation', 'default'))
_LAYOUT = st.fixed_dictionaries(
    {
        'file': st.sampled_from(_FILES),
        'folder': st.sampled_from(_FOLDERS),
        'name': st.sampled_from(_NAMES),
        'missing': st.integers(0, 6),
    }
)
_IMAGES = st.sampled_from([None, None, None, 'images', 'pictures', '.'])


@st.composite
def _layout_cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], str, str | None]:
    """Two splits, where each has its files, the split that is asked for, and the setting `data.images`."""
    first, second = ({**draw(_LAYOUT), 'split': draw(st.sampled_from(names))} for names in _SPLIT_NAMES)
    asked = draw(st.sampled_from((first['split'], second['split'], 'train', 'val')))
    return first, second, asked, draw(_IMAGES)


def _layouts(value: Any, folder: Path) -> None:
    """Two splits whose pictures have the same names; a value in each picture says whose it is."""
    from detection.data import CocoDataset, check_data, find_data

    first, second, asked, images = value
    root = folder / 'root'
    root.mkdir()
    _picture(folder / '1.png', 250)  # outside
    for layout, value_of in ((first, 100), (second, 200)):
        split = layout['split']
        names = [layout['name'].format(name=f'{k}.png', split=split) for k in (1, 2)]
        tree = _tree([{'id': 1, 'name': 'cat'}], [0, 0])
        for k, name in enumerate(names):
            tree['images'][k]['file_name'] = name
            tree['images'][k]['value'] = value_of + k + 1
            if layout['missing'] != k + 1:
                path = root / layout['folder'].format(split) / f'{k + 1}.png'
                if not path.exists():
                    _picture(path, value_of + k + 1)
        file = root / layout['file'].format(split, split)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_text(json.dumps(tree))
    find_data(root)
    report = check_data(root, 'box', (asked,), images=images, workers=1)
    try:
        data = CocoDataset(root, asked, 'box', images=images)
    except ValueError:
        if report.ok:
            raise AssertionError('the doctor takes what the data set refuses') from None
        raise
    assert report.ok, report.text()
    # where a folder is not named like a split, it may be the one of both
    shared = images is not None or '{}' not in first['folder'] or '{}' not in second['folder']
    for index, image_id in enumerate(data.image_ids):
        shown, meant = int(data.load(index)[0][0, 0, 0]), data.coco.imgs[image_id]['value']
        right = shown % 100 == meant % 100 and (shown // 100 == meant // 100 or shared)
        assert right, f'{data.coco.imgs[image_id]["file_name"]} is {shown}, not {meant}'


def _import() -> None:
    import detection.training  # noqa: F401


SURFACES = [
    Surface('label maps', _label_map_cases(), _label_maps, 1500, _import),
    Surface('layouts', _layout_cases(), _layouts, 3000, _import),
]
