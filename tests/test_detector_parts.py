"""rcnn/export.py: what exporters trace is equal to what torchvision computes."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection import roi_heads
from torchvision.ops import batched_nms
from torchvision.ops import boxes as box_ops

from detection.rcnn.export import nms_by_class, paste_masks, without_branches


def boxes_in(width: float, height: float, count: int) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(count)) * torch.tensor([width, height])
    return torch.cat([corners.amin(1), corners.amax(1)], 1)


@pytest.mark.parametrize('count', [0, 1, 300])
def test_the_same_boxes_are_kept(count):
    boxes, classes = boxes_in(64, 48, count), torch.arange(count) % 3
    scores = torch.rand(count, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nms_by_class(boxes, scores, classes, 0.3), batched_nms(boxes, scores, classes, 0.3))


@pytest.mark.parametrize('count', [0, 1, 40])
def test_masks_are_pasted_alike(count):
    masks, boxes = torch.rand(count, 1, 30, 30), boxes_in(100, 90, count).to(torch.int64)
    boxes[: count // 4, 2:] = boxes[: count // 4, :2]  # one pixel wide
    boxes[count // 4 : count // 2, :2] -= 25  # over the edge
    boxes[count // 3 :, 2:] += 40
    expected = [roi_heads.paste_mask_in_image(m[0], b, 90, 100) for m, b in zip(masks, boxes)]
    found = paste_masks(masks, boxes, torch.tensor(90), torch.tensor(100))
    assert found.shape == (count, 90, 100)
    for image, other in zip(found, expected):
        torch.testing.assert_close(image, other, atol=1e-5, rtol=0)


def test_torchvision_has_its_own_parts_again_afterwards():
    before = box_ops._batched_nms_coordinate_trick, roi_heads._onnx_paste_masks_in_image_loop
    with pytest.raises(KeyError), without_branches():
        assert box_ops._batched_nms_coordinate_trick is nms_by_class
        assert roi_heads._onnx_paste_masks_in_image_loop is paste_masks
        raise KeyError
    assert (box_ops._batched_nms_coordinate_trick, roi_heads._onnx_paste_masks_in_image_loop) == before
