"""COCO annotation files: finding, checking and indexing them, category and keypoint maps, masks."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torchvision.models._meta import _COCO_CATEGORIES

from norton_timm.utils import MOST_PIXELS, brief

_log = logging.getLogger(__name__)

_FIELDS: dict[str, dict[str, type]] = {
    'images': {'id': int, 'file_name': str, 'width': int, 'height': int},
    'categories': {'id': int, 'name': str},
    'annotations': {'id': int, 'image_id': int, 'category_id': int, 'bbox': list},
}
_LONGEST_OUTLINE = 1_000_000  # pixels; enough for any object in a camera's picture


def decode_mask(record: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Mask ``(H, W)`` uint8 of an annotation's polygons or run-length code."""
    outline, where = record['segmentation'], f'annotation {record["id"]}'
    check_outline(record, height, width)
    try:
        if isinstance(outline, list):
            rle = mask_utils.merge(mask_utils.frPyObjects([p for p in outline if len(p) >= 6], height, width))
        elif isinstance(outline['counts'], list):
            rle = mask_utils.frPyObjects(outline, height, width)
        else:
            rle = outline
        mask = mask_utils.decode(rle)
    except Exception as error:  # pycocotools raises bare exceptions of many types
        raise ValueError(f'{where} has a malformed segmentation: {error}') from None
    return mask


def check_outline(record: dict[str, Any], height: int, width: int) -> None:
    """Check an annotation's segmentation before pycocotools' C code reads it, which trusts its input.

    Raises:
        ValueError: it is neither polygons of numbers nor a run-length code of the image's size, or its outline is too
            long. The C code keeps every fifth of a pixel along it, and would run out of memory and crash.
    """
    outline, where = record['segmentation'], f'annotation {record["id"]}'
    if isinstance(outline, list):
        good = all(_numbers(polygon) for polygon in outline)
        longest = max((_walk(polygon) for polygon in outline), default=0.0) if good else 0.0
        if longest > _LONGEST_OUTLINE:
            raise ValueError(f'{where} has a polygon of {longest:.0f} pixels around, {_LONGEST_OUTLINE} are allowed')
    else:
        said: Any = outline if isinstance(outline, dict) else {}
        size, counts = said.get('size'), said.get('counts')
        good = isinstance(size, list) and len(size) == 2 and all(_is(n, int) for n in size)
        if good and size != [height, width]:
            raise ValueError(f'{where} has a mask of {(size[0], size[1])}; its image is {(height, width)}')
        if isinstance(counts, list):
            good = good and all(_is(n, int) and n >= 0 for n in counts) and sum(counts) == height * width
        else:
            good = good and isinstance(counts, (str, bytes)) and _length(counts) == height * width
    if not good:
        told = f'polygons of numbers, or a run-length code of {height}x{width} pixels'
        raise ValueError(f'{where} has a malformed segmentation {brief(outline)}; expected {told}')


def _walk(polygon: list[float]) -> float:
    """Pixels along a closed polygon (x, y, x, y, ...), each edge by its longer side."""
    points = np.asarray(polygon[: len(polygon) // 2 * 2], float).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) if len(points) else 0.0


def _length(code: str | bytes) -> int:
    """Pixels that a compressed run-length code stands for; -1 if it is malformed.

    Each character holds five bits of a count, and a sixth that says whether more follow. From the fourth on, counts are
    differences to the count two places before (pycocotools' rleToString).
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in code.encode() if isinstance(code, str) else code:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 30:
            return -1
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        if counts[-1] < 0:
            return -1
        value = shift = 0
    return sum(counts) if not shift else -1


def load_coco(path: str | os.PathLike[str]) -> COCO:
    """Check an annotation file and index it by pycocotools; missing ``iscrowd``, ``area`` and counts are filled in.

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
        if isinstance(record.get('segmentation'), list):  # a point or a line has no area, and breaks the evaluation
            record['segmentation'] = [
                polygon for polygon in record['segmentation'] if not isinstance(polygon, list) or len(polygon) >= 6
            ]
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
    except (ValueError, RecursionError) as error:
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


def match_classes(coco: COCO, task: str, names: Sequence[str], source: object = 'annotations') -> dict[int, int]:
    """Category ids of this file for the labels of a trained network: names decide, not positions or ids.

    Args:
        coco: the annotations.
        task: 'box', 'mask' or 'keypoint'.
        names: name of every label from 0, the background.
        source: the file, for messages.

    Returns:
        ``{label: category id}``; a label whose name is not in the file has no entry.

    Raises:
        ValueError: objects of a category that the network does not have, or a name that stands for several.
    """
    own, known = class_map(coco, task, source)
    if known == list(names):
        return own
    category_of: dict[str, list[int]] = {}
    for category in own.values():
        category_of.setdefault(coco.cats[category]['name'], []).append(category)
    labels = {label: category_of[name] for label, name in enumerate(names) if name in category_of}
    used = {record['category_id'] for record in coco.anns.values()}
    new = [name for name, categories in category_of.items() if name not in names and used & set(categories)]
    if new or not labels:
        told = f'has objects of {", ".join(new[:5])}' if new else f'has {", ".join(list(category_of)[:5])}'
        raise ValueError(f'{source} {told}; the network knows {", ".join(names[1:6])}' + ', ...' * (len(names) > 6))
    twice = [names[label] for label, found in labels.items() if len(found) > 1 or list(names).count(names[label]) > 1]
    if twice:
        raise ValueError(f'{source}: the name {twice[0]!r} stands for several categories, so labels cannot be matched')
    return {label: found[0] for label, found in labels.items()}


def mirror_indices(names: Sequence[str], pairs: Sequence[tuple[str | int, str | int]] | None = None) -> tuple[int, ...]:
    """For each keypoint, the index of its partner in a mirrored image (itself if it has none).

    Args:
        names: Keypoint names.
        pairs: Names or indices; by default names that differ only in left / right, or in a word L / R.

    Raises:
        ValueError: If a pair names no keypoint or a keypoint twice.
    """
    swap = list(range(len(names)))
    if pairs is None:
        index = {name.lower(): i for i, name in enumerate(names)} | {_words(name): i for i, name in enumerate(names)}
        for i, name in enumerate(names):
            swap[i] = index.get(_other_side(name), i)
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
    layouts = {tuple(coco.cats[c].get('keypoints') or ()) for c in labels.values()} - {()}
    if not layouts:
        return (), ()
    if len(layouts) > 1:
        raise ValueError(f'{source} has categories with different keypoints; expected one list of names for all')
    names = layouts.pop()
    for category in labels.values():
        edges = coco.cats[category].get('skeleton') or ()
        wrong = [edge for edge in edges if not all(1 <= k <= len(names) for k in edge)]
        if wrong:
            raise ValueError(f'{source} has edge {wrong[0]}; expected two numbers from 1 to {len(names)}')
        if edges:
            return names, tuple((int(a) - 1, int(b) - 1) for a, b in edges)
    return names, ()


def unpaired(names: Sequence[str], partners: Sequence[int]) -> list[str]:
    """Keypoints whose names say left or right but that have no partner in a mirrored image."""
    return [name for i, name in enumerate(names) if partners[i] == i and _other_side(name)]


def _words(name: str) -> tuple[str, ...]:
    """The words of a name: `front_l_paw`, `LShoulder` and `eyeR` have two or three."""
    return tuple(word.lower() for word in re.findall(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+', name))


def _other_side(name: str) -> str | tuple[str, ...]:
    """The name, or its words, on the other side; empty where it has none."""
    sides = {'left': 'right', 'right': 'left', 'l': 'r', 'r': 'l'}
    found = re.search('left|right', name.lower())
    if found:
        return name.lower().replace(found[0], sides[found[0]])
    words = _words(name)
    place = next((i for i, word in enumerate(words) if word in sides), None)
    return () if place is None else (*words[:place], sides[words[place]], *words[place + 1 :])


def _is_coco(category: dict[str, Any]) -> bool:
    return 0 < category['id'] < len(_COCO_CATEGORIES) and _COCO_CATEGORIES[category['id']] == category['name']


def content_problems(content: Any) -> Iterator[tuple[str, str]]:
    """Problems of an annotation file that would break training or evaluation: (kind, message naming the entry)."""
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
            wrong = [n for n, kind in types.items() if not isinstance(record, dict) or not _is(record.get(n), kind)]
            if wrong:
                yield 'missing field', f'{key}[{position}] has no {types[wrong[0]].__name__} {wrong[0]!r}'
                if wrong[0] != 'id' and isinstance(record, dict):
                    ids[key].add(record['id'])
            elif record['id'] in ids[key]:
                yield 'duplicate id', f'{key}[{position}] has id {record["id"]} again; expected unique ids'
            else:
                ids[key].add(record['id'])
                if key == 'images':
                    yield from _image_problems(record)
                elif key == 'categories':
                    yield from _category_problems(record)
    counts = {
        c['id']: len(c['keypoints'])
        for c in content['categories']
        if _valid(c, 'categories') and isinstance(c.get('keypoints'), list) and c['keypoints']
    }
    for record in content['annotations']:
        if _valid(record, 'annotations'):
            yield from _annotation_problems(record, ids, counts)


def _valid(record: Any, key: str) -> bool:
    return isinstance(record, dict) and all(_is(record.get(n), kind) for n, kind in _FIELDS[key].items())


def _is(value: Any, kind: type) -> bool:
    if kind is int:  # true and false are int in Python; larger numbers do not fit into evaluation's arrays
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return isinstance(value, kind)


def _numbers(value: Any) -> bool:
    """Whether a value is a list of finite numbers."""
    return isinstance(value, list) and all(
        isinstance(v, (int, float)) and abs(v) < 1e30 and not isinstance(v, bool) for v in value
    )


def _image_problems(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    width, height = record['width'], record['height']
    if min(width, height) < 1 or width * height > MOST_PIXELS:
        told = f'image {record["id"]} is {width}x{height}; expected 1 or more, and at most {MOST_PIXELS:,} pixels'
        yield 'image size', told
    if leads_away(record['file_name']):
        told = f'image {record["id"]} has file name {brief(record["file_name"])}; expected a file in the image folder'
        yield 'file name', told


def leads_away(name: str) -> bool:
    """Whether a file name in an annotation file is not a valid path below the image folder."""
    parts = PurePosixPath(name.replace('\\', '/')).parts
    return not parts or parts[0] == '/' or '..' in parts or '\0' in name or len(name) > 1000


def _category_problems(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    where, names = f'category {record["id"]}', record.get('keypoints')
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        yield 'malformed keypoints', f'{where} has keypoints {brief(names)}; expected a list of names'
        return
    edges, sigmas = record.get('skeleton'), record.get('sigmas')
    if edges is not None and not (isinstance(edges, list) and all(_is_edge(e) for e in edges)):
        yield 'malformed skeleton', f'{where} has skeleton {brief(edges)}; expected pairs of whole numbers'
    if sigmas is not None and not (_numbers(sigmas) and len(sigmas) == len(names or ()) and all(s > 0 for s in sigmas)):
        yield 'malformed sigmas', f'{where} has sigmas {brief(sigmas)}; expected a number above 0 for each keypoint'


def _is_edge(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is(k, int) for k in value)


def _annotation_problems(
    record: dict[str, Any], ids: dict[str, set[Any]], counts: dict[int, int]
) -> Iterator[tuple[str, str]]:
    where = f'annotation {record["id"]}'
    for kind, known in (('image', ids['images']), ('category', ids['categories'])):
        if record[f'{kind}_id'] not in known:
            yield f'unknown {kind}', f'{where} refers to {kind} {record[f"{kind}_id"]}, which is not in the file'
    box, area = record['bbox'], record.get('area', 0)
    if len(box) != 4 or not _numbers(box):
        yield 'malformed box', f'{where} has bbox {brief(box)}; expected four finite numbers x, y, width, height'
    if not _numbers([area]):
        yield 'malformed area', f'{where} has area {brief(area)}; expected a finite number'
    if not _is(record.get('iscrowd', 0), int) or record.get('iscrowd', 0) not in (0, 1):
        yield 'malformed crowd flag', f'{where} has iscrowd {brief(record["iscrowd"])}; expected 0 or 1'
    count, points = counts.get(record['category_id']), record.get('keypoints')
    if 'keypoints' in record and not _numbers(points):
        yield 'malformed keypoints', f'{where} has keypoints {brief(points)}; expected finite numbers'
    elif count is not None and points is not None and len(points) != 3 * count:
        yield 'keypoint count', f'{where} has {len(points)} keypoint numbers; expected {3 * count}, for {count} names'
    if not _is(record.get('num_keypoints', 0), int):
        yield 'malformed number', f'{where} has num_keypoints {brief(record["num_keypoints"])}; expected a whole number'
