"""draw.py: where colour lands, what is left untouched, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detection.visual.draw import color_of, draw_caption, draw_detections, grid, line_width, side_by_side

NAMES = ['__background__', 'person', 'dog']


def picture(height: int = 200, width: int = 300, value: int = 90) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def shows(pixel: np.ndarray, color: tuple[int, int, int]) -> bool:
    """Equal up to what anti-aliasing of a one-pixel line takes."""
    return bool(np.abs(pixel.astype(int) - color).max() <= 20)


def one(**extra) -> dict[str, torch.Tensor]:
    return {
        'boxes': torch.tensor([[60.0, 80.0, 160.0, 180.0]]),
        'labels': torch.tensor([1]),
        'scores': torch.tensor([0.9]),
        **extra,
    }


def test_box_edge_has_the_class_colour_in_rgb_and_the_input_is_untouched():
    image = picture()
    drawn = draw_detections(image, one(), NAMES)
    assert (image == 90).all()
    assert shows(drawn[130, 60], color_of(1))  # left edge
    assert shows(drawn[180, 110], color_of(1))  # lower edge
    assert tuple(drawn[130, 110]) == (90, 90, 90)  # inside
    assert tuple(drawn[195, 290]) == (90, 90, 90)  # outside


def test_below_the_score_nothing_is_drawn():
    assert (draw_detections(picture(), one(), NAMES, score=0.95) == 90).all()
    assert (draw_detections(picture(), one(), NAMES, score=0.9 - 1e-6) != 90).any()


def test_mask_is_blended_only_where_it_is_above_half():
    mask = torch.zeros(1, 1, 200, 300)
    mask[..., 90:170, 70:110] = 0.9
    mask[..., 90:170, 111:150] = 0.4
    drawn = draw_detections(picture(), one(masks=mask), NAMES).astype(int)
    expected = 0.55 * 90 + 0.45 * np.array(color_of(1))
    assert np.abs(drawn[130, 90] - expected).max() <= 1
    assert tuple(drawn[130, 130]) == (90, 90, 90)


def test_keypoints_and_limbs_are_drawn_only_where_both_ends_are_visible():
    points = torch.tensor([[[80.0, 100.0, 1.0], [140.0, 100.0, 1.0], [80.0, 160.0, 0.0]]])
    drawn = draw_detections(picture(), one(keypoints=points), NAMES, skeleton=[(0, 1), (0, 2)])
    assert shows(drawn[100, 110], color_of(1))
    assert tuple(drawn[130, 80]) == (90, 90, 90)
    assert tuple(drawn[160, 80]) == (90, 90, 90)


def test_seventeen_keypoints_get_the_coco_skeleton():
    points = torch.zeros(1, 17, 3)
    points[0, 5], points[0, 6] = torch.tensor([80.0, 100.0, 1.0]), torch.tensor([140.0, 100.0, 1.0])
    assert tuple(draw_detections(picture(), one(keypoints=points), NAMES)[100, 110]) == color_of(1)


def test_colour_follows_the_track_when_there_is_one():
    drawn = draw_detections(picture(), one(track_ids=torch.tensor([42])), NAMES)
    assert shows(drawn[130, 60], color_of(42)) and not shows(drawn[130, 60], color_of(1))


def test_a_target_without_scores_and_with_plain_masks_can_be_drawn():
    target = {'boxes': np.array([[60, 80, 160, 180]]), 'labels': np.array([2]), 'masks': np.ones((1, 200, 300), 'u1')}
    assert tuple(draw_detections(picture(), target, NAMES)[130, 60]) != (90, 90, 90)


@pytest.mark.parametrize('size', [(24, 32), (120, 160), (720, 1280)])
def test_any_size_and_boxes_over_the_border_or_not_finite(size):
    boxes = torch.tensor(
        [[-50.0, -50.0, 1e4, 1e4], [5.0, 2.0, 9.0, 7.0], [float('nan'), 0, 1, 1], [3.0, 3.0, 3.0, 3.0]]
    )
    output = {
        'boxes': boxes,
        'labels': torch.tensor([1, 2, 1, 7]),
        'scores': torch.ones(4),
        'masks': torch.ones(4, 1, *size),
        'keypoints': torch.full((4, 17, 3), 1e9),
    }
    drawn = draw_detections(picture(*size), output, NAMES)
    assert drawn.shape == (*size, 3) and (drawn != 90).any()


def test_no_detections_gives_an_equal_copy():
    empty = {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.long), 'scores': torch.zeros(0)}
    image = picture()
    drawn = draw_detections(image, empty, NAMES)
    assert (drawn == image).all() and drawn is not image


def test_every_coco_class_has_its_own_colour():
    colours = np.array([color_of(i) for i in range(1, 91)])
    gaps = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(90, dtype=int)
    assert gaps.min() > 0
    assert color_of(3) == color_of(3)


def test_wrong_pictures_and_arrays_are_named():
    with pytest.raises(ValueError, match=r'float64 \(4, 4, 3\), expected a uint8'):
        draw_detections(np.zeros((4, 4, 3)), one(), NAMES)
    with pytest.raises(ValueError, match='labels has 2 entries for 1 boxes'):
        draw_detections(picture(), {**one(), 'labels': torch.tensor([1, 2])}, NAMES)
    with pytest.raises(ValueError, match=r'mask of shape \(10, 10\) for a picture of 200 x 300'):
        draw_detections(picture(), one(masks=torch.ones(1, 1, 10, 10)), NAMES)
    with pytest.raises(ValueError, match=r'pair \(0, 5\), expected 0-based indices below 2'):
        draw_detections(picture(), one(keypoints=torch.ones(1, 2, 3)), NAMES, skeleton=[(0, 5)])
    with pytest.raises(ValueError, match='no images'):
        grid([])


def test_grid_holds_every_picture_unscaled():
    pictures = [picture(20, 30, 10), picture(40, 10, 20), picture(8, 8, 30)]
    sheet = grid(pictures)
    for image in pictures:
        assert (sheet == image[0, 0, 0]).all(-1).sum() == image.shape[0] * image.shape[1]
    assert grid(pictures, columns=3).shape == (48, 3 * 34 + 4, 3)


def test_side_by_side_keeps_both_and_has_an_even_width():
    joined = side_by_side(picture(10, 20, 1), picture(10, 20, 2))
    assert joined.shape == (10, 42, 3)
    assert (joined[:, :20] == 1).all() and (joined[:, -20:] == 2).all()


def test_caption_and_warning_mark_top_and_bottom_only():
    image = draw_caption(picture(300, 400), ['model  12.3 FPS'], warning='RANDOM WEIGHTS')
    assert (image[0] < 90).all()
    assert (image[150] == 90).all()
    assert tuple(image[-1, 0]) == (200, 20, 20)


def test_lines_grow_with_the_picture():
    assert line_width(picture(100, 100)) == 1
    assert line_width(picture(1080, 1920)) == 4
