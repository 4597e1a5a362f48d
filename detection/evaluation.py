"""The one evaluation loop of detection."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import nn
from tqdm import tqdm

from detection.data import CocoDataset
from detection.evaluator import CocoEvaluator, Metrics
from detection.loader import eval_loader
from norton_timm.distributed import is_main
from norton_timm.finite import check_weights, watched

_WATCHED = ('backbone', 'rpn.head', 'roi_heads.box_predictor', 'roi_heads.mask_predictor',
            'roi_heads.keypoint_predictor')  # fmt: skip
_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


def evaluate(
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
        FloatingPointError: NaN or infinite weights or activations; torchvision's R-CNNs would drop what comes of them
            and seem to find nothing.
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


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """The context of mixed precision `none`, `bf16` or `fp16`."""
    return torch.autocast(device.type, _DTYPES[amp]) if amp in _DTYPES else contextlib.nullcontext()
