"""All surfaces that are fuzzed."""

from __future__ import annotations

from . import annotations, arguments, checkpoints, pictures, texts

SURFACES = [
    *texts.SURFACES,
    *annotations.SURFACES,
    *pictures.SURFACES,
    *checkpoints.SURFACES,
    *arguments.SURFACES,
]
