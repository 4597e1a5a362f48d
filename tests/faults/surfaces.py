"""All surfaces that are fuzzed."""

from __future__ import annotations

from . import annotations, arguments, checkpoints, data_sets, pictures, texts, videos

SURFACES = [
    *texts.SURFACES,
    *annotations.SURFACES,
    *data_sets.SURFACES,
    *pictures.SURFACES,
    *videos.SURFACES,
    *checkpoints.SURFACES,
    *arguments.SURFACES,
]
