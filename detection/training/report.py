"""What a run shows: its facts at the start, and the table of COCO's metrics and a picture of detections at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from detection.data import CocoDataset, to_tensor, unpaired
from detection.training.engine import DetectorTrainer
from detection.visual import Image, draw_detections, grid
from norton_timm.profiling import count_params
from norton_timm.utils import replacing, world_size


def format_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of each kind of evaluation, side by side, one name and value a line; -1: no ground truth."""
    columns = [
        [kind.ljust(16), *(f'{name.ljust(9)} {value:6.3f}' for name, value in figures.items())]
        for kind, figures in results.items()
    ]
    height = max(len(column) for column in columns)
    filled = [column + [' ' * 16] * (height - len(column)) for column in columns]
    return '\n'.join('   '.join(row).rstrip() for row in zip(*filled))


def describe_run(trainer: DetectorTrainer, data_name: str) -> str:
    """A few lines on model, data, device and schedule, to show before the work starts."""
    config, model, device = trainer.config, trainer.model, trainer.device
    total, trained = count_params(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    if config.model.weights is not None:
        start = f'weights from {config.model.weights}'
    elif config.model.pretrained:
        start = 'pretrained weights'
    else:
        start = 'random weights, trained from scratch (model.pretrained or model.weights start from others)'
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} threads'
    optim = config.optim
    rows = {
        'task': f'{config.task}, {trainer.train_set.num_classes - 1} classes',
        'device': f'{device} ({where}), {world_size()} process{"es" if world_size() > 1 else ""}',
        'data': f'{data_name}: {len(trainer.train_set)} training and {len(trainer.val_set)} validation images',
        'backbone': f'{config.model.backbone}, {start}',
        'parameters': f'{total:,}' + (f', of which {trained:,} are trained' if trained < total else ''),
        'run': f'{trainer.total} iterations of {trainer.step_images} images, {optim.name}, learning rate {optim.lr:g}'
        + (f', from iteration {trainer.iteration}' if trainer.iteration else ''),
    }
    points, partners = trainer.train_set.keypoint_names, trainer.train_set.flip_indices
    if points:
        pairs = [f'{points[i]} - {points[k]}' for i, k in enumerate(partners) if i < k]
        rows['mirrored'] = ', '.join(pairs) or 'no keypoints trade places (data.flip_pairs names them)'
        alone = unpaired(points, partners)
        if alone:
            rows['warning'] = f'no partner for {", ".join(alone[:6])} in a mirrored image (data.flip_pairs names it)'
    return '\n'.join(f'{name:<11}{value}' for name, value in rows.items())


def save_predictions(
    model: nn.Module,
    dataset: CocoDataset,
    path: str | Path,
    *,
    device: torch.device,
    count: int = 12,
    score: float = 0.5,
) -> Path:
    """Draw what a detector finds in the first images of a data set that hold objects, and write the picture.

    Args:
        model: a torchvision R-CNN, with the labels of the data set.
        dataset: where the images are from.
        path: picture file; appears only when complete.
        device: where the model is.
        count: number of images at most.
        score: detections below it are not drawn.
    """
    path = Path(path)
    was_training = model.training
    model.eval()
    full = [i for i in range(len(dataset)) if dataset.labels_of(i)]
    drawn = []
    for index in (full or list(range(len(dataset))))[:count]:
        image = dataset.read_image(dataset.image_ids[index])
        with torch.inference_mode():
            output = model([to_tensor(image).to(device)])[0]
        found = {name: value.cpu() for name, value in output.items()}
        # a small picture would be all text: enlarge it
        drawn.append(draw_detections(*_enlarge(image, found), dataset.class_names, score=score,
                                     skeleton=dataset.skeleton or None))  # fmt: skip
    model.train(was_training)
    ok, data = cv2.imencode(path.suffix, cv2.cvtColor(grid(drawn), cv2.COLOR_RGB2BGR))
    if not ok:
        raise ValueError(f'cannot write a picture as {path.suffix}, expected .jpg or .png')
    with replacing(path) as temporary:
        temporary.write_bytes(data.tobytes())
    return path


def _enlarge(image: Image, found: dict[str, Tensor], side: int = 320) -> tuple[Image, dict[str, Tensor]]:
    """Image and detections scaled up by a whole factor to about `side` pixels."""
    factor = max(1, round(side / max(image.shape[:2])))
    if factor == 1:
        return image, found
    large = np.asarray(cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC), np.uint8)
    scaled = {**found, 'boxes': found['boxes'] * factor}
    if 'keypoints' in found:
        scaled['keypoints'] = found['keypoints'] * torch.tensor([factor, factor, 1.0])
    if 'masks' in found:
        scaled['masks'] = nn.functional.interpolate(found['masks'], scale_factor=factor, mode='bilinear')
    return large, scaled
