"""Drawings of the sample set: articulated persons, other objects, textured backgrounds.

Every drawing is a list of ``Shape`` primitives, painted with anti-aliasing on the image and without it on the mask,
so that picture and mask agree. Coordinates are pixels, the centre of the top-left pixel at (0, 0), as COCO's
keypoints are.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

KEYPOINT_NAMES = (
    'nose', 'left_eye', 'right_eye', 'left_ear', 'right_ear', 'left_shoulder', 'right_shoulder', 'left_elbow',
    'right_elbow', 'left_wrist', 'right_wrist', 'left_hip', 'right_hip', 'left_knee', 'right_knee', 'left_ankle',
    'right_ankle',
)  # fmt: skip
# COCO's own edges, counted from 1 as in its files
SKELETON = (
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9), (8, 10), (9, 11),
    (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip
OBJECT_NAMES = ('person', 'ball', 'box', 'tree')

_FIXED = 4  # fractional bits of OpenCV's sub-pixel coordinates
_SKIN = ((244, 208, 177), (224, 172, 135), (198, 134, 94), (141, 85, 54), (92, 58, 40))

_Color = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """One filled primitive: a thick line (two points), a disc (one point) or a polygon (three or more)."""

    points: np.ndarray
    color: _Color
    size: float = 0.0


@dataclass(frozen=True)
class Pose:
    """Joint angles in radians; limb angles are measured from straight down, outwards positive, (left, right)."""

    lean: float
    turn: float
    upper_arm: tuple[float, float]
    forearm: tuple[float, float]
    thigh: tuple[float, float]
    shin: tuple[float, float]


@dataclass(frozen=True)
class Appearance:
    """Colours of a person."""

    skin: _Color
    hair: _Color
    shirt: _Color
    trousers: _Color
    shoes: _Color


def paint(canvas: np.ndarray, shapes: list[Shape], smooth: bool = True) -> None:
    """Draw shapes on an RGB image ``(H, W, 3)``, or with ``smooth=False`` ones on a mask ``(H, W)``, in place."""
    line = cv2.LINE_AA if smooth else cv2.LINE_8
    for shape in shapes:
        color = shape.color if canvas.ndim == 3 else 1
        points = np.round(shape.points * (1 << _FIXED)).astype(np.int32)
        if len(points) == 1:
            radius = max(1, round(shape.size * (1 << _FIXED)))
            cv2.circle(canvas, points[0].tolist(), radius, color, -1, line, _FIXED)
        elif len(points) == 2:
            width = max(1, round(shape.size))
            cv2.line(canvas, points[0].tolist(), points[1].tolist(), color, width, line, _FIXED)
        else:
            cv2.fillPoly(canvas, [points.reshape(-1, 1, 2)], color, line, _FIXED)


def random_pose(rng: np.random.Generator) -> Pose:
    """A standing, gesturing or striding pose seen from the front."""

    def pair(low: float, high: float) -> tuple[float, float]:
        return float(rng.uniform(low, high)), float(rng.uniform(low, high))

    upper, thigh = pair(0.1, 2.2), pair(0.02, 0.55)
    forearm = tuple(angle + float(rng.uniform(-0.5, 1.1)) for angle in upper)
    shin = tuple(angle + float(rng.uniform(-0.45, 0.1)) for angle in thigh)
    lean, turn = float(rng.normal(0, 0.09)), float(rng.uniform(-1, 1))
    return Pose(lean, turn, upper, (forearm[0], forearm[1]), thigh, (shin[0], shin[1]))


def walking_pose(phase: float, turn: float = 0.0) -> Pose:
    """One moment of a walk; ``phase`` in radians, one step cycle per 2 pi."""
    swing = float(np.sin(phase))
    wave = 1.0 + 0.6 * float(np.sin(2 * phase))
    return Pose(
        lean=0.04 * swing,
        turn=turn,
        upper_arm=(0.5 + 0.35 * swing, 0.5 - 0.35 * swing),
        forearm=(0.5 + wave, 0.6 - 0.5 * swing),
        thigh=(0.22 + 0.2 * swing, 0.22 - 0.2 * swing),
        shin=(0.1 + 0.1 * swing, 0.1 - 0.1 * swing),
    )


def random_look(rng: np.random.Generator) -> Appearance:
    """Skin, hair and clothes of one person."""
    skin = _SKIN[int(rng.integers(len(_SKIN)))]
    hair = _bright(rng, 20, 110)
    return Appearance(skin, hair, _bright(rng, 60, 255), _bright(rng, 30, 160), _bright(rng, 10, 80))


def person_joints(hip: tuple[float, float], height: float, pose: Pose) -> np.ndarray:
    """COCO's 17 keypoints ``(17, 2)`` of a person ``height`` pixels tall, with the hips centred at ``hip``.

    Persons face the viewer: their left is at the right of the picture.
    """
    up = np.array([np.sin(pose.lean), -np.cos(pose.lean)])
    right = np.array([-up[1], up[0]])
    centre = np.asarray(hip, dtype=np.float64)
    neck = centre + up * 0.29 * height
    head = neck + up * 0.155 * height
    radius = 0.095 * height
    shift = right * pose.turn * 0.35 * radius
    joints = np.zeros((17, 2))
    joints[0] = head + shift * 1.3 - up * 0.22 * radius
    for side, sign in ((0, 1.0), (1, -1.0)):
        joints[1 + side] = head + shift + right * sign * 0.40 * radius + up * 0.18 * radius
        joints[3 + side] = head + right * sign * 0.98 * radius - shift * 0.4
        joints[5 + side] = neck + right * sign * 0.125 * height - up * 0.02 * height
        joints[11 + side] = centre + right * sign * 0.075 * height
        chains = ((5, pose.upper_arm, 0.16), (7, pose.forearm, 0.15), (11, pose.thigh, 0.22), (13, pose.shin, 0.21))
        for start, angles, length in chains:
            angle = angles[side]
            step = np.array([sign * np.sin(angle), np.cos(angle)])
            joints[start + 2 + side] = joints[start + side] + step * length * height
    return joints


def person_shapes(joints: np.ndarray, height: float, pose: Pose, look: Appearance) -> list[Shape]:
    """The primitives of a person, from back to front."""
    shapes: list[Shape] = []
    for side in (0, 1):
        hip, knee, ankle = joints[11 + side], joints[13 + side], joints[15 + side]
        shapes.append(Shape(np.stack([hip, knee]), look.trousers, 0.085 * height))
        shapes.append(Shape(np.stack([knee, ankle]), look.trousers, 0.07 * height))
        shapes.append(Shape(ankle[None] + [[0.0, 0.012 * height]], look.shoes, 0.045 * height))
    neck = (joints[5] + joints[6]) / 2
    radius = 0.095 * height
    torso = np.stack([joints[5], joints[6], joints[12], joints[11]])
    middle = torso.mean(0)
    shapes.append(Shape(middle + (torso - middle) * [1.22, 1.1], look.shirt))
    for side in (0, 1):
        shoulder, elbow, wrist = joints[5 + side], joints[7 + side], joints[9 + side]
        shapes.append(Shape(np.stack([shoulder, elbow]), look.shirt, 0.07 * height))
        shapes.append(Shape(np.stack([elbow, wrist]), look.skin, 0.055 * height))
        shapes.append(Shape(wrist[None], look.skin, 0.038 * height))
    head = (joints[3] + joints[4]) / 2 + (joints[1] + joints[2] - joints[3] - joints[4]) * 0.05
    up = (head - neck) / max(1e-6, float(np.linalg.norm(head - neck)))
    shapes.append(Shape(np.stack([neck, head]), look.skin, 0.06 * height))
    shapes.append(Shape((head + up * 0.25 * radius)[None], look.hair, 1.02 * radius))
    shapes.append(Shape((head - up * 0.15 * radius)[None], look.skin, 0.92 * radius))
    for ear in hidden_ears(pose, visible=True):
        shapes.append(Shape(joints[ear][None], look.skin, 0.2 * radius))
    for eye in (1, 2):
        shapes.append(Shape(joints[eye][None], (250, 250, 250), 0.22 * radius))
        shapes.append(Shape(joints[eye][None], (25, 25, 35), 0.13 * radius))
    shapes.append(Shape(joints[0][None], tuple(int(0.72 * v) for v in look.skin), 0.15 * radius))  # type: ignore[arg-type]
    return shapes


def hidden_ears(pose: Pose, visible: bool = False) -> list[int]:
    """Keypoint indices of the ears behind a turned head, or of the others with ``visible=True``."""
    hidden = [3] if pose.turn > 0.6 else [4] if pose.turn < -0.6 else []
    return [ear for ear in (3, 4) if ear not in hidden] if visible else hidden


def object_shapes(name: str, centre: tuple[float, float], size: float, rng: np.random.Generator) -> list[Shape]:
    """The primitives of a ball, box or tree about ``size`` pixels high."""
    at = np.asarray(centre, dtype=np.float64)
    color, mark = _bright(rng, 70, 255), _bright(rng, 20, 130)
    if name == 'ball':
        radius = size / 2
        angle = rng.uniform(0, np.pi)
        band = np.array([np.cos(angle), np.sin(angle)]) * radius * 0.8
        return [Shape(at[None], color, radius), Shape(np.stack([at - band, at + band]), mark, 0.25 * radius)]
    if name == 'box':
        angle, aspect = rng.uniform(-0.3, 0.3), rng.uniform(0.8, 1.5)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        half = np.array([[-aspect, -1], [aspect, -1], [aspect, 1], [-aspect, 1]]) * size / 2
        corners = half @ turn.T + at
        tape = np.array([[0, -0.85], [0, 0.85]]) * size / 2 @ turn.T + at
        cardboard = (int(rng.integers(150, 200)), int(rng.integers(105, 140)), int(rng.integers(55, 90)))
        return [Shape(corners, cardboard), Shape(tape, (225, 205, 160), 0.14 * size)]
    if name == 'tree':
        green = (int(rng.integers(20, 80)), int(rng.integers(90, 160)), int(rng.integers(20, 80)))
        trunk = at + np.array([[0, 0.05], [0, 0.47]]) * size
        shapes = [Shape(trunk, (95, 62, 38), 0.12 * size)]
        for dx, dy, r in ((-0.17, -0.08, 0.19), (0.17, -0.08, 0.19), (0.0, -0.26, 0.22)):
            shade = tuple(int(np.clip(v + rng.integers(-18, 18), 0, 255)) for v in green)
            shapes.append(Shape(at[None] + np.array([[dx, dy]]) * size, shade, r * size))  # type: ignore[arg-type]
        return shapes
    raise ValueError(f'unknown object {name!r}; expected one of {", ".join(OBJECT_NAMES[1:])}')


def background(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A textured RGB scene ``(H, W, 3)`` uint8 without objects; ``size`` is (width, height)."""
    width, height = size
    colors = rng.uniform(60, 205, (2, 3)) * 0.4 + rng.uniform(60, 205, (2, 1)) * 0.6
    horizon = int(height * rng.uniform(0.35, 0.75))
    image = np.empty((height, width, 3), np.float32)
    ramp = np.linspace(0.85, 1.1, height, dtype=np.float32)[:, None, None]
    image[:horizon], image[horizon:] = colors[0], colors[1]
    image *= ramp
    for cells, strength in ((4, 22.0), (12, 14.0), (40, 9.0)):
        grid = rng.normal(0, strength, (cells, cells, 3)) * 0.25 + rng.normal(0, strength, (cells, cells, 1)) * 0.75
        image += cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    canvas = np.clip(image, 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(2, 7))):
        start = rng.uniform(0, 1, 2) * [width, height]
        end = start + rng.normal(0, 0.35, 2) * [width, height]
        shade = canvas[int(start[1]) % height, int(start[0]) % width].astype(int) + rng.integers(-35, 35)
        tone = tuple(int(v) for v in np.clip(shade, 0, 255))
        paint(canvas, [Shape(np.stack([start, end]), tone, float(rng.uniform(1, 0.05 * height)))])  # type: ignore[arg-type]
    noise = rng.normal(0, 5, canvas.shape)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)


def _bright(rng: np.random.Generator, low: int, high: int) -> _Color:
    r, g, b = (int(v) for v in rng.integers(low, high, 3))
    return r, g, b
