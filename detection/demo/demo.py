"""The video demo around the pipeline: checks options, chooses models, and writes pictures and reports."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, KeypointRCNN_ResNet50_FPN_Weights

from detection.demo.pipeline import Report, real_time_repeats
from detection.demo.predictor import ModelFacts, Predictor
from detection.demo.studio import ModelChoice, Studio
from detection.demo.video import IMAGE_SUFFIXES, Frame, FrameSource, fit_image, open_source
from detection.demo.video_writer import VideoWriter, check_video_output
from detection.rcnn import build_detector, take_thin_pictures
from detection.tasks import TASKS, check_same_task
from detection.training import load_detector
from detection.visual import Image, plot_histogram
from norton_timm.profiling import count_params
from norton_timm.utils import write_text

DENSE = 'resnet50'
OPTIONS = ('half', 'compile', 'deploy', 'imgsz', 'score', 'warmup', 'tracker')  # that go to the `Predictor`
TORCHVISION_TASKS = {
    'fasterrcnn_resnet50_fpn': 'box',
    'fasterrcnn_resnet50_fpn_v2': 'box',
    'fasterrcnn_mobilenet_v3_large_fpn': 'box',
    'fasterrcnn_mobilenet_v3_large_320_fpn': 'box',
    'maskrcnn_resnet50_fpn': 'mask',
    'maskrcnn_resnet50_fpn_v2': 'mask',
    'keypointrcnn_resnet50_fpn': 'keypoint',
}


def coco_names(task: str) -> list[str]:
    """Names by label of COCO's detectors in torchvision: 91 with gaps, or background and person."""
    weights = KeypointRCNN_ResNet50_FPN_Weights if task == 'keypoint' else FasterRCNN_ResNet50_FPN_Weights
    return list(weights.COCO_V1.meta['categories'])


def load_model(weights: str, task: str | None = None) -> tuple[nn.Module, ModelFacts]:
    """A detector from a file, or torchvision's pretrained one of that name.

    Args:
        weights: a checkpoint of ``tools/train_det.py``, a file of torchvision's reference training, or the name.
        task: what the detector should be for; None takes any.

    Raises:
        FileNotFoundError: neither a file nor a name that torchvision knows.
        ValueError: the file holds no detector, or one for another task, or the download failed.
    """
    if weights in TORCHVISION_TASKS and not Path(weights).exists():
        known = TORCHVISION_TASKS[weights]
        check_same_task(weights, known, task)
        try:
            model = take_thin_pictures(get_model(weights, weights='DEFAULT'))
        except OSError as error:
            raise ValueError(f'torchvision weights of {weights} cannot be downloaded: {error}') from error
        return model, ModelFacts(weights, known, coco_names(known), params=count_params(model))
    if not Path(weights).is_file():
        raise FileNotFoundError(
            f'no weights {weights}: expected a checkpoint of train_det.py or one of {", ".join(TORCHVISION_TASKS)}'
        )
    model, meta = load_detector(weights, task)
    facts = ModelFacts(
        name=str(meta['config'].model.backbone),
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
            'no weights: give --weights CHECKPOINT (of train_det.py, or a torchvision name such as '
            'fasterrcnn_resnet50_fpn), or --random-weights to measure time only'
        )
    if args.serve is not None:
        if args.output is not None or args.headless or args.compare or args.json is not None:
            raise ValueError('--serve excludes --output, --headless, --compare and --json')
        if not 1 <= args.serve <= 65535:
            raise ValueError(f'--serve {args.serve}, expected a port from 1 to 65535')
    elif args.weights and len(args.weights) != 1 + args.compare:
        want = 'two with --compare: dense, then compressed' if args.compare else 'one (more need --compare or --serve)'
        raise ValueError(f'--weights got {len(args.weights)}, expected {want}')
    if args.output is not None:
        check_video_output(args.output, args.codec)
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f'--json folder {args.json.parent} does not exist')
    _check_nothing_is_overwritten(args)
    if wants_window(args) and (problem := window_problem()):
        raise ValueError(f'no window: {problem}; use --output FILE.mp4, --headless or --serve PORT')


def _check_nothing_is_overwritten(args: argparse.Namespace) -> None:
    """Check that no file to be written, derived ones included, is one that is read."""
    written = [args.output, figures_file(args)]
    written += [path.with_suffix('.png') for path in written[1:] if path is not None]
    read = [Path(name.removeprefix('file://')) for name in [args.input or '', *args.weights] if name]
    with contextlib.suppress(OSError):  # a URL may be too long for a path
        read += [
            file
            for folder in read
            if folder.is_dir()
            for file in folder.iterdir()
            if file.suffix.lower() in IMAGE_SUFFIXES
        ]
        for path in written:
            if path is not None and path.exists() and any(file.exists() and path.samefile(file) for file in read):
                raise ValueError(f'{path} is read and would be overwritten: choose another --output or --json')


def figures_file(args: argparse.Namespace) -> Path | None:
    """Where the figures go: ``--json``, or beside the video."""
    return args.json or (args.output.with_suffix('.json') if args.output else None)


def choose_models(args: argparse.Namespace) -> list[tuple[nn.Module, ModelFacts]]:
    """The models the user asked for: one, or with ``--compare`` the dense and the compressed one."""
    if args.random_weights:
        return [
            random_model(args.task or 'box', n) for n in ([DENSE, args.backbone] if args.compare else [args.backbone])
        ]
    return distinct([load_model(w, args.task) for w in args.weights], args.weights)


def make_studio(args: argparse.Namespace, options: dict[str, Any]) -> Studio:
    """What the web page runs: the models given, or with random weights every task, compressed and dense."""
    if args.random_weights:
        first = args.task or 'box'
        tasks = [first, *(t for t in TASKS if t != first)]
        names = dict.fromkeys([args.backbone, DENSE])

        def random_predictor(task: str, name: str) -> Predictor:
            return Predictor(*random_model(task, name), **options)

        choices = [ModelChoice(task, name, partial(random_predictor, task, name)) for task in tasks for name in names]
    else:
        choices = [
            ModelChoice(facts.task, facts.name, partial(Predictor, model, facts, **options))
            for model, facts in distinct([load_model(w, args.task) for w in args.weights], args.weights)
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


class Output:
    """Where finished pictures go: a file, a window, both, or nowhere; a context manager.

    Args:
        source: gives the frame rate; live sources are written so that the file plays in real time.
        path: .mp4 to write, or ``None``.
        window: show a window; Escape, q or closing it ends the run.
        codec: see `VideoWriter`.
        progress: called after every frame.
    """

    title = 'norton-timm'

    def __init__(
        self,
        source: FrameSource,
        path: Path | None,
        *,
        window: bool = False,
        codec: str = 'auto',
        progress: Callable[[], object] | None = None,
    ):
        self.source, self.path, self.window, self.codec, self.progress = source, path, window, codec, progress
        self.writer: VideoWriter | None = None
        self._start = 0.0

    def __call__(self, image: Image, frame: Frame) -> bool:
        """Write and show one picture; false when the user closed the window."""
        if self.path is not None:
            if self.writer is None:
                self.writer = VideoWriter(self.path, self.source.fps, (image.shape[1], image.shape[0]), self.codec)
                self._start = frame.time
            repeats = 1
            if self.source.live:
                repeats = real_time_repeats(frame, self._start, float(self.source.fps), self.writer.frames)
            for _ in range(repeats):
                self.writer.write(fit_image(image, self.writer.size))
        if self.progress is not None:
            self.progress()
        if not self.window:
            return True
        cv2.imshow(self.title, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(1) & 0xFF
        return key not in (27, ord('q')) and cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) >= 1

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.writer is not None:
                self.writer.close()
        finally:
            if self.window:
                with contextlib.suppress(cv2.error):
                    cv2.destroyAllWindows()


def save_report(report: Report, path: Path) -> list[Path]:
    """Write the figures as JSON, and beside it the latency histogram as PNG if any frame was counted."""
    written = [write_text(path, json.dumps(report.to_dict(), indent=2) + '\n')]
    series = report.totals()
    if any(series.values()):
        plot_histogram(series, path.with_suffix('.png'), title='Picture to detections')
        written.append(path.with_suffix('.png'))
    return written
