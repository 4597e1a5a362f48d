"""Faster, Mask and Keypoint R-CNN of torchvision on any timm backbone."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from detection.rcnn.backbone import build_backbone, normalisation, set_training
from detection.rcnn.compression import RECIPES, compress_detector, read_spec, recipe_spec
from detection.rcnn.released import RELEASED, differences, is_released
from detection.rcnn.restore import detector_content, restore, start_from, state_of, task_of
from detection.rcnn.transform import take_thin_pictures
from detection.tasks import TASKS, check_same_task
from norton_timm.checkpoints import dense_name
from norton_timm.compression import CompressionSpec
from norton_timm.models import released_detector

log = logging.getLogger(__name__)

DEFAULT_CLASSES = {'box': 91, 'mask': 91, 'keypoint': 2}
# torchvision's: keypoint detectors are trained at several scales and tested at the last
DEFAULT_MIN_SIZE: dict[str, tuple[int, ...]] = {
    'box': (800,),
    'mask': (800,),
    'keypoint': (640, 672, 704, 736, 768, 800),
}
ROI_SIZE = 7
VERSIONS = (1, 2)
# torchvision passes unknown names on to its image transform, which ignores them: so we check them here
RCNN_OPTIONS = tuple(
    name
    for name in inspect.signature(FasterRCNN.__init__).parameters
    if name.startswith(('rpn_', 'box_', 'bbox_')) and not name.endswith(('_generator', '_head', '_pool', '_predictor'))
)


class _KeypointPredictor(KeypointRCNNPredictor):
    """Heatmaps in the plain memory layout: torchvision's loss calls `.view`, which fails on channels_last maps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


def build_detector(
    task: str,
    backbone: str | nn.Module = 'norton_resnet50.r078',
    num_classes: int | None = None,
    *,
    recipe: str = 'backbone',
    compress: CompressionSpec | str | Path | None = None,
    pretrained: bool | str = False,
    weights: str | Path | None = None,
    partial: bool = False,
    norm: str | None = None,
    frozen_stages: int = 0,
    min_size: int | Sequence[int] | None = None,
    max_size: int = 1333,
    num_keypoints: int = 17,
    fpn_channels: int = 256,
    box_head: int = 1024,
    mask_layers: Sequence[int] = (256, 256, 256, 256),
    keypoint_layers: Sequence[int] = (512,) * 8,
    version: int | None = None,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    **rcnn: object,
) -> GeneralizedRCNN:
    """A torchvision R-CNN with FPN (He et al., 2017, arXiv:1703.06870) on a timm backbone.

    The result has torchvision's inputs, losses and outputs: images are float RGB `(3, H, W)` in 0..1, of any size;
    boxes are xyxy in pixels of the given image.

    Args:
        task: `'box'` (Faster R-CNN), `'mask'` (Mask R-CNN) or `'keypoint'` (Keypoint R-CNN).
        backbone: a timm name (see `detection.rcnn.create_features`) or a `features_only` module.
        num_classes: with background; by default COCO's 91, or 2 for keypoints (background, person).
        recipe: what is compressed; `'backbone'` leaves FPN, RPN and heads dense, `'full'` narrows them too, and
            `'light'` narrows them more.
        compress: a spec, or a YAML file with one, to compress the given network: its backbone, or all of it with
            `scope: detector`.
        pretrained: backbone weights that timm knows for this name; `'authors'`: the whole detector that the authors of
            the compression released for this task and tag; else the start is random.
        weights: a file to start from instead: weights of the backbone as timm reads them, a network of
            `norton_timm.save` (with its compression), or a checkpoint of train_det.py, heads included; or the name of
            a detector that torchvision trained on COCO (see `RELEASED`), downloaded once. If that has other classes,
            the last layers start at random.
        partial: a checkpoint of a whole detector may lack other layers too, which then start at random, or be for
            another task, e.g. the mask head is missing where the file is of a detector of boxes.
        norm: `'train'`, `'frozen'` or `'sync'` batch norm in the backbone; by default frozen if there are backbone
            weights, as in torchvision, else trained.
        frozen_stages: 0 to 4, number of pyramid levels that keep their weights, with all layers before them.
        min_size: length in pixels to which the shorter side of an image is resized; of several, training takes one
            at random and evaluation the last.
        max_size: limit in pixels on the longer side after that.
        num_keypoints: keypoints of a person.
        fpn_channels: width of the FPN.
        box_head: width of the two fully connected layers of the box head.
        mask_layers: widths of the convolutions of the mask head.
        keypoint_layers: widths of the convolutions of the keypoint head.
        version: torchvision's: 1, or 2 (Li et al., 2021, arXiv:2111.11429) with batch norm in FPN, box head and mask
            head, two convolutions in the RPN, and four convolutions before one fully connected layer in the box head;
            by default that of `weights` by name, else 1.
        anchor_sizes: in pixels of the resized image, one for each of the five pyramid levels; a pyramid of fewer
            levels (MobileNetV3) has all of them on each.
        **rcnn: further arguments of torchvision's classes, see `RCNN_OPTIONS`, e.g. `box_score_thresh`.

    Raises:
        ValueError: an argument is not one of the choices; the message lists them.
        ConnectionError: the authors' or torchvision's detector cannot be downloaded now.

    Example:
        >>> model = build_detector('box', 'norton_resnet50.r078').eval()
        >>> detections = model([torch.rand(3, 480, 640)])[0]
        >>> detections['boxes'], detections['labels'], detections['scores']
    """
    if task not in TASKS:
        raise ValueError(f'task is {task!r}, expected one of {", ".join(TASKS)}')
    if recipe not in RECIPES:
        raise ValueError(f'recipe is {recipe!r}, expected one of {", ".join(RECIPES)}')
    unknown = [name for name in rcnn if name not in RCNN_OPTIONS]
    if unknown:
        raise ValueError(f'unknown arguments {", ".join(unknown)}, expected some of {", ".join(RCNN_OPTIONS)}')
    if num_classes is None:
        num_classes = DEFAULT_CLASSES[task]
    if num_classes < 2:
        raise ValueError(f'num_classes is {num_classes}, expected 2 or more (the background is one)')
    if len(anchor_sizes) != 5:
        raise ValueError(f'anchor_sizes has {len(anchor_sizes)} entries, expected 5 (one for each pyramid level)')
    if pretrained not in (True, False, 'authors'):
        raise ValueError(f"pretrained is {pretrained!r}, expected True, False or 'authors'")
    if version not in (None, *VERSIONS):
        raise ValueError(f'version is {version!r}, expected one of {", ".join(map(str, VERSIONS))}')
    if is_released(weights):
        shapes = {'backbone': backbone, 'fpn_channels': fpn_channels, 'box_head': box_head, 'mask_layers': mask_layers,
                  'keypoint_layers': keypoint_layers, **({} if version is None else {'version': version})}  # fmt: skip
        if problems := differences(weights, task, shapes, partial):
            raise ValueError('; '.join(problems))
        version = version or RELEASED[str(weights)].shapes['version']
    version = version or 1
    authors = pretrained == 'authors'
    if authors:
        if weights is not None or not isinstance(backbone, str):
            raise ValueError("pretrained='authors' takes a backbone by name and no weights: it has them all")
        weights, pretrained = released_detector(task, backbone), False
    if norm is None:
        norm = 'frozen' if pretrained or weights is not None else 'train'
    if norm == 'frozen' and isinstance(backbone, str) and not pretrained and weights is None:
        raise ValueError("norm='frozen' needs backbone weights: frozen statistics of a random network are meaningless")

    content = None if weights is None else detector_content(weights)
    if authors and content is None:
        raise ValueError(f'{weights} holds no detector that can be read safely')
    options: dict[str, Any] = {
        'fpn_channels': fpn_channels,
        'box_head': box_head,
        'mask_layers': mask_layers,
        'keypoint_layers': keypoint_layers,
        'version': version,
        'anchor_sizes': anchor_sizes,
        'common': {
            'min_size': DEFAULT_MIN_SIZE[task] if min_size is None else min_size,
            'max_size': max_size,
            **rcnn,
        },
    }
    if content is None:
        fpn = build_backbone(backbone, pretrained=bool(pretrained), weights=weights, out_channels=fpn_channels,
                             norm_layer=_norm_layer(version))  # fmt: skip
        model = _assemble(task, fpn, num_classes, num_keypoints, **options)
        made: Mapping[str, Any] = {}
    else:
        made = _check_start(content, task, backbone, recipe, weights, partial)
        model = _start(content, str(backbone), num_classes, num_keypoints, weights, task, options, partial)
    if compress is not None and str(compress) != str(made.get('compress')):
        model = compress_detector(model, read_spec(compress), fresh=not pretrained and weights is None)
    spec = recipe_spec(task, recipe, version)
    if spec is not None and recipe != made.get('recipe'):
        model = compress_detector(model, spec, fresh=content is None)
    set_training(model.backbone, norm, frozen_stages)
    if norm == 'sync':  # those of version 2 as well
        model.backbone.fpn, model.roi_heads = map(convert_sync_batchnorm, (model.backbone.fpn, model.roi_heads))
    return model


def _norm_layer(version: int) -> type[nn.BatchNorm2d] | None:
    return nn.BatchNorm2d if version == 2 else None


def _anchors(sizes: Sequence[int], levels: int) -> AnchorGenerator:
    """One size on each of five levels; where there are fewer levels all sizes on each, as in torchvision."""
    by_level = [(s,) for s in sizes] if levels == len(sizes) else [tuple(sizes)] * levels
    return AnchorGenerator(tuple(by_level), ((0.5, 1.0, 2.0),) * levels)


def _assemble(
    task: str,
    fpn: nn.Module,
    num_classes: int,
    num_keypoints: int,
    fpn_channels: int,
    box_head: int,
    mask_layers: Sequence[int],
    keypoint_layers: Sequence[int],
    version: int,
    anchor_sizes: Sequence[int],
    common: Mapping[str, Any],
) -> GeneralizedRCNN:
    """A dense R-CNN around a backbone with FPN; arguments as in `build_detector`."""
    mean, std = normalisation(fpn.body)
    norm_layer = _norm_layer(version)
    anchors = _anchors(anchor_sizes, len(fpn.levels) + 1)
    common = {'rpn_anchor_generator': anchors, **common}
    if version == 2:
        convs, size = [fpn_channels] * 4, (fpn_channels, ROI_SIZE, ROI_SIZE)
        common = {
            'rpn_head': RPNHead(fpn_channels, anchors.num_anchors_per_location()[0], conv_depth=2),
            'box_head': FastRCNNConvFCHead(size, convs, [box_head], norm_layer=norm_layer),
            **common,
        }
    common = {
        'image_mean': mean,
        'image_std': std,
        'box_head': TwoMLPHead(fpn_channels * ROI_SIZE**2, box_head),
        'box_predictor': FastRCNNPredictor(box_head, num_classes),
        **common,
    }
    if task == 'box':
        return take_thin_pictures(FasterRCNN(fpn, **common))
    if task == 'mask':
        head = {
            'mask_head': MaskRCNNHeads(fpn_channels, tuple(mask_layers), 1, norm_layer=norm_layer),
            'mask_predictor': MaskRCNNPredictor(mask_layers[-1], mask_layers[-1], num_classes),
        }
        return take_thin_pictures(MaskRCNN(fpn, **head, **common))
    head = {
        'keypoint_head': KeypointRCNNHeads(fpn_channels, tuple(keypoint_layers)),
        'keypoint_predictor': _KeypointPredictor(keypoint_layers[-1], num_keypoints),
    }
    return take_thin_pictures(KeypointRCNN(fpn, **head, **common))


def _check_start(
    content: Mapping[str, Any], task: str, backbone: str | nn.Module, recipe: str, path: object, partial: bool
) -> Mapping[str, Any]:
    """Check that a run may start from a checkpoint; its configuration's section `model`, empty for torchvision's."""
    if not isinstance(backbone, str):
        raise ValueError('weights go with a backbone given by name; load the weights of a module first')
    if not partial:
        check_same_task(path, task_of(state_of(content)), task, ', or --partial to start from the layers that fit')
    config = content.get('config')
    if config is None:
        return {}
    made = config['model']
    if made.get('recipe', 'backbone') not in ('backbone', recipe):
        raise ValueError(f'{path} was compressed by recipe {made["recipe"]!r} already, got recipe {recipe!r}')
    if content.get('surgery') is not None and dense_name(made['backbone']) != dense_name(backbone):
        raise ValueError(f'{path} has another backbone: {made["backbone"]}, got {backbone}')
    if config['task'] != task and made.get('recipe', 'backbone') != 'backbone':
        raise ValueError(f'{path} is a detector for task {config["task"]}, expected {task}')
    return made


def _start(
    content: Mapping[str, Any],
    backbone: str,
    num_classes: int,
    num_keypoints: int,
    path: object,
    task: str,
    options: Mapping[str, Any],
    partial: bool,
) -> GeneralizedRCNN:
    """A detector with the weights, and the compression, of another run."""
    fpn_channels, norm_layer = options['fpn_channels'], _norm_layer(options['version'])
    if content.get('surgery') is None or content['config']['task'] != task:
        fpn = build_backbone(backbone, out_channels=fpn_channels, norm_layer=norm_layer)
        model = _assemble(task, fpn, num_classes, num_keypoints, **options)
        start_from(model, state_of(content), str(path), partial)
        return model
    meta = content['meta']
    fpn = build_backbone(dense_name(backbone), out_channels=fpn_channels, norm_layer=norm_layer)
    model = _assemble(task, fpn, meta['num_classes'], meta['num_keypoints'] or num_keypoints, **options)
    try:
        restore(model, content)
    except ValueError as error:
        raise ValueError(f'{path} does not fit the detector that was asked for: {error}') from None
    _renew_last_layers(model, num_classes, num_keypoints)
    return model


def _renew_last_layers(model: GeneralizedRCNN, num_classes: int, num_keypoints: int) -> None:
    """Replace the last layers, in place, if the detector was trained on other classes or keypoints."""
    heads, renewed = model.roi_heads, []
    box = heads.box_predictor
    if box.cls_score.out_features != num_classes:
        heads.box_predictor = FastRCNNPredictor(box.cls_score.in_features, num_classes)
        renewed.append('box_predictor')
        if heads.mask_predictor is not None:
            old = heads.mask_predictor.mask_fcn_logits
            heads.mask_predictor.mask_fcn_logits = nn.Conv2d(old.in_channels, num_classes, 1)
            renewed.append('mask_predictor')
    if heads.keypoint_predictor is not None:
        old = heads.keypoint_predictor.kps_score_lowres
        if old.out_channels != num_keypoints:
            heads.keypoint_predictor = _KeypointPredictor(old.in_channels, num_keypoints)
            renewed.append('keypoint_predictor')
    if renewed:
        log.warning('classes differ from those of the weights: %s starts anew', ', '.join(renewed))
