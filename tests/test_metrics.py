"""Rows of metrics: what is dropped on resume, and what TensorBoard gets."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch

from norton_timm.profiling.memory import process_peak, reset_process_peak
from norton_timm.training.metrics import MetricsWriter


def rows(folder: Path) -> list[int]:
    return [json.loads(line)['iteration'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_resume_drops_later_rows_and_half_lines(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        writer.write({'iteration': step, 'loss': 1.0})
    with writer.path.open('a') as file:
        file.write('{"iteration": 2, "results": {"bbox": {}}')
    MetricsWriter(tmp_path, 2, tensorboard=False).write({'iteration': 3, 'loss': 2.0})
    assert rows(tmp_path) == [1, 2, 3]
    assert not (tmp_path / 'tensorboard').exists()
    MetricsWriter(tmp_path, tensorboard=False).write({'iteration': 1})
    assert rows(tmp_path) == [1]


def test_runs_in_one_folder_leave_each_other_alone(tmp_path: Path) -> None:
    for run in ('shot1', 'checkpoint'):
        writer = MetricsWriter(tmp_path, tensorboard=False, step='epoch', run=run)
        for epoch in (1, 2):
            writer.write({'epoch': epoch, 'loss': 1.0})
    MetricsWriter(tmp_path, 1, tensorboard=False, step='epoch', run='checkpoint')
    found = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [(row['run'], row['epoch']) for row in found] == [('shot1', 1), ('shot1', 2), ('checkpoint', 1)]


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write({'iteration': step, 'loss': step / 2})
    writer.close()
    writer = MetricsWriter(tmp_path, 2)  # goes on after step 2
    writer.write({'iteration': 3, 'loss': 9.0})
    writer.write({'iteration': 3, 'results': {'bbox': {'AP': 0.25}}})
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    assert [(e.step, e.value) for e in events.Scalars('loss')] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert [(e.step, e.value) for e in events.Scalars('results/bbox/AP')] == [(3, 0.25)]
    assert set(events.Tags()['scalars']) == {'loss', 'results/bbox/AP'}


@pytest.mark.parametrize(('asked', 'lines'), [(True, 1), (None, 0), (False, 0)])
def test_without_tensorboard_only_who_asks_for_it_is_told(
    asked: bool | None, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with caplog.at_level(logging.INFO):
        writer = MetricsWriter(tmp_path, tensorboard=asked)
        writer.write({'iteration': 1, 'loss': 1.0})
        writer.write({'iteration': 2, 'loss': 1.0})
        writer.close()
    assert len([r for r in caplog.records if 'tensorboard' in r.message]) == lines
    assert rows(tmp_path) == [1, 2]
    assert not (tmp_path / 'tensorboard').exists()


def test_peak_memory_rises_with_what_is_held() -> None:
    before = process_peak(torch.device('cpu'))
    held = torch.ones(before // 4 + 32 * 2**20, dtype=torch.float32)  # more than was ever held, and 128 MiB
    assert process_peak(torch.device('cpu')) >= before + 100 * 2**20
    assert held[-1] == 1


def test_peak_memory_counts_anew() -> None:
    if not reset_process_peak():
        pytest.skip('this system does not let a process count anew')
    before = process_peak(torch.device('cpu'))
    held = torch.ones(32 * 2**20)  # 128 MiB
    assert process_peak(torch.device('cpu')) >= before + 100 * 2**20 and held[-1] == 1
    del held
    assert reset_process_peak() and process_peak(torch.device('cpu')) < before + 64 * 2**20
