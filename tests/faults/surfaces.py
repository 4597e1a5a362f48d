"""All surfaces that are fuzzed."""

from __future__ import annotations

from . import annotations, arguments, checkpoints, data_sets, pictures, texts

SURFACES = [
    *texts.SURFACES,
    *annotations.SURFACES,
    *data_sets.SURFACES,
    *pictures.SURFACES,
    *checkpoints.SURFACES,
    *arguments.SURFACES,
]
