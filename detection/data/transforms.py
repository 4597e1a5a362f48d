"""Augmentation for training: albumentations pipelines in which a box, its mask and its keypoints stay together.

Every object carries its row number through the pipeline; one that loses its box (or its whole mask) is dropped with all
its parts. Nothing is resized or normalised for the network here: torchvision's ``GeneralizedRCNNTransform`` does it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np
from albumentations.augmentations.geometric.resize import MaxSizeTransform

from detection.tasks import check_task

Target = dict[str, Any]
Transform = Callable[[np.ndarray, Target, Sequence[int], int], tuple[np.ndarray, Target]]


class RandomResize(MaxSizeTransform):
    """Resize by a random factor with the aspect ratio kept.

    Args:
        jitter: Range of the factor; with ``fit`` this is large-scale jittering (Ghiasi et al., 2021).
        fit: Height and width into which the image just fits at factor 1; None: the image's own size.
    """

    class InitSchema(A.BasicTransform.InitSchema):
        """Arguments as albumentations validates them."""

        jitter: Any
        fit: Any

    def __init__(
        self, jitter: tuple[float, float] = (1.0, 1.0), fit: tuple[int, int] | None = None, p: float = 1
    ) -> None:
        super().__init__(max_size=1, interpolation=cv2.INTER_LINEAR, area_for_downscale='image', p=p)
        self.jitter, self.fit = jitter, fit

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the factor."""
        height, width = params['shape'][:2]
        scale = 1.0 if self.fit is None else min(self.fit[0] / height, self.fit[1] / width)
        return {'scale': scale * self.py_random.uniform(*self.jitter)}


class SafeCrop(A.BBoxSafeRandomCrop):
    """A random crop that keeps every object whole; without objects, the image as it is.

    Albumentations' own crop rounds the far side down, which can cut a pixel off, and raises on boxes below one pixel.
    """

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the four sides."""
        height, width = params['shape'][:2]
        boxes = np.asarray(data['bboxes'])
        if not len(boxes):
            return {'crop_coords': (0, 0, width, height)}
        sides = []
        for axis, size in ((0, width), (1, height)):
            low = int(np.clip(boxes[:, axis].min() * size, 0, size - 1))
            high = int(np.clip(np.ceil(boxes[:, axis + 2].max() * size), low + 1, size))
            sides.append((self.py_random.randint(0, low), self.py_random.randint(high, size)))
        (left, right), (top, bottom) = sides
        return {'crop_coords': (left, top, right, bottom)}


class DetectionTransform:
    """Applies albumentations to an image and all parts of its target.

    Args:
        steps: Albumentations transforms, applied in order.
        min_visibility: An object is dropped when a step leaves a smaller fraction of its box inside the image.
        min_size: Smallest box side in pixels that is kept.
    """

    def __init__(self, steps: Sequence[A.BasicTransform], min_visibility: float = 0.1, min_size: float = 1.0) -> None:
        boxes = A.BboxParams(
            format='pascal_voc',
            clip=True,
            filter_invalid_bboxes=True,
            min_visibility=min_visibility,
            min_width=min_size,
            min_height=min_size,
        )
        # invisible keypoints are kept, so that row k of a person stays its k-th keypoint
        points = A.KeypointParams(format='xy', remove_invisible=False)
        with warnings.catch_warnings():
            # a pipeline that changes colours only is no mistake
            warnings.filterwarnings('ignore', message='Got processor for')
            self.compose = A.Compose(list(steps), bbox_params=boxes, keypoint_params=points)
        self.min_size = min_size

    def __call__(
        self, image: np.ndarray, target: Target, flip_indices: Sequence[int] = (), seed: int = 0
    ) -> tuple[np.ndarray, Target]:
        """Transform one sample.

        Args:
            image: RGB uint8 ``(H, W, 3)``.
            target: NumPy arrays with a row per object: ``boxes (N, 4)`` xyxy in pixels, and any of ``labels (N,)``,
                ``masks (N, H, W)`` uint8, ``keypoints (N, K, 3)``, ``area (N,)``, ``iscrowd (N,)``; other entries
                pass through.
            flip_indices: For each of K keypoints, its partner in a mirrored image.
            seed: Decides every random choice.

        Returns:
            The new image and target. Boxes lie inside the image and are at least ``min_size`` wide and high; where
            there are masks each box is the tight box of its mask. Keypoints outside are (0, 0, 0).
        """
        self._seed(seed)
        count = len(target['boxes'])
        height, width = image.shape[:2]
        boxes = np.asarray(target['boxes'], np.float32).reshape(count, 4)
        # the last three points are no keypoints: they show whether the image came out mirrored
        frame = np.array([[0, 0], [max(1, width - 1), 0], [0, max(1, height - 1)]], np.float32)
        points = (
            np.concatenate([np.asarray(target['keypoints'], np.float32)[..., :2].reshape(-1, 2), frame])
            if ('keypoints' in target)
            else frame
        )
        data: dict[str, Any] = {
            'image': image,
            'bboxes': np.column_stack([boxes, np.arange(count, dtype=np.float32)]),
            'keypoints': points,
        }
        if 'masks' in target and count:
            data['masks'] = np.asarray(target['masks'], np.uint8)
        result = self.compose(**data)

        moved = np.asarray(result['bboxes'], np.float32)
        rows = moved[:, 4].round().astype(np.int64) if len(moved) else np.zeros(0, np.int64)
        moved = moved[:, :4].reshape(-1, 4)
        image = result['image']
        parts: Target = {}
        if 'masks' in target:
            shape = (0, *image.shape[:2])
            masks = np.stack(result['masks'])[rows] if len(rows) else np.zeros(shape, np.uint8)
            moved, keep = tight_boxes(masks)
            keep &= ((moved[:, 2:] - moved[:, :2]) >= self.min_size).all(1)
            rows, moved, parts['masks'] = rows[keep], moved[keep], masks[keep]
            parts['area'] = parts['masks'].sum((1, 2)).astype(np.float32)
        elif 'area' in target:
            before = np.maximum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1e-6)[rows]
            after = np.prod(moved[:, 2:] - moved[:, :2], axis=1)
            parts['area'] = (np.asarray(target['area'], np.float32)[rows] * after / before).astype(np.float32)
        if 'keypoints' in target:
            parts['keypoints'] = _keypoints(np.asarray(result['keypoints']), target, rows, image.shape, flip_indices)
        for name, value in target.items():
            if name not in parts and name != 'boxes':
                parts[name] = value[rows] if isinstance(value, np.ndarray) and value.shape[:1] == (count,) else value
        return image, {'boxes': moved, **parts}

    def _seed(self, seed: int) -> None:
        # Compose.set_random_seed gives all steps one seed, which ties their choices together
        children = np.random.SeedSequence(seed).generate_state(len(self.compose.transforms) + 1)
        self.compose.set_random_seed(int(children[-1]))
        for step, child in zip(self.compose.transforms, children):
            step.set_random_seed(int(child))


def build_transforms(
    task: str,
    train: bool,
    *,
    flip: float = 0.5,
    jitter: tuple[float, float] = (1.0, 1.0),
    crop: tuple[int, int] | None = None,
    safe_crop: float = 0.0,
    color: float = 0.0,
    min_visibility: float = 0.1,
) -> DetectionTransform | None:
    """The augmentation of a training run, or None for evaluation, which sees images as they are.

    Args:
        task: 'box', 'mask' or 'keypoint'.
        train: False gives None.
        flip: Probability of a horizontal flip; left and right keypoints trade places.
        jitter: Range of a random scale factor.
        crop: (height, width) of a random crop, padded at the right and bottom; ``jitter`` is then relative to the
            size that just fits, so ``jitter=(0.1, 2.0), crop=(1024, 1024)`` is large-scale jittering.
        safe_crop: Probability of a random crop that keeps every object whole.
        color: Strength of brightness, contrast, saturation and hue changes, 0 to 1.
        min_visibility: Smallest fraction of a box's area that may remain in view.

    Raises:
        ValueError: On a task or a number out of range.

    Example:
        >>> augment = build_transforms('mask', True, flip=0.5, color=0.4)
    """
    check_task(task)
    _check_range('flip', flip, 0, 1)
    _check_range('safe_crop', safe_crop, 0, 1)
    _check_range('color', color, 0, 1)
    _check_range('min_visibility', min_visibility, 0, 1)
    if crop and min(crop) < 1:
        raise ValueError(f'got crop={crop}; expected sizes of 1 or more')
    if not 0 < jitter[0] <= jitter[1]:
        raise ValueError(f'got jitter={jitter}; expected two factors above 0, the smaller one first')
    if not train:
        return None
    steps: list[A.BasicTransform] = []
    if safe_crop > 0:
        steps.append(SafeCrop(p=safe_crop))
    if flip > 0:
        steps.append(A.HorizontalFlip(p=flip))
    if crop or jitter != (1.0, 1.0):
        steps.append(RandomResize((float(jitter[0]), float(jitter[1])), crop))
    if crop:
        steps.append(A.RandomCrop(crop[0], crop[1], pad_if_needed=True, pad_position='top_left', fill=114))
    if color > 0:
        change = 0.4 * color
        steps.append(A.ColorJitter((1 - change, 1 + change), (1 - change, 1 + change), (1 - change, 1 + change),
                                   (-0.1 * color, 0.1 * color), p=0.8))  # fmt: skip
    return DetectionTransform(steps, min_visibility)


def tight_boxes(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tight boxes ``(N, 4)`` xyxy of masks ``(N, H, W)``, and which of them ``(N,)`` are not empty."""
    boxes = np.zeros((len(masks), 4), np.float32)
    found = np.zeros(len(masks), bool)
    for i, mask in enumerate(masks):
        xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        if len(xs):
            boxes[i], found[i] = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1), True
    return boxes, found


def _keypoints(
    points: np.ndarray, target: Target, rows: np.ndarray, shape: Sequence[int], flip_indices: Sequence[int]
) -> np.ndarray:
    """Keypoints ``(M, K, 3)`` of the objects kept: left and right traded if mirrored, those outside set to zero."""
    old = np.asarray(target['keypoints'], np.float32)
    frame = points[-3:, :2]
    across, down = frame[1] - frame[0], frame[2] - frame[0]
    mirrored = across[0] * down[1] - across[1] * down[0] < 0
    new = old.copy()
    new[..., :2] = points[:-3, :2].reshape(*old.shape[:2], 2)
    new = new[rows]
    if mirrored and len(flip_indices):
        if len(flip_indices) != old.shape[1]:
            raise ValueError(f'got {len(flip_indices)} flip indices for {old.shape[1]} keypoints; expected as many')
        new = new[:, list(flip_indices)]
    height, width = shape[:2]
    x, y, v = new[..., 0], new[..., 1], new[..., 2]
    seen = (v > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return np.where(seen[..., None], new, np.float32(0))


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f'got {name}={value}; expected a number from {low} to {high}')
