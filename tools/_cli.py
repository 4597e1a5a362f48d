"""Helpers of the command-line tools: a parser, errors on one line, exit codes, and signals.

A tool imports this module first: from then on Ctrl-C ends it with one line, also in the seconds of its imports.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

_WRONG_FILES = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_WRONG_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_LONGEST = 2000  # characters of an error
USAGE, FAILURE, INTERRUPTED, TERMINATED = 2, 1, 130, 143
_OUTPUTS = ('output', 'json', 'report', 'markdown', 'csv', 'detections')  # options that name what is written
_TOOLS = str(Path(__file__).resolve().parent)


class Terminated(KeyboardInterrupt):
    """The process was asked to end; code that handles Ctrl-C handles this too.

    Its text is never empty, so that such code can tell the two apart. Arguments are advice on how to go on.
    """

    def __str__(self) -> str:
        return 'terminated'


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, which holds commands to copy, and shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; the defaults are in the help."""

    def __init__(self, description: str | None = None) -> None:
        super().__init__(description=description, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and a message."""
        fail(f'{message} (see --help)', USAGE)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; a file that one of them names to be read is not one to be written."""
        parsed = super().parse_args(args, namespace)
        _keep_inputs({name: value for name, value in vars(parsed).items() if value is not None})
        return parsed


def _keep_inputs(options: dict[str, Any]) -> None:
    """End with one line where a file to be written is read as well, or written twice."""
    read = [v for name in set(options) - set(_OUTPUTS) for v in _paths(options[name]) if _is_file(v)]
    written: list[tuple[str, Path]] = []
    for option in _OUTPUTS:
        for path in _paths(options.get(option)):
            if any(os.path.abspath(path) == os.path.abspath(other) for _, other in written):
                fail(f'{path} would be written twice: choose another --{option}', USAGE)
            written.append((option, path))
    for option, path in written:
        for file in {path, path.with_suffix('.png')} if path.suffix == '.json' else {path}:  # with a picture beside
            if _is_file(file) and any(file.samefile(other) for other in read):
                fail(f'{file} is read and would be overwritten: choose another --{option}', USAGE)


def _paths(value: Any) -> list[Path]:
    values = value if isinstance(value, list) else [value]
    return [Path(v) for v in values if isinstance(v, (str, Path))]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # an argument that is too long for a path
        return False


def fail(message: object, code: int) -> NoReturn:
    """Print one line on stderr and exit."""
    text = str(message)
    # an error in a loading process arrives with that process's whole traceback; its last line is the message
    if 'DataLoader worker process' in text:
        text = re.sub(r'^\w+(\.\w+)*: ', '', text.strip().splitlines()[-1])
    text = ' '.join(text.split())
    print(f'error: {text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."}', file=sys.stderr)
    sys.exit(code)


def _lost_process(error: RuntimeError) -> bool:
    """Whether a collective operation failed because a process of a torchrun job is gone."""
    return 'WORLD_SIZE' in os.environ and ('Dist' in type(error).__name__ or 'gloo' in str(error))


def _terminate(signum: int, frame: object) -> NoReturn:
    raise Terminated


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Raise KeyboardInterrupt as Python does, but end at once where a tool is only importing.

    Nothing is lost there, and an exception would get lost: packages catch it, or make an ImportError of it.
    """
    if _importing(frame):
        os.write(2, b'error: interrupted\n')
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    """Whether an `import` in a file of this folder is being carried out."""
    inside = False
    while frame is not None:
        name = frame.f_code.co_filename
        if inside and os.path.abspath(name).startswith(_TOOLS):
            return True
        inside = name.startswith('<frozen importlib')
        frame = frame.f_back
    return False


def _heed_interrupts() -> None:
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs ignore it
        signal.signal(signal.SIGINT, _interrupt)


_heed_interrupts()


@contextlib.contextmanager
def when_stopped(advice: Callable[[], str]) -> Iterator[None]:
    """A block in which Ctrl-C and SIGTERM end the tool with this advice on how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.args += (advice(),)
        raise


def run(main: Callable[[], None]) -> None:
    """Call a tool's main function; wrong arguments or files end with one line and code 2, a failed run with code 1."""
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    for package in ('norton_timm', 'detection'):
        logging.getLogger(package).setLevel(logging.INFO)
    _heed_interrupts()
    before = signal.signal(signal.SIGTERM, _terminate) or signal.SIG_DFL
    try:
        main()
    except (ValueError, *_WRONG_FILES) as error:
        fail(error, USAGE)
    except OSError as error:
        fail(error, USAGE if error.errno in _WRONG_NAMES else FAILURE)
    except (FloatingPointError, MemoryError) as error:
        fail(str(error) or 'out of memory', FAILURE)
    except RuntimeError as error:
        if not _lost_process(error):
            raise
        fail(f'another process of this run ended: {error}', FAILURE)
    except Terminated as stop:
        fail('; '.join(('terminated', *stop.args)), TERMINATED)
    except KeyboardInterrupt as stop:
        fail('; '.join(('interrupted', *stop.args)), INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)
