"""COCO evaluation by faster-coco-eval, with less work in Python for boxes. Imported only where that is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO as FastCOCO
from faster_coco_eval import COCOeval_faster
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO


class BoxEvaluation(COCOeval_faster):
    """Evaluation of boxes straight from arrays: no index of the detections, one matrix of overlaps for each image.

    Args:
        coco: ground truth.
        images: by image id, `bbox (N, 4)` as x, y, width, height, `categories (N,)` and `scores (N,)`.
        image_ids: the images that count.
        category_ids: the categories that count.
    """

    def __init__(
        self, coco: COCO, images: Mapping[int, Mapping[str, Any]], image_ids: Sequence[int], category_ids: Sequence[int]
    ) -> None:
        super().__init__(iouType='bbox')
        self.truth, self.images = coco, images
        self.params.imgIds, self.params.catIds = list(image_ids), sorted(category_ids)

    def _prepare(self) -> None:
        """Hand ground truth and detections to the C++ part, and compute the overlaps of those in one image."""
        self.gt_dataset.clean()
        self.dt_dataset.clean()
        categories = set(self.params.catIds)
        self._overlaps: dict[tuple[int, int], np.ndarray] = {}
        number = 0
        for image_id in map(int, self.params.imgIds):
            records = [a for a in self.truth.imgToAnns.get(image_id, ()) if a['category_id'] in categories]
            for record in records:
                crowd = int(record.get('iscrowd', 0))
                entry = {'id': record['id'], 'area': record['area'], 'iscrowd': crowd, 'ignore': crowd}
                self.gt_dataset.append_ref(image_id, record['category_id'], entry)
            found = self.images.get(image_id)
            if found is None or not len(found['scores']):
                continue
            areas = (found['bbox'][:, 2] * found['bbox'][:, 3]).tolist()
            rows = zip(found['categories'].tolist(), found['scores'].tolist(), areas)
            for category, score, area in rows:
                number += 1
                entry = {'id': number, 'score': score, 'area': area, 'iscrowd': 0}
                self.dt_dataset.append_ref(image_id, category, entry)
            if records:
                self._match(image_id, records, found)
        self._nonempty_iou_pairs = set(self._overlaps)

    def _match(self, image_id: int, records: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> None:
        boxes = np.array([record['bbox'] for record in records], np.float64)
        owners = np.array([record['category_id'] for record in records])
        crowds = [int(record.get('iscrowd', 0)) for record in records]
        order = np.argsort(-found['scores'], kind='mergesort')
        labels = found['categories'][order]
        overlaps = mask_utils.iou(found['bbox'][order], boxes, crowds)
        for category in set(owners.tolist()) & set(labels.tolist()):
            own = np.flatnonzero(labels == category)[: self.params.maxDets[-1]]
            self._overlaps[image_id, category] = overlaps[own][:, owners == category]

    def computeIoU(self, imgId: int, catId: int) -> np.ndarray:
        """Overlaps `(detections by falling score, objects)` of one image and category."""
        return self._overlaps[imgId, catId]


def evaluation_of_records(coco: COCO, results: list[dict[str, Any]], iou_type: str) -> COCOeval_faster:
    """Evaluation of masks or keypoints from detections in COCO's submission format."""
    truth = FastCOCO()
    truth.dataset = coco.dataset
    truth.createIndex()
    return COCOeval_faster(truth, truth.loadRes(results), iou_type)
