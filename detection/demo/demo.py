"""The video demo around the pipeline: checks options and chooses models."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
from torch import nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, KeypointRCNN_ResNet50_FPN_Weights

from detection.demo.output import check_outputs
from detection.demo.predictor import ModelFacts, Predictor
from detection.demo.studio import ModelChoice, Studio
from detection.demo.video import check_input, open_source
from detection.rcnn import RELEASED, build_detector, is_released
from detection.tasks import TASKS
from detection.training import AUTHORS, load_authors_detector, load_detector
from norton_timm.profiling import count_params

DENSE = 'resnet50'
BACKBONE = 'norton_resnet50.r078'  # where none is given
OPTIONS = ('half', 'compile', 'deploy', 'imgsz', 'score', 'warmup', 'tracker')  # that go to the `Predictor`


def coco_names(task: str) -> list[str]:
    """Names by label of COCO's detectors in torchvision: 91 with gaps, or background and person."""
    weights = KeypointRCNN_ResNet50_FPN_Weights if task == 'keypoint' else FasterRCNN_ResNet50_FPN_Weights
    return list(weights.COCO_V1.meta['categories'])


def load_model(weights: str, task: str | None = None, backbone: str = '') -> tuple[nn.Module, ModelFacts]:
    """A detector from a file, torchvision's pretrained one of that name, or the authors'.

    Args:
        weights: a checkpoint of ``tools/train_det.py``, a file of torchvision's reference training, torchvision's name,
            or ``authors``.
        task: what the detector should be for; None takes any.
        backbone: timm's name of the backbone that it should have; empty takes any, and of the authors' detectors
            `BACKBONE`.

    Raises:
        ConnectionError: the authors' or torchvision's detector cannot be downloaded now.
        FileNotFoundError: neither a file nor a name that torchvision knows.
        ValueError: the file holds no detector, or one for another task or on another backbone.
    """
    if weights == AUTHORS:
        model, meta = load_authors_detector(task, backbone or BACKBONE)
    elif is_released(weights) or Path(weights).is_file():
        model, meta = load_detector(weights, task, backbone or None)
    else:
        raise FileNotFoundError(
            f'no weights {weights}: expected a checkpoint of train_det.py, {AUTHORS}, or one of {", ".join(RELEASED)}'
        )
    facts = ModelFacts(
        name=weights if is_released(weights) else str(meta['config'].model.backbone),
        task=meta['task'],
        class_names=meta['class_names'],
        skeleton=meta['skeleton'] or None,
        params=count_params(model),
    )
    return model, facts


def random_model(task: str, backbone: str) -> tuple[nn.Module, ModelFacts]:
    """A detector with random weights, for timing; its facts say so, and so will every picture.

    At most 10 detections a frame: random scores would let all of torchvision's 100 through to the keypoint head.
    """
    if task not in TASKS:
        raise ValueError(f'task is {task!r}, expected one of {", ".join(TASKS)}')
    model = build_detector(task, backbone, box_detections_per_img=10)
    facts = ModelFacts(backbone, task, coco_names(task), params=count_params(model), random=True)
    return model, facts


def check_options(args: argparse.Namespace) -> None:
    """Check the tool's parsed arguments before a model is loaded.

    Raises:
        FileExistsError: a file to be written is there already.
        ValueError: options that cannot work, or exclude each other.
    """
    if args.warmup < 0:
        raise ValueError(f'--warmup {args.warmup}, expected 0 or more')
    if args.frames is not None and args.frames < 1:
        raise ValueError(f'--frames {args.frames}, expected 1 or more')
    if args.weights and args.random_weights:
        raise ValueError('--weights and --random-weights exclude each other')
    if not args.weights and not args.random_weights:
        raise ValueError(
            'no weights: give --weights CHECKPOINT (of train_det.py, `authors`, or a torchvision name such '
            'as fasterrcnn_resnet50_fpn), or --random-weights to measure time only'
        )
    if args.serve is not None:
        if args.output is not None or args.headless or args.compare or args.json is not None:
            raise ValueError('--serve excludes --output, --headless, --compare and --json')
        if not 1 <= args.serve <= 65535:
            raise ValueError(f'--serve {args.serve}, expected a port from 1 to 65535')
    elif args.weights and len(args.weights) != 1 + args.compare:
        want = 'two with --compare: dense, then compressed' if args.compare else 'one (more need --compare or --serve)'
        raise ValueError(f'--weights got {len(args.weights)}, expected {want}')
    if args.input is not None:
        check_input(args.input)
    check_outputs(args)
    if wants_window(args) and (problem := window_problem()):
        raise ValueError(f'no window: {problem}; use --output FILE.mp4, --headless or --serve PORT')


def choose_models(args: argparse.Namespace) -> list[tuple[nn.Module, ModelFacts]]:
    """The models the user asked for: one, or with ``--compare`` the dense and the compressed one."""
    if args.random_weights:
        small = args.backbone or BACKBONE
        return [random_model(args.task or 'box', n) for n in ([DENSE, small] if args.compare else [small])]
    return distinct([load_model(w, args.task, args.backbone) for w in args.weights], args.weights)


def make_studio(args: argparse.Namespace, options: dict[str, Any]) -> Studio:
    """What the web page runs: the models given, or with random weights every task, compressed and dense."""
    if args.random_weights:
        first = args.task or 'box'
        tasks = [first, *(t for t in TASKS if t != first)]
        names = dict.fromkeys([args.backbone or BACKBONE, DENSE])

        def random_predictor(task: str, name: str) -> Predictor:
            return Predictor(*random_model(task, name), **options)

        choices = [ModelChoice(task, name, partial(random_predictor, task, name)) for task in tasks for name in names]
    else:
        choices = [
            ModelChoice(facts.task, facts.name, partial(Predictor, model, facts, **options))
            for model, facts in distinct([load_model(w, args.task, args.backbone) for w in args.weights], args.weights)
        ]
    return Studio(lambda: open_source(args.input), choices, args.score)


def distinct(models: list[tuple[nn.Module, ModelFacts]], weights: list[str]) -> list[tuple[nn.Module, ModelFacts]]:
    """Checkpoints of one architecture and task, named after the folders of their runs as well."""
    if len({(f.task, f.name) for _, f in models}) == len(models):
        return models
    folders = [Path(w).resolve().parent.name for w in weights]
    return [(m, replace(f, name=f'{folder}/{f.name}')) for (m, f), folder in zip(models, folders)]


def wants_window(args: argparse.Namespace) -> bool:
    """Whether the output is a window: it is where no other output was named."""
    return args.output is None and not args.headless and args.serve is None


def window_problem() -> str | None:
    """The reason why no window can be opened here; ``None`` when one can."""
    gui = next((line for line in cv2.getBuildInformation().splitlines() if line.strip().startswith('GUI:')), '')
    if 'NONE' in gui:
        return 'this OpenCV has no windows (opencv-python-headless)'
    if sys.platform.startswith('linux') and not (os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')):
        return 'there is no display'
    return None
