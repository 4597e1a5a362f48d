"""A release on GitHub: its list of files, and a file of it, downloaded once and checked ever after."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from norton_timm.checkpoints.download import cache_folder, digest_of, fetch, open_url
from norton_timm.utils import write_text

API_ENV = 'NORTON_TIMM_RELEASES'  # another server with GitHub's API, such as GitHub Enterprise or a mirror
TOKEN_ENV = 'GITHUB_TOKEN'
API = 'https://api.github.com'
_DAY = 24 * 3600
_MOST_BYTES = 16 << 20  # of a list; a hundred assets take a tenth of a megabyte


@dataclass(frozen=True)
class Asset:
    """A file of a release.

    Attributes:
        name: Its name on the page of the release.
        size: Bytes.
        url: Where it is downloaded.
        sha256: Hexadecimal digits, None for files that were uploaded before GitHub recorded any.
    """

    name: str
    size: int
    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class Release:
    """A release of a GitHub repository.

    Attributes:
        repository: `owner/name`. The owner may have been renamed since.
        tag: The tag of the release.

    Example:
        >>> release = Release('pvti/NORTON', 'v0.1.0')
        >>> [asset.name for asset in release.assets()]
    """

    repository: str
    tag: str

    @property
    def page(self) -> str:
        """The page for people."""
        return f'https://github.com/{self.repository}/releases/tag/{self.tag}'

    def folder(self, cache_dir: str | Path | None = None) -> Path:
        """The folder where files of this release are kept."""
        return cache_folder(cache_dir) / 'norton_timm' / f'{self.repository.replace("/", "--")}--{self.tag}'

    def assets(self, cache_dir: str | Path | None = None) -> list[Asset]:
        """The files of the release, asked of GitHub at most once a day.

        Raises:
            ConnectionError: The server cannot be reached, or does not answer with the list.
        """
        folder = self.folder(cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / 'assets.json'
        with FileLock(f'{kept}.lock'):
            found = _kept_list(kept)
            if found is None:
                found = _read_list(self._ask())
                values = {'asked': time.time(), 'assets': [asdict(asset) for asset in found]}
                write_text(kept, json.dumps(values, indent=1))
        return found

    def download(self, asset: Asset, cache_dir: str | Path | None = None) -> Path:
        """A file of the release.

        Its SHA-256 is recorded the first time, also beyond the file's own life; a file with another one is refused.

        Raises:
            ConnectionError: The server cannot be reached, or the transfer broke off; the next call resumes it.
            ValueError: Size or checksum differ from what GitHub or the record says.
        """
        folder = self.folder(cache_dir)
        record = folder / f'{asset.name}.sha256'
        known = record.read_text().strip() if record.is_file() else None
        if known and asset.sha256 and known != asset.sha256:
            raise ValueError(_changed(asset.name, asset.sha256, known, record))
        path = fetch(asset.url, folder / 'files', size=asset.size, sha256=asset.sha256)
        found = digest_of(path)
        if known and found != known:
            path.unlink()
            raise ValueError(_changed(asset.name, found, known, record))
        if not known:
            write_text(record, found + '\n')
        return path

    def _ask(self) -> bytes:
        url = f'{os.environ.get(API_ENV, API).rstrip("/")}/repos/{self.repository}/releases/tags/{self.tag}'
        headers = {'Accept': 'application/vnd.github+json'}
        if os.environ.get(TOKEN_ENV):
            headers['Authorization'] = f'Bearer {os.environ[TOKEN_ENV]}'
        try:
            with open_url(url, headers) as response:
                return response.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            raise ConnectionError(f'{url}: {_refusal(error)}') from None
        except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's URLError is an OSError
            raise ConnectionError(f'{url} cannot be reached ({getattr(error, "reason", error)})') from None


def _refusal(error: urllib.error.HTTPError) -> str:
    """Why the server refuses, and what to do."""
    with error:
        left, until = error.headers.get('X-RateLimit-Remaining'), error.headers.get('X-RateLimit-Reset') or ''
    if error.code in (403, 429) and (left == '0' or error.code == 429):
        when = f' until {datetime.fromtimestamp(int(until), timezone.utc):%H:%M} UTC' if until.isdecimal() else ''
        return (
            f'the limit of requests an hour is reached{when} (60 without a token): set {TOKEN_ENV} to a token of a '
            'GitHub account, or wait'
        )
    if error.code == 401:
        return f'the token in {TOKEN_ENV} is refused: unset it, or set a valid one'
    if error.code == 404:
        return 'there is no such release (404)'
    return f'the server answered {error.code} {error.reason}'


def _kept_list(path: Path) -> list[Asset] | None:
    """The list that was kept; None where there is none of the last day."""
    try:
        values = json.loads(path.read_text(encoding='utf-8'))
        if not 0 <= time.time() - values['asked'] < _DAY:
            return None
        return [Asset(**row) for row in values['assets']]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _read_list(answer: bytes) -> list[Asset]:
    """The files in an answer of the API; what is not a plain file name is left out."""
    try:
        rows: list[dict[str, Any]] = json.loads(answer)['assets']
        found = []
        for row in rows:
            algorithm, _, digits = (row.get('digest') or '').partition(':')
            name = str(row['name'])
            if name == Path(name).name and name not in ('.', '..') and '\0' not in name:
                digest = digits.lower() if algorithm == 'sha256' and digits else None
                found.append(Asset(name, int(row['size']), str(row['browser_download_url']), digest))
        return found
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ConnectionError('the server answered with something else than the list of a release') from None


def _changed(name: str, found: str, known: str, record: Path) -> str:
    return (
        f'{name}: the SHA-256 is {found}, but was {known} before: the released file has changed. '
        f'Remove {record} to take the new one'
    )
