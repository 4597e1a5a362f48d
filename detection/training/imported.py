"""Detectors of torchvision's reference training, and of the authors, who used it, as checkpoints of ours.

Their files hold tensors, and the options of the script, but not what the labels mean.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models import detection as tv

from detection.rcnn import BODY, convert_detector_state_dict, task_of, version_of
from detection.training.config import load_config, values_of_weights
from detection.visual import COCO_SKELETON
from norton_timm.checkpoints import surgery_of

log = logging.getLogger(__name__)

_COCO = {
    'box': tv.FasterRCNN_ResNet50_FPN_Weights,
    'mask': tv.MaskRCNN_ResNet50_FPN_Weights,
    'keypoint': tv.KeypointRCNN_ResNet50_FPN_Weights,
}


def imported_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of ours, from a raw file of a detector on a ResNet, compressed or not.

    With COCO's number of classes (91, for keypoints 2) the labels are COCO's; other files do not say what their labels
    are called, so they are numbered.

    Args:
        path: `{'model': tensors, ...}` or the tensors alone, by either version of torchvision's names; or the name of
            one of torchvision's detectors.

    Raises:
        ValueError: the file cannot be read safely, or holds no such detector.
    """
    state, backbone = convert_detector_state_dict(path)
    task = task_of(state)
    cfg = backbone.pretrained_cfg
    model = {**values_of_weights(path), 'task': task, 'model.version': version_of(state)}
    name = '.'.join(filter(None, (cfg['architecture'], cfg.get('tag'))))
    surgery = None
    if name.startswith(('norton_', 'coring_')) and not cfg.get('tag'):  # widths that no name stands for
        surgery = surgery_of(backbone)
        surgery['layers'] = {BODY + layer: facts for layer, facts in surgery.get('layers', {}).items()}
    return {
        'model': state, 'ema': None, 'iteration': None, 'results': None, 'meta': _meanings(state, task, path),
        'config': load_config(None, [], {**model, 'model.backbone': name}).to_dict(), 'surgery': surgery,
    }  # fmt: skip


def _meanings(state: dict[str, Tensor], task: str, path: object) -> dict[str, Any]:
    """What labels and keypoints mean, see `describe_data`."""
    known, classes, points = _COCO[task].COCO_V1.meta, len(state['roi_heads.box_predictor.cls_score.weight']), 0
    names = list(known['categories'])
    if classes != len(names):
        names = [f'class {k}' for k in range(classes)]
        log.warning('%s does not say what its %d classes are: they are called class 1, class 2, ...', path, classes - 1)
    if task == 'keypoint':
        points = state['roi_heads.keypoint_predictor.kps_score_lowres.weight'].shape[1]
    point_names, edges = list(known.get('keypoint_names', ()))[:points], [list(edge) for edge in COCO_SKELETON]
    if points != len(known.get('keypoint_names', ())):
        point_names, edges = [f'keypoint {k + 1}' for k in range(points)], []
    labels = [k for k, name in enumerate(names) if k and name != 'N/A']
    return {
        'task': task, 'num_classes': classes, 'class_names': ['__background__', *names[1:]],
        'label_to_category': {k: k for k in labels}, 'num_keypoints': points, 'keypoint_names': point_names,
        'skeleton': edges if points else [],
    }  # fmt: skip
