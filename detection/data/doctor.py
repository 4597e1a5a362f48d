"""The data doctor: reads all of a data set and lists its problems before a run fails on them."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from detection.data.annotations import Labels, box_to_train_on, indexed, labels_of
from detection.data.content import complete, content_problems, polygon_problem, read_annotations
from detection.data.decode import read_picture
from detection.data.layouts import Pictures, find_annotations, find_images, match_pictures, other_splits
from detection.data.masks import mask_area
from detection.tasks import check_task

_log = logging.getLogger(__name__)

# kinds after which labels need not be matched: more of the same would be told
_LABEL_PROBLEMS = ('duplicate id', 'unknown category', 'category twice', 'no keypoints', 'keypoint layout', 'skeleton')
_SLACK = 2.0  # pixels by which a box or keypoint may stick out: real COCO rounds that generously


@dataclass(frozen=True)
class Problem:
    """One finding. A fatal one breaks training or falsifies its figures; others are handled, but worth a look."""

    kind: str
    message: str
    fatal: bool = True


@dataclass
class DataReport:
    """What ``check_data`` found.

    Attributes:
        source: The folder.
        counts: Images, objects, crowds and empty images of each split.
        problems: In the order found.
    """

    source: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing fatal was found."""
        return not any(problem.fatal for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {'ok': self.ok, **asdict(self)}

    def text(self, examples: int = 5) -> str:
        """A table of counts, then the problems by kind with a few examples of each."""
        lines = [f'data in {self.source}']
        for split, counts in self.counts.items():
            lines.append(f'  {split}: ' + ', '.join(f'{number} {name}' for name, number in counts.items()))
        kinds = Counter((problem.kind, problem.fatal) for problem in self.problems)
        for (kind, fatal), number in sorted(kinds.items(), key=lambda item: (not item[0][1], -item[1])):
            lines.append(f'{"ERROR" if fatal else "note"}: {kind} ({number})')
            messages = [p.message for p in self.problems if (p.kind, p.fatal) == (kind, fatal)]
            lines += [f'  {message}' for message in messages[:examples]]
            if number > examples:
                lines.append(f'  ... and {number - examples} more')
        lines.append('the data can be used' if self.ok else 'the data must be repaired first')
        return '\n'.join(lines)

    def __str__(self) -> str:
        return self.text()


def check_data(
    root: str | os.PathLike[str],
    task: str,
    splits: Sequence[str] = ('train', 'val'),
    *,
    images: str | os.PathLike[str] | None = None,
    workers: int = 4,
    progress: Callable[[Iterable[Any], str, int], Iterable[Any]] | None = None,
) -> DataReport:
    """Read every annotation and every image of a data set.

    Args:
        root: Folder in COCO layout, or in a label tool's.
        task: 'box', 'mask' or 'keypoint'.
        splits: Splits to read.
        images: Folder of the pictures, as `CocoDataset` takes it.
        workers: Threads that decode images.
        progress: Wraps the images of a split to show progress; called with the iterable, the split and the number.

    Returns:
        A report; ``report.ok`` is False if training or evaluation would fail or mislead.

    Raises:
        ValueError: On an unknown task; anything wrong with the data is in the report instead.

    Example:
        >>> report = check_data('data/coco', 'keypoint')
        >>> print(report)
    """
    check_task(task)
    report = DataReport(str(root))
    first: Labels | None = None
    for split in splits:
        try:
            path = find_annotations(root, split, task)
            content, notes = read_annotations(path)
        except ValueError as error:
            report.problems.append(Problem('annotation file', str(error)))
            continue
        found = [Problem(kind, f'{path.name}: {message}') for kind, message in content_problems(content)]
        report.problems += found
        if any(p.kind in ('format', 'missing field') or p.kind.startswith('malformed') for p in found):
            continue  # what follows relies on them
        notes += complete(content)
        report.problems += [Problem(kind, f'{path.name}: {message}', False) for kind, message in notes]
        report.counts[split] = _counts(content)
        told = any(p.kind in _LABEL_PROBLEMS for p in found)
        for problem in _content(content, task, split, split == splits[0]):
            report.problems.append(Problem(problem.kind, f'{path.name}: {problem.message}', problem.fatal))
            told |= problem.fatal and problem.kind in _LABEL_PROBLEMS
        if not told:
            labels = _labels(content, task, path, first)
            if isinstance(labels, str):
                report.problems.append(Problem('categories', labels))
            first = labels if split == splits[0] and isinstance(labels, Labels) else first
        try:
            folders = find_images(Path(root), split, path, images)
        except ValueError as error:
            report.problems.append(Problem('image folder', str(error)))
            continue
        others = other_splits(Path(root), split, path)
        pictures = match_pictures((image['file_name'] for image in content['images']), folders, others)
        if pictures.files:
            name, file = next(iter(pictures.files.items()))
            message = (
                f'{path.name}: {len(pictures.files)} pictures have another path, {name} is {pictures.folder / file}'
            )
            report.problems.append(Problem('picture path', message, False))
        with ThreadPoolExecutor(workers) as pool:
            checks: Iterable[Problem | None] = pool.map(
                partial(_image, pictures, set(pictures.missing)), content['images']
            )
            if progress is not None:
                checks = progress(checks, split, len(content['images']))
            report.problems += [problem for problem in checks if problem is not None]
    return report


def _labels(content: dict[str, Any], task: str, path: Path, first: Labels | None) -> Labels | str:
    """What the labels of a split mean, matched with the first split's as a run does it; else why they do not fit."""
    try:
        return labels_of(indexed(content), task, path.name, first and first.names, first and first.keypoints)
    except ValueError as error:
        return str(error)


def _counts(content: dict[str, Any]) -> dict[str, int]:
    used = {a['image_id'] for a in content['annotations']}
    return {
        'images': len(content['images']),
        'objects': sum(not a.get('iscrowd') for a in content['annotations']),
        'crowds': sum(bool(a.get('iscrowd')) for a in content['annotations']),
        'empty images': sum(image['id'] not in used for image in content['images']),
    }


def _content(content: dict[str, Any], task: str, split: str, trained: bool) -> Iterator[Problem]:
    """Problems of annotations that are well-formed."""
    if not content['images']:
        yield Problem('no images', 'the file lists no images; expected at least one')
    images = {image['id']: image for image in content['images']}
    layouts = {c['id']: c.get('keypoints') or [] for c in content['categories']}
    others = {key for key, points in layouts.items() if task == 'keypoint' and not points}
    if not any(
        _trains(record, task, images) for record in content['annotations'] if record['category_id'] not in others
    ):
        message = f'there is no object in split {split!r}; expected some, not crowds or empty boxes only'
        yield Problem('no objects', message, trained)
    names = Counter(image['file_name'] for image in content['images'])
    yield from (Problem('image listed twice', f'{n} is listed {k} times') for n, k in names.items() if k > 1)
    classes = Counter(category['name'] for category in content['categories'])
    yield from (Problem('category twice', f'the name {n!r} has {k} categories') for n, k in classes.items() if k > 1)
    if task == 'mask' and (told := polygon_problem(content['annotations'])):
        yield Problem('malformed polygon', told)
    if task == 'keypoint':
        if not any(layouts.values()):
            yield Problem('no keypoints', 'no category has a list of keypoints; the keypoint task needs one')
        if len({tuple(names) for names in layouts.values() if names}) > 1:
            yield Problem('keypoint layout', 'categories have different keypoints; expected one list of names')
        for category in content['categories']:
            count = len(layouts[category['id']])
            wrong = [e for e in category.get('skeleton') or () if len(e) != 2 or not all(1 <= k <= count for k in e)]
            if wrong:
                message = f'category {category["name"]!r} has edge {wrong[0]}; expected two numbers from 1 to {count}'
                yield Problem('skeleton', message)
    for record in content['annotations']:
        image = images.get(record['image_id'])
        if image is None or len(record['bbox']) != 4:
            continue  # listed before
        yield from _box(record, image)
        if task == 'mask':
            yield from _mask(record, image)
        if task == 'keypoint' and layouts.get(record['category_id']):
            yield from _points(record, image, len(layouts[record['category_id']]))


def _trains(record: dict[str, Any], task: str, images: dict[int, dict[str, Any]]) -> bool:
    """Whether an annotation is something to train on; a malformed one may be, once it is repaired."""
    image = images.get(record['image_id'])
    if image is None or len(record['bbox']) != 4:
        return True
    x, y, w, h = record['bbox']
    if w > 0 and h > 0 and (x >= image['width'] or y >= image['height'] or x + w <= 0 or y + h <= 0):
        return not record['iscrowd']  # told as a box outside
    if box_to_train_on(record, task, image['height'], image['width']) is None:
        return w < 0 or h < 0
    try:
        return task != 'mask' or mask_area(record, image['height'], image['width']) > 0
    except ValueError:
        return True


def _box(record: dict[str, Any], image: dict[str, Any]) -> Iterator[Problem]:
    where, (x, y, w, h) = f'annotation {record["id"]}', record['bbox']
    width, height = image['width'], image['height']
    if w < 0 or h < 0:
        yield Problem('negative box', f'{where} has a box of {w}x{h} pixels; expected x, y, width, height')
    elif w == 0 or h == 0:
        yield Problem('box without area', f'{where} has a box of {w}x{h} pixels; it is left out of training', False)
    elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
        message = f'{where} has box {record["bbox"]} outside its image of {width}x{height} pixels'
        yield Problem('box outside', message)
    elif x < -_SLACK or y < -_SLACK or x + w > width + _SLACK or y + h > height + _SLACK:
        message = f'{where} has box {record["bbox"]} in an image of {width}x{height} pixels; it is clipped in training'
        yield Problem('box sticks out', message, False)


def _mask(record: dict[str, Any], image: dict[str, Any]) -> Iterator[Problem]:
    where, outline = f'annotation {record["id"]}', record.get('segmentation')
    if not outline:
        yield Problem('no mask', f'{where} has no segmentation; it is left out of training', False)
        return
    try:
        filled = mask_area(record, image['height'], image['width'])
    except ValueError as error:
        yield Problem('malformed polygon' if isinstance(outline, list) else 'malformed mask', str(error))
        return
    if not filled:
        yield Problem('empty mask', f'{where} has a mask without a pixel; it is left out of training', False)


def _points(record: dict[str, Any], image: dict[str, Any], count: int) -> Iterator[Problem]:
    where, points = f'annotation {record["id"]}', record.get('keypoints')
    if points is None or len(points) != 3 * count:
        return  # missing ones count as unlabelled; wrong numbers are listed before
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in points):
        yield Problem('malformed keypoints', f'{where} has keypoints that are no finite numbers')
        return
    flags = points[2::3]
    if any(v not in (0, 1, 2) for v in flags):
        wrong = next(v for v in flags if v not in (0, 1, 2))
        yield Problem('keypoint visibility', f'{where} has a keypoint with visibility {wrong}; expected 0, 1 or 2')
    labelled = sum(v > 0 for v in flags)
    if record.get('num_keypoints', labelled) != labelled:
        message = f'{where} has num_keypoints {record["num_keypoints"]}, but {labelled} labelled ones'
        yield Problem('keypoint number', message)
    width, height = image['width'] + _SLACK, image['height'] + _SLACK
    for x, y, v in zip(points[::3], points[1::3], flags):
        if v > 0 and not (-_SLACK <= x <= width and -_SLACK <= y <= height):
            yield Problem('keypoint outside', f'{where} has a labelled keypoint at ({x}, {y}) outside its image')
            break


def _image(pictures: Pictures, missing: set[str], record: dict[str, Any]) -> Problem | None:
    """Decode one image, as training does."""
    name = record['file_name']
    if name in missing:
        return Problem('missing image', f'{pictures.folder / name} does not exist, nor another file that it can mean')
    path = pictures.path(name)
    try:
        height, width = read_picture(path, oriented=False).shape[:2]
    except ValueError as error:
        return Problem('unreadable image', str(error))
    size, expected = (width, height), (record['width'], record['height'])
    if size != expected:
        turned = '; it may be turned by its EXIF data' if size == expected[::-1] else ''
        message = f'{path} is {width}x{height} pixels; the annotations say {expected[0]}x{expected[1]}{turned}'
        return Problem('image size', message)
    return None
