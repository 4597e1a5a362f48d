"""Untrusted picture files, opened with Pillow: common formats only, and no more pixels than a limit."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import EpsImagePlugin, Image

MOST_PIXELS = 89_478_485  # Pillow's own limit: 256 MB once decoded, which a file of a few KB can announce
# only the formats of cameras and data sets: PostScript, for one, would run Ghostscript
IMAGE_FORMATS = ('JPEG', 'MPO', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM', 'JPEG2000', 'AVIF')
# what Pillow's decoders raise on damaged files
DAMAGE = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, EOFError, AttributeError,
           NotImplementedError, struct.error, zlib.error)  # fmt: skip


def read_rgb(source: Path | bytes, name: object, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Decode a whole picture to RGB; of 16 bits the upper 8 are kept.

    Args:
        source: a file, or the encoded picture.
        name: name of the picture, for messages.
        most_pixels: a picture with more pixels is refused before it is decoded.

    Raises:
        ValueError: no picture, a damaged one, one that is too large, or one of float or 32-bit numbers, whose range is
            unknown.
    """
    with _opened(source, name) as picture:
        if picture.width * picture.height > most_pixels:
            size = f'{picture.width}x{picture.height}'
            raise ValueError(f'{name} is not decoded: {size} pixels, expected at most {most_pixels:,} in all')
        sixteen = picture.mode == 'I' and picture.format in ('PPM', 'PNG')  # formats that end at 16 bits
        if picture.mode in ('F', 'I') and not sixteen:
            numbers = 'float' if picture.mode == 'F' else '32-bit whole'
            raise ValueError(f'{name}: a picture of {numbers} numbers; expected 8 or 16 bits')
        try:
            if picture.mode.startswith('I;16') or sixteen:  # Pillow would cut off at 255
                return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert('RGB')
            return picture.convert('RGB')
        except DAMAGE as error:
            raise ValueError(f'{name}: not an image that can be read: {_brief(error)}') from None


def picture_size(source: Path | bytes, name: object) -> tuple[int, int]:
    """Width and height in pixels as the header announces them; nothing is decoded.

    Raises:
        ValueError: no picture.
    """
    with _opened(source, name) as picture:
        return picture.size


def refuse_postscript() -> None:
    """Keep Pillow from running Ghostscript, also where another library opens the pictures."""
    EpsImagePlugin.gs_binary = False  # type: ignore[assignment]


def _opened(source: Path | bytes, name: object) -> Any:
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():  # a pipe would never end
            raise ValueError('not a plain file')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            stream = io.BytesIO(source) if isinstance(source, bytes) else source
            return Image.open(stream, formats=_formats())
    except Image.DecompressionBombError as error:
        raise ValueError(f'{name} is not decoded: {_brief(error)}') from None
    except DAMAGE as error:
        raise ValueError(f'{name}: not an image that can be read: {_brief(error)}') from None


@lru_cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(form for form in IMAGE_FORMATS if form in Image.OPEN)  # AVIF and JPEG 2000 are not in every build


def _brief(error: Exception) -> str:
    return ' '.join(str(error).split())[:200] or type(error).__name__
