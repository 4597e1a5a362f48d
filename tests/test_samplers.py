"""Groups, repeat factors and copy-paste against their definitions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from detection.data.coco import CocoDataset
from detection.data.sample import write_sample
from detection.data.samplers import CopyPaste, RepeatFactorSampler, aspect_groups, paste, repeat_factors
from detection.data.transforms import build_transforms, tight_boxes


def test_aspect_groups_part_wide_from_tall_images(tiny_coco: Path) -> None:
    data = CocoDataset(tiny_coco, 'val', 'box')
    groups = aspect_groups(data)
    assert set(groups) == {0, 1}
    for index in range(0, 50, 7):
        height, width = data[index][0].shape[1:]
        assert groups[index] == int(height > width)
    assert len(set(aspect_groups(data, (0.7, 1.0, 1.4)))) > 2
    with pytest.raises(ValueError, match='expected ascending ratios'):
        aspect_groups(data, (2.0, 1.0))


def test_repeat_factors_by_hand() -> None:
    # class 1 in all four images, class 2 in one of them: sqrt(1 / 0.25) = 2
    factors = repeat_factors([[1], [1, 1], [1, 2, 2], [1]], threshold=1.0)
    assert factors.tolist() == [1, 1, 2, 1]
    # below the threshold of a half only class 2 is rare: sqrt(0.5 / 0.25)
    factors = repeat_factors([[1], [1], [2], []], threshold=0.5)
    np.testing.assert_allclose(factors, [1, 1, 2**0.5, 1])
    with pytest.raises(ValueError, match='got threshold=0'):
        repeat_factors([[1]], 0)


def test_repeat_factor_sampler_repeats_as_often_as_the_factors_say() -> None:
    sampler = RepeatFactorSampler(torch.tensor([1.0, 2.5, 1.25, 3.0]), seed=5)
    counts: Counter[int] = Counter()
    for epoch in range(400):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler)
        assert indices == list(sampler)
        counts.update(indices)
    assert counts[0] == 400 and counts[3] == 1200
    assert counts[1] / 400 == pytest.approx(2.5, abs=0.1)
    assert counts[2] / 400 == pytest.approx(1.25, abs=0.1)


def square(height: int, width: int, *places: tuple[int, int, int]) -> tuple[torch.Tensor, dict]:
    """An image of one random colour with squares (y, x, side) as objects."""
    masks = torch.zeros(len(places), height, width, dtype=torch.uint8)
    for mask, (y, x, side) in zip(masks, places):
        mask[y : y + side, x : x + side] = 1
    return torch.rand(3, 1, 1).expand(3, height, width), {
        'boxes': torch.from_numpy(tight_boxes(masks.numpy())[0]),
        'labels': torch.arange(1, len(places) + 1),
        'masks': masks,
        'area': masks.sum((1, 2)).float(),
        'iscrowd': torch.zeros(len(places), dtype=torch.int64),
        'image_id': height,
    }


def test_pasted_objects_cover_what_is_behind() -> None:
    image, target = square(40, 40, (0, 0, 10), (20, 20, 10), (30, 0, 4))
    other_image, other = square(30, 60, (5, 0, 10), (0, 50, 5), (20, 20, 10))
    merged, result = paste(image, target, other_image, other, torch.tensor([0, 1, 2]))
    # own objects 1 (half covered) and 3; 2 is hidden, the pasted second one lies outside
    assert result['labels'].tolist() == [1, 3, 1, 3]
    assert result['boxes'].tolist() == [[0, 0, 10, 5], [0, 30, 4, 34], [0, 5, 10, 15], [20, 20, 30, 30]]
    assert result['area'].tolist() == [50, 16, 100, 100]
    assert result['masks'].sum(0).max() == 1
    assert result['image_id'] == 40
    front = result['masks'][2:].bool().any(0)
    assert torch.equal(merged[:, front], other_image[:, 0, 0][:, None].expand(3, int(front.sum())))
    assert torch.equal(merged[:, ~front], image[:, ~front])
    # the sources are untouched
    assert target['masks'].sum() == 216 and torch.equal(image[:, 0, 0], image[:, 5, 5])


def test_pasting_nothing_changes_nothing() -> None:
    image, target = square(20, 20, (2, 2, 5))
    other_image, other = square(20, 20)
    merged, result = paste(image, target, other_image, other, torch.zeros(0, dtype=torch.int64))
    assert torch.equal(merged, image)
    assert all(torch.equal(result[k], target[k]) for k in ('boxes', 'labels', 'masks', 'area'))


def test_copy_paste_adds_objects_and_stays_consistent(tmp_path: Path) -> None:
    root = write_sample(tmp_path, train=20, val=1, size=(96, 96))
    augment = build_transforms('mask', True, jitter=(0.5, 1.5), crop=(96, 96))
    data = CocoDataset(root, 'train', 'mask', augment, seed=1)
    mixed = CopyPaste(data, p=1.0)
    plain = total = 0
    for index in range(len(mixed)):
        image, target = mixed[index]
        assert torch.equal(image, mixed[index][0])
        assert image.shape[1:] == target['masks'].shape[1:]
        tight, found = tight_boxes(target['masks'].numpy())
        assert found.all()
        np.testing.assert_array_equal(target['boxes'], tight)
        assert len({len(target[k]) for k in ('boxes', 'labels', 'masks', 'area', 'iscrowd')}) == 1
        plain, total = plain + len(data[index][1]['labels']), total + len(target['labels'])
    assert total > 1.2 * plain
    assert torch.equal(CopyPaste(data, p=0.0)[0][0], data[0][0])
    with pytest.raises(ValueError, match="got a data set for task 'box'"):
        CopyPaste(CocoDataset(root, 'train', 'box'))
