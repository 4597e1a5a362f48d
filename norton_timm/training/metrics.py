"""Metrics of a run: rows in `metrics.jsonl`, and the same figures for TensorBoard if it is installed."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from norton_timm.utils import write_text

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends rows to `metrics.jsonl`, which stays readable whatever happens to the process, and to TensorBoard.

    Args:
        folder: where `metrics.jsonl` and the folder `tensorboard` go.
        done: steps done so far. Rows of later steps, which the checkpoint does not cover, are dropped, because they
            will be written again; 0 begins anew.
        tensorboard: write for TensorBoard; None: only if it is installed. True without it logs a warning.
        step: the key of a row that counts the steps.
        run: name of this run where several write to one folder; each row carries it, and rows of others are left.
    """

    def __init__(
        self,
        folder: str | Path,
        done: int = 0,
        tensorboard: bool | None = None,
        *,
        step: str = 'iteration',
        run: str | None = None,
    ) -> None:
        self.path, self.step, self.run = Path(folder) / 'metrics.jsonl', step, run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            lines = self.path.read_text(encoding='utf-8').splitlines()
            write_text(self.path, ''.join(line + '\n' for line in lines if self._stays(line, done)))
        self.board: Any = None
        installed = importlib.util.find_spec('tensorboard') is not None
        if tensorboard and not installed:
            log.warning(
                'tensorboard is set, but not installed (pip install tensorboard): only metrics.jsonl is written'
            )
        if installed and tensorboard is not False:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.path.parent / 'tensorboard' / (run or '')), purge_step=done + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row: numbers or nested mappings of numbers, among them the step."""
        named = row if self.run is None else {'run': self.run, **row}
        with self.path.open('a', encoding='utf-8') as file:
            file.write(json.dumps(named) + '\n')
        if self.board is not None:
            for name, value in _scalars(row):
                if name != self.step:
                    self.board.add_scalar(name, value, row[self.step])

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self.board is not None:
            self.board.close()

    def _stays(self, line: str, done: int) -> bool:
        try:
            row = json.loads(line)
            return row.get('run') != self.run or row[self.step] <= done
        except (ValueError, AttributeError, KeyError, TypeError):  # a killed process may leave half a line
            return False


def _scalars(row: Mapping[str, Any], where: str = '') -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f'{where}{name}/')
        else:
            yield where + name, float(value)
