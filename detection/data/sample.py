"""The built-in sample data set, drawn by code in COCO's 2017 layout, so that everything runs without a download.

Persons with 17 keypoints (visible, occluded and outside the picture), balls, boxes and trees on textured
backgrounds; every tenth picture is empty, every twentieth holds a crowd, annotated as COCO does: one region,
run-length encoded, ``iscrowd`` 1. Objects overlap; masks and boxes are of the visible part, masks are polygons.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from detection.data import figures

_log = logging.getLogger(__name__)

VERSION = 1  # raise it when the drawings change: an older set on disk is then drawn anew
_MANIFEST = 'sample.json'
_MIN_VISIBLE = 0.45  # share of every object that the others leave visible


class _Scene:
    """A picture under construction: the image and, per object, its full area and the mask that later ones left."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.width, self.height = size
        self.rng = rng
        self.image = figures.background(size, rng)
        self.objects: list[dict[str, Any]] = []

    def try_add(self, category: int, shapes: list[figures.Shape], **extra: Any) -> bool:
        """Draw an object in front of the others, unless it would leave too little of one of them (or of itself)."""
        mask = np.zeros((self.height, self.width), np.uint8)
        figures.paint(mask, shapes, smooth=False)
        if mask.sum() < 40:
            return False
        front = mask.astype(bool)
        for other in self.objects:
            if (other['visible'] & ~front).sum() < _MIN_VISIBLE * other['full']:
                return False
        for other in self.objects:
            other['visible'] &= ~front
        figures.paint(self.image, shapes)
        self.objects.append({'category_id': category, 'visible': front, 'full': int(front.sum()), **extra})
        return True

    def add_person(self) -> bool:
        """Add one person of random size, place, pose and look."""
        rng = self.rng
        share = rng.uniform(0.55, 0.95) if rng.random() < 0.8 else rng.uniform(0.3, 0.55)
        height = share * self.height
        # mostly inside; a tenth of them cut off by the border
        spread = 0.0 if rng.random() < 0.9 else 0.2
        hip = (
            float(rng.uniform(0.22 - spread, 0.78 + spread) * self.width),
            float(np.clip(rng.uniform(0.4, 0.72), 0.5 * share + 0.05, 1 - 0.46 * share + spread) * self.height),
        )
        pose, look = figures.random_pose(rng), figures.random_look(rng)
        joints = figures.person_joints(hip, height, pose)
        shapes = figures.person_shapes(joints, height, pose, look)
        return self.try_add(1, shapes, joints=joints, hidden=figures.hidden_ears(pose))

    def add_object(self) -> bool:
        """Add one ball, box or tree."""
        category = int(self.rng.integers(1, len(figures.OBJECT_NAMES)))
        low, high = (0.4, 0.8) if figures.OBJECT_NAMES[category] == 'tree' else (0.12, 0.35)
        size = float(self.rng.uniform(low, high) * self.height)
        centre = (float(self.rng.uniform(0, 1) * self.width), float(self.rng.uniform(0.2, 0.95) * self.height))
        return self.try_add(category + 1, figures.object_shapes(figures.OBJECT_NAMES[category], centre, size, self.rng))

    def add_crowd(self) -> None:
        """Add a group of small overlapping persons as a single crowd region, behind everything else."""
        mask = np.zeros((self.height, self.width), np.uint8)
        height = 0.22 * self.height
        left, middle = self.rng.uniform(0.1, 0.4) * self.width, self.rng.uniform(0.15, 0.3) * self.height
        for i in range(8):
            hip = (left + (i % 4) * 0.55 * height + self.rng.normal(0, 2), middle + (i // 4) * 0.4 * height)
            pose, look = figures.random_pose(self.rng), figures.random_look(self.rng)
            shapes = figures.person_shapes(figures.person_joints(hip, height, pose), height, pose, look)
            figures.paint(self.image, shapes)
            figures.paint(mask, shapes, smooth=False)
        region = mask.astype(bool)
        self.objects.append({'category_id': 1, 'visible': region, 'full': int(region.sum()), 'iscrowd': 1})


def write_sample(
    root: str | os.PathLike[str],
    *,
    train: int = 200,
    val: int = 40,
    size: tuple[int, int] = (192, 192),
    seed: int = 0,
) -> Path:
    """Draw the sample set into ``root`` (created; its own files are overwritten).

    Args:
        root: Folder that gets ``annotations/``, ``train2017/`` and ``val2017/``.
        train: Number of training pictures.
        val: Number of validation pictures.
        size: Width and height in pixels, at least 64.
        seed: Same seed, same files.

    Returns:
        ``root`` as a ``Path``.

    Raises:
        ValueError: On a negative count or a size below 64 pixels.
    """
    settings = _settings(train, val, size, seed)
    root = Path(root)
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    for split, count in (('train', train), ('val', val)):
        _write_split(root, split, count, size, seed)
    (root / _MANIFEST).write_text(json.dumps(settings))
    return root


def ensure_sample(
    root: str | os.PathLike[str],
    *,
    train: int = 200,
    val: int = 40,
    size: tuple[int, int] = (192, 192),
    seed: int = 0,
) -> Path:
    """The sample set in ``root``, drawn only if it is not there yet with these settings; safe in several processes.

    Raises:
        ValueError: If ``root`` holds something else, which is never overwritten.
    """
    root = Path(root)
    settings = _settings(train, val, size, seed)
    if _manifest(root) == settings:
        return root
    if root.exists() and _manifest(root) is None and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f'{root} is not a sample set: expected a new or empty folder, or one written by this version')
    root.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent))
    try:
        _log.info('drawing the sample set (%d + %d pictures) into %s', train, val, root)
        write_sample(fresh, train=train, val=val, size=size, seed=seed)
        fresh.chmod(0o755)
        if _manifest(root) == settings:  # another process was faster
            return root
        old = fresh.with_name(fresh.name + '-old')
        try:
            if root.exists():
                os.replace(root, old)
            os.replace(fresh, root)
        except OSError:
            if _manifest(root) != settings:
                raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return root


def draw_frames(n: int, size: tuple[int, int] = (192, 192), seed: int = 0) -> Iterator[np.ndarray]:
    """Yield ``n`` RGB uint8 frames ``(H, W, 3)`` of persons walking about; ``size`` is (width, height)."""
    width, height = size
    rng = np.random.default_rng([seed, 2])
    scene = figures.background(size, rng)
    walkers = []
    for lane in np.linspace(0.22, 0.78, 2 if width <= 1.5 * height else 3):
        tall, phase, swing = rng.uniform(0.6, 0.85) * height, rng.uniform(0, 6.28), rng.uniform(0.06, 0.12)
        walkers.append((float(lane) * width, float(tall), float(phase), float(swing), figures.random_look(rng)))
    ball = figures.object_shapes('ball', (0.0, 0.0), 0.18 * height, rng)
    for t in range(n):
        frame = scene.copy()
        for x, tall, phase, swing, look in walkers:
            angle = phase + 0.25 * t
            hip = (x + np.sin(0.2 * angle + phase) * swing * width, 0.96 * height - 0.46 * tall)
            pose = figures.walking_pose(angle, turn=0.8 * float(np.sin(0.3 * angle)))
            figures.paint(frame, figures.person_shapes(figures.person_joints(hip, tall, pose), tall, pose, look))
        offset = np.array([(0.02 * t % 1.2 - 0.1) * width, (0.85 - 0.25 * abs(np.sin(0.2 * t))) * height])
        figures.paint(frame, [figures.Shape(s.points + offset, s.color, s.size) for s in ball])
        yield frame


def _settings(train: int, val: int, size: tuple[int, int], seed: int) -> dict[str, Any]:
    if train < 0 or val < 0:
        raise ValueError(f'got {train} training and {val} validation pictures; expected counts of 0 or more')
    if min(size) < 64:
        raise ValueError(f'got pictures of {size[0]}x{size[1]} pixels; expected 64 or more each way')
    return {'version': VERSION, 'train': train, 'val': val, 'size': list(size), 'seed': seed}


def _manifest(root: Path) -> dict[str, Any] | None:
    try:
        return json.loads((root / _MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def _write_split(root: Path, split: str, count: int, size: tuple[int, int], seed: int) -> None:
    folder = root / f'{split}2017'
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    persons: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng([seed, 0 if split == 'train' else 1, index])
        scene = _draw_scene(index, size, rng)
        image_id = index + 1
        name = f'{image_id:012d}.jpg'
        written, code = cv2.imencode('.jpg', scene.image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        if not written:
            raise ValueError(f'OpenCV could not encode {name} as JPEG')
        (folder / name).write_bytes(code.tobytes())
        images.append({'id': image_id, 'file_name': name, 'width': size[0], 'height': size[1]})
        for entry in scene.objects:
            annotation = _annotation(entry, len(objects) + 1, image_id)
            if annotation is None:
                continue
            objects.append(annotation)
            if annotation['category_id'] == 1:
                persons.append({**annotation, **_keypoints(entry)})
    categories: list[dict[str, Any]] = [
        {'id': i + 1, 'name': name, 'supercategory': 'person' if i == 0 else 'object'}
        for i, name in enumerate(figures.OBJECT_NAMES)
    ]
    person = {
        **categories[0],
        'keypoints': list(figures.KEYPOINT_NAMES),
        'skeleton': [list(e) for e in figures.SKELETON],
    }
    info = {'description': 'sample set drawn by norton-timm', 'version': str(VERSION)}
    for kind, records, cats in (('instances', objects, categories), ('person_keypoints', persons, [person])):
        content = {'info': info, 'licenses': [], 'images': images, 'annotations': records, 'categories': cats}
        (root / 'annotations' / f'{kind}_{split}2017.json').write_text(json.dumps(content))


def _draw_scene(index: int, size: tuple[int, int], rng: np.random.Generator) -> _Scene:
    scene = _Scene(size, rng)
    if index % 10 == 5:
        return scene
    if index % 20 == 3:
        scene.add_crowd()
    wanted = [scene.add_person] * int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    wanted += [scene.add_object] * int(rng.integers(0, 4))
    for i in rng.permutation(len(wanted)):
        for _ in range(8):
            if wanted[i]():
                break
    return scene


def _annotation(entry: dict[str, Any], annotation_id: int, image_id: int) -> dict[str, Any] | None:
    """COCO's record of one object, or None if nothing of it can be outlined."""
    visible: np.ndarray = entry['visible']
    crowd = entry.get('iscrowd', 0)
    if crowd:
        segmentation: Any = _uncompressed_rle(visible)
        raster = visible
    else:
        segmentation = _polygons(visible)
        if not segmentation:
            return None
        rle = mask_utils.merge(mask_utils.frPyObjects(segmentation, *visible.shape))
        # from here on the mask is what the polygons say: scraps too small for one are gone
        raster = entry['visible'] = mask_utils.decode(rle).astype(bool)
    ys, xs = np.nonzero(raster)
    if len(xs) == 0:
        return None
    box = [int(xs.min()), int(ys.min()), int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1)]
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': entry['category_id'],
        'bbox': [float(v) for v in box],
        'area': float(raster.sum()),
        'segmentation': segmentation,
        'iscrowd': crowd,
    }


def _keypoints(entry: dict[str, Any]) -> dict[str, Any]:
    """17 triples (x, y, v): v is 2 visible, 1 labelled but hidden, 0 outside the picture; a crowd has none."""
    flat = [0] * (3 * len(figures.KEYPOINT_NAMES))
    visible: np.ndarray = entry['visible']
    height, width = visible.shape
    # a joint may lie on the very edge of a limb: look at its neighbourhood
    near = cv2.dilate(visible.astype(np.uint8), np.ones((3, 3), np.uint8))
    for i, (x, y) in enumerate(np.round(entry.get('joints', np.zeros((0, 2)))).astype(int).tolist()):
        if 0 <= x < width and 0 <= y < height:
            flat[3 * i : 3 * i + 3] = [x, y, 2 if near[y, x] and i not in entry['hidden'] else 1]
    return {'keypoints': flat, 'num_keypoints': sum(v > 0 for v in flat[2::3])}


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines of a boolean mask along its pixel edges, in COCO's continuous coordinates; holes are filled."""
    # traced at twice the size, so that the outline surrounds pixel centres instead of running through them
    large = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for contour in contours:
        outline = cv2.approxPolyDP(contour, 0.8, True).reshape(-1, 2)
        if len(outline) >= 3 and cv2.contourArea(contour) >= 16:
            polygons.append([round(float(v), 2) for v in ((outline + 0.5) / 2).ravel()])
    return polygons


def _uncompressed_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths in column order, the first one counting zeros."""
    flat = np.concatenate([[0], mask.ravel(order='F').astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    bounds = np.concatenate([[0], edges, [mask.size]])
    counts = np.diff(bounds).tolist()
    if counts and counts[-1] == 0:
        counts.pop()
    return {'counts': counts, 'size': [int(mask.shape[0]), int(mask.shape[1])]}
