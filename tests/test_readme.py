"""What the README shows is what the project does: its table, and its Python blocks, run in order."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from norton_timm.studies.zoo import to_markdown, zoo_names, zoo_rows

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()


def test_zoo_table():
    table = to_markdown(list(zoo_rows(zoo_names([]), False, 1)), ['name', 'rank', 'params', 'macs', 'top1'])
    assert table.strip() in README


@pytest.mark.parametrize('options', [[], ['--accuracy']])
def test_results_table(options: list[str]):
    command = [sys.executable, str(ROOT / 'tools' / 'results_table.py'), *options]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout in README


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'```python\n(.*?)```', README, re.S)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)  # our own text
    assert (tmp_path / 'small.safetensors').is_file()
