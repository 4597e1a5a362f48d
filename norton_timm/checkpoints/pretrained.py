"""Finds and downloads pretrained weights: in the user's own directory, the package, or the tag's `pretrained_cfg`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch.hub import get_dir
from tqdm import tqdm

from norton_timm.checkpoints.recipe import Recipe
from norton_timm.checkpoints.shapes import dense_name

log = logging.getLogger(__name__)

ENV = 'NORTON_TIMM_WEIGHTS'
EXTENSIONS = ('.safetensors', '.pth', '.pt', '.pth.tar', '.bin')
SHIPPED = Path(__file__).parents[1] / 'pretrained'
_PREPROCESSING = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
_RECIPE, _DIGEST = 'norton_timm', 'sha256'  # as norton_timm.checkpoints.file writes them
_SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id')
_CHUNK = 1 << 20


def locate(
    variant: str,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Finds the weights of an entrypoint, downloads them if needed, and returns an overlay for timm's builder.

    Looks, in order, at a source named in `overlay` or by timm itself (`hf-hub:`, `local-dir:`), at the directory in the
    environment variable NORTON_TIMM_WEIGHTS, at weights that ship with the package, and at the source in the tag's
    configuration.

    Args:
        variant: Name of the entrypoint, without the tag.
        pretrained_cfg: A tag, or a whole configuration, as timm hands it to entrypoints.
        overlay: The caller's `pretrained_cfg_overlay`.
        cache_dir: Where downloads are kept; torch's hub directory by default.

    Returns:
        The overlay to build with.

    Raises:
        ValueError: There are no weights; the message says how to get them.
    """
    overlay = dict(overlay or {})
    if any(overlay.get(key) for key in _SOURCES):
        overlay = _local(overlay, cache_dir)
        return {**preprocessing_in(Path(overlay['file'])), **overlay} if overlay.get('file') else overlay
    cfg = _resolve(variant, pretrained_cfg)
    if cfg.source in ('hf-hub', 'local-dir'):
        return overlay
    names = [f'{variant}.{cfg.tag}'] if cfg.tag else [variant]
    found = find_file(names[0])
    if found is not None:
        log.info('weights of %s: %s', names[0], found)
        return {**preprocessing_in(found), **overlay, 'file': str(found)}
    if cfg.has_weights:
        chosen = {key: getattr(cfg, key) for key in ('file', 'url') if getattr(cfg, key)}
        return dict(overlay, **_local(chosen, cache_dir)) if chosen and not cfg.hf_hub_id else overlay
    raise ValueError(no_weights_message(names[0]))


def find_file(name: str) -> Path | None:
    """The file with the weights of `name` (`arch` or `arch.tag`), in NORTON_TIMM_WEIGHTS or shipped; None if neither.

    Raises:
        ValueError: The variable is set to something that is not a directory.
    """
    folders = []
    if os.environ.get(ENV):
        own = Path(os.environ[ENV]).expanduser()
        if not own.is_dir():
            raise ValueError(f'{ENV} is {str(own)!r}, expected a directory with files like {name}.safetensors')
        folders.append(own)
    folders.append(SHIPPED)
    candidates = (folder / f'{name}{extension}' for folder in folders for extension in EXTENSIONS)
    return next((path for path in candidates if path.is_file()), None)


def preprocessing_in(path: Path) -> dict[str, Any]:
    """Preprocessing of images for the network in a file of :func:`norton_timm.save`; empty for other files.

    Raises:
        ValueError: The file is damaged, or its recipe is of another version.
    """
    if path.suffix != '.safetensors':
        return {}
    try:
        with safe_open(path, 'pt') as file:
            text = (file.metadata() or {}).get(_RECIPE)
    except (SafetensorError, OSError) as error:
        raise ValueError(f'{path}: not a safetensors file: {" ".join(str(error).split())[:200]}') from None
    if text is None:
        return {}
    try:
        values = json.loads(text)
        cfg = Recipe.from_dict({key: value for key, value in values.items() if key != _DIGEST}).pretrained_cfg
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path}: {error}') from None
    return {k: tuple(cfg[k]) if isinstance(cfg[k], list) else cfg[k] for k in _PREPROCESSING if k in cfg}


def no_weights_message(name: str) -> str:
    """The message of `pretrained=True` where there is nothing to load."""
    dense, run = dense_name(name), f'--data DATA --output runs/{name}'
    if dense == name:
        train = 'train it', f'{name} --config configs/classification/dense_cifar10.yaml {run}'
    elif dense.endswith('_cifar'):
        train = f'compress a trained {dense} and fine-tune it', f'{name} --weights FILE {run}'
    else:
        train = f"compress timm's {dense} and fine-tune it", f'{name} --pretrained {run}'
    return (
        f'no pretrained weights of {name} were found. Three ways to get them: '
        f"(1) the authors' released checkpoint: python tools/import_checkpoint.py FILE --output {name}.safetensors; "
        f'(2) {train[0]}: python tools/train_cls.py {train[1]}; '
        f"(3) a file of your own: create_model(..., pretrained_cfg_overlay=dict(file='FILE')). Files named like "
        f'{name}.safetensors are found in the directory that {ENV} names. For random weights use pretrained=False.'
    )


def fetch(url: str, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """Downloads a file once: resumed after an interruption, checked, and put in place atomically.

    The SHA-256 is checked where the URL gives it, as `#sha256=<hex>` or as torch's file names do (`name-1a2b3c4d.pth`).

    Args:
        url: An http, https or file URL.
        cache_dir: Where the file is kept; torch's hub directory by default.
        progress: Show a progress bar.

    Returns:
        The file. For a file URL the original, which is not copied.

    Raises:
        ValueError: The URL has another scheme, names no file, or the checksum differs.
        ConnectionError: The server cannot be reached or the transfer broke off; the next call resumes it.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == 'file':
        return _existing(urllib.request.url2pathname(parts.path))
    if parts.scheme not in ('http', 'https'):
        raise ValueError(f'url is {url!r}, expected http://, https:// or file://')
    name = Path(urllib.parse.unquote(parts.path)).name
    if not name or name == '..' or '\0' in name or len(name) > 200:
        raise ValueError(f'url is {url[:200]!r}, expected one that ends in a file name')
    folder = Path(cache_dir) if cache_dir else Path(get_dir()) / 'checkpoints'
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    expected = _expected_hash(parts.fragment, name)
    with FileLock(f'{target}.lock'):  # several processes of one training start at once
        if target.is_file() and (expected is None or _sha256(target).startswith(expected)):
            return target
        partial = target.with_name(target.name + '.part')
        _download(urllib.parse.urldefrag(url).url, partial, progress)
        if expected is not None:
            actual = _sha256(partial)
            if not actual.startswith(expected):
                partial.unlink()
                raise ValueError(f'{url}: the SHA-256 is {actual}, expected {expected}; the download was removed')
        os.replace(partial, target)
    return target


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, never from https to http; urllib would also go on to ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = (urllib.parse.urlsplit(u).scheme for u in (req.full_url, newurl))
        if new not in ('http', 'https') or (old == 'https' and new != 'https'):
            raise urllib.error.URLError(f'it is redirected from {old} to {new}, expected https')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _resolve(variant: str, pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None) -> PretrainedCfg:
    if isinstance(pretrained_cfg, PretrainedCfg):
        return pretrained_cfg
    if isinstance(pretrained_cfg, dict):
        return PretrainedCfg(**pretrained_cfg)
    name = f'{variant}.{pretrained_cfg}' if pretrained_cfg else variant
    return get_pretrained_cfg(name) or PretrainedCfg()


def _local(overlay: dict[str, Any], cache_dir: str | Path | None) -> dict[str, Any]:
    """Turns file and url entries into the path of a file that exists."""
    overlay = dict(overlay)
    if overlay.get('file'):
        text = str(overlay['file'])
        overlay['file'] = str(fetch(text) if text.startswith('file:') else _existing(text))
    elif overlay.get('url'):
        overlay['file'] = str(fetch(overlay.pop('url'), cache_dir))
    return overlay


def _existing(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise ValueError(f'weights file {str(found)!r} does not exist')
    return found


def _expected_hash(fragment: str, name: str) -> str | None:
    if fragment:
        match = re.fullmatch(r'sha256=([0-9a-fA-F]{8,64})', fragment)
        if match is None:
            raise ValueError(f'url fragment is {fragment!r}, expected sha256=<8 to 64 hexadecimal digits>')
        return match[1].lower()
    match = re.search(r'-([0-9a-f]{8,64})\.', name)
    return match[1] if match and re.search('[a-f]', match[1]) else None  # digits alone may be a date


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _download(url: str, partial: Path, progress: bool) -> None:
    """Appends to `partial` what is missing of `url`; starts again where the server's file has changed."""
    stamp = partial.with_name(partial.name + '.version')
    start = partial.stat().st_size if partial.is_file() and stamp.is_file() else 0
    headers = {'User-Agent': 'norton-timm'}
    if start:
        headers.update({'Range': f'bytes={start}-', 'If-Range': stamp.read_text()})
    try:
        opener = urllib.request.build_opener(_WebOnly)
        with opener.open(urllib.request.Request(url, headers=headers), timeout=30) as response:
            start = start if response.status == 206 else 0
            length = response.headers.get('Content-Length')
            total = start + int(length) if length else None
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
            return _download(url, partial, progress)
        raise ConnectionError(f'{url}: the server answered {error.code} {error.reason}') from error
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, 'reason', error)
        raise ConnectionError(
            f'{url} cannot be reached ({reason}); offline, put the file into ${ENV} instead'
        ) from error
    if total is not None and partial.stat().st_size != total:
        size = partial.stat().st_size
        raise ConnectionError(f'{url}: the transfer broke off after {size} of {total} bytes; call again to resume')
    stamp.unlink(missing_ok=True)
