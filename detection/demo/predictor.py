"""Runs a detector on one picture after another and times its stages apart: pre-process, network, post-process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

import norton_timm
from detection.demo.tracking import Tracker
from detection.visual import Image, LatencyRecorder


@dataclass(frozen=True)
class ModelFacts:
    """What the demo shows and reports about a model.

    Attributes:
        name: short name for captions and tables.
        task: ``box``, ``mask`` or ``keypoint``.
        class_names: indexed by label, background first.
        skeleton: 0-based pairs of keypoints, ``None`` for the usual one.
        params: number of parameters.
        random: the weights are random; pictures must say so.
    """

    name: str
    task: str
    class_names: Sequence[str]
    skeleton: Sequence[tuple[int, int]] | None = None
    params: int = 0
    random: bool = False


@dataclass(frozen=True)
class Prepared:
    """A picture on the device: the network's input, its original (height, width), and the time of preparing it."""

    images: Any
    size: tuple[int, int]
    milliseconds: float


class Predictor:
    """A torchvision R-CNN (or any detector with its interface) ready to run on RGB pictures.

    Args:
        model: list of ``(3, H, W)`` in 0..1 in, list of dicts out. It is moved to the device and set to evaluation.
        facts: its name, task, classes.
        device: where to run.
        half: autocast to float16 on accelerators, to bfloat16 on a CPU.
        compile: ``torch.compile`` the backbone; the warm-up frames then take long.
        imgsz: length in pixels of the shorter image side inside the network; ``None`` keeps the model's own.
        score: detections below it are dropped before the mask or keypoint head spends time on them. Those above it
            are the same as with any lower threshold, as non-maximum suppression works from the highest score down.
            May be set between frames.
        warmup: first frames that do not count in the timings.
        tracker: name of a tracker that numbers the objects, one of `detection.demo.TRACKERS`; frames must then come in
            order.
        deploy: tune the network to this device on the first picture, see `norton_timm.deploy`; that takes a while.

    Raises:
        ValueError: `imgsz`, `score`, `tracker` or `compile` that the model does not allow.

    Example:
        >>> predictor = Predictor(model, ModelFacts('resnet50', 'box', class_names), score=0.7)
        >>> output = predictor(image)  # boxes, labels, scores, on the CPU
    """

    def __init__(
        self,
        model: nn.Module,
        facts: ModelFacts,
        *,
        device: torch.device | str = 'cpu',
        half: bool = False,
        compile: bool = False,
        imgsz: int | None = None,
        score: float = 0.5,
        warmup: int = 3,
        tracker: str | None = None,
        deploy: bool = False,
    ):
        if imgsz is not None and not 32 <= imgsz <= 4096:
            raise ValueError(f'imgsz {imgsz}, expected 32 to 4096 pixels')
        self.facts = facts
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.recorder = LatencyRecorder(warmup=warmup, device=self.device)
        self.found = 0  # detections in all frames, warm-up included
        self._own_threshold = model.roi_heads.score_thresh if isinstance(model, GeneralizedRCNN) else 0.0
        self.score = score
        self.tracker = None if tracker is None else Tracker(tracker, score)
        self.precision = 'fp32'
        self._dtype: torch.dtype | None = None
        if half:
            self._dtype = torch.bfloat16 if self.device.type == 'cpu' else torch.float16
            self.precision = 'bf16 autocast' if self.device.type == 'cpu' else 'fp16 autocast'
        if imgsz is not None:
            self._resize(imgsz)
        if compile and not isinstance(model, GeneralizedRCNN):
            raise ValueError(f'compile needs a torchvision R-CNN, got {type(model).__name__}')
        self._compile, self._deploy = compile, deploy
        if not deploy:
            self._finish()

    def _finish(self) -> None:
        if self._compile:
            self.model.backbone = torch.compile(self.model.backbone)  # type: ignore[assignment]

    @property
    def score(self) -> float:
        """Threshold on the detections' scores."""
        return self._score

    @score.setter
    def score(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f'score {value}, expected a number from 0 to 1')
        self._score = value
        # random scores are all alike: a threshold would decide whether the second stage runs at all
        if isinstance(self.model, GeneralizedRCNN) and not self.facts.random:
            self.model.roi_heads.score_thresh = max(self._own_threshold, value)

    def __call__(self, image: Image) -> dict[str, torch.Tensor]:
        """Detections in one RGB ``uint8 (H, W, 3)``, on the CPU, coordinates in its pixels."""
        return self.detect(self.prepare(image))

    @torch.inference_mode()
    def prepare(self, image: Image) -> Prepared:
        """The first stage: to the device, scaled, normalised. Safe to run in another thread than ``detect``."""
        if self._deploy:
            with torch.inference_mode(False):
                self.model = norton_timm.deploy(self.model, [self._tensor(image)])
                self._finish()
            self._deploy = False
        start = time.perf_counter()
        with self.recorder.stage('preprocess', sync=True):
            tensor = self._tensor(image)
            images = self.model.transform([tensor])[0] if isinstance(self.model, GeneralizedRCNN) else [tensor]
        return Prepared(images, (image.shape[0], image.shape[1]), (time.perf_counter() - start) * 1e3)

    @torch.inference_mode()
    def detect(self, prepared: Prepared) -> dict[str, torch.Tensor]:
        """The other two stages. The frame's ``total`` is the sum of all three."""
        recorder, model, images = self.recorder, self.model, prepared.images
        start = time.perf_counter()
        with recorder.stage('network', sync=True), self._autocast():
            if isinstance(model, GeneralizedRCNN):
                features: Any = model.backbone(images.tensors)
                if isinstance(features, torch.Tensor):
                    features = {'0': features}
                proposals, _ = model.rpn(images, features)
                found = model.roi_heads(features, proposals, images.image_sizes)[0][0]
            else:  # its stages cannot be told apart: all of it is the network
                found = model(images)[0]
        self.found += len(found['boxes'])
        with recorder.stage('postprocess', sync=True):
            output = self._above_score(found)
            if isinstance(model, GeneralizedRCNN):
                output = model.transform.postprocess([output], images.image_sizes, [prepared.size])[0]
            output = self._to_cpu(output)
        if self.tracker is not None:
            with recorder.stage('track'):
                output = self.tracker(output)
        recorder.add('total', prepared.milliseconds + (time.perf_counter() - start) * 1e3)
        return output

    def total(self) -> list[float]:
        """Time of each counted frame from picture to detections, in ms."""
        return self.recorder.times('total')

    def _tensor(self, image: Image) -> torch.Tensor:
        # bytes travel to the device, not floats: a quarter of the traffic
        return torch.from_numpy(image).to(self.device).permute(2, 0, 1).float().div_(255)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def _above_score(self, output: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        keep = output['scores'] >= self.score
        return {name: values[keep] for name, values in output.items()}

    @staticmethod
    def _to_cpu(output: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v.float().cpu() if v.is_floating_point() else v.cpu() for k, v in output.items()}

    def _resize(self, imgsz: int) -> None:
        transform = getattr(self.model, 'transform', None)
        if transform is None or not hasattr(transform, 'min_size'):
            raise ValueError(f'imgsz cannot be set for {type(self.model).__name__}, expected a torchvision R-CNN')
        longest = round(imgsz * 1333 / 800)  # torchvision's own proportion
        transform.min_size, transform.max_size = (imgsz,), longest
        if getattr(transform, 'fixed_size', None) is not None:
            transform.fixed_size = (imgsz, imgsz)
