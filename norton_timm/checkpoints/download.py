"""Downloads: resumed after an interruption, checked by size and SHA-256, and put in place whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch.hub import get_dir
from tqdm import tqdm

ENV = 'NORTON_TIMM_WEIGHTS'
_CHUNK = 1 << 20


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder where downloads are kept: `cache_dir`, by default the one of torch's hub."""
    return Path(cache_dir) if cache_dir else Path(get_dir()) / 'checkpoints'


def fetch(
    url: str,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    size: int | None = None,
    sha256: str | None = None,
) -> Path:
    """Downloads a file once: resumed after an interruption, checked, and put in place atomically.

    The SHA-256 is also checked where the URL gives it, as `#sha256=<hex>` or as torch's file names do
    (`name-1a2b3c4d.pth`).

    Args:
        url: An http, https or file URL.
        cache_dir: Where the file is kept; torch's hub directory by default.
        progress: Show a progress bar.
        size: Bytes that the file must have.
        sha256: Hexadecimal digits of the checksum that the file must have.

    Returns:
        The file. For a file URL the original, which is not copied.

    Raises:
        ValueError: The URL has another scheme, names no file, or size or checksum differ.
        ConnectionError: The server cannot be reached or the transfer broke off; the next call resumes it.

    Example:
        >>> path = fetch('https://example.org/weights.safetensors', sha256='1a2b...')
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == 'file':
        return existing(urllib.request.url2pathname(parts.path))
    if parts.scheme not in ('http', 'https'):
        raise ValueError(f'url is {url!r}, expected http://, https:// or file://')
    name = Path(urllib.parse.unquote(parts.path)).name
    if not name or name == '..' or '\0' in name or len(name) > 200:
        raise ValueError(f'url is {url[:200]!r}, expected one that ends in a file name')
    folder = cache_folder(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    expected = sha256.lower() if sha256 else _expected_hash(parts.fragment, name)
    with FileLock(f'{target}.lock'):  # several processes of one training start at once
        fits = target.is_file() and size in (None, target.stat().st_size)
        if fits and (expected is None or digest_of(target).startswith(expected)):
            return target
        partial = target.with_name(target.name + '.part')
        _download(urllib.parse.urldefrag(url).url, partial, progress, size)
        actual = '' if expected is None else digest_of(partial)
        if expected is not None and not actual.startswith(expected):
            partial.unlink()
            raise ValueError(f'{url}: the SHA-256 is {actual}, expected {expected}; the download was removed')
        os.replace(partial, target)
    return target


def existing(path: str) -> Path:
    """The path of a file that is there.

    Raises:
        ValueError: There is none.
    """
    found = Path(path).expanduser()
    if not found.is_file():
        raise ValueError(f'weights file {str(found)!r} does not exist')
    return found


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def open_url(url: str, headers: dict[str, str], timeout: float = 30) -> Any:
    """Opens an http or https URL; redirects are followed, except to other schemes or from https to http."""
    opener = urllib.request.build_opener(_WebOnly)
    return opener.open(urllib.request.Request(url, headers={'User-Agent': 'norton-timm', **headers}), timeout=timeout)


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, never from https to http; urllib would also go on to ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = (urllib.parse.urlsplit(u) for u in (req.full_url, newurl))
        if new.scheme not in ('http', 'https') or (old.scheme == 'https' and new.scheme != 'https'):
            raise urllib.error.URLError(f'it is redirected from {old.scheme} to {new.scheme}, expected https')
        request = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        if request is not None and new.netloc != old.netloc:  # a token is for the server that it was meant for
            request.remove_header('Authorization')
        return request

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 does not follow it


def _expected_hash(fragment: str, name: str) -> str | None:
    if fragment:
        match = re.fullmatch(r'sha256=([0-9a-fA-F]{8,64})', fragment)
        if match is None:
            raise ValueError(f'url fragment is {fragment!r}, expected sha256=<8 to 64 hexadecimal digits>')
        return match[1].lower()
    match = re.search(r'-([0-9a-f]{8,64})\.', name)
    return match[1] if match and re.search('[a-f]', match[1]) else None  # digits alone may be a date


def _download(url: str, partial: Path, progress: bool, size: int | None) -> None:
    """Appends to `partial` what is missing of `url`; starts again where the server's file has changed."""
    stamp = partial.with_name(partial.name + '.version')
    start = partial.stat().st_size if partial.is_file() and stamp.is_file() else 0
    headers = {'Range': f'bytes={start}-', 'If-Range': stamp.read_text()} if start else {}
    try:
        with open_url(url, headers) as response:
            start = start if response.status == 206 else 0
            length = response.headers.get('Content-Length')
            total = start + int(length) if length else None
            if size is not None and total not in (None, size):
                _remove(partial, stamp)
                raise ValueError(f'{url}: the server has {total} bytes, expected {size}; nothing was kept')
            version = response.headers.get('ETag') or response.headers.get('Last-Modified')
            if version and not version.startswith('W/'):
                stamp.write_text(version)
            bar = tqdm(total=total, initial=start, unit='B', unit_scale=True, desc=partial.stem, disable=not progress)
            with bar, partial.open('ab' if start else 'wb') as file:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # the partial file is complete, but perhaps of another version: begin anew
            partial.unlink(missing_ok=True)
            return _download(url, partial, progress, size)
        raise ConnectionError(f'{url}: the server answered {error.code} {error.reason}') from error
    except (OSError, http.client.HTTPException) as error:  # urllib's URLError is an OSError
        reason = getattr(error, 'reason', error)
        raise ConnectionError(
            f'{url} cannot be reached ({reason}); offline, put the file into ${ENV} instead'
        ) from error
    got = partial.stat().st_size
    if total is not None and got < total:
        raise ConnectionError(f'{url}: the transfer broke off after {got} of {total} bytes; call again to resume')
    if size not in (None, got) or total not in (None, got):
        _remove(partial, stamp)
        raise ValueError(f'{url}: got {got} bytes, expected {size or total}; the download was removed')
    stamp.unlink(missing_ok=True)


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
