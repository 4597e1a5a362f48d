"""Outlines of objects: checked before native code reads them, and filled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from norton_timm.utils import brief

_LONGEST_OUTLINE = 1_000_000  # pixels; enough for any object in a camera's picture


def decode_mask(record: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Mask ``(H, W)`` uint8 of an annotation's polygons or run-length code.

    Raises:
        ValueError: as ``check_outline``.
    """
    return mask_utils.decode(_encoded(record, height, width))


def mask_area(record: dict[str, Any], height: int, width: int) -> int:
    """Pixels of an annotation's mask.

    Raises:
        ValueError: as ``check_outline``.
    """
    return int(mask_utils.area(_encoded(record, height, width)))


def check_outline(record: dict[str, Any], height: int, width: int) -> None:
    """Check an annotation's segmentation before pycocotools' C code reads it, which trusts its input.

    Raises:
        ValueError: it is neither polygons of numbers nor a run-length code of the image's size, or its outline is too
            long. The C code keeps every fifth of a pixel along it, and would run out of memory and crash.
    """
    outline, where = record['segmentation'], f'annotation {record["id"]}'
    if isinstance(outline, list):
        good = all(finite_numbers(polygon) for polygon in outline)
        odd = next((polygon for polygon in outline if len(polygon) % 2), None) if good else None
        if odd is not None:
            raise ValueError(f'{where} has a polygon of {len(odd)} numbers; expected an even number: x, y, x, y, ...')
        longest = max((_walk(polygon) for polygon in outline), default=0.0) if good else 0.0
        if longest > _LONGEST_OUTLINE:
            raise ValueError(f'{where} has a polygon of {longest:.0f} pixels around, {_LONGEST_OUTLINE} are allowed')
    else:
        said: Any = outline if isinstance(outline, dict) else {}
        size, counts = said.get('size'), said.get('counts')
        good = isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size)
        if good and size != [height, width]:
            raise ValueError(f'{where} has a mask of {(size[0], size[1])}; its image is {(height, width)}')
        if isinstance(counts, list):
            good = good and all(type(n) is int and n >= 0 for n in counts) and sum(counts) == height * width
        else:
            good = good and isinstance(counts, (str, bytes)) and _length(counts) == height * width
    if not good:
        told = f'polygons of numbers, or a run-length code of {height}x{width} pixels'
        raise ValueError(f'{where} has a malformed segmentation {brief(outline)}; expected {told}')


def finite_numbers(value: Any) -> bool:
    """Whether a value is a list of finite numbers, none of them beyond 1e30. Long lists take a microsecond or two."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int, float}:
        return False
    # a sum of numbers is NaN where one of them is; integers beyond floats cannot be added to any
    return not value or (min(value) > -1e30 and max(value) < 1e30 and math.isfinite(sum(value)))


def _encoded(record: dict[str, Any], height: int, width: int) -> Any:
    """The mask as pycocotools' run-length code."""
    outline = record['segmentation']
    check_outline(record, height, width)
    try:
        if isinstance(outline, list):
            return mask_utils.merge(mask_utils.frPyObjects([p for p in outline if len(p) >= 6], height, width))
        return mask_utils.frPyObjects(outline, height, width) if isinstance(outline['counts'], list) else outline
    except Exception as error:  # pycocotools raises bare exceptions of many types
        raise ValueError(f'annotation {record["id"]} has a malformed segmentation: {error}') from None


def _walk(polygon: list[float]) -> float:
    """Pixels along a closed polygon (x, y, x, y, ...), each edge by its longer side; of short ones an upper bound."""
    bound = len(polygon) / 2 * (max(polygon) - min(polygon)) if polygon else 0.0
    if bound <= _LONGEST_OUTLINE:
        return bound
    points = np.asarray(polygon, float).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def _length(code: str | bytes) -> int:
    """Pixels that a compressed run-length code stands for; -1 if it is malformed.

    Each character holds five bits of a count, and a sixth that says whether more follow. From the fourth on, counts are
    differences to the count two places before (pycocotools' rleToString).
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in code.encode() if isinstance(code, str) else code:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 30:
            return -1
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        if counts[-1] < 0:
            return -1
        value = shift = 0
    return sum(counts) if not shift else -1
