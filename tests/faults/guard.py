"""Judges what one input did: handled, refused with one line, or a defect (traceback, hang, memory, write, code)."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tool_runner import ROOT

LIMIT_S = 10.0  # an input that takes longer hangs
LIMIT_BYTES = 2 * 2**30  # more memory than this for one small file is a blow-up
# what tools turn into one line and an exit code
REFUSALS = (ValueError, FloatingPointError, OSError)
_RUNS = ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.startfile', 'pty.spawn')
_NETWORK = ('socket.connect', 'socket.getaddrinfo', 'socket.bind', 'urllib.Request')
_CHANGES = ('os.remove', 'os.rename', 'os.mkdir', 'os.rmdir', 'os.symlink', 'os.link', 'os.chmod', 'os.truncate')


class Hang(BaseException):
    """An input took longer than the limit; no `except Exception` may swallow it."""


@dataclass(frozen=True)
class Verdict:
    """What came of one input.

    Attributes:
        outcome: `handled`, `refused`, or the kind of defect: `traceback`, `hang`, `memory`, `write`, `code`,
            `network`, `died`.
        where: the innermost line of ours, and the error's type.
        detail: the error's text.
    """

    outcome: str
    where: str = ''
    detail: str = ''

    @property
    def defect(self) -> bool:
        return self.outcome not in ('handled', 'refused')


class Watch:
    """An audit hook (there is no way to remove one) that notes forbidden acts while an input runs."""

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.acts: list[tuple[str, str]] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in _RUNS:
            self.acts.append(('code', f'{event} {arguments!r}'[:300]))
        elif event in _NETWORK:
            self.acts.append(('network', f'{event} {arguments!r}'[:300]))
        elif event == 'open':
            path, mode, flags = arguments
            writes = isinstance(mode, str) and set(mode) & set('wax+')
            writes = writes or (mode is None and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))
            if writes:
                self._changed(event, path)
        elif event in _CHANGES:
            for path in arguments[
                event in ('os.symlink', 'os.link') : 2 if 'link' in event or event == 'os.rename' else 1
            ]:
                self._changed(event, path)

    def _changed(self, event: str, path: Any) -> None:
        if isinstance(path, int) or self.allowed is None:
            return
        allowed, self.allowed = self.allowed, None  # resolving a path must not be heard
        try:
            full = Path(os.path.realpath(os.fsdecode(path)))
            inside = full.is_relative_to(allowed) or full == Path(os.devnull) or full.suffix == '.pyc'
            if not inside and '__pycache__' not in full.parts:
                self.acts.append(('write', f'{event} {full}'))
        except ValueError:
            pass
        finally:
            self.allowed = allowed


_watch: Watch | None = None


def limit_memory() -> None:
    """Bound this process's address space, so that a blow-up is a MemoryError and not the end of the machine."""
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    most = pages * resource.getpagesize() + 2 * LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def judge(call: Callable[[], object], folder: Path, limit_s: float = LIMIT_S) -> Verdict:
    """Run one input.

    Args:
        call: what is done with it.
        folder: the only place where it may write.
        limit_s: wall-clock seconds after which it hangs.
    """
    global _watch
    _watch = _watch or Watch()
    canary = folder / 'canary'
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, _hang)
    _watch.acts, _watch.allowed = [], folder.resolve()
    tempfile.tempdir = str(folder)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    verdict = Verdict('handled')
    try:
        call()
    except REFUSALS as error:
        verdict = Verdict('refused', *_told(error)) if str(error).strip() else Verdict('traceback', *_told(error))
    except Hang as error:
        verdict = Verdict('hang', *_told(error))
    except MemoryError as error:
        verdict = Verdict('memory', *_told(error))
    except (Exception, SystemExit) as error:
        verdict = Verdict('traceback', *_told(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _watch.allowed = None
        tempfile.tempdir = None
    if _watch.acts:
        return Verdict(_watch.acts[0][0], verdict.where, _watch.acts[0][1])
    if canary.exists():
        canary.unlink()
        return Verdict('code', verdict.where, 'the canary was written')
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > LIMIT_BYTES and not verdict.defect:
        return Verdict('memory', verdict.where, f'grew by {grown >> 20} MiB')
    return verdict


def _hang(signum: int, frame: object) -> None:
    raise Hang(f'more than {LIMIT_S} s')


def _ours(path: Path) -> bool:
    return path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / 'tests')


def _told(error: BaseException) -> tuple[str, str]:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if _ours(Path(f.filename))]
    frame = (ours or frames)[-1] if frames else None
    place = f'{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.name}' if frame else '?'
    return f'{place} {type(error).__name__}', ' '.join(str(error).split())[:200]
