"""What the README shows is what the project does: its table, and its Python blocks, run in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tool_runner import ROOT

from norton_timm.studies.zoo import to_markdown, zoo_names, zoo_rows

README = (ROOT / 'README.md').read_text()


def test_zoo_table():
    table = to_markdown(list(zoo_rows(zoo_names([]), False, 1)), ['name', 'rank', 'params', 'macs', 'top1'])
    assert table.strip() in README


@pytest.mark.parametrize('options', [[], ['--accuracy']])
def test_results_table(options: list[str], tool):
    code, out, err = tool('results_table.py', *options)
    assert code == 0, err
    assert out.strip() and out in README


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'```python\n(.*?)```', README, re.S)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)  # our own text
    assert (tmp_path / 'small.safetensors').is_file()
