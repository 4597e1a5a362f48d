"""COCO annotations in memory: indexed, what of them is trained on, maps of categories and keypoints."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools.coco import COCO
from torchvision.models._meta import _COCO_CATEGORIES

from detection.data.content import complete, content_problems, read_annotations

_log = logging.getLogger(__name__)


def load_coco(path: str | os.PathLike[str]) -> COCO:
    """Check an annotation file and index it by pycocotools; what may be missing is filled in.

    Numbers written otherwise are put right, as ``read_annotations`` and ``complete`` in ``content.py`` say.

    Raises:
        ValueError: If the file is missing, not JSON, or not in COCO's object format; the message names the entry.
    """
    path = Path(path)
    content, notes = read_annotations(path)
    for _, message in content_problems(content):
        raise ValueError(f'{path}: {message}')
    notes += complete(content)
    for kind, number in Counter(kind for kind, _ in notes).items():
        first = next(message for k, message in notes if k == kind)
        _log.info('%s: %s (%d times)', path, first, number)
    return indexed(content)


def indexed(content: dict[str, Any]) -> COCO:
    """Checked and completed content of an annotation file, indexed by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
    return coco


def box_to_train_on(record: dict[str, Any], task: str, height: int, width: int) -> tuple[float, ...] | None:
    """The box (xyxy) of an annotation, clipped to its image; None where there is nothing to train on.

    Crowds, boxes without area inside the image and, in the mask task, objects without a mask are not trained on.
    Whether a mask is empty shows only once it is filled.
    """
    if record['iscrowd'] or (task == 'mask' and not record.get('segmentation')):
        return None
    x, y, w, h = record['bbox']
    box = (max(0.0, x), max(0.0, y), min(float(width), x + w), min(float(height), y + h))
    # float32 must still tell the two sides apart
    return box if box[2] - box[0] > 1e-3 and box[3] - box[1] > 1e-3 else None


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


class Labels(NamedTuple):
    """What the labels of a data set mean, and the keypoints that its objects share.

    Attributes:
        categories: Category id of every label.
        names: Name of every label from 0, the background.
        keypoints: Names of the keypoints; none in other tasks.
        skeleton: Edges between keypoints, counted from 0.
    """

    categories: dict[int, int]
    names: list[str]
    keypoints: tuple[str, ...]
    skeleton: tuple[tuple[int, int], ...]


def labels_of(
    coco: COCO,
    task: str,
    source: object,
    names: Sequence[str] | None = None,
    keypoints: Sequence[str] | None = None,
) -> Labels:
    """Labels and keypoints of a file; those of a trained network, or of the training split, where they are given.

    Raises:
        ValueError: no category fits the task, or what the file has cannot be matched with what is given.
    """
    if names is None:
        categories, names = class_map(coco, task, source)
    else:
        categories = match_classes(coco, task, names, source)
    found, skeleton = keypoint_layout(coco, categories, source) if task == 'keypoint' else ((), ())
    if keypoints is not None and tuple(keypoints) != found:
        told, wanted = (', '.join(points[:20]) or 'none' for points in (found, tuple(keypoints)))
        raise ValueError(f'{source} has keypoints {told}; the network finds {wanted}')
    return Labels(categories, list(names), found, skeleton)


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
