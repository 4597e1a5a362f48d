"""Dense against compressed R-CNNs end to end, in several runtimes, with the time of each stage."""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detection.rcnn import build_detector, exportable
from detection.training import detector_from_config, load_detector
from norton_timm.checkpoints import dense_name
from norton_timm.inference import deploy, deployment_report, frozen_weights, read_exported, write_exported
from norton_timm.profiling import count, synchronise, take_turns
from norton_timm.studies import EXPORTED, RUNTIMES_OF_DETECTORS, Row, multiple_for, peak_mb, summaries
from norton_timm.utils import removing

DETECTOR_STAGES = ('transform', 'backbone', 'fpn', 'rpn', 'heads', 'postprocess')
Sizes = Mapping[str, tuple[int, int]]


def _build(task: str, backbone: str, recipe: str, size: Sequence[int]) -> GeneralizedRCNN:
    """A detector with random weights that takes images of (H, W) as they are and always fills its heads.

    Random scores are all alike, so detectors of masks and keypoints get one class and no score threshold: their heads
    then work on ten boxes. Detectors of boxes keep COCO's classes and threshold.
    """
    options: dict[str, Any] = {} if task == 'box' else {
        'num_classes': 2, 'box_score_thresh': 0.0, 'box_detections_per_img': 10,
    }  # fmt: skip
    if recipe != 'backbone':
        options['recipe'] = recipe
    model = build_detector(task, backbone, min_size=min(size), max_size=max(size), **options)
    return model.eval().requires_grad_(False)


def _pair(checkpoint: str | Path, task: str | None, size: Sequence[int]) -> tuple[GeneralizedRCNN, GeneralizedRCNN]:
    """The dense detector and the one in a file; both find so many objects that their heads are never without work."""
    small, meta = load_detector(checkpoint, task)
    config = meta['config']
    plain = dataclasses.replace(
        config.model, backbone=dense_name(config.model.backbone), recipe='backbone', compress=None, weights=None,
        partial=False, pretrained=False, norm=None,
    )  # fmt: skip
    dense = detector_from_config(dataclasses.replace(config, model=plain), meta).eval()
    if {n: t.shape for n, t in dense.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}:
        raise ValueError(f'{checkpoint} holds a dense detector on {plain.backbone}, expected a compressed one')
    for model in (dense, small):
        model.requires_grad_(False)
        _fix_size(model, size)
        if meta['task'] != 'box':
            model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 10
    return dense, small


def control_size(dense: GeneralizedRCNN, macs: int, size: Sequence[int]) -> tuple[int, int] | None:
    """Largest (H, W) in the proportions of ``size``, H a multiple of 32, at which ``dense`` needs at most ``macs``.

    None where even the smallest size needs more.
    """
    height, width = size
    for h in range((height - 1) // 32 * 32, 31, -32):
        w = round(h * width / height)
        _fix_size(dense, (h, w))
        if count(dense, [torch.rand(3, h, w)]).macs <= macs:
            return h, w
    return None


def _fix_size(model: GeneralizedRCNN, size: Sequence[int]) -> None:
    model.transform.min_size, model.transform.max_size = (min(size),), max(size)


@contextmanager
def timed_stages(model: GeneralizedRCNN) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of each stage but the last, appended at every pass of the model inside the block."""
    parts = {'transform': model.transform, 'backbone': model.backbone.body, 'fpn': model.backbone.fpn,
             'rpn': model.rpn, 'heads': model.roi_heads}  # fmt: skip
    spent: dict[str, list[float]] = {name: [] for name in parts}
    parameter = next(model.parameters())
    began: dict[str, float] = {}
    hooks = []

    def enter(name: str) -> None:
        synchronise(parameter)
        began[name] = time.perf_counter()

    def leave(name: str) -> None:
        synchronise(parameter)
        spent[name].append(1000 * (time.perf_counter() - began[name]))

    for name, part in parts.items():
        hooks.append(part.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        hooks.append(part.register_forward_hook(lambda *_, name=name: leave(name)))
    with removing(hooks):
        yield spent


def _stages(model: GeneralizedRCNN, images: list[Tensor], passes: int = 3) -> dict[str, float]:
    """Median milliseconds of each stage; post-processing is what the others leave of the whole."""
    wholes = []
    with timed_stages(model) as spent:
        for _ in range(passes + 1):
            synchronise(images)
            start = time.perf_counter()
            model(images)
            synchronise(images)
            wholes.append(1000 * (time.perf_counter() - start))
    stages = {name: statistics.median(values[1:]) for name, values in spent.items()}  # the first pass warms up
    rest = [whole - sum(values[k] for values in spent.values()) for k, whole in enumerate(wholes)]
    return stages | {'postprocess': statistics.median(rest[1:])}


def _prepare(model: GeneralizedRCNN, image: Tensor, runtime: str, folder: Path) -> tuple[Callable[[], Any], Any]:
    """One inference as a call without arguments, and the PyTorch model in it, if any."""
    if runtime in ('eager', 'deployed'):
        return partial(model, [image]), model
    if runtime == 'compile':
        model = copy.deepcopy(model)
        model.backbone.body = torch.compile(model.backbone.body, dynamic=False)
        model.backbone.fpn = torch.compile(model.backbone.fpn, dynamic=False)
        with frozen_weights():
            model([image])
        return partial(model, [image]), model
    path = folder / {'onnxruntime': 'model.onnx', 'openvino': 'model.xml'}[runtime]
    write_exported(exportable(model), image[None], path)
    return partial(read_exported(path), image[None]), None


@torch.no_grad()
def benchmark_detector(
    task: str | None = None,
    backbone: str = 'norton_resnet50.r078',
    recipe: str = 'backbone',
    size: tuple[int, int] = (800, 1066),
    runtimes: Sequence[str] = ('eager', 'deployed'),
    seconds: float = 20.0,
    image: Tensor | None = None,
    checkpoint: str | Path | None = None,
) -> list[Row]:
    """Time a compressed detector, the dense one, and the dense one at the largest resolution with no more MACs.

    Args:
        task: ``box``, ``mask`` or ``keypoint``; None is ``box``, or any of a checkpoint.
        backbone: of the compressed detector; the dense detector has the dense network of that backbone.
        recipe: what is compressed, see :func:`detection.rcnn.build_detector`.
        size: (H, W) of the image inside the network, in pixels.
        runtimes: some of ``RUNTIMES_OF_DETECTORS``; ``compile`` compiles backbone and FPN.
        seconds: about how long to measure each runtime.
        image: (3, H, W) in 0..1; random pixels if none.
        checkpoint: a detector to time instead, see :func:`detection.training.load_detector`.

    Returns:
        One row for each runtime and network, with ``stages`` in ms where PyTorch runs it.

    Raises:
        ValueError: an unknown runtime, task or recipe, a package that is missing, or a checkpoint of a dense detector.
    """
    unknown = [r for r in runtimes if r not in RUNTIMES_OF_DETECTORS]
    if unknown:
        raise ValueError(f'runtime: got {", ".join(unknown)}, expected some of {", ".join(RUNTIMES_OF_DETECTORS)}')
    if checkpoint is None:
        task = task or 'box'
        dense, small = _build(task, dense_name(backbone), 'backbone', size), _build(task, backbone, recipe, size)
        title = f'{task} {backbone} {recipe}'
    else:
        dense, small = _pair(checkpoint, task, size)
        title = str(checkpoint)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) if image is None else image
    macs = count(small, [image]).macs
    networks: dict[str, GeneralizedRCNN] = {'dense': dense, 'compressed': small}
    images = {'dense': image, 'compressed': image}
    control = copy.deepcopy(dense)
    if (smaller := control_size(control, macs, size)) is not None:
        label = f'dense at {smaller[0]}x{smaller[1]}'
        networks[label] = control
        images[label] = nn.functional.interpolate(image[None], smaller, mode='bilinear', antialias=True)[0]
    gmacs = {label: count(model, [images[label]]).macs / 1e9 for label, model in networks.items()}
    deployed = {
        exported: {k: deploy(m, [images[k]], channel_multiple=multiple_for(exported)) for k, m in networks.items()}
        for exported in sorted({runtime in EXPORTED for runtime in runtimes if runtime != 'eager'})
    }
    rows: list[Row] = []
    for runtime in runtimes:
        in_eager, exported = runtime in ('eager', 'deployed'), runtime in EXPORTED
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            calls, runners = [], []
            for number, label in enumerate(networks):
                (place := Path(folder) / str(number)).mkdir()
                if runtime == 'eager':
                    source: Any = networks[label].to(memory_format=torch.channels_last)
                else:
                    source = deployed[exported][label]
                call, runner = _prepare(source, images[label], runtime, place)
                calls.append(call)
                runners.append(runner)
            figures = summaries(take_turns(calls, partial(synchronise, image), seconds, least=5))
        for label, runner, figure in zip(networks, runners, figures):
            rows.append({
                'model': title, 'network': label, 'runtime': runtime, 'batch': 1,
                'gmacs': gmacs[label], **figure,
                'peak_mb': peak_mb(runner, [images[label]]) if in_eager else None,
                'stages': _stages(runner, [images[label]]) if runner is not None else {}, 'load': load,
                'forms': '' if runtime == 'eager' else deployment_report(deployed[exported][label]).chosen,
            })  # fmt: skip
    return rows
