"""Decodes pictures with OpenCV, after a check of the size that their headers announce."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from norton_timm.utils import MOST_PIXELS, picture_size


def decode_rgb(data: bytes, name: object, *, oriented: bool, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """An encoded picture as RGB uint8 ``(H, W, 3)``.

    Args:
        data: the encoded picture.
        name: for messages.
        oriented: rotate it as its EXIF data say.
        most_pixels: larger ones are not decoded.

    Raises:
        ValueError: no picture, or one that is too large.
    """
    try:
        width, height = picture_size(data, name)
    except ValueError:
        raise ValueError(f'{name}: {len(data)} bytes that are no JPEG, PNG or other known format') from None
    if width * height > most_pixels:
        raise ValueError(f'{name}: {width}x{height} pixels, expected at most {most_pixels:,} in all')
    flags = cv2.IMREAD_COLOR if oriented else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        bgr = None
    if bgr is None:
        raise ValueError(f'{name}: {len(data)} bytes that cannot be decoded')
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def read_picture(path: Path, *, oriented: bool) -> np.ndarray:
    """A picture file as RGB uint8 ``(H, W, 3)``.

    Raises:
        ValueError: it is missing, no plain file, no picture, or too large.
    """
    name = f'cannot read image {path}'
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise ValueError(f'{name}: not a plain file')
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f'{name}: {error.strerror or error}') from None
    return decode_rgb(data, name, oriented=oriented)
