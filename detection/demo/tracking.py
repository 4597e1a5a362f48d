"""Tracking: an object keeps its number from frame to frame, by a tracker of the package `trackers`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

TRACKERS = {'bytetrack': 'ByteTrackTracker', 'sort': 'SORTTracker', 'ocsort': 'OCSORTTracker'}


class Tracker:
    """Adds `track_ids` to a detector's outputs, frame after frame of one video.

    Args:
        name: one of `TRACKERS`.
        score: detections below it start no track.

    Raises:
        ValueError: an unknown name, or the package is not installed.
    """

    def __init__(self, name: str, score: float = 0.5) -> None:
        if name not in TRACKERS:
            raise ValueError(f'tracker is {name!r}, expected one of {", ".join(TRACKERS)}')
        try:
            import supervision
            import trackers
        except ImportError as error:
            raise ValueError(f'tracker {name!r} needs the extra track: pip install -e ".[track]"') from error
        self._detections = supervision.Detections
        options = {'track_activation_threshold': score} if name != 'ocsort' else {'high_conf_det_threshold': score}
        if name == 'bytetrack':
            options['high_conf_det_threshold'] = score
        self._tracker: Any = getattr(trackers, TRACKERS[name])(**options)

    def __call__(self, output: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The output with `track_ids (N,)`, -1 for objects that were seen in too few frames so far.

        Args:
            output: boxes (N, 4), scores (N,) and labels (N,) of the next frame, on the CPU.
        """
        count = len(output['boxes'])
        found = self._tracker.update(
            self._detections(
                xyxy=output['boxes'].numpy().reshape(-1, 4),
                confidence=output['scores'].numpy(),
                class_id=output['labels'].numpy(),
                data={'row': np.arange(count)},
            )
        )
        ids = torch.full((count,), -1, dtype=torch.int64)
        if len(found):  # the tracker may change their order
            ids[torch.as_tensor(found.data['row'], dtype=torch.int64)] = torch.as_tensor(
                found.tracker_id, dtype=torch.int64
            )
        return {**output, 'track_ids': ids}
