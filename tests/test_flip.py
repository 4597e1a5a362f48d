"""Test-time flip: a mirror image gives mirrored detections, and duplicates go."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from detection.evaluation.loop import FlipDetector, mirror_output
from detection.rcnn.build import build_detector


class Fixed(nn.Module):
    """Gives prepared answers, one after the other, and keeps what it was shown."""

    def __init__(self, *answers: dict[str, Tensor], most: int = 100) -> None:
        super().__init__()
        self.answers, self.seen = list(answers), []
        self.roi_heads = types.SimpleNamespace(nms_thresh=0.5, detections_per_img=most)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.seen.append(images[0])
        return [self.answers[len(self.seen) - 1]]


def found(boxes: list[list[float]], labels: list[int], scores: list[float]) -> dict[str, Tensor]:
    return {'boxes': torch.tensor(boxes).float(), 'labels': torch.tensor(labels), 'scores': torch.tensor(scores)}


def test_mirroring_twice_changes_nothing() -> None:
    output = {
        **found([[1, 2, 11, 12], [0, 0, 30, 20]], [1, 2], [0.5, 0.4]),
        'masks': torch.rand(2, 1, 20, 30),
        'keypoints': torch.rand(2, 3, 3) * 20,
        'keypoints_scores': torch.rand(2, 3),
    }
    once = mirror_output(output, 30, (0, 2, 1))
    for name, value in mirror_output(once, 30, (0, 2, 1)).items():
        torch.testing.assert_close(value, output[name])
    assert once['boxes'].tolist() == [[19, 2, 29, 12], [0, 0, 30, 20]]
    assert torch.equal(once['keypoints'][:, 1, 1], output['keypoints'][:, 2, 1])
    assert torch.equal(once['keypoints'][:, 0, 0], 29 - output['keypoints'][:, 0, 0])
    with pytest.raises(ValueError, match='got 0 flip indices for 3 keypoints'):
        mirror_output(output, 30)


def test_a_box_drawn_around_pixels_stays_around_them() -> None:
    mask = torch.zeros(1, 1, 6, 9)
    mask[0, 0, 1:4, 2:5] = 1
    point = torch.tensor([[[3.0, 2.0, 1.0]]])  # the middle pixel
    flipped = mirror_output({'boxes': torch.tensor([[2.0, 1, 5, 4]]), 'masks': mask, 'keypoints': point}, 9, (0,))
    x1, y1, x2, y2 = (int(v) for v in flipped['boxes'][0])
    assert flipped['masks'][0, 0, y1:y2, x1:x2].sum() == mask.sum() == 9
    assert flipped['keypoints'][0, 0].tolist() == [5, 2, 1]


def test_duplicates_go_by_class_and_score() -> None:
    model = Fixed(
        found([[0, 0, 10, 10], [40, 0, 50, 10]], [1, 1], [0.6, 0.9]),
        # in a mirror of 100 pixels: the first one again, of higher score; the second one as another class; a new one
        found([[90, 0, 100, 10], [50, 0, 60, 10], [0, 20, 10, 30]], [1, 2, 1], [0.8, 0.5, 0.3]),
    )
    image = torch.rand(3, 40, 100)
    (output,) = FlipDetector(model)([image])
    assert torch.equal(model.seen[1], image.flip(-1))
    assert output['scores'].tolist() == pytest.approx([0.9, 0.8, 0.5, 0.3])
    assert output['labels'].tolist() == [1, 1, 2, 1]
    assert output['boxes'].tolist() == [[40, 0, 50, 10], [0, 0, 10, 10], [40, 0, 50, 10], [90, 20, 100, 30]]
    few = Fixed(*model.answers, most=2)
    assert FlipDetector(few)([image])[0]['scores'].tolist() == pytest.approx([0.9, 0.8])


@pytest.mark.parametrize('task', ['mask', 'keypoint'])
def test_a_mirrored_image_gives_the_mirrored_answer(task: str) -> None:
    torch.manual_seed(0)
    model = build_detector(task, 'resnet18', 5 if task == 'mask' else 2, min_size=64, max_size=96, fpn_channels=16,
                           box_head=16, mask_layers=[8], keypoint_layers=[8], box_score_thresh=0.0,
                           box_detections_per_img=20)  # fmt: skip
    order = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15] if task == 'keypoint' else []
    both = FlipDetector(model, order)
    assert not model.training
    image = torch.rand(3, 64, 96)
    with torch.inference_mode():
        one, other = both([image])[0], mirror_output(both([image.flip(-1)])[0], 96, order)
    # the order of equal scores is not fixed, so every detection is looked up in the other answer
    partner = box_iou(one['boxes'], other['boxes']).argmax(1)
    assert sorted(partner.tolist()) == list(range(len(one['boxes'])))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name][partner], rtol=1e-4, atol=1e-3)
