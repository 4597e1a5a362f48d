"""Decodes pictures: one reader for training, evaluation, the data doctor and the demo, so that all refuse the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import ImageOps

from norton_timm.utils import MOST_PIXELS, picture_size, read_rgb


def decode_rgb(data: bytes, name: object, *, oriented: bool, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """An encoded picture as RGB uint8 ``(H, W, 3)``.

    Args:
        data: the encoded picture.
        name: for messages.
        oriented: rotate it as its EXIF data say.
        most_pixels: larger ones are not decoded.

    Raises:
        ValueError: no picture, a damaged or truncated one, one of float numbers, or one that is too large.
    """
    try:
        picture = read_rgb(data, name, most_pixels)
    except ValueError:
        try:
            picture_size(data, name)
        except ValueError:
            raise ValueError(f'{name}: {len(data)} bytes that are no JPEG, PNG or other known format') from None
        raise
    if oriented:
        picture = ImageOps.exif_transpose(picture)
    return np.array(picture)  # a copy: arrays that share a picture's memory cannot be written


def read_picture(path: Path, *, oriented: bool) -> np.ndarray:
    """A picture file as RGB uint8 ``(H, W, 3)``.

    Raises:
        ValueError: it is missing, no plain file, no picture, damaged, or too large.
    """
    name = f'cannot read image {path}'
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise ValueError(f'{name}: not a plain file')
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f'{name}: {error.strerror or error}') from None
    return decode_rgb(data, name, oriented=oriented)
