"""Augmentation: images, boxes, masks and keypoints against NumPy slicing, and invariants under random pipelines."""

from __future__ import annotations

import itertools
from typing import Any

import albumentations as A
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detection.data.annotations import mirror_indices
from detection.data.figures import KEYPOINT_NAMES
from detection.data.transforms import DetectionTransform, RandomResize, SafeCrop, build_transforms, tight_boxes

FLIP = mirror_indices(KEYPOINT_NAMES)


def scene(seed: int = 0, height: int = 60, width: int = 80, count: int = 3, kinds: int = 17) -> tuple[np.ndarray, dict]:
    """A random image and a consistent target with rectangular masks."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    x0, y0 = rng.integers(0, width - 12, count), rng.integers(0, height - 12, count)
    x1 = np.minimum(x0 + rng.integers(8, 40, count), width)
    y1 = np.minimum(y0 + rng.integers(8, 40, count), height)
    boxes = np.stack([x0, y0, x1, y1], 1).astype(np.float32)
    masks = np.zeros((count, height, width), np.uint8)
    points = np.zeros((count, kinds, 3), np.float32)
    for i in range(count):
        masks[i, y0[i] : y1[i], x0[i] : x1[i]] = 1
        points[i, :, 0] = rng.integers(x0[i], x1[i], kinds)
        points[i, :, 1] = rng.integers(y0[i], y1[i], kinds)
        points[i, :, 2] = rng.integers(0, 3, kinds)
        points[i][points[i, :, 2] == 0] = 0
    target = {
        'boxes': boxes,
        'labels': np.arange(1, count + 1),
        'masks': masks,
        'keypoints': points,
        'area': masks.sum((1, 2)).astype(np.float32),
        'iscrowd': np.zeros(count, np.int64),
        'image_id': 5,
    }
    return image, target


def test_horizontal_flip_mirrors_everything_and_trades_left_and_right() -> None:
    image, target = scene()
    flipped, result = DetectionTransform([A.HorizontalFlip(p=1)])(image, target, FLIP)
    np.testing.assert_array_equal(flipped, image[:, ::-1])
    np.testing.assert_array_equal(result['masks'], target['masks'][:, :, ::-1])
    boxes = target['boxes']
    np.testing.assert_allclose(
        result['boxes'], np.stack([80 - boxes[:, 2], boxes[:, 1], 80 - boxes[:, 0], boxes[:, 3]], 1)
    )
    for name, index in zip(KEYPOINT_NAMES, range(17)):
        mirror = name.replace('left', '#').replace('right', 'left').replace('#', 'right')
        old = target['keypoints'][:, KEYPOINT_NAMES.index(mirror)]
        new = result['keypoints'][:, index]
        np.testing.assert_allclose(new[:, 2], old[:, 2])
        np.testing.assert_allclose(new[:, 0], np.where(old[:, 2] > 0, 79 - old[:, 0], 0), atol=1e-4)
        np.testing.assert_allclose(new[:, 1], np.where(old[:, 2] > 0, old[:, 1], 0), atol=1e-4)
    assert result['image_id'] == 5


def test_two_flips_give_the_original_back() -> None:
    image, target = scene(1)
    flip = DetectionTransform([A.HorizontalFlip(p=1)])
    twice, result = flip(*flip(image, target, FLIP), FLIP)
    np.testing.assert_array_equal(twice, image)
    for key in ('boxes', 'labels', 'masks', 'keypoints', 'area'):
        np.testing.assert_allclose(result[key], target[key], atol=1e-4)


@pytest.mark.parametrize(
    ('steps', 'mirrored'),
    [
        ([A.VerticalFlip(p=1)], True),
        ([A.Transpose(p=1)], True),
        ([A.HorizontalFlip(p=1), A.VerticalFlip(p=1)], False),
        ([A.Affine(rotate=(40, 40), p=1)], False),
        ([A.ColorJitter(p=1)], False),
        ([], False),
    ],
    ids=['vertical flip', 'transpose', 'half turn', 'rotation', 'colour', 'nothing'],
)
def test_left_and_right_are_traded_exactly_when_the_image_is_mirrored(steps: list, mirrored: bool) -> None:
    image, target = scene(2)
    target['keypoints'][...] = [40, 30, 0]
    target['keypoints'][:, 5] = [40, 30, 1]  # left shoulder
    target['keypoints'][:, 6] = [42, 30, 2]  # right shoulder
    _, result = DetectionTransform(steps, min_visibility=0)(image, target, FLIP)
    assert set(result['keypoints'][:, 5, 2]) == ({2} if mirrored else {1})


def test_crop_shifts_clips_and_drops_together() -> None:
    image, target = scene(3, count=0)
    boxes = np.array([[5, 5, 15, 15], [30, 20, 60, 50], [70, 50, 78, 58]], np.float32)
    masks = np.zeros((3, 60, 80), np.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int)):
        mask[y0:y1, x0:x1] = 1
    points = np.zeros((3, 17, 3), np.float32)
    points[1, 0] = [35, 25, 2]  # inside the crop
    points[1, 1] = [55, 45, 1]  # outside
    target |= {'boxes': boxes, 'labels': np.array([1, 2, 3]), 'masks': masks, 'keypoints': points}
    target |= {'area': np.array([100, 900, 64], np.float32), 'iscrowd': np.zeros(3, np.int64)}
    crop = DetectionTransform([A.Crop(20, 10, 50, 40)])
    cropped, result = crop(image, target, FLIP)
    np.testing.assert_array_equal(cropped, image[10:40, 20:50])
    np.testing.assert_array_equal(result['labels'], [2])
    np.testing.assert_allclose(result['boxes'], [[10, 10, 30, 30]])
    np.testing.assert_array_equal(result['masks'], masks[1:2, 10:40, 20:50])
    np.testing.assert_allclose(result['area'], [400])
    np.testing.assert_allclose(result['keypoints'][0, 0], [15, 15, 2], atol=1e-4)
    np.testing.assert_array_equal(result['keypoints'][0, 1], [0, 0, 0])


def test_box_shrinks_to_what_a_crop_leaves_of_the_mask() -> None:
    image, target = scene(count=1)
    mask = np.zeros((1, 60, 80), np.uint8)
    mask[0, 10:50, 10:14] = 1  # a thin left part
    mask[0, 46:50, 10:60] = 1  # and a foot
    target |= {'masks': mask, 'boxes': np.array([[10, 10, 60, 50]], np.float32)}
    del target['keypoints']
    _, result = DetectionTransform([A.Crop(0, 0, 80, 40)])(image, target)
    np.testing.assert_array_equal(result['boxes'], [[10, 10, 14, 40]])


def test_keypoints_follow_their_pixels() -> None:
    """A coloured dot at every keypoint is still under it after flips, crops and padding."""
    pipeline = DetectionTransform(
        [A.HorizontalFlip(p=0.5), A.RandomCrop(50, 90, pad_if_needed=True, pad_position='top_left', fill=0)], 0.0
    )
    for seed in range(30):
        rng = np.random.default_rng(seed)
        places = rng.choice(60 * 80, 17, replace=False)
        image = np.zeros((60, 80, 3), np.uint8)
        colors = rng.integers(1, 256, (17, 3))
        points = np.ones((1, 17, 3), np.float32)
        for i, place in enumerate(places):
            y, x = divmod(int(place), 80)
            image[y, x], points[0, i, :2] = colors[i], (x, y)
        target: dict[str, Any] = {'boxes': np.array([[0, 0, 80, 60]], np.float32), 'keypoints': points}
        moved, result = pipeline(image, target, tuple(range(17)), seed)
        for i, (x, y, v) in enumerate(result['keypoints'][0]):
            if v:
                np.testing.assert_array_equal(moved[round(float(y)), round(float(x))], colors[i])
        assert (result['keypoints'][0, :, 2] > 0).sum() == (moved.any(2)).sum()


def test_same_seed_same_result_and_steps_choose_independently() -> None:
    image, target = scene()
    pipeline = DetectionTransform([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])
    outcomes = []
    for seed in range(40):
        first, again = (pipeline(image, target, FLIP, seed)[0] for _ in range(2))
        np.testing.assert_array_equal(first, again)
        choices = itertools.product((1, -1), repeat=2)
        outcomes.append(next((v, h) for v, h in choices if np.array_equal(first, image[::v, ::h])))
    assert len(set(outcomes)) == 4


def test_resizing_keeps_the_aspect_ratio() -> None:
    image, target = scene(height=60, width=80)
    out, result = DetectionTransform([RandomResize(fit=(120, 150))])(image, target, FLIP)
    assert out.shape[:2] == (round(60 * 150 / 80), 150)
    np.testing.assert_allclose(result['boxes'], target['boxes'] * 150 / 80, atol=1.01)
    heights = [DetectionTransform([RandomResize((0.5, 2.0))])(image, target, FLIP, s)[0].shape[0] for s in range(20)]
    assert 30 <= min(heights) < 60 < max(heights) <= 120


def test_large_scale_jitter_always_gives_the_crop_size() -> None:
    pipeline = build_transforms('mask', True, jitter=(0.1, 2.0), crop=(64, 96))
    assert pipeline is not None
    for seed in range(20):
        image, target = scene(seed, height=50, width=70)
        del target['keypoints']
        out, result = pipeline(image, target, (), seed)
        assert out.shape == (64, 96, 3)
        assert result['masks'].shape[1:] == (64, 96)


def test_safe_crop_crops_but_keeps_every_object_whole() -> None:
    sizes = set()
    for seed in range(30):
        image, target = scene(seed, count=2)
        out, result = DetectionTransform([SafeCrop(p=1)])(image, target, FLIP, seed)
        sizes.add(out.shape)
        np.testing.assert_array_equal(result['area'], target['area'])
        np.testing.assert_array_equal(result['keypoints'][..., 2], target['keypoints'][..., 2])
    assert len(sizes) > 10


def test_a_target_without_objects_passes(capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = build_transforms('keypoint', True, jitter=(0.5, 1.5), crop=(64, 64), safe_crop=1, color=1)
    assert pipeline is not None
    # an empty image first and after others: label bookkeeping must not depend on what came before
    for count in (0, 2, 0):
        image, target = scene(count=count)
        out, result = pipeline(image, target, FLIP, 1)
        assert out.shape == (64, 64, 3)
        for key, shape in (('boxes', (4,)), ('keypoints', (17, 3)), ('masks', (64, 64)), ('labels', ())):
            assert result[key].shape[1:] == shape
            assert result[key].dtype == target[key].dtype
    assert capfd.readouterr().out == ''


@st.composite
def samples(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, Any], bool]:
    """An image and any target: boxes outside or without area, empty and scattered masks, keypoints anywhere."""
    height, width = draw(st.integers(1, 48)), draw(st.integers(1, 48))
    count = draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    masks = np.zeros((count, height, width), np.uint8)
    for mask in masks:
        kind = rng.integers(3)
        if kind == 1:
            mask[...] = rng.random((height, width)) < 0.1
        elif kind == 2:
            y, x = rng.integers(height), rng.integers(width)
            mask[y : y + rng.integers(1, 30), x : x + rng.integers(1, 30)] = 1
    with_masks = draw(st.booleans())
    if with_masks:
        boxes = tight_boxes(masks)[0]
    else:
        corner = rng.uniform(-10, 50, (count, 2))
        boxes = np.concatenate([corner, corner + rng.choice([0.0, 0.5, 7.25, 30.0], (count, 2))], 1).astype(np.float32)
    points = rng.uniform(-5, 50, (count, 3, 3)).astype(np.float32)
    points[..., 2] = rng.integers(0, 3, (count, 3))
    target: dict[str, Any] = {
        'boxes': boxes,
        'labels': rng.integers(1, 90, count),
        'number': np.arange(count),
        'keypoints': points,
        'area': np.ones(count, np.float32),
    }
    if with_masks:
        target['masks'] = masks
    return image, target, with_masks


@st.composite
def pipelines(draw: st.DrawFn) -> DetectionTransform:
    """Any sequence of the steps that ``build_transforms`` puts together."""
    size = st.integers(1, 64)
    steps = {
        'flip': st.builds(A.HorizontalFlip, p=st.just(0.5)),
        'rotate': st.builds(lambda a: A.Affine(rotate=(-a, a), p=1), st.floats(0, 180)),
        'safe': st.just(SafeCrop(p=1)),
        'crop': st.builds(lambda h, w: A.RandomCrop(h, w, pad_if_needed=True, pad_position='top_left'), size, size),
        'resize': st.builds(lambda s, j: RandomResize((j, 2 * j), (s, s)), size, st.floats(0.05, 1.5)),
        'color': st.just(A.ColorJitter(p=1)),
    }
    order = draw(st.permutations(sorted(steps)))
    names = order[: draw(st.integers(0, 4))]
    return DetectionTransform([draw(steps[n]) for n in names], draw(st.sampled_from([0.0, 0.1, 0.5])))


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(samples(), pipelines(), st.integers(0, 2**62))
def test_nothing_invalid_leaves_any_pipeline(data: tuple, pipeline: DetectionTransform, seed: int) -> None:
    image, target, with_masks = data
    out, result = pipeline(image, target, (0, 2, 1), seed)
    height, width = out.shape[:2]
    boxes, points = result['boxes'], result['keypoints']
    count = len(boxes)
    assert out.dtype == np.uint8 and out.shape[2] == 3
    assert boxes.shape == (count, 4) and boxes.dtype == np.float32 and np.isfinite(boxes).all()
    assert all(len(result[key]) == count for key in ('labels', 'number', 'keypoints', 'area'))
    # boxes inside the image, of at least one pixel each way
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width + 1e-3).all() and (boxes[:, 3] <= height + 1e-3).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 1 - 1e-2).all()
    # each row is still one object
    numbers = result['number']
    assert len(set(numbers.tolist())) == count
    np.testing.assert_array_equal(result['labels'], target['labels'][numbers])
    # keypoints: inside or wiped, none invented
    seen = points[..., 2] > 0
    assert not points[~seen].any()
    assert (points[..., 0][seen] < width).all() and (points[..., 1][seen] < height).all() and (points >= 0).all()
    assert (seen.sum(1) <= (target['keypoints'][numbers][..., 2] > 0).sum(1)).all()
    if with_masks:
        masks = result['masks']
        assert masks.shape == (count, height, width) and set(np.unique(masks)) <= {0, 1}
        tight, found = tight_boxes(masks)
        assert found.all()
        np.testing.assert_allclose(boxes, tight, atol=1)
        np.testing.assert_allclose(result['area'], masks.sum((1, 2)))


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'task': 'pose'}, "unknown task 'pose'; expected one of box, mask, keypoint"),
        ({'flip': 1.5}, 'got flip=1.5; expected a number from 0 to 1'),
        ({'color': -1}, 'got color=-1'),
        ({'jitter': (2.0, 1.0)}, 'expected two factors above 0, the smaller one first'),
        ({'crop': (0, 64)}, 'expected sizes of 1 or more'),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build_transforms(**{'task': 'box', 'train': True, **wrong})
    assert message in str(error.value)


def test_evaluation_changes_nothing() -> None:
    assert build_transforms('box', False, flip=1.0) is None


def test_flip_indices_must_fit_the_keypoints() -> None:
    image, target = scene()
    with pytest.raises(ValueError, match='got 3 flip indices for 17 keypoints'):
        DetectionTransform([A.HorizontalFlip(p=1)])(image, target, (0, 2, 1))
