"""COCO annotation files: finding, checking and indexing them, category and keypoint maps, masks."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torchvision.models._meta import _COCO_CATEGORIES

_log = logging.getLogger(__name__)

_FIELDS: dict[str, dict[str, type]] = {
    'images': {'id': int, 'file_name': str, 'width': int, 'height': int},
    'categories': {'id': int, 'name': str},
    'annotations': {'id': int, 'image_id': int, 'category_id': int, 'bbox': list},
}


def decode_mask(record: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Mask ``(H, W)`` uint8 of an annotation's polygons or run-length code."""
    outline = record['segmentation']
    try:
        if isinstance(outline, list):
            rle = mask_utils.merge(mask_utils.frPyObjects([p for p in outline if len(p) >= 6], height, width))
        elif isinstance(outline['counts'], list):
            rle = mask_utils.frPyObjects(outline, height, width)
        else:
            rle = outline
        mask = mask_utils.decode(rle)
    except Exception as error:  # pycocotools raises bare exceptions of many types
        raise ValueError(f'annotation {record["id"]} has a malformed segmentation: {error}') from None
    if mask.shape != (height, width):
        raise ValueError(f'annotation {record["id"]} has a mask of {mask.shape}; its image is {(height, width)}')
    return mask


def load_coco(path: str | os.PathLike[str]) -> COCO:
    """An annotation file as pycocotools' index, checked; missing ``iscrowd``, ``area``, counts are filled in.

    Raises:
        ValueError: If the file is missing, not JSON, or not in COCO's object format; the message names the entry.
    """
    path = Path(path)
    content = read_json(path)
    for _, message in content_problems(content):
        raise ValueError(f'{path}: {message}')
    # COCOeval takes a matched ground truth of id 0 for an unmatched one
    if any(record['id'] == 0 for record in content['annotations']):
        _log.info('%s has an annotation with id 0; annotations are renumbered from 1 in memory', path)
        for number, record in enumerate(content['annotations'], 1):
            record['id'] = number
    counts = {c['id']: len(c['keypoints']) for c in content['categories'] if c.get('keypoints')}
    for record in content['annotations']:
        record.setdefault('iscrowd', 0)
        record.setdefault('area', record['bbox'][2] * record['bbox'][3])
        if record['category_id'] in counts:  # objects nobody marked points on often lack the entry
            record.setdefault('keypoints', [0] * (3 * counts[record['category_id']]))
        if 'keypoints' in record:
            record.setdefault('num_keypoints', sum(v > 0 for v in record['keypoints'][2::3]))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
    return coco


def read_json(path: Path) -> Any:
    """Content of an annotation file.

    Raises:
        ValueError: If it is missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f'cannot read annotation file {path}: {error.strerror or error}') from None
    except ValueError as error:
        raise ValueError(f'annotation file {path} is not valid JSON: {error}') from None


def find_annotations(root: str | os.PathLike[str], split: str, task: str) -> Path:
    """The annotation file of a split: ``annotations/{instances,person_keypoints}_{split}[year].json``.

    Raises:
        ValueError: If there is none or more than one; the message lists the splits that are there.
    """
    root = Path(root)
    usual, prefix = ('person_keypoints', r'(?:\w+_)?keypoints') if task == 'keypoint' else ('instances', 'instances')
    folder = root / 'annotations'
    if not root.is_dir():
        raise ValueError(f'data folder {root} does not exist; expected a folder in COCO layout')
    files = [file for file in sorted(folder.glob('*.json')) if re.fullmatch(prefix + r'_\w+\.json', file.name)]
    matches = [f for f in files if re.fullmatch(rf'{prefix}_{re.escape(split)}(\d{{4}})?\.json', f.name)]
    if len(matches) == 1:
        return matches[0]
    if len(matches) > 1:
        names = ', '.join(file.name for file in matches)
        raise ValueError(f'{folder} has several files for split {split!r}: {names}; name one, e.g. "{split}2017"')
    known = ', '.join(file.stem.rsplit('_', 1)[-1] for file in files) or 'none'
    raise ValueError(f'no {usual}_{split}[year].json in {folder}; splits found for task {task!r}: {known}')


def find_images(root: Path, split: str, annotation_file: Path) -> Path:
    """The folder of a split's images: ``train2017``, ``images/train2017``, ``train``, ``images/train`` or ``images``.

    Raises:
        ValueError: If there is none.
    """
    full = annotation_file.stem.split('_')[-1]
    choices = [root / full, root / 'images' / full, root / split, root / 'images' / split, root / 'images']
    for folder in choices:
        if folder.is_dir():
            return folder
    raise ValueError(f'no image folder for {annotation_file.name}; expected {choices[0]} or {choices[1]}')


def class_map(coco: COCO, task: str, source: object = 'annotations') -> tuple[dict[int, int], list[str]]:
    """Labels of the categories: ``{label: category id}``, and the name of every label from 0, the background.

    Raises:
        ValueError: If no category fits the task.
    """
    categories = sorted(coco.cats.values(), key=lambda c: c['id'])
    if task == 'keypoint':
        categories = [c for c in categories if c.get('keypoints')]
        if not categories:
            raise ValueError(f'{source} has no category with a list of keypoints; the keypoint task needs one')
    if not categories:
        raise ValueError(f'{source} has no categories; expected at least one')
    if len(categories) == 80 and all(_is_coco(c) for c in categories):
        return {c['id']: c['id'] for c in categories}, list(_COCO_CATEGORIES)
    return {i: c['id'] for i, c in enumerate(categories, 1)}, ['__background__', *(c['name'] for c in categories)]


def mirror_indices(names: Sequence[str], pairs: Sequence[tuple[str | int, str | int]] | None = None) -> tuple[int, ...]:
    """For each keypoint the index of the one it trades places with in a mirror.

    Args:
        names: Keypoint names.
        pairs: Names or indices; by default names that differ in left / right (or a leading or trailing l / r) only.

    Raises:
        ValueError: If a pair names no keypoint or a keypoint twice.
    """
    swap = list(range(len(names)))
    if pairs is None:
        index = {name.lower(): i for i, name in enumerate(names)}
        for i, name in enumerate(names):
            swap[i] = index.get(_other_side(name.lower()), i)
        return tuple(swap)
    for pair in pairs:
        try:
            a, b = (names.index(p) if isinstance(p, str) else range(len(names))[p] for p in pair)
        except (ValueError, IndexError):
            raise ValueError(
                f'flip pair {tuple(pair)} names no keypoints; expected two of {", ".join(names)}'
            ) from None
        if a == b or swap[a] != a or swap[b] != b:
            raise ValueError(f'flip pair {tuple(pair)} uses a keypoint twice; expected each in one pair at most')
        swap[a], swap[b] = b, a
    return tuple(swap)


def keypoint_layout(
    coco: COCO, labels: dict[int, int], source: object
) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Keypoint names and edges (from 0) that all categories share."""
    layouts = {tuple(coco.cats[c].get('keypoints', ())) for c in labels.values()} - {()}
    if not layouts:
        return (), ()
    if len(layouts) > 1:
        raise ValueError(f'{source} has categories with different keypoints; expected one list of names for all')
    names = layouts.pop()
    for category in labels.values():
        edges = coco.cats[category].get('skeleton') or ()
        if edges:
            return names, tuple((int(a) - 1, int(b) - 1) for a, b in edges)
    return names, ()


def _other_side(name: str) -> str:
    for pattern, mirror in ((r'left', 'right'), (r'right', 'left')):
        if re.search(pattern, name):
            return re.sub(pattern, mirror, name)
    for pattern, mirror in ((r'^l(?=[_\- .])', 'r'), (r'^r(?=[_\- .])', 'l'), (r'(?<=[_\- .])l$', 'r'),
                            (r'(?<=[_\- .])r$', 'l')):  # fmt: skip
        if re.search(pattern, name):
            return re.sub(pattern, mirror, name)
    return name


def _is_coco(category: dict[str, Any]) -> bool:
    return 0 < category['id'] < len(_COCO_CATEGORIES) and _COCO_CATEGORIES[category['id']] == category['name']


def content_problems(content: Any) -> Iterator[tuple[str, str]]:
    """What in an annotation file would break training or evaluation: pairs of a kind and a message naming the entry."""
    if not isinstance(content, dict):
        yield 'format', f'the file holds a {type(content).__name__}; expected an object with images, annotations, ...'
        return
    lists = ('images', 'annotations', 'categories')
    for key in lists:
        if not isinstance(content.get(key), list):
            yield 'format', f'there is no list {key!r}; expected images, annotations and categories'
    if not all(isinstance(content.get(key), list) for key in lists):
        return
    ids: dict[str, set[Any]] = {}
    for key, types in _FIELDS.items():
        ids[key] = set()
        for position, record in enumerate(content[key]):
            wrong = [
                n for n, kind in types.items() if not isinstance(record, dict) or not isinstance(record.get(n), kind)
            ]
            if wrong:
                yield 'missing field', f'{key}[{position}] has no {types[wrong[0]].__name__} {wrong[0]!r}'
                if wrong[0] != 'id' and isinstance(record, dict):
                    ids[key].add(record['id'])
            elif record['id'] in ids[key]:
                yield 'duplicate id', f'{key}[{position}] has id {record["id"]} again; expected unique ids'
            else:
                ids[key].add(record['id'])
                if key == 'images' and min(record['width'], record['height']) < 1:
                    yield (
                        'image size',
                        f'image {record["id"]} is {record["width"]}x{record["height"]}; expected 1 or more',
                    )
    counts = {
        c['id']: len(c['keypoints']) for c in content['categories'] if _valid(c, 'categories') and c.get('keypoints')
    }
    for record in content['annotations']:
        if _valid(record, 'annotations'):
            yield from _annotation_problems(record, ids, counts)


def _valid(record: Any, key: str) -> bool:
    return isinstance(record, dict) and all(isinstance(record.get(n), kind) for n, kind in _FIELDS[key].items())


def _annotation_problems(
    record: dict[str, Any], ids: dict[str, set[Any]], counts: dict[int, int]
) -> Iterator[tuple[str, str]]:
    where = f'annotation {record["id"]}'
    for kind, known in (('image', ids['images']), ('category', ids['categories'])):
        if record[f'{kind}_id'] not in known:
            yield f'unknown {kind}', f'{where} refers to {kind} {record[f"{kind}_id"]}, which is not in the file'
    box = record['bbox']
    if len(box) != 4 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in box):
        yield 'malformed box', f'{where} has bbox {box}; expected four finite numbers x, y, width, height'
    if record.get('iscrowd', 0) not in (0, 1):
        yield 'malformed crowd flag', f'{where} has iscrowd {record["iscrowd"]!r}; expected 0 or 1'
    count, points = counts.get(record['category_id']), record.get('keypoints')
    if count is not None and points is not None and len(points) != 3 * count:
        yield 'keypoint count', f'{where} has {len(points)} keypoint numbers; expected {3 * count}, for {count} names'
