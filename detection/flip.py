"""Test-time flip: a detector sees every image and its mirror image, and both answers are merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms


class FlipDetector(nn.Module):
    """A detector that also looks at the mirrored images; inputs and outputs are those of torchvision's R-CNNs.

    Of two detections of one class that overlap, the one with the lower score goes (non-maximum suppression, as within
    one image), and no more are kept than the detector itself gives at most.

    Args:
        model: a torchvision R-CNN in evaluation mode.
        flip_indices: for each of K keypoints the one it trades places with in a mirror, as in
            `CocoDataset.flip_indices`; needed where the detector finds keypoints.
    """

    def __init__(self, model: nn.Module, flip_indices: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, self.flip_indices = model, list(flip_indices)
        self.eval()

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        plain, mirrored = self.model(images), self.model([image.flip(-1) for image in images])
        return [
            self._merge(one, mirror_output(other, image.shape[-1], self.flip_indices))
            for image, one, other in zip(images, plain, mirrored)
        ]

    def _merge(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
        both = {name: torch.cat([value, other[name]]) for name, value in one.items()}
        heads = self.model.roi_heads
        keep = batched_nms(both['boxes'], both['scores'], both['labels'], heads.nms_thresh)
        return {name: value[keep[: heads.detections_per_img]] for name, value in both.items()}


def mirror_output(output: dict[str, Tensor], width: int, flip_indices: Sequence[int] = ()) -> dict[str, Tensor]:
    """Detections of a mirrored image as they are in the image itself.

    Args:
        output: `boxes (N, 4)` xyxy in pixels and, by task, `masks (N, 1, H, W)` or `keypoints (N, K, 3)` with
            `keypoints_scores (N, K)`; other entries stay as they are.
        width: of the image, in pixels.
        flip_indices: for each of K keypoints the one it trades places with.

    Raises:
        ValueError: not as many flip indices as keypoints.
    """
    result = dict(output)
    left, top, right, bottom = output['boxes'].unbind(1)
    result['boxes'] = torch.stack([width - right, top, width - left, bottom], 1)
    if 'masks' in output:
        result['masks'] = output['masks'].flip(-1)
    if 'keypoints' in output:
        if len(flip_indices) != output['keypoints'].shape[1]:
            raise ValueError(
                f'got {len(flip_indices)} flip indices for {output["keypoints"].shape[1]} keypoints; expected as many'
            )
        order = list(flip_indices)
        x, y, seen = output['keypoints'][:, order].unbind(2)
        # the centre of a pixel has whole coordinates, the side of a box lies between pixels
        result['keypoints'] = torch.stack([width - 1 - x, y, seen], 2)
        if 'keypoints_scores' in output:
            result['keypoints_scores'] = output['keypoints_scores'][:, order]
    return result
