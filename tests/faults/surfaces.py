"""All surfaces that are fuzzed."""

from __future__ import annotations

from . import annotations, arguments, checkpoints, pictures, texts, videos

SURFACES = [
    *texts.SURFACES,
    *annotations.SURFACES,
    *pictures.SURFACES,
    *videos.SURFACES,
    *checkpoints.SURFACES,
    *arguments.SURFACES,
]
