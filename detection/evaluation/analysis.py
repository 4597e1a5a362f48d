"""Where a detector errs: precision-recall curves, a table of categories, and pictures of the worst images."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert, box_iou
from torchvision.utils import draw_bounding_boxes

from detection.data import CocoDataset
from detection.evaluation.coco_metrics import CocoEvaluator, load_results
from detection.visual import Image, draw_caption, grid
from norton_timm.utils import new_figure, replacing, write_png, write_text

FALSE, CONFUSED, MISSED = 'red', 'darkorange', 'yellow'


@dataclass
class ImageErrors:
    """Wrong boxes of one image, each a dict with `bbox` (x, y, width, height in pixels) and `category_id`.

    Attributes:
        image_id: of the annotations.
        false: detections without an object of their class; with `score`, and with `is_category` where they lie on a
            missed object of another class.
        missed: objects without a detection.
    """

    image_id: int
    false: list[dict[str, Any]] = field(default_factory=list)
    missed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of errors."""
        return len(self.false) + len(self.missed)


def image_errors(evaluator: CocoEvaluator, *, score: float = 0.5, iou: float = 0.5) -> list[ImageErrors]:
    """False and missed boxes of every image, most errors first; pycocotools decides what matches what.

    Args:
        evaluator: after `evaluate`; in process 0.
        score: detections below it are not looked at.
        iou: overlap from which a detection matches an object. Detections in crowd regions are no errors.
    """
    for name, value in (('score', score), ('iou', iou)):
        if not 0 <= value <= 1:
            raise ValueError(f'{name} is {value}, expected 0 to 1')
    results = [result for result in evaluator.results('bbox') if result['score'] >= score]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        matching = COCOeval(evaluator.coco, load_results(evaluator.coco, results), 'bbox')
        matching.params.imgIds = list(evaluator.image_ids)
        matching.params.catIds = sorted(evaluator.label_to_category.values())
        matching.params.iouThrs = np.array([iou])
        matching.params.areaRng, matching.params.areaRngLbl = [[0, 1e10]], ['all']
        matching.evaluate()
    errors = {image_id: ImageErrors(image_id) for image_id in evaluator.image_ids}
    for cell in filter(None, matching.evalImgs):
        found = errors[cell['image_id']]
        wrong = (cell['dtMatches'][0] == 0) & (cell['dtIgnore'][0] == 0)
        found.false += [
            {key: matching.cocoDt.anns[i][key] for key in ('category_id', 'bbox', 'score')}
            for i in np.asarray(cell['dtIds'])[wrong]
        ]
        unseen = (cell['gtMatches'][0] == 0) & (np.asarray(cell['gtIgnore']) == 0)
        found.missed += [
            {key: evaluator.coco.anns[i][key] for key in ('category_id', 'bbox')}
            for i in np.asarray(cell['gtIds'])[unseen]
        ]
    for found in errors.values():
        _confusions(found, iou)
    return sorted(errors.values(), key=lambda e: (-e.count, e.image_id))


def draw_errors(dataset: CocoDataset, errors: Sequence[ImageErrors], path: str | Path, *, count: int = 12) -> Path:
    """Write a picture of the images with most errors.

    False detections are red with class and score, orange where they lie on an object of another class ("is ..."),
    missed objects yellow.

    Args:
        dataset: where the images are from.
        errors: what `image_errors` returns.
        path: picture file; appears only when complete.
        count: number of images at most; without any error the first image is shown.
    """
    path = Path(path)
    if path.suffix not in ('.jpg', '.png'):
        raise ValueError(f'cannot write a picture as {path.name}, expected .jpg or .png')
    worst = [e for e in errors if e.count] or list(errors[:1])
    sheet = grid([_draw(dataset, e) for e in worst[:count]])
    data = cv2.imencode(path.suffix, cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1]
    with replacing(path) as temporary:
        temporary.write_bytes(data.tobytes())
    return path


def plot_precision_recall(curves: Mapping[str, np.ndarray], path: str | Path) -> Path:
    """Write a PNG with precision over recall for each kind of evaluation, at several overlaps, mean over categories.

    Args:
        curves: `CocoEvaluator.precision`: arrays `(10 overlaps from 0.5 to 0.95, 101 recalls, categories)`.
        path: picture file; appears only when complete.
    """
    figure = new_figure(5 * len(curves), 4.5)
    for axes, (kind, precision) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        mean = mean_curves(precision)
        for threshold, row in [(0.5, mean[0]), (0.75, mean[5]), (None, mean.mean(0))]:
            name = '0.50 to 0.95' if threshold is None else f'{threshold:.2f}'
            axes.plot(np.linspace(0, 1, len(row)), row, label=f'overlap {name}: AP {row.mean():.3f}')
        axes.set(title=kind, xlabel='recall', ylabel='precision', xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc='lower left')
    return write_png(figure, Path(path))


def mean_curves(precision: np.ndarray) -> np.ndarray:
    """Precision `(overlaps, recalls)`, mean over the categories that have objects; 0 if none has."""
    present = (precision > -1).all((0, 1))
    return precision[..., present].mean(-1) if present.any() else np.zeros(precision.shape[:2])


def write_report(
    evaluator: CocoEvaluator, dataset: CocoDataset, folder: str | Path, *, score: float = 0.5
) -> list[Path]:
    """Write `precision_recall.png`, `categories.csv`, `worst.jpg` and, with all errors, `errors.json`.

    Args:
        evaluator: after `evaluate`; in process 0.
        dataset: what was evaluated.
        folder: made if it is not there.
        score: detections below it count as no errors.
    """
    folder = Path(folder)
    errors = image_errors(evaluator, score=score)
    tables = [evaluator.per_category(kind) for kind in evaluator.iou_types]
    lines = [','.join(['category', *(f'{kind} AP' for kind in evaluator.iou_types)])]
    lines += [','.join([f'"{name}"', *(f'{table[name]:.4f}' for table in tables)]) for name in tables[0]]
    listed = [{'image_id': e.image_id, 'false': e.false, 'missed': e.missed} for e in errors if e.count]
    return [
        write_text(folder / 'categories.csv', '\n'.join(lines) + '\n'),
        write_text(folder / 'errors.json', json.dumps(listed, indent=1) + '\n'),
        plot_precision_recall(evaluator.precision, folder / 'precision_recall.png'),
        draw_errors(dataset, errors, folder / 'worst.jpg'),
    ]


def _confusions(errors: ImageErrors, iou: float) -> None:
    """Note which missed object a false detection lies on."""
    if not errors.false or not errors.missed:
        return
    overlaps = box_iou(_boxes(errors.false), _boxes(errors.missed))
    for detection, row in zip(errors.false, overlaps):
        if row.max() >= iou:
            detection['is_category'] = errors.missed[int(row.argmax())]['category_id']


def _boxes(records: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Boxes `(N, 4)` xyxy of records with `bbox`."""
    return box_convert(torch.tensor([r['bbox'] for r in records], dtype=torch.float64), 'xywh', 'xyxy')


def _draw(dataset: CocoDataset, errors: ImageErrors) -> Image:
    names = {category: record['name'] for category, record in dataset.coco.cats.items()}
    image = dataset.read_image(errors.image_id)
    factor = max(1, round(480 / max(image.shape[:2])))  # a small picture would be all text
    canvas = np.asarray(cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC), np.uint8)
    if errors.count:
        texts = [f'{names[d["category_id"]]} {d["score"]:.2f}' for d in errors.false]
        texts = [
            text + (f', is {names[d["is_category"]]}' if 'is_category' in d else '')
            for text, d in zip(texts, errors.false)
        ]
        colors = [CONFUSED if 'is_category' in d else FALSE for d in errors.false]
        texts += [f'missed {names[m["category_id"]]}' for m in errors.missed]
        colors += [MISSED] * len(errors.missed)
        boxes = _boxes(errors.false + errors.missed) * factor
        drawn = draw_bounding_boxes(torch.from_numpy(canvas).permute(2, 0, 1), boxes, texts, colors, width=2)
        canvas = np.ascontiguousarray(drawn.permute(1, 2, 0).numpy())
    name = dataset.coco.imgs[errors.image_id]['file_name']
    return draw_caption(canvas, [f'{name}: {len(errors.false)} false, {len(errors.missed)} missed'])
