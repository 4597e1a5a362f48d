"""COCO-format data sets for the three tasks, as torchvision's R-CNNs take them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from detection.data.annotations import box_to_train_on, labels_of, load_coco, mirror_indices
from detection.data.content import polygon_problem
from detection.data.decode import read_picture
from detection.data.layouts import find_annotations, find_images, has_annotations, match_pictures, other_splits
from detection.data.masks import check_outline, decode_mask, mask_area
from detection.data.sample import ensure_sample
from detection.data.transforms import Transform
from detection.tasks import check_task
from norton_timm.utils import brief

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSource:
    """Where data come from: the folder, and a name to print."""

    root: Path
    name: str


def find_data(path: str | os.PathLike[str] | None = None) -> DataSource:
    """The data set to use: ``path``; without one ``data/coco`` if it is there, else the built-in sample set.

    The sample set is drawn into ``data/sample`` on first use.

    Raises:
        ValueError: If ``path`` is no folder or holds no annotation files.

    Example:
        >>> source = find_data()
        >>> dataset = CocoDataset(source.root, 'val', 'keypoint')
    """
    if path is not None:
        root = Path(path)
        if not root.is_dir():
            raise ValueError(f'data folder {root} does not exist; expected a folder in COCO layout')
        if not has_annotations(root):
            raise ValueError(
                f'{root} holds no annotations/*.json; expected e.g. {root}/annotations/instances_train2017.json, or a '
                'layout of label tools such as train/_annotations.coco.json'
            )
        return DataSource(root, f'COCO-format data in {root}')
    root = Path('data/coco')
    if has_annotations(root):
        return DataSource(root, f'COCO-format data in {root}')
    return DataSource(ensure_sample('data/sample'), 'built-in sample set in data/sample')


class Draw(NamedTuple):
    """An item of an epoch: the image's index and its position. A repeated image is augmented anew at each position."""

    image: int
    position: int


class CocoDataset(Dataset):
    """One split of a COCO-format data set.

    An item is ``(image, target)``: the image float ``(3, H, W)``, RGB in 0..1; the target a dict with ``boxes (N, 4)``
    xyxy in pixels, ``labels (N,)``, ``area (N,)``, ``iscrowd (N,)``, ``image_id`` (int) and, by task, ``masks
    (N, H, W)`` uint8 or ``keypoints (N, K, 3)``. Crowd regions, boxes without area and objects without what the task
    needs are left out of targets; the evaluator reads the annotations themselves (``coco``). Images without objects
    stay, as N = 0.

    Items are requested by index, or by a ``Draw`` that also gives the position in the epoch.

    Args:
        root: Folder with ``annotations/{instances,person_keypoints}_{split}*.json`` and the images, or in a layout of
            ``layouts.py``.
        split: 'train' or 'val', or any other split that has an annotation file.
        task: 'box', 'mask' or 'keypoint'.
        transforms: What ``build_transforms`` returns.
        min_keypoints: In the keypoint task, objects with fewer labelled keypoints are left out. By default none is:
            a person without keypoints still trains the box head, and would count as background if left out.
        flip_pairs: Names or indices of keypoints that trade places in a mirrored image; by default, names that differ
            in left / right only.
        annotations: Annotation file, if its name or place is not the usual one.
        images: Image folder, likewise; relative to ``root`` or else to the working folder.
        class_names: Names of a trained network's labels, from 0, the background: the labels then mean those names,
            whatever ids and order the file has. By default labels are numbered as ``label_to_category`` says.
        keypoint_names: Likewise, the keypoints that a trained network finds.
        seed: Makes augmentation a function of seed, epoch (``set_epoch``), index and position in the epoch (0 for a
            plain index) alone, whatever the number of workers; None draws from torch's generator.
        limit: Take only this many images, the first ones that hold objects (with keypoints, in the keypoint task).

    Attributes:
        coco: ``pycocotools.coco.COCO`` of the annotations.
        num_classes: Classes including the background.
        class_names: Name of every label; label 0 is the background, gaps are 'N/A'.
        label_to_category: Category id of every label. Labels are COCO's own category ids for COCO's 80 classes (91
            with the background, as in torchvision's weights), otherwise 1..N.
        num_keypoints: K, 0 in the other tasks.
        keypoint_names: Their names.
        skeleton: Edges between keypoints, counted from 0.
        pictures: Where the files of its images lie.
        flip_indices: For each keypoint, its partner in a mirrored image.

    Raises:
        ValueError: On an unknown task or split, a missing or malformed annotation file, a malformed mask in the mask
            task, a missing picture; an item raises it on an image that cannot be read or has another size than the
            annotations say.

    Example:
        >>> dataset = CocoDataset('data/sample', 'train', 'mask', build_transforms('mask', True), seed=0)
        >>> image, target = dataset[0]  # (3, H, W); boxes, labels, masks, ...
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        task: str,
        transforms: Transform | None = None,
        *,
        min_keypoints: int = 0,
        flip_pairs: Sequence[tuple[str | int, str | int]] | None = None,
        annotations: str | os.PathLike[str] | None = None,
        images: str | os.PathLike[str] | None = None,
        class_names: Sequence[str] | None = None,
        keypoint_names: Sequence[str] | None = None,
        seed: int | None = None,
        limit: int | None = None,
    ) -> None:
        check_task(task)
        self.root, self.split, self.task, self.transforms, self.seed = Path(root), split, task, transforms, seed
        self.annotation_file = Path(annotations) if annotations else find_annotations(self.root, split, task)
        self.coco = load_coco(self.annotation_file)
        folders = find_images(self.root, split, self.annotation_file, images)
        self.image_ids: list[int] = sorted(self.coco.imgs)
        if not self.image_ids:
            raise ValueError(f'{self.annotation_file} lists no images; expected at least one')
        found = labels_of(self.coco, task, self.annotation_file, class_names, keypoint_names)
        self.label_to_category, self.class_names, self.keypoint_names, self.skeleton = found
        self.num_classes = len(self.class_names)
        self._labels = {category: label for label, category in self.label_to_category.items()}
        self.num_keypoints = len(self.keypoint_names)
        self.flip_indices = mirror_indices(self.keypoint_names, flip_pairs)
        self.min_keypoints = min_keypoints
        if limit is not None:
            self.image_ids = self._first_with_objects(limit)
        others = other_splits(self.root, split, self.annotation_file)
        self.pictures = match_pictures((self.coco.imgs[i]['file_name'] for i in self.image_ids), folders, others)
        self._check_files()
        # shared, so that persistent workers see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.image_ids)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the random augmentation; only matters with a ``seed``."""
        self._epoch.fill_(epoch)

    def __getitem__(self, item: int | Draw) -> tuple[torch.Tensor, dict[str, Any]]:
        return self.augmented(item.image if isinstance(item, Draw) else item, self.item_seed(item))

    def augmented(self, index: int, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Image ``index`` and its target, all random choices decided by ``seed``."""
        image, target = self.load(index)
        if self.transforms is not None:
            image, target = self.transforms(image, target, self.flip_indices, seed)
        tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in target.items()}
        return to_tensor(image), tensors

    def load(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Item ``index`` as it is on disk: RGB uint8 ``(H, W, 3)`` and the target in NumPy arrays."""
        image_id = self.image_ids[index]
        image = self.read_image(image_id)
        return image, self._target(image_id, *image.shape[:2])

    def read_image(self, image_id: int) -> np.ndarray:
        """RGB uint8 image ``(H, W, 3)``, without its EXIF rotation, which COCO's annotations ignore."""
        record = self.coco.imgs[image_id]
        path = self.pictures.path(record['file_name'])
        image = read_picture(path, oriented=False)
        expected = (record['height'], record['width'])
        if image.shape[:2] != expected:
            raise ValueError(
                f'{path} is {image.shape[1]}x{image.shape[0]} pixels; '
                f'{self.annotation_file.name} says {expected[1]}x{expected[0]}'
            )
        return image

    def height_and_width(self, index: int) -> tuple[int, int]:
        """Size of an image in pixels, from the annotations, without reading it."""
        record = self.coco.imgs[self.image_ids[index]]
        return int(record['height']), int(record['width'])

    def labels_of(self, index: int) -> list[int]:
        """Labels of the objects of an item before augmentation, without reading the image."""
        image_id = self.image_ids[index]
        return [self._labels[a['category_id']] for a, _ in self._objects(image_id, *self.height_and_width(index))]

    def has_objects(self, index: int) -> bool:
        """Whether an item has objects to train on before augmentation, without reading the image."""
        size = self.height_and_width(index)
        objects = self._objects(self.image_ids[index], *size)
        return any(self.task != 'mask' or mask_area(record, *size) for record, _ in objects)

    def item_seed(self, item: int | Draw) -> int:
        """Number that decides the random choices for an item in this epoch."""
        if self.seed is None:
            return int(torch.randint(2**62, ()))
        index, position = item if isinstance(item, Draw) else (item, 0)
        sequence = np.random.SeedSequence([self.seed, int(self._epoch), index, position])
        return int(sequence.generate_state(1, np.uint64)[0] >> 2)

    def _check_files(self) -> None:
        """Find a missing picture or a malformed mask now, and not in the middle of a run."""
        pictures = self.pictures
        if pictures.missing:
            raise ValueError(
                f'{self.annotation_file}: {len(pictures.missing)} of {len(self.image_ids)} pictures are not in '
                f'{pictures.folder}, such as {brief(pictures.missing[0])}; data.images=FOLDER says where they lie'
            )
        if pictures.files:
            name, file = next(iter(pictures.files.items()))
            _log.info('%s: %d pictures have another path, %s is %s', self.annotation_file, len(pictures.files), name,
                      pictures.folder / file)  # fmt: skip
        if self.task == 'mask':
            if told := polygon_problem(self.coco.anns.values()):
                raise ValueError(f'{self.annotation_file}: {told}')
            for image_id in self.image_ids:
                image = self.coco.imgs[image_id]
                for record in self.coco.imgToAnns.get(image_id, ()):
                    if record.get('segmentation'):
                        try:
                            check_outline(record, image['height'], image['width'])
                        except ValueError as error:
                            raise ValueError(f'{self.annotation_file}: {error}') from None

    def _first_with_objects(self, limit: int) -> list[int]:
        points = self.task == 'keypoint'
        found = [
            image_id
            for i, image_id in enumerate(self.image_ids)
            if any(not points or a['num_keypoints'] for a, _ in self._objects(image_id, *self.height_and_width(i)))
        ]
        if len(found) < limit:
            raise ValueError(
                f'{self.annotation_file} has {len(found)} images with objects for task {self.task}; '
                f'expected at least {limit}'
            )
        return found[:limit]

    def _objects(self, image_id: int, height: int, width: int) -> list[tuple[dict[str, Any], tuple[float, ...]]]:
        """Annotations to train on, each with its box clipped to the image (xyxy)."""
        found: list[tuple[dict[str, Any], tuple[float, ...]]] = []
        for record in self.coco.imgToAnns.get(image_id, ()):
            box = box_to_train_on(record, self.task, height, width)
            if box is None or record['category_id'] not in self._labels:
                continue
            if self.task == 'keypoint' and record['num_keypoints'] < self.min_keypoints:
                continue
            found.append((record, box))
        return found

    def _target(self, image_id: int, height: int, width: int) -> dict[str, Any]:
        objects = self._objects(image_id, height, width)
        masks = [decode_mask(record, height, width) for record, _ in objects] if self.task == 'mask' else []
        if self.task == 'mask':
            filled = [i for i, mask in enumerate(masks) if mask.any()]
            objects, masks = [objects[i] for i in filled], [masks[i] for i in filled]
        target: dict[str, Any] = {
            'boxes': np.array([box for _, box in objects], np.float32).reshape(-1, 4),
            'labels': np.array([self._labels[r['category_id']] for r, _ in objects], np.int64),
            'image_id': image_id,
            'area': np.array([r['area'] for r, _ in objects], np.float32),
            'iscrowd': np.zeros(len(objects), np.int64),
        }
        if self.task == 'mask':
            target['masks'] = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
        if self.task == 'keypoint':
            flat = [r['keypoints'] for r, _ in objects]
            target['keypoints'] = np.array(flat, np.float32).reshape(len(flat), self.num_keypoints, 3)
        return target


def collate(batch: list[tuple[torch.Tensor, dict[str, Any]]]) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Items to a list of images and a list of targets: sizes differ, so nothing is stacked."""
    return [item[0] for item in batch], [item[1] for item in batch]


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """RGB uint8 ``(H, W, 3)`` to float ``(3, H, W)`` in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div_(255)
