"""The content of a COCO annotation file: read, put into COCO's own terms, checked, and completed.

The data set and the data doctor both read files by this module, so that they take the same things for sound.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from detection.data.masks import finite_numbers, mask_area
from norton_timm.utils import MOST_PIXELS, brief

_FIELDS: dict[str, dict[str, type]] = {
    'images': {'id': int, 'file_name': str, 'width': int, 'height': int},
    'categories': {'id': int, 'name': str},
    'annotations': {'id': int, 'image_id': int, 'category_id': int, 'bbox': list},
}
_WHOLE = {
    'images': ('id', 'width', 'height'),
    'categories': ('id',),
    'annotations': ('id', 'image_id', 'category_id', 'iscrowd', 'num_keypoints'),
}
_EXACT = 2**53  # floats hold whole numbers below it exactly
_FEW_BOXES = 4  # too few to tell what all of them mean
# fields of annotations that may be left out, so that null means the same
_OPTIONAL = ('area', 'iscrowd', 'num_keypoints')


def read_annotations(path: Path) -> tuple[Any, list[tuple[str, str]]]:
    """The content of an annotation file in COCO's own terms, and what was changed that is worth a note.

    Whole numbers written as 640.0 or "640" become numbers, ``iscrowd`` true or 0.0 becomes 1 or 0, and null in a field
    that may be missing means that it is missing. Polygons of less than three points are left out.

    Returns:
        The content, not checked yet, and notes: (kind, message naming the entry).

    Raises:
        ValueError: If the file is missing or not JSON.
    """
    content = read_json(path)
    for key, fields in _WHOLE.items():
        for record in _records(content, key):
            for name in fields:
                if type(record.get(name, 0)) is not int:
                    record[name] = _whole(record[name], name)
    notes = []
    for record in _records(content, 'annotations'):
        for name in _OPTIONAL:
            if record.get(name, 0) is None:
                del record[name]
        outline = record.get('segmentation')
        if isinstance(outline, dict) and isinstance(outline.get('size'), list):
            outline['size'] = [_whole(side) for side in outline['size']]
        if isinstance(outline, list) and any(_is_short(p) for p in outline):
            # a point or a line has no area, and breaks the evaluation
            record['segmentation'] = [p for p in outline if not _is_short(p)]
            where = f'annotation {brief(record.get("id"))}'
            notes.append(('short polygon', f'{where} has a polygon of less than three points; it is left out'))
    return content, notes


def polygon_problem(records: Iterable[dict[str, Any]]) -> str | None:
    """What is wrong where all polygons of a split are in shares of the picture; None where they are in pixels."""
    polygons = [p for record in records for p in _polygons(record.get('segmentation'))]
    if polygons and all(min(p) >= 0 and max(p) <= 1 for p in polygons) and any(0 < v < 1 for p in polygons for v in p):
        told = f'all {len(polygons)} polygons lie between 0 and 1, such as {brief(polygons[0])}'
        return f'{told}; expected pixels, not shares of the picture'
    return None


def complete(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Fill in what a checked file leaves out: ``iscrowd``, ``area`` and numbers of keypoints.

    An area of 0 counts as left out where the object has pixels: keypoints would be measured against it. A category that
    only holds the others together (Roboflow's number 0) is dropped. Ids of annotations that evaluation cannot hold are
    replaced by numbers from 1; images and categories keep theirs.

    Returns:
        Notes: (kind, message naming the entry).
    """
    notes = []
    records, images = content['annotations'], {image['id']: image for image in content['images']}
    used = {record['category_id'] for record in records}
    heads = {c['supercategory'] for c in content['categories'] if isinstance(c.get('supercategory'), str)}
    for category in list(content['categories']):
        alone = category['id'] not in used and category.get('supercategory') in (None, '', 'none')
        if alone and category['name'] in heads:
            content['categories'].remove(category)
            message = f'category {category["id"]}, {category["name"]!r}, only holds others together; it is left out'
            notes.append(('super-category', message))
    # COCOeval takes a matched ground truth of id 0 for an unmatched one, and keeps ids as floats
    if any(record['id'] == 0 or abs(record['id']) >= _EXACT for record in records):
        notes.append(('annotation ids', 'ids of annotations are 0 or beyond 2^53; in memory they are numbered from 1'))
        for number, record in enumerate(records, 1):
            record['id'] = number
    counts = {c['id']: len(c['keypoints']) for c in content['categories'] if c.get('keypoints')}
    for record in records:
        record.setdefault('iscrowd', 0)
        if not record.get('area'):
            filled = _area(record, images.get(record['image_id']))
            if filled or 'area' not in record:
                message = f'annotation {record["id"]} has no area; it takes {filled:g} pixels, of its mask or its box'
                notes.append(('no area', message))
                record['area'] = filled
        if record['category_id'] in counts:  # objects nobody marked points on often lack the entry
            record.setdefault('keypoints', [0] * (3 * counts[record['category_id']]))
        if 'keypoints' in record:
            record.setdefault('num_keypoints', sum(v > 0 for v in record['keypoints'][2::3]))
    return notes


def _area(record: dict[str, Any], image: dict[str, Any] | None) -> float:
    """Pixels of an object's mask; of its box where it has none."""
    try:
        area = mask_area(record, image['height'], image['width']) if image and record.get('segmentation') else 0
    except ValueError:
        area = 0  # told where masks are needed
    return float(area or max(0, record['bbox'][2]) * max(0, record['bbox'][3]))


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
    yield from _box_problems(content)


def _valid(record: Any, key: str) -> bool:
    return isinstance(record, dict) and all(_is(record.get(n), kind) for n, kind in _FIELDS[key].items())


def _is(value: Any, kind: type) -> bool:
    if kind is int:  # true and false are int in Python; larger numbers do not fit into evaluation's arrays
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)


def _image_problems(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    width, height = record['width'], record['height']
    if min(width, height) < 1 or width * height > MOST_PIXELS:
        told = f'image {record["id"]} is {width}x{height}; expected 1 or more, and at most {MOST_PIXELS:,} pixels'
        yield 'image size', told
    name = record['file_name']
    if not PurePosixPath(name.replace('\\', '/')).name.strip('.') or '\0' in name or len(name) > 1000:
        yield 'file name', f'image {record["id"]} has file name {brief(name)}; expected the name of a picture'


def _category_problems(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    where, names = f'category {record["id"]}', record.get('keypoints')
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        yield 'malformed keypoints', f'{where} has keypoints {brief(names)}; expected a list of names'
        return
    edges, sigmas = record.get('skeleton'), record.get('sigmas')
    if edges is not None and not (isinstance(edges, list) and all(_is_edge(e) for e in edges)):
        yield 'malformed skeleton', f'{where} has skeleton {brief(edges)}; expected pairs of whole numbers'
    good = sigmas is None or (finite_numbers(sigmas) and len(sigmas) == len(names or ()) and all(s > 0 for s in sigmas))
    if not good:
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
    if len(box) != 4 or not finite_numbers(box):
        yield 'malformed box', f'{where} has bbox {brief(box)}; expected four finite numbers x, y, width, height'
    if not finite_numbers([area]) or area < 0:
        yield 'malformed area', f'{where} has area {brief(area)}; expected a number of 0 or more'
    if not _is(record.get('iscrowd', 0), int) or record.get('iscrowd', 0) not in (0, 1):
        yield 'malformed crowd flag', f'{where} has iscrowd {brief(record["iscrowd"])}; expected 0 or 1'
    count, points = counts.get(record['category_id']), record.get('keypoints')
    if 'keypoints' in record and not finite_numbers(points):
        yield 'malformed keypoints', f'{where} has keypoints {brief(points)}; expected finite numbers'
    elif count is not None and points is not None and len(points) != 3 * count:
        yield 'keypoint count', f'{where} has {len(points)} keypoint numbers; expected {3 * count}, for {count} names'
    if not _is(record.get('num_keypoints', 0), int):
        yield 'malformed number', f'{where} has num_keypoints {brief(record["num_keypoints"])}; expected a whole number'


def _box_problems(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Boxes in other terms than x, y, width and height in pixels, where all of a file show it."""
    sizes = {image['id']: (image['width'], image['height']) for image in content['images'] if _valid(image, 'images')}
    known = [
        (record['bbox'], *sizes[record['image_id']]) for record in content['annotations']
        if _valid(record, 'annotations') and record['image_id'] in sizes
        and len(record['bbox']) == 4 and finite_numbers(record['bbox'])
    ]  # fmt: skip
    if not known:
        return
    within_one = all(min(box) >= 0 and box[0] + box[2] <= 1 and box[1] + box[3] <= 1 for box, _, _ in known)
    if within_one and any(0 < value < 1 for box, _, _ in known for value in box):
        told = f'the boxes of all {len(known)} annotations lie between 0 and 1, such as {brief(known[0][0])}'
        yield 'malformed boxes', f'{told}; expected pixels, not shares of the picture'
    beyond = sum(x + w > 1.1 * width or y + h > 1.1 * height for (x, y, w, h), width, height in known)
    inside = all(x <= w <= width + 1 and y <= h <= height + 1 for (x, y, w, h), width, height in known)
    if len(known) >= _FEW_BOXES and inside and 3 * beyond >= len(known):
        told = f'{beyond} of {len(known)} boxes reach out of their pictures, and all would fit as x1, y1, x2, y2'
        yield 'malformed boxes', f'{told}, such as {brief(known[0][0])}; expected x, y, width, height'


def _polygons(outline: Any) -> list[list[float]]:
    return [p for p in outline if finite_numbers(p) and p] if isinstance(outline, list) else []


def _is_short(polygon: Any) -> bool:
    return finite_numbers(polygon) and len(polygon) < 6


def _records(content: Any, key: str) -> Iterator[dict[str, Any]]:
    found = content.get(key) if isinstance(content, dict) else None
    return (record for record in found if isinstance(record, dict)) if isinstance(found, list) else iter(())


def _whole(value: Any, name: str = '') -> Any:
    """A number that is whole but written otherwise as an integer; anything else as it is."""
    if isinstance(value, bool):
        return int(value) if name == 'iscrowd' else value
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19:
        return int(value)
    return value
