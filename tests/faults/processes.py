"""The real tools in processes of their own, forked from one that has imported them, so that a start costs little."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from fake_clock import happens
from tool_runner import TOOLS, call_tool


def preload() -> None:
    """Import what the tools import, once."""
    sys.path.insert(0, str(TOOLS))
    os.environ['OMP_NUM_THREADS'] = '1'
    import torch

    torch.set_num_threads(1)
    import torch.utils.tensorboard


@dataclass
class Tool:
    """A running tool.

    Attributes:
        pid: of its process.
        log: file with all it printed.
        began: on `time.monotonic`.
    """

    pid: int
    log: Path
    began: float

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, limit_s: float = 300) -> int:
        """Its exit code, negative for a signal; a tool that does not end in time is killed and that is an error."""
        if not happens(self.ended, limit_s):
            self.send(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise AssertionError(f'the tool did not end: {self.text()[-2000:]}')
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def text(self) -> str:
        return self.log.read_text(errors='replace') if self.log.is_file() else ''

    def error(self) -> str:
        """The line that says what was wrong."""
        lines = [line for line in self.text().replace('\r', '\n').splitlines() if line.startswith('error:')]
        return lines[-1] if lines else ''


def start(name: str, arguments: list[object], log: Path, largest_file: int | None = None) -> Tool:
    """Start a tool of the toolkit.

    Args:
        name: `train_det.py`, ...
        arguments: of its command line.
        log: where its output goes.
        largest_file: bytes at which the disk is full.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return Tool(child, log, time.monotonic())
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = open(1, 'w', closefd=False)  # noqa: SIM115 (they live as long as the process)
        sys.stderr = open(2, 'w', buffering=1, closefd=False)  # noqa: SIM115
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(log.parent)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        try:
            code = call_tool(name, *arguments)
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    finally:
        os._exit(71)
