"""Runs the scripts of tools/: in this process, which saves the seconds of a start, or in one of their own.

A process of its own is for what needs one: signals, torchrun, an environment that is read at the start.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'tools'
LIMIT_S = 280.0  # a safety net: less than that of a test


class Done(NamedTuple):
    """What a tool that ended leaves.

    Attributes:
        code: exit code, negative for a signal.
        out: what it printed on stdout.
        err: what it printed on stderr.
    """

    code: int
    out: str
    err: str

    def error_lines(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.err.splitlines() if line.startswith('error:')]


# in this process


def run_tool(name: str, *arguments: object) -> Done:
    """Run a tool in this process, which is as before afterwards; an error that it does not handle is raised.

    Args:
        name: `train_det.py`, ...
        *arguments: of its command line.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _as_before():
        code = call_tool(name, *arguments)
    return Done(code, out.getvalue(), err.getvalue())


def call_tool(name: str, *arguments: object) -> int:
    """Run a tool in this process as Python runs a script; returns its exit code."""
    argv, sys.argv = sys.argv, [str(TOOLS / name), *map(str, arguments)]
    sys.path.insert(0, str(TOOLS))
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = argv
        sys.path.remove(str(TOOLS))
    return 0


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Undo what a tool sets for its process: threads, the grad mode, logging, what signals do."""
    root, packages = logging.getLogger(), [logging.getLogger(name) for name in ('norton_timm', 'detection')]
    loggers = [(logger, logger.level) for logger in (root, *packages)]
    # pytest's handlers are kept apart: a root logger that has some is not set up by a tool
    handlers, root.handlers = root.handlers, []
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with torch.enable_grad():  # what it is inside this block is the tool's matter
            yield
    finally:
        for number, handler in signals.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
        root.handlers = handlers
        for logger, level in loggers:
            logger.setLevel(level)


# in a process of its own


def torchrun(processes: int) -> list[str]:
    """What stands before the script where torchrun starts it in so many processes; a `launcher`."""
    return ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}']


def start_tool(name: str, *arguments: object, launcher: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
    """Start a tool in a process of its own.

    Args:
        name: `train_det.py`, ...
        *arguments: of its command line.
        launcher: arguments of Python before the script, see `torchrun`.
        **options: as for `start_python`.
    """
    return start_python(*launcher, TOOLS / name, *arguments, **options)


def start_python(*arguments: object, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start Python with these packages on its path and one thread, its output in pipes.

    Args:
        *arguments: of Python.
        env: variables beside those of this process.
        **options: of `subprocess.Popen`.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', **(env or {})}, text=True,
        # a shell starts background jobs, such as this test run may be one, with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **options},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], limit_s: float = LIMIT_S) -> Done:
    """Wait for the end of a process; one that does not end is killed, and that is an error."""
    with process:
        try:
            out, err = process.communicate(timeout=limit_s)
        except BaseException:
            process.kill()
            raise
    return Done(process.returncode, out or '', err or '')


def run_process(name: str, *arguments: object, **options: Any) -> Done:
    """Run a tool in a process of its own to its end; see `start_tool`."""
    return finish(start_tool(name, *arguments, **options))


def run_python(*arguments: object, limit_s: float = LIMIT_S, **options: Any) -> Done:
    """Run Python to its end; see `start_python`."""
    return finish(start_python(*arguments, **options), limit_s)
