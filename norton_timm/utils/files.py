"""Safe files: written whole or not at all, pickles that are read without running code, and checks of output paths."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from norton_timm.utils.processes import undisturbed

_RATIO = 1.1  # torch stores tensors uncompressed; a compressed archive may unpack to a thousand times its size


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
    """Remove the temporary files that killed processes left: of one file, or of the checkpoints in a folder."""
    pattern = '.*.pt.*' if path.is_dir() else f'.{glob.escape(path.name)}.*'
    for partial in (path if path.is_dir() else path.parent).glob(pattern):
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file whole or not at all; a missing folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding='utf-8')
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_plain(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """Load what `torch.save` wrote, on the CPU, without running code from the file.

    Args:
        path: the file.
        allowed: classes besides torch's own that a file may hold; none of them may run code when it is built.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is damaged, would run code, or unpacks to more than its size.
    """
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint file {path}')
    try:
        size = path.stat().st_size
        _check_archive(path, size)
        known = torch.serialization.safe_globals(list(allowed)) if allowed else contextlib.nullcontext()
        with undisturbed(), known:
            content = torch.load(path, map_location='cpu', weights_only=True)
        _check_tensors(content, size)
    except OSError as error:
        raise ValueError(f'{path} is not a checkpoint that can be read: {error.strerror or error}') from None
    # a damaged pickle can make the unpickler raise any error
    except Exception as error:
        told = (' '.join(str(error).split()) or type(error).__name__)[:300]
        raise ValueError(f'{path} is not a checkpoint that can be read with weights_only=True: {told}') from None
    return content


def write_plain(path: Path, content: Any) -> None:
    """Call `torch.save`; its failure is raised as an OSError that tells the cause, such as a full disk.

    Raises:
        OSError: it could not be written.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's writer does not say why
        with path.open('ab') as file:  # the disk itself does
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
        raise OSError(errno.EIO, f'could not be written: {" ".join(str(error).split())[:200]}', str(path)) from None


def _check_archive(path: Path, size: int) -> None:
    """Check every part of torch's archive by its checksum, which torch ignores; files in the old format have none."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if sum(part.file_size for part in parts) > _RATIO * size:
            raise ValueError('its parts unpack to more than the file holds')
        for part in parts:
            with archive.open(part) as stream:
                while stream.read(2**20):  # to its end, where its checksum is compared
                    pass


def _check_tensors(content: Any, size: int) -> None:
    """Refuse tensors with more numbers than the file can hold, such as views with a stride of 0."""
    seen, todo = set(), [content]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > _RATIO * size:
                raise ValueError(f'a tensor of shape {tuple(value.shape)} in a file of {size:,} bytes')
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            todo += value.values() if isinstance(value, dict) else value


def check_not_written(read: Sequence[str | os.PathLike[str] | None], folder: Path, names: Sequence[str]) -> None:
    """Check that a run does not write over a file that it reads.

    Args:
        read: files; None and names of files that are not there are left out.
        folder: of the run.
        names: of the files that the run writes, or patterns.

    Raises:
        ValueError: one of the files is one of those.
    """
    for path in (Path(name) for name in read if name):
        written = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in names)
        if written and path.is_file() and path.resolve().parent == folder.resolve():
            raise ValueError(f'{path} is read and would be overwritten by a run in {folder}: choose another folder')


def check_output(path: str | os.PathLike[str], *suffixes: str) -> Path:
    """Check that a file can be written at this path, and return the path.

    Raises:
        ValueError: the ending is none of ``suffixes``, the path is a folder, or its folder does not exist or cannot be
            written to.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f'got {str(path)!r}, expected a name that ends in {" or ".join(suffixes)}')
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f'got {str(path)!r}, expected a file in a folder that exists and can be written')
    return path
