"""COCO metrics for boxes, masks and keypoints in one pass, exact whatever the number of processes.

pycocotools is the reference; faster-coco-eval, which gives the same figures, is used where it is installed.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.data import check_outline, class_map
from detection.tasks import check_task
from norton_timm.utils import write_text

_log = logging.getLogger(__name__)

IOU_TYPES = {'box': ('bbox',), 'mask': ('bbox', 'segm'), 'keypoint': ('bbox', 'keypoints')}
BACKENDS = ('auto', 'pycocotools', 'faster')
_OBJECT_NAMES = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl')
_KEYPOINT_NAMES = ('AP', 'AP50', 'AP75', 'APm', 'APl', 'AR', 'AR50', 'AR75', 'ARm', 'ARl')

Metrics = dict[str, dict[str, float]]


def metric_names(iou_type: str) -> tuple[str, ...]:
    """COCO's 12 figures for 'bbox' and 'segm', 10 for 'keypoints', in pycocotools' order."""
    return _KEYPOINT_NAMES if iou_type == 'keypoints' else _OBJECT_NAMES


class CocoEvaluator:
    """Collects detections image by image, then computes COCO's average precision and recall.

    Every image of ``coco`` counts; one that is never passed to ``process`` counts as without detections. An image that
    is passed twice, as by distributed samplers that fill up, counts once.

    Args:
        coco: Ground truth, crowd regions included.
        task: 'box' gives bbox; 'mask' bbox and segm; 'keypoint' bbox and keypoints.
        label_to_category: Category id of every label; by default the data set's own map. Detections with other
            labels are dropped.
        image_ids: Restricts the evaluation to these images.
        sigmas: Standard deviations of the object keypoint similarity, relative to the object's size, one per keypoint.
            Default: COCO's for 17 keypoints; else those in the category's entry ``sigmas``; else 0.05 for all.
        backend: 'pycocotools', 'faster' (faster-coco-eval), or 'auto' for the latter where installed.

    Raises:
        ValueError: On an unknown task, backend or image id, or sigmas that do not fit.

    Example:
        >>> evaluator = CocoEvaluator(dataset.coco, 'box')
        >>> evaluator.process(targets, model(images))
        >>> evaluator.evaluate()['bbox']['AP']
    """

    def __init__(
        self,
        coco: COCO,
        task: str,
        label_to_category: Mapping[int, int] | None = None,
        *,
        image_ids: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        backend: str = 'auto',
    ) -> None:
        check_task(task)
        if backend not in BACKENDS:
            raise ValueError(f'unknown backend {backend!r}; expected one of {", ".join(BACKENDS)}')
        installed = importlib.util.find_spec('faster_coco_eval') is not None
        if backend == 'faster' and not installed:
            raise ValueError("backend 'faster' needs the package faster-coco-eval; expected it installed")
        self.backend = ('faster' if installed else 'pycocotools') if backend == 'auto' else backend
        self.coco, self.task = with_masks(coco) if task == 'mask' else coco, task
        self.iou_types = IOU_TYPES[task]
        self.label_to_category = dict(label_to_category or class_map(coco, task)[0])
        self.image_ids = sorted(set(coco.imgs if image_ids is None else image_ids))
        unknown = [i for i in self.image_ids if i not in coco.imgs]
        if unknown:
            raise ValueError(f'image ids {unknown[:5]} are not in the annotations; expected ids of its images')
        self.sigmas = self._sigmas(sigmas) if task == 'keypoint' else None
        self._images: dict[int, dict[str, Any]] = {}
        self.precision: dict[str, np.ndarray] = {}

    def reset(self) -> None:
        """Forget all detections."""
        self._images = {}
        self.precision = {}

    def process(self, targets: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Take the detections of a batch.

        Args:
            targets: Only ``image_id`` is read.
            outputs: What torchvision's R-CNNs return: ``boxes (N, 4)`` xyxy in pixels of the original image,
                ``labels (N,)``, ``scores (N,)`` and, by task, ``masks (N, 1, H, W)`` probabilities or
                ``keypoints (N, K, 3)``.

        Raises:
            ValueError: On an unknown image id or an output that lacks what the task needs.
        """
        if len(targets) != len(outputs):
            raise ValueError(f'got {len(targets)} targets and {len(outputs)} outputs; expected as many')
        for target, output in zip(targets, outputs):
            image_id = int(target['image_id'])
            if image_id not in self.coco.imgs:
                raise ValueError(f'image id {image_id} is not in the annotations; expected an id of its images')
            self._images[image_id] = self._pack(output)

    def evaluate(self) -> Metrics:
        """Metrics of all images of all processes, the same dict in every process.

        Returns:
            ``{'bbox': {'AP': .., ...}, ...}``, figures in 0..1, 0 without detections, and as in pycocotools -1 where
            there is no ground truth (e.g. no small object).
        """
        if not _distributed():
            return self._evaluate()
        self._gather()
        answer: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                answer = [self._evaluate(), None]
            except Exception as error:
                answer = [None, f'{type(error).__name__}: {error}']
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise RuntimeError(f'evaluation failed in process 0: {answer[1]}')
        return answer[0]

    def per_category(self, iou_type: str = 'bbox') -> dict[str, float]:
        """AP of every category after ``evaluate`` (in process 0); NaN for one without ground truth."""
        if iou_type not in self.precision:
            raise ValueError(f'no figures for {iou_type!r}; expected evaluate() first and one of {self.iou_types}')
        precision = self.precision[iou_type]  # (thresholds, recalls, categories)
        table = {}
        for k, category in enumerate(sorted(self.label_to_category.values())):
            valid = precision[:, :, k][precision[:, :, k] > -1]
            table[self.coco.cats[category]['name']] = float(valid.mean()) if valid.size else float('nan')
        return table

    def results(self, iou_type: str) -> list[dict[str, Any]]:
        """Detections in COCO's submission format, one dict each, ordered by image id.

        A detection with v = 0 for every keypoint says nothing about keypoints and is left out of that type.
        """
        if iou_type not in self.iou_types:
            raise ValueError(f'unknown type {iou_type!r} for task {self.task!r}; expected one of {self.iou_types}')
        found = []
        for image_id in self.image_ids:
            image = self._images.get(image_id)
            if image is None:
                continue
            values = image[iou_type].tolist() if isinstance(image[iou_type], np.ndarray) else image[iou_type]
            name = 'segmentation' if iou_type == 'segm' else iou_type
            for category, score, value in zip(image['categories'].tolist(), image['scores'].tolist(), values):
                if iou_type == 'keypoints' and not any(value[2::3]):
                    continue
                found.append({'image_id': image_id, 'category_id': category, name: value, 'score': score})
        return found

    def write_results(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``{bbox,segm,keypoints}_results.json`` for COCO's server; in process 0 after ``evaluate``."""
        paths, folder = [], Path(folder)
        for iou_type in self.iou_types:
            text = json.dumps(self.results(iou_type))
            paths.append(write_text(folder / f'{iou_type}_results.json', text))
        return paths

    def _pack(self, output: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Detections of one image as small arrays and run-length codes."""
        needed = {'boxes', 'labels', 'scores'} | {'mask': {'masks'}, 'keypoint': {'keypoints'}}.get(self.task, set())
        missing = sorted(needed - set(output))
        if missing:
            raise ValueError(
                f'output has no {", ".join(missing)}; task {self.task!r} expects {", ".join(sorted(needed))}'
            )
        labels = output['labels'].cpu().tolist()
        keep = [i for i, label in enumerate(labels) if label in self.label_to_category]
        boxes = output['boxes'].detach().cpu().double().reshape(-1, 4)[keep].numpy()
        packed: dict[str, Any] = {
            'categories': np.array([self.label_to_category[labels[i]] for i in keep], np.int64),
            'scores': output['scores'].detach().cpu().double()[keep].numpy(),
            'bbox': np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
        }
        if self.task == 'mask':
            packed['segm'] = _encode(output['masks'].detach()[keep])
        if self.task == 'keypoint':
            points = output['keypoints'].detach().cpu().double()[keep]
            packed['keypoints'] = points.flatten(1).numpy()
        return packed

    def _gather(self) -> None:
        """Bring the detections of all processes to process 0."""
        rank = dist.get_rank()
        parts: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(self._images, parts, dst=0)
        if rank == 0:
            merged: dict[int, dict[str, Any]] = {}
            for part in parts or ():
                for image_id, image in part.items():
                    merged.setdefault(image_id, image)
            self._images = merged

    def _evaluate(self) -> Metrics:
        absent = len(set(self.image_ids) - set(self._images))
        if absent:
            _log.warning('%d of %d images were not evaluated and count as empty', absent, len(self.image_ids))
        return {iou_type: self._run(iou_type) for iou_type in self.iou_types}

    def _run(self, iou_type: str) -> dict[str, float]:
        log = io.StringIO()
        with contextlib.redirect_stdout(log), _without_collection():  # pycocotools prints
            evaluation = self._build(iou_type)
            evaluation.params.imgIds = list(self.image_ids)
            evaluation.params.catIds = sorted(self.label_to_category.values())
            if iou_type == 'keypoints':
                evaluation.params.kpt_oks_sigmas = self.sigmas
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        _log.debug('%s', log.getvalue())
        # all objects (area range 0), the largest number of detections
        self.precision[iou_type] = np.asarray(evaluation.eval['precision'])[..., 0, -1]
        names = metric_names(iou_type)
        return {name: float(value) for name, value in zip(names, np.asarray(evaluation.stats)[: len(names)])}

    def _build(self, iou_type: str) -> Any:
        if self.backend == 'faster':
            from detection.evaluation.faster import BoxEvaluation, evaluation_of_records

            if iou_type == 'bbox':
                return BoxEvaluation(self.coco, self._images, self.image_ids, list(self.label_to_category.values()))
            return evaluation_of_records(self.coco, self.results(iou_type), iou_type)
        return COCOeval(self.coco, load_results(self.coco, self.results(iou_type)), iou_type)

    def _sigmas(self, sigmas: Sequence[float] | None) -> np.ndarray:
        category = self.coco.cats[min(self.label_to_category.values())]
        count = len(category.get('keypoints', ()))
        if sigmas is None and category.get('sigmas'):
            sigmas = category['sigmas']
        if sigmas is None:
            if count == 17:
                return COCOeval(iouType='keypoints').params.kpt_oks_sigmas
            _log.info('no sigmas are known for %d keypoints of %s; using 0.05', count, category['name'])
            sigmas = [0.05] * count
        if len(sigmas) != count or min(sigmas) <= 0:
            raise ValueError(f'got {len(sigmas)} sigmas for {count} keypoints; expected one above 0 for each')
        return np.asarray(sigmas, np.float64)


def with_masks(coco: COCO) -> COCO:
    """Ground truth for masks: an object without a mask becomes a crowd, so that detections on it are not wrong.

    Raises:
        ValueError: a malformed mask.
    """
    bare = []
    for record in coco.dataset['annotations']:
        if record.get('segmentation'):
            image = coco.imgs[record['image_id']]
            check_outline(record, image['height'], image['width'])
        else:
            bare.append(record['id'])
    if not bare:
        return coco
    _log.warning('%d objects have no mask, such as annotation %d: they do not count', len(bare), bare[0])
    truth, without = COCO(), set(bare)
    records = [_crowd(a) if a['id'] in without else a for a in coco.dataset['annotations']]
    truth.dataset = {**coco.dataset, 'annotations': records}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _crowd(record: dict[str, Any]) -> dict[str, Any]:
    x, y, w, h = record['bbox']
    return {**record, 'iscrowd': 1, 'segmentation': [[x, y, x + w, y, x + w, y + h, x, y + h]]}


def load_results(coco: COCO, results: list[dict[str, Any]]) -> COCO:
    """``coco.loadRes`` that also takes an empty list."""
    if results:
        return coco.loadRes(results)
    empty = COCO()
    empty.dataset = {
        'images': list(coco.dataset['images']),
        'categories': copy.deepcopy(coco.dataset['categories']),
        'annotations': [],
    }
    empty.createIndex()
    return empty


def _encode(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Masks ``(N, 1, H, W)`` or ``(N, H, W)``, probabilities or 0 / 1, to compressed run-length codes."""
    if masks.ndim == 4:
        masks = masks[:, 0]
    if len(masks) == 0:
        return []
    binary = (masks > 0.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    codes = mask_utils.encode(np.asfortranarray(binary))
    return [{'size': [int(v) for v in code['size']], 'counts': code['counts'].decode('ascii')} for code in codes]


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Turn garbage collection off: it would visit half a million small dicts again and again, none in a cycle."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
