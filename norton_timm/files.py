"""Files that are written whole or not at all."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder that becomes ``path`` when the block ends well."""
    handle, name = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, 'rb') as file:
            os.fsync(file.fileno())  # a name that survives a power cut should not outlive its content
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def remove_partial(path: Path) -> None:
    """Remove what killed processes had begun to write in place of a file, or of the checkpoints in a folder."""
    pattern = '.*.pt.*' if path.is_dir() else f'.{glob.escape(path.name)}.*'
    for partial in (path if path.is_dir() else path.parent).glob(pattern):
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file whole or not at all, in a folder that is made if there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding='utf-8')
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
