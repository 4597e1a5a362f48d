"""Images for calibration: from a folder or an archive, prepared as the network expects them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch import Tensor, nn

from norton_timm.image_data import Preprocessing
from norton_timm.image_sources import open_data
from norton_timm.pictures import DAMAGE, refuse_postscript

_BATCH = 128


def calibration_images(
    path: Path, model: nn.Module, count: int = 512, size: Sequence[int] | None = None
) -> list[Tensor]:
    """Batches (N, 3, H, W) of some images, drawn at random but the same each time.

    Args:
        path: a folder of images (in subfolders too; where there is a folder ``train``, only that), or an archive of
            small images ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``.
        model: a timm model, whose ``pretrained_cfg`` says how images are resized, cropped and normalised.
        count: how many images; all of them where there are fewer.
        size: height and width in pixels, if not the model's own.

    Raises:
        ValueError: a count below 1, nothing at the path, or files that are no images.
    """
    if count < 1:
        raise ValueError(f'calibration images: got {count}, expected at least 1')
    cfg = resolve_data_config(pretrained_cfg=getattr(model, 'pretrained_cfg', None))
    height, width = size or cfg['input_size'][1:]
    if path.is_file():
        wanted = Preprocessing((height, width), cfg['mean'], cfg['std'], cfg['interpolation'], cfg['crop_pct'])
        batches = open_data(str(path), wanted, torch.device('cpu')).calibration_batches(count, _BATCH)
        return [images for images, _ in batches]
    if not path.is_dir():
        raise ValueError(f'calibration: no folder of images and no archive at {path}')
    folder = path / 'train' if (path / 'train').is_dir() else path
    refuse_postscript()
    try:
        images = ImageDataset(str(folder), transform=create_transform(**{**cfg, 'input_size': (3, height, width)}))
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
        return list(torch.stack([images[k][0] for k in chosen]).split(_BATCH))
    except (RuntimeError, *DAMAGE) as error:
        told = ' '.join(str(error).split())[:200]
        raise ValueError(f'calibration: {folder}: no images that can be read: {told}') from None
