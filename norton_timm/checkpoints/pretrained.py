"""Finds pretrained weights: in the user's own directory, in the package, or where the tag's `pretrained_cfg` says."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, get_pretrained_cfg

from norton_timm.checkpoints.download import ENV, existing, fetch
from norton_timm.checkpoints.recipe import Recipe
from norton_timm.checkpoints.shapes import dense_name

log = logging.getLogger(__name__)

EXTENSIONS = ('.safetensors', '.pth', '.pt', '.pth.tar', '.bin')
SHIPPED = Path(__file__).parents[1] / 'pretrained'
_PREPROCESSING = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
_RECIPE, _DIGEST = 'norton_timm', 'sha256'  # as norton_timm.checkpoints.file writes them
_SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id')
_sources: dict[str, Source] = {}


class Source(Protocol):
    """A place that knows the weights of many networks, for entries such as `authors:PLACE` in a `pretrained_cfg`."""

    def obtain(self, name: str, place: str, cache_dir: str | Path | None) -> Path:
        """The file with the weights of `name` (`arch` or `arch.tag`), downloaded if needed; raises where it cannot."""
        ...

    def recognise(self, name: str, folder: Path, cache_dir: str | Path | None) -> Path | None:
        """The same from files in `folder` that have the source's own names; None where there is none."""
        ...


def register_source(scheme: str, source: Source) -> None:
    """Make `pretrained=True` ask `source` for weights whose `url` starts with `scheme:`."""
    _sources[scheme] = source


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
    name = f'{variant}.{cfg.tag}' if cfg.tag else variant
    scheme, _, place = str(cfg.url or '').partition(':')
    source = _sources.get(scheme)
    own = own_folder(name)
    found = _named(name, own) if own else None
    if found is None and own and source:
        found = source.recognise(name, own, cache_dir)
    found = found or _named(name, SHIPPED)
    if found is None and source and not cfg.file:
        found = source.obtain(name, place, cache_dir)
    if found is not None:
        log.info('weights of %s: %s', name, found)
        return {**preprocessing_in(found), **overlay, 'file': str(found)}
    if cfg.has_weights:
        chosen = {key: getattr(cfg, key) for key in ('file', 'url') if getattr(cfg, key)}
        return dict(overlay, **_local(chosen, cache_dir)) if chosen and not cfg.hf_hub_id else overlay
    raise ValueError(no_weights_message(name))


def find_file(name: str) -> Path | None:
    """The file with the weights of `name` (`arch` or `arch.tag`), in NORTON_TIMM_WEIGHTS or shipped; None if neither.

    Raises:
        ValueError: The variable is set to something that is not a directory.
    """
    own = own_folder(name)
    return (_named(name, own) if own else None) or _named(name, SHIPPED)


def own_folder(name: str) -> Path | None:
    """The directory that NORTON_TIMM_WEIGHTS names; None where it is not set.

    Raises:
        ValueError: The variable is set to something that is not a directory; `name` is a network, for the message.
    """
    if not os.environ.get(ENV):
        return None
    own = Path(os.environ[ENV]).expanduser()
    if not own.is_dir():
        raise ValueError(f'{ENV} is {str(own)!r}, expected a directory with files like {name}.safetensors')
    return own


def _named(name: str, folder: Path) -> Path | None:
    return next((path for extension in EXTENSIONS if (path := folder / f'{name}{extension}').is_file()), None)


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


def no_weights_message(name: str, reason: str = 'were found', released: str = '') -> str:
    """The message of `pretrained=True` where there is nothing to load.

    Args:
        name: The network, with its tag.
        reason: Why: what follows after "no pretrained weights of NAME".
        released: How the authors' file is called, and the page that has it.
    """
    dense, run = dense_name(name), f'--data DATA --output runs/{name}'
    if dense == name:
        train = 'train it', f'{name} --config configs/classification/dense_cifar10.yaml {run}'
    elif dense.endswith('_cifar'):
        train = f'compress a trained {dense} and fine-tune it', f'{name} --weights FILE {run}'
    else:
        train = f"compress timm's {dense} and fine-tune it", f'{name} --pretrained {run}'
    return (
        f'no pretrained weights of {name} {reason}. Three ways to get them: '
        f"(1) the authors' released checkpoint{released}: "
        f'python tools/import_checkpoint.py FILE --output {name}.safetensors; '
        f'(2) {train[0]}: python tools/train_cls.py {train[1]}; '
        f"(3) a file of your own: create_model(..., pretrained_cfg_overlay=dict(file='FILE')). Files named like "
        f'{name}.safetensors are found in the directory that {ENV} names. For random weights use pretrained=False.'
    )


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
        overlay['file'] = str(fetch(text) if text.startswith('file:') else existing(text))
    elif overlay.get('url'):
        overlay['file'] = str(fetch(overlay.pop('url'), cache_dir))
    return overlay
