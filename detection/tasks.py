"""The three tasks of a detector."""

from __future__ import annotations

from typing import Literal

TASKS = ('box', 'mask', 'keypoint')
Task = Literal['box', 'mask', 'keypoint']


def check_task(task: str) -> None:
    """Raise ``ValueError`` unless ``task`` is one of ``TASKS``."""
    if task not in TASKS:
        raise ValueError(f'unknown task {task!r}; expected one of {", ".join(TASKS)}')
