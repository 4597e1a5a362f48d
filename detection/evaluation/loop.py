"""The one evaluation loop of detection, and a detector that also looks at mirrored images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms
from tqdm import tqdm

from detection.data import CocoDataset, eval_loader
from detection.evaluation.coco_metrics import CocoEvaluator, Metrics
from norton_timm.utils import autocast, check_weights, is_main, watched

_WATCHED = ('backbone', 'rpn.head', 'roi_heads.box_predictor', 'roi_heads.mask_predictor',
            'roi_heads.keypoint_predictor')  # fmt: skip


def evaluate_detector(
    model: nn.Module,
    dataset: CocoDataset,
    *,
    device: torch.device,
    batch_size: int = 2,
    workers: int = 0,
    evaluator: CocoEvaluator | None = None,
    label_to_category: Mapping[int, int] | None = None,
    amp: str = 'none',
    progress: bool = True,
) -> Metrics:
    """COCO metrics of a detector on a data set; under torchrun each process takes a part and all get the result.

    Args:
        model: a torchvision R-CNN; its mode is restored.
        dataset: evaluation split.
        device: where the model is.
        batch_size: images of one process at a time.
        workers: loading processes.
        evaluator: takes the detections, e.g. to write them afterwards; a new one by default.
        label_to_category: what the model's labels mean; by default as in the data set.
        amp: `none`, `bf16` or `fp16`.
        progress: show a progress bar.

    Raises:
        FloatingPointError: NaN or infinite weights or activations; torchvision's R-CNNs would silently drop their
            detections and seem to find nothing.

    Example:
        >>> dataset = CocoDataset('data/sample', 'val', 'box')
        >>> evaluate_detector(model, dataset, device=torch.device('cpu'))['bbox']['AP']
    """
    check_weights(model, 'the network to evaluate')
    if evaluator is None:
        labels = label_to_category or dataset.label_to_category
        evaluator = CocoEvaluator(dataset.coco, dataset.task, labels, image_ids=dataset.image_ids)
    evaluator.reset()
    was_training = model.training
    model.eval()
    batches = eval_loader(dataset, batch_size, workers)
    parts = {name: module for name, module in model.named_modules() if name in _WATCHED}
    hint = 'mixed precision in fp16 overflows at 65504, try bf16 or none' if amp == 'fp16' else 'the weights diverged'
    with torch.inference_mode(), watched(parts, hint):
        for images, targets in tqdm(batches, 'evaluate', leave=False, disable=not (progress and is_main())):
            with autocast(device, amp):
                outputs = model([image.to(device, non_blocking=True) for image in images])
            evaluator.process(targets, [{k: v.float().cpu() if v.is_floating_point() else v.cpu()
                                         for k, v in output.items()} for output in outputs])  # fmt: skip
    model.train(was_training)
    return evaluator.evaluate()


class FlipDetector(nn.Module):
    """A detector that also looks at the mirrored images; inputs and outputs are those of torchvision's R-CNNs.

    The detections of both images are merged by non-maximum suppression, class by class and with the detector's own
    threshold; the detector's limit on the number of detections holds for the result.

    Args:
        model: a torchvision R-CNN in evaluation mode.
        flip_indices: for each of K keypoints, its partner in a mirrored image, as in `CocoDataset.flip_indices`; needed
            if the detector finds keypoints.
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
    """Map the detections of a mirrored image back to the image itself.

    Args:
        output: `boxes (N, 4)` xyxy in pixels and, by task, `masks (N, 1, H, W)` or `keypoints (N, K, 3)` with
            `keypoints_scores (N, K)`; other entries stay as they are.
        width: of the image, in pixels.
        flip_indices: for each of K keypoints, its partner in the mirrored image.

    Raises:
        ValueError: the number of flip indices is not that of the keypoints.
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
