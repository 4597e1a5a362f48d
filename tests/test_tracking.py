"""Track numbers: steady along a path, one for each object, drawn; and what is said when they cannot be had."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch

from detection.demo.tracking import TRACKERS, Tracker
from detection.visual.draw import color_of, draw_detections


def _frame(*corners: tuple[float, float], scores: list[float] | None = None) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[x, y, x + 40, y + 60] for x, y in corners]).reshape(-1, 4)
    count = len(corners)
    return {'boxes': boxes, 'scores': torch.tensor(scores or [0.9] * count), 'labels': torch.ones(count).long()}


@pytest.mark.parametrize('name', TRACKERS)
def test_two_objects_keep_their_numbers(name: str) -> None:
    pytest.importorskip('trackers')
    tracker = Tracker(name, score=0.5)
    seen: list[list[int]] = []
    for t in range(12):  # one moves right, one left; every other frame lists them the other way round
        corners = [(10.0 + 5 * t, 20.0), (300.0 - 5 * t, 100.0)]
        output = tracker(_frame(*(corners if t % 2 == 0 else corners[::-1])))
        ids = output['track_ids'].tolist()
        seen.append(ids if t % 2 == 0 else ids[::-1])
    settled = seen[4:]
    assert all(row == settled[0] for row in settled)
    assert len(set(settled[0])) == 2 and min(settled[0]) >= 0


def test_an_empty_frame_and_a_return() -> None:
    pytest.importorskip('trackers')
    tracker = Tracker('bytetrack', score=0.3)
    before = [tracker(_frame((10, 20), scores=[0.4]))['track_ids'].tolist() for _ in range(4)][-1]
    assert tracker(_frame())['track_ids'].shape == (0,)
    after = tracker(_frame((12, 20), scores=[0.4]))['track_ids'].tolist()
    assert before == after != [-1]


def test_colour_and_caption_follow_the_track() -> None:
    image = np.zeros((200, 200, 3), np.uint8)
    output = {'boxes': torch.tensor([[20.0, 60, 120, 160]]), 'labels': torch.tensor([1]), 'scores': torch.tensor([0.9])}
    plain = draw_detections(image, output, ['', 'cat'])
    unsure = draw_detections(image, {**output, 'track_ids': torch.tensor([-1])}, ['', 'cat'])
    tracked = draw_detections(image, {**output, 'track_ids': torch.tensor([7])}, ['', 'cat'])
    assert np.array_equal(plain, unsure)
    for drawn, index in ((tracked, 7), (plain, 1)):  # the lower edge; its pixels are blended with the black around
        edge, wanted = drawn[160, 70] / 255, np.array(color_of(index)) / 255
        assert edge.sum() > 0.4 and np.allclose(edge / edge.sum(), wanted / wanted.sum(), atol=0.03)


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'kalman', expected one of bytetrack"):
        Tracker('kalman')
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name in ('trackers', 'supervision'):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ValueError, match=r'needs the extra track: pip install -e "\.\[track\]"'):
        Tracker('bytetrack')
