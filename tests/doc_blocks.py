"""The fenced blocks of a Markdown page: read, run in order in one folder, compared with the output that is shown.

A comment before a block says what is special about it: `<!-- slow -->`, `<!-- ci: NAME -->` (run by .ci/run) or
`<!-- not run: REASON -->`. What a block prints stands after it: a `text` block with the title Output, an `output` block
with the title Error.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tool_runner import run_tool

TRAINING = 'python tools/train_det.py --task keypoint'  # minutes: several pages begin with it
_FENCE = re.compile(r'^```(\w+)([^\n]*)\n(.*?)^```$', re.S | re.M)
_NUMBER = re.compile(r'[-+]?(\d[\d,]*(\.\d+)?(e[-+]?\d+)?|\bnan\b)')


@dataclass
class Block:
    """One block that can be run, and what the page says of it."""

    language: str
    text: str
    line: int
    slow: bool = False
    skipped: str = ''
    output: str | None = None
    error: str | None = None


def read_blocks(markdown: str) -> list[Block]:
    """The Python and bash blocks of a page, with the outputs that are shown for them."""
    blocks: list[Block] = []
    for match in _FENCE.finditer(markdown):
        language, info, text = match.groups()
        if language in ('text', 'output') and (kind := re.search(r'title="(Output|Error)"', info)):
            assert blocks, f'an {kind[1]} block without a block before it'
            setattr(blocks[-1], kind[1].lower(), text)
        if language not in ('python', 'bash'):
            continue
        before = markdown[: match.start()].rstrip().rpartition('\n')[2]
        reason = re.fullmatch(r'<!-- (?:not run|ci): (.+?) -->', before)
        line = markdown[: match.start()].count('\n') + 1
        blocks.append(Block(language, text, line, before == '<!-- slow -->', reason[1] if reason else ''))
    return blocks


class Runner:
    """Runs the blocks of one page: Python ones share their names, tools run in this process, the rest in bash.

    What `TRAINING` wrote for the first page is kept in the folder `trained`, and copied for the pages after it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
        self.names: dict[str, object] = {}
        self.monkeypatch, self.trained = monkeypatch, trained

    def run(self, block: Block) -> None:
        """Run a block and compare; an assertion tells what differs."""
        if block.language == 'python':
            code, out, err = self._python(block.text)
        else:
            commands = [line for line in block.text.replace('\\\n', ' ').splitlines() if line.strip()]
            inside = all(re.match(r'(\w+=\S+ )*python tools/', line) for line in commands)
            code, out, err = self._tools(commands) if inside else self._bash(block.text)
        assert code == (2 if block.error is not None else 0), f'{block.text}\nexit code {code}\n{out}{err}'
        if block.output is not None:
            assert same(block.output, out), f'{block.text}\nthe page shows\n{block.output}\nbut it prints\n{out}'
        if block.error is not None:
            told = '\n'.join(line for line in err.splitlines() if line.startswith('error:'))
            assert same(block.error, told), f'{block.text}\nthe page shows\n{block.error}\nbut it prints\n{err}'

    def _python(self, text: str) -> tuple[int, str, str]:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(text, 'block', 'exec'), self.names)  # our own text
        return 0, out.getvalue(), ''

    def _tools(self, commands: list[str]) -> tuple[int, str, str]:
        code, out, err = 0, '', ''
        for command in commands:
            if command == TRAINING and self.trained.is_dir():
                shutil.copytree(self.trained, 'runs/keypoint')
                continue
            words = shlex.split(command, comments=True)
            with self.monkeypatch.context() as patch:
                while '=' in words[0]:
                    patch.setenv(*words.pop(0).split('=', 1))
                done = run_tool(words[1].removeprefix('tools/'), *words[2:])
            code, out, err = done.code, out + done.out, err + done.err
            if code:
                break
            if command == TRAINING:
                shutil.copytree('runs/keypoint', self.trained)
        return code, out, err

    def _bash(self, text: str) -> tuple[int, str, str]:
        environment = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
        done = subprocess.run(
            ['bash', '-euo', 'pipefail', '-c', text], capture_output=True, text=True, env=environment
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr


def same(shown: str, printed: str) -> bool:
    """Whether the output is what is shown, numbers and the widths of columns aside; `...` stands for anything."""
    rows = (re.escape(line).replace(re.escape('...'), '.*') + '\n' for line in _lines(shown))
    pattern = ''.join('(?:.*\n)*' if row == '.*\n' else row for row in rows)
    return re.fullmatch(pattern, ''.join(f'{line}\n' for line in _lines(printed))) is not None


def _lines(text: str) -> list[str]:
    lines = (re.sub(r'\s+', ' ', _NUMBER.sub('#', line)).strip() for line in text.splitlines())
    return [line for line in lines if line]
