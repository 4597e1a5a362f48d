"""Decodes pictures: one reader for training, evaluation, the data doctor and the demo, so that all refuse the same."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from norton_timm.utils import DAMAGE, MOST_PIXELS, picture_size, read_rgb

_log = logging.getLogger(__name__)


def decode_rgb(data: bytes, name: object, *, oriented: bool, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """An encoded picture as RGB uint8 ``(H, W, 3)``.

    Args:
        data: the encoded picture.
        name: for messages.
        oriented: rotate it as its EXIF data say; where they cannot be read, it stays as it is stored.
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
    if data[:2] == b'\xff\xd8' and not _jpeg_ends(data):
        raise ValueError(f'{name}: not an image that can be read: a JPEG without its end')
    if oriented:
        picture = _turned(picture, name)
    return np.array(picture)  # a copy: arrays that share a picture's memory cannot be written


# by the EXIF tag's value; ImageOps.exif_transpose also writes the EXIF data anew, which fails for data with damage
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def _turned(picture: Image.Image, name: object) -> Image.Image:
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:
        _log.warning('%s: its EXIF data cannot be read, it is taken as it is stored', name)
        return picture
    return picture if turn is None else picture.transpose(turn)


def _jpeg_ends(data: bytes) -> bool:
    """Whether the end marker follows the pixels of a JPEG; decoders take zeros or garbage in its place for pixels."""
    at = 2
    while data[at : at + 1] == b'\xff':
        if data[at + 1 : at + 2] == b'\xda':
            return b'\xff\xd9' in data[at:]
        filled = data[at + 1 : at + 2] == b'\xff'  # any number of these may stand before a marker
        at += 1 if filled else 2 + int.from_bytes(data[at + 2 : at + 4], 'big')
    return True  # no order that is known here, and a decoder took it


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
