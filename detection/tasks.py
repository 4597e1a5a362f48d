"""The three tasks of a detector."""

from __future__ import annotations

from typing import Literal

TASKS = ('box', 'mask', 'keypoint')
Task = Literal['box', 'mask', 'keypoint']


def check_task(task: str) -> None:
    """Raise ``ValueError`` unless ``task`` is one of ``TASKS``."""
    if task not in TASKS:
        raise ValueError(f'unknown task {task!r}; expected one of {", ".join(TASKS)}')


def check_same_task(source: object, task: str, asked: str | None, way_out: str = '') -> None:
    """Raise ``ValueError`` if the detector in a file is for another task than the one asked for; None asks for any."""
    if asked is not None:
        check_task(asked)
        if asked != task:
            raise ValueError(f'{source} is a detector for task {task}, got task {asked}: give --task {task}{way_out}')
