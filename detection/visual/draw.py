"""Draws detections on RGB pictures: boxes with names and scores, translucent masks, keypoints with skeleton.

Every picture here is RGB ``uint8 (H, W, 3)``. OpenCV draws into any channel order, so nothing is converted here; only
code that reads, writes or shows pictures converts from or to BGR.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

Image = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

# COCO's 17 person keypoints, pairs of 0-based indices (the annotation files count from 1).
COCO_SKELETON: tuple[tuple[int, int], ...] = (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7),
    (6, 8), (7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
)  # fmt: skip

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_MASK_ALPHA = 0.45
_UNITS = 16  # cv2's fixed-point drawing: 4 fractional bits, so that boxes do not jitter by whole pixels in a video
_SHIFT = 4


@lru_cache(maxsize=4096)
def color_of(index: int) -> Color:
    """RGB colour of a class or track: the same for the same index in every frame, run and machine."""
    hue = (0.08 + index * 0.6180339887) % 1.0  # golden ratio: neighbours in index are far apart in hue
    saturation, value = ((0.75, 1.0), (0.95, 0.85), (0.55, 0.95))[index // 12 % 3]
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def draw_detections(
    image: Image,
    output: Mapping[str, Any],
    class_names: Sequence[str] | Mapping[int, str],
    *,
    score: float = 0.5,
    skeleton: Sequence[tuple[int, int]] | None = None,
) -> Image:
    """Draw what a torchvision R-CNN found in one picture.

    Args:
        image: RGB ``uint8 (H, W, 3)``; left untouched.
        output: one element of the detector's list: ``boxes (N, 4)`` as x1, y1, x2, y2 in pixels, ``labels (N,)``,
            ``scores (N,)`` (taken as 1 where there are none, as in a target), and optionally
            ``masks (N, 1, H, W)`` or ``(N, H, W)`` as probabilities or 0/1, ``keypoints (N, K, 3)`` as x, y,
            visibility (0 = not drawn) and ``track_ids (N,)``, which then decide the colours (-1: no track). Tensors
            or arrays.
        class_names: indexed by label; labels without a name are drawn as ``class 7``.
        score: detections below it are not drawn.
        skeleton: pairs of 0-based keypoint indices; ``None`` takes COCO's for 17 keypoints, else no limbs.

    Returns:
        A new RGB ``uint8 (H, W, 3)``.

    Raises:
        ValueError: for another picture format, or arrays of different lengths.

    Example:
        >>> output = model([to_tensor(image)])[0]
        >>> picture = draw_detections(image, output, dataset.class_names, score=0.7)
    """
    _check_image(image)
    found = {k: _array(output[k]) for k in ('boxes', 'labels', 'masks', 'keypoints', 'track_ids') if k in output}
    if 'boxes' not in found or 'labels' not in found:
        raise ValueError(f'output has {sorted(output)}, expected at least boxes and labels')
    boxes = found['boxes'].reshape(-1, 4).astype(np.float64)
    count = len(boxes)
    scores = _array(output['scores']) if 'scores' in output else np.ones(count)
    for name, values in [*found.items(), ('scores', scores)]:
        if len(values) != count:
            raise ValueError(f'{name} has {len(values)} entries for {count} boxes')
    canvas = image.copy()
    finite = np.asarray(np.isfinite(boxes).all(axis=1))
    order = [int(i) for i in np.argsort(scores, kind='stable') if scores[i] >= score and finite[i]]
    if not order:
        return canvas
    tracks = found.get('track_ids', np.full(count, -1))
    colors = {i: color_of(int(tracks[i] if tracks[i] >= 0 else found['labels'][i])) for i in order}
    if 'masks' in found:
        masks = found['masks'].reshape(count, *found['masks'].shape[-2:])
        for i in order:
            _mask(canvas, masks[i], boxes[i], colors[i])
    width = line_width(canvas)
    for i in order:
        _box(canvas, boxes[i], colors[i], width)
    if 'keypoints' in found:
        limbs = skeleton if skeleton is not None else _default_skeleton(found['keypoints'].shape[1])
        for i in order:
            _keypoints(canvas, found['keypoints'][i], limbs, colors[i], width)
    for i in order:  # names last: nothing covers them
        text = _name(class_names, int(found['labels'][i]))
        if tracks[i] >= 0:
            text = f'{text} #{int(tracks[i])}'
        if 'scores' in output:
            text = f'{text} {scores[i]:.2f}'
        _label(canvas, text, boxes[i], colors[i])
    return canvas


def grid(images: Sequence[Image], *, columns: int | None = None, gap: int = 4) -> Image:
    """Put pictures of any sizes into one, row by row on dark grey, each centred in a cell of the largest size."""
    if not images:
        raise ValueError('grid got no images, expected at least one')
    for image in images:
        _check_image(image)
    columns = columns or math.ceil(math.sqrt(len(images)))
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height, width = max(i.shape[0] for i in images), max(i.shape[1] for i in images)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 32, np.uint8)
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        y = gap + row * (height + gap) + (height - image.shape[0]) // 2
        x = gap + column * (width + gap) + (width - image.shape[1]) // 2
        sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    return sheet


def side_by_side(left: Image, right: Image) -> Image:
    """Join two pictures of one size with a thin line between; the total width is even, as encoders want it."""
    if left.shape != right.shape:
        raise ValueError(f'pictures of shapes {left.shape} and {right.shape}, expected two of one shape')
    line = np.full((left.shape[0], 2, 3), 255, np.uint8)
    return np.concatenate([left, line, right], axis=1)


def draw_caption(image: Image, lines: Sequence[str], *, warning: str | None = None) -> Image:
    """Write lines of text on a shaded strip at the top, and a warning on a red strip at the bottom, in place."""
    _check_image(image)
    height, width = image.shape[:2]
    scale = _text_scale(image)
    lines = [part for line in lines for part in _wrap(line, width, scale)]
    if lines:
        fitted, thick = _fit(lines, width, scale)
        step = round(_text_size('Ag', fitted, thick)[1] * 1.3)
        strip = image[: min(height, step * len(lines) + step // 3)]
        strip[:] = (strip * 0.35).astype(np.uint8)
        for k, line in enumerate(lines):
            origin = (max(2, round(6 * fitted)), step * (k + 1) - step // 8)
            cv2.putText(image, line, origin, _FONT, fitted, (255, 255, 255), thick, cv2.LINE_AA)
    if warning:
        fitted, thick = _fit([warning], width, scale)
        text_width, text_height = _text_size(warning, fitted, thick)
        strip_height = round(text_height * 1.5)
        image[max(0, height - strip_height) :] = (200, 20, 20)
        origin = ((width - text_width) // 2, height - round(text_height * 0.47))
        cv2.putText(image, warning, origin, _FONT, fitted, (255, 255, 255), thick, cv2.LINE_AA)
    return image


def line_width(image: Image) -> int:
    """Line width in pixels that suits the picture's size: 1 up to about 450 pixels, 4 at 1080."""
    return max(1, round(min(image.shape[:2]) / 300))


def _check_image(image: Image) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f'{image.dtype} {image.shape}' if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f'picture is {got}, expected a uint8 array of shape (H, W, 3), RGB')


def _array(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    return np.asarray(value)


def _name(names: Sequence[str] | Mapping[int, str], label: int) -> str:
    if isinstance(names, Mapping):
        return str(names.get(label, f'class {label}'))
    return str(names[label]) if 0 <= label < len(names) else f'class {label}'


def _default_skeleton(count: int) -> Sequence[tuple[int, int]]:
    return COCO_SKELETON if count == 17 else ()


def _mask(canvas: Image, mask: npt.NDArray[Any], box: npt.NDArray[np.float64], color: Color) -> None:
    """Blend one mask and trace its outline. Only the window around the box is touched: masks are mostly empty."""
    height, width = canvas.shape[:2]
    if mask.shape != (height, width):
        raise ValueError(f'a mask of shape {mask.shape} for a picture of {height} x {width}, expected the same')
    x1, y1 = max(0, math.floor(box[0]) - 2), max(0, math.floor(box[1]) - 2)
    x2, y2 = min(width, math.ceil(box[2]) + 3), min(height, math.ceil(box[3]) + 3)
    if x2 <= x1 or y2 <= y1:
        return
    inside = np.ascontiguousarray(mask[y1:y2, x1:x2] > 0.5).view(np.uint8)
    window = canvas[y1:y2, x1:x2]
    tinted = cv2.addWeighted(window, 1 - _MASK_ALPHA, np.full_like(window, color), _MASK_ALPHA, 0)
    cv2.copyTo(tinted, inside, window)
    contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, color, 1, cv2.LINE_AA, offset=(x1, y1))


def _fixed(x: float, y: float) -> tuple[int, int]:
    # a diverged network may give coordinates beyond cv2's 32 bits
    return round(float(np.clip(x, -1e5, 1e5)) * _UNITS), round(float(np.clip(y, -1e5, 1e5)) * _UNITS)


def _box(canvas: Image, box: npt.NDArray[np.float64], color: Color, width: int) -> None:
    cv2.rectangle(canvas, _fixed(box[0], box[1]), _fixed(box[2], box[3]), color, width, cv2.LINE_AA, _SHIFT)


def _keypoints(
    canvas: Image, points: npt.NDArray[Any], skeleton: Sequence[tuple[int, int]], color: Color, width: int
) -> None:
    count = len(points)
    seen = (points[:, 2] > 0) & np.isfinite(points).all(axis=1)
    for a, b in skeleton:
        if not (0 <= a < count and 0 <= b < count):
            raise ValueError(f'skeleton has the pair ({a}, {b}), expected 0-based indices below {count}')
        if seen[a] and seen[b]:
            cv2.line(canvas, _fixed(*points[a, :2]), _fixed(*points[b, :2]), color, width + 1, cv2.LINE_AA, _SHIFT)
    for point in points[seen]:
        cv2.circle(canvas, _fixed(*point[:2]), (width + 1) * _UNITS, (255, 255, 255), -1, cv2.LINE_AA, _SHIFT)
        cv2.circle(canvas, _fixed(*point[:2]), width * _UNITS, color, -1, cv2.LINE_AA, _SHIFT)


def _label(canvas: Image, text: str, box: npt.NDArray[np.float64], color: Color) -> None:
    """The name above its box, or below the upper edge where there is no room, always wholly inside the picture."""
    height, width = canvas.shape[:2]
    scale, thick = _fit([text], width, _text_scale(canvas))
    text_width, text_height = _text_size(text, scale, thick)
    pad = max(1, round(4 * scale))
    plate_w, plate_h = text_width + 2 * pad, text_height + 2 * pad
    x = int(np.clip(box[0], 0, max(0, width - plate_w)))
    y = box[1] - plate_h if box[1] >= plate_h else box[1]
    y = int(np.clip(y, 0, max(0, height - plate_h)))
    cv2.rectangle(canvas, (x, y), (x + plate_w - 1, y + plate_h - 1), color, -1)
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    ink = (0, 0, 0) if dark else (255, 255, 255)
    baseline = y + pad + round(text_height * 0.78)
    cv2.putText(canvas, text, (x + pad, baseline), _FONT, scale, ink, thick, cv2.LINE_AA)


def _text_scale(image: Image) -> float:
    """Font scale that grows with the picture and never falls below what can be read (about 8 pixels high)."""
    return max(0.33, min(image.shape[:2]) / 1000)


def _wrap(line: str, width: int, scale: float) -> list[str]:
    """Break a line at double spaces, so that each part fits into ``width`` pixels where that is possible."""
    parts: list[str] = []
    for word in line.split('  '):
        joined = f'{parts[-1]}  {word}' if parts else word
        if parts and _text_size(joined, scale, 1)[0] + 12 * scale <= width:
            parts[-1] = joined
        else:
            parts.append(word)
    return parts


def _fit(lines: Sequence[str], width: int, scale: float) -> tuple[float, int]:
    """Scale and stroke so that the longest line fits into ``width`` pixels."""
    widest = max(_text_size(line, scale, 1)[0] for line in lines) + 12 * scale
    scale = min(scale, max(0.2, scale * width / widest))
    return scale, max(1, round(scale * 1.6))


def _text_size(text: str, scale: float, thick: int) -> tuple[int, int]:
    (width, height), below = cv2.getTextSize(text, _FONT, scale, thick)
    return width, height + below
