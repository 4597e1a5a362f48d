"""The authors' releases as a source of weights: which file belongs to a network, and its conversion into one of ours.

A `pretrained_cfg` names the releases as `authors:pvti/NORTON@v0.1.0`, several joined by commas. The names of the files
tell architecture, rates, rank and accuracy; the tensors decide in the end.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn
from tqdm import tqdm

from norton_timm.checkpoints import (
    AUTHORS_NAMES,
    EXTENSIONS,
    AssetName,
    Release,
    cache_folder,
    digest_of,
    dotted,
    no_weights_message,
    read_asset_name,
    register_source,
    save,
)
from norton_timm.compression import parse_rates, widths_of
from norton_timm.models.authors import convert_authors_checkpoint
from norton_timm.models.compressed import published_accuracy, tags
from norton_timm.utils import replacing, write_text

log = logging.getLogger(__name__)

_DETECTORS = {'box': 'FasterRCNN', 'mask': 'MaskRCNN', 'keypoint': 'KeypointRCNN'}
_PICKLES = tuple(extension for extension in EXTENSIONS if extension != '.safetensors')


class AuthorsReleases:
    """Weights of the authors for `pretrained=True`; a `Source` as `norton_timm.checkpoints` describes it."""

    def obtain(self, name: str, place: str, cache_dir: str | Path | None = None) -> Path:
        """Download and convert the weights of a network, once; from then on no network is needed.

        Args:
            name: A tag such as `norton_resnet50.r078`, or a dense network such as `vgg16_bn_cifar`.
            place: `owner/repository@tag`, several joined by commas; the first that has the file is taken.
            cache_dir: Where files are kept; torch's hub directory by default.

        Returns:
            A `.safetensors` file of ours.

        Raises:
            ConnectionError: The list or the file cannot be had now; the message says how to get it by hand.
            ValueError: No file of the releases fits, or the one that does is refused.
        """
        releases = _releases(place)
        for release in releases:
            ready = _ready(release.folder(cache_dir) / f'{name}.safetensors')
            if ready is not None:
                return ready

        def converted(release: Release, found: Sequence[str]) -> Path:
            return _convert_first(name, release, found, cache_dir)

        return _from_first(name, None, releases, cache_dir, converted)

    def recognise(self, name: str, folder: Path, cache_dir: str | Path | None = None) -> Path | None:
        """The same from the authors' files in a folder, which may have their own names or those of the release page.

        Raises:
            ValueError: A file has the right name, but none can be read as this network.
        """
        paths = {path.name: path for path in sorted(folder.iterdir()) if path.name.endswith(_PICKLES)}
        found = assets_of(name, paths)
        problems = []
        for choice in found:
            digest = digest_of(paths[choice])
            target = cache_folder(cache_dir) / 'norton_timm' / 'own' / digest[:16] / f'{name}.safetensors'
            try:
                ready = _ready(target)
                return ready or _convert(name, paths[choice], target, source=choice, source_sha256=digest)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError('; '.join(problems))
        return None


def released_detector(task: str, backbone: str, place: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The authors' detector with a compressed backbone, downloaded once; as torchvision's reference training wrote it.

    Args:
        task: `box`, `mask` or `keypoint`.
        backbone: The tag of its backbone, such as `norton_resnet50.r078`.
        place: Releases, as in `AuthorsReleases.obtain`; None takes those of the tag.
        cache_dir: Where files are kept; torch's hub directory by default.

    Raises:
        ConnectionError: The list or the file cannot be had now; the message says how to get it by hand.
        ValueError: The authors have no such detector.
    """
    if task not in _DETECTORS:
        raise ValueError(f'task is {task!r}, expected one of {", ".join(_DETECTORS)}')
    if place is None:
        cfg = get_pretrained_cfg(backbone) if '.' in backbone else None
        scheme, _, place = str(cfg.url if cfg else '').partition(':')
        if scheme != 'authors' or backbone.partition('.')[0] not in ('norton_resnet50', 'coring_resnet50'):
            raise ValueError(
                f'the authors have no detector on {backbone!r}, expected a tag of norton_resnet50 or coring_resnet50 '
                'such as norton_resnet50.r078'
            )

    def downloaded(release: Release, found: Sequence[str]) -> Path:
        (asset,) = (a for a in release.assets(cache_dir) if a.name == found[0])
        if len(found) > 1:
            log.warning('%s fit %s on %s; taken: %s', ', '.join(found), task, backbone, found[0])
        new = not (release.folder(cache_dir) / 'files' / asset.name).is_file()
        path = release.download(asset, cache_dir)
        if new:
            _tell(backbone, asset.url, release)
        return path

    return _from_first(backbone, task, _releases(place), cache_dir, downloaded)


def assets_of(name: str, files: Iterable[str], task: str | None = None) -> list[str]:
    """Those of the file names that fit a network, the best first: published accuracy, some accuracy, none.

    Args:
        name: A tag, or a dense network.
        files: Names as the authors gave them, or as the page of a release has them.
        task: `box`, `mask` or `keypoint` for a detector with this backbone.

    Example:
        >>> assets_of('norton_resnet56_cifar.r027', ['resnet_56.pt', 'resnet_56_.0.+.0.18.29_7_94.46.pt'])
        ['resnet_56_.0.+.0.18.29_7_94.46.pt']
    """
    top1 = published_accuracy(name).get('top1')
    read = {file: read_asset_name(file) for file in files if file.endswith(_PICKLES)}
    fits = [file for file, told in read.items() if told.task == task and _fits(name, told)]
    return sorted(fits, key=lambda file: (read[file].top1 != top1, read[file].top1 is None, file))


def expected_asset(name: str, task: str | None = None) -> str:
    """How a release page would call the authors' file of a network, as far as that is known."""
    base, row = _row(name)
    if row is None:
        return f'{AUTHORS_NAMES[base]}.pt'
    authors = AUTHORS_NAMES[base] + ('_pabs' if name.startswith('norton_resnet50.') else '')  # its criterion
    parts = [authors, row['rates'], *([str(row['rank'])] if row.get('rank') else [])]
    if task is not None:
        parts.insert(0, f'{_DETECTORS[task]}ResNet50FPN')
    elif 'top1' in published_accuracy(name):
        parts.append(f'{published_accuracy(name)["top1"]:.2f}')
    return dotted('_'.join(parts) + '.pt')


def _releases(place: str) -> list[Release]:
    pairs = [entry.partition('@') for entry in place.split(',')]
    if not all(repository.count('/') == 1 and tag for repository, _, tag in pairs):
        raise ValueError(f'releases are {place!r}, expected owner/repository@tag, several joined by commas')
    return [Release(repository, tag) for repository, _, tag in pairs]


def _row(name: str) -> tuple[str, dict[str, Any] | None]:
    """The dense network of a tag, and its row in the table; None for a dense network."""
    variant, _, tag = name.partition('.')
    method, _, base = variant.partition('_')
    return (base, tags()[method][base][tag]) if method in tags() else (variant, None)


def _fits(name: str, told: AssetName) -> bool:
    base, row = _row(name)
    if told.architecture != base:
        return False
    if row is None or told.rates is None or told.rank != (row.get('rank') or None):
        return row is None and told.rates is None and told.rank is None
    return _widths(base, told.rates) == _widths(base, row['rates'])


@cache
def _dense(base: str) -> nn.Module:
    return model_entrypoint(base)(pretrained=False, device='meta')


@cache
def _widths(base: str, rates: str) -> tuple[int, ...] | None:
    """Channels of every layer; lists of rates that give the same ones mean the same network. None for no such list."""
    dense = _dense(base)
    try:
        listed = parse_rates(rates)
        while listed and listed[-1] == 0:  # the authors write `[0.]*100` for "nothing pruned"
            listed.pop()
        return tuple(widths_of(dense, listed).values())
    except ValueError:
        return None


def _from_first(
    name: str,
    task: str | None,
    releases: Sequence[Release],
    cache_dir: str | Path | None,
    get: Callable[[Release, Sequence[str]], Path],
) -> Path:
    """What `get` makes of the first release that has a fitting file; all that goes wrong is told in one line."""
    reasons: list[str] = []
    kind: type[ConnectionError] | type[ValueError] = ValueError
    for release in releases:
        try:
            listed = [asset.name for asset in release.assets(cache_dir)]
            found = assets_of(name, listed, task)
            if found:
                return get(release, found)
            reasons.append(_nothing_fits(name, task, release, listed))
        except (ConnectionError, ValueError) as error:
            kind = ConnectionError if isinstance(error, ConnectionError) else kind
            reasons.append(str(error))
    reason = '; '.join(dict.fromkeys(reasons))
    released = f', called like {expected_asset(name, task)} on {releases[0].page}'
    if task is not None:
        raise kind(f"no detector of the authors ({task}) on {name}: {reason}. By hand: take the file{released}, and "
                   'give it as --weights or weights=') from None  # fmt: skip
    raise kind(no_weights_message(name, f'could be had: {reason}', released)) from None


def _nothing_fits(name: str, task: str | None, release: Release, listed: Sequence[str]) -> str:
    base, row = _row(name)
    read = {file: read_asset_name(file) for file in listed}
    same = [file for file, told in read.items() if told.architecture == base and told.task == task]
    top1 = published_accuracy(name).get('top1')
    rank = (row or {}).get('rank') or None
    other = [f for f in same if read[f].top1 is not None and read[f].top1 == top1 and read[f].rank == rank]
    told = f'no file of {release.page} has the rank and rates of {name}'
    if other and task is None:
        return (
            f'{told}; {other[0]} has its accuracy with other rates, so it is another network, which '
            'norton_timm.convert_authors_checkpoint reads'
        )
    return f'{told}; of this architecture it has {", ".join(same[:6]) or "none"}'


def _convert_first(name: str, release: Release, found: Sequence[str], cache_dir: str | Path | None) -> Path:
    """The first of the files whose content is the network, converted; one process at a time."""
    target = release.folder(cache_dir) / f'{name}.safetensors'
    with FileLock(f'{target}.lock'):
        ready = _ready(target)
        if ready is not None:
            return ready
        assets = {asset.name: asset for asset in release.assets(cache_dir)}
        problems = []
        for choice in found:
            path = release.download(assets[choice], cache_dir)
            try:
                _convert(name, path, target, source=assets[choice].url, source_sha256=digest_of(path))
            except ValueError as error:
                problems.append(str(error))
                continue
            finally:
                path.unlink(missing_ok=True)  # the converted file is kept instead
            _tell(name, assets[choice].url, release)
            return target
    raise ValueError('; '.join(problems))


def _convert(name: str, path: Path, target: Path, **provenance: Any) -> Path:
    """Write the network of an authors' file to one of ours, with its checksum beside it.

    Raises:
        ValueError: The file is refused, or is another network.
    """
    model: Any = convert_authors_checkpoint(path, _row(name)[0])
    cfg = model.pretrained_cfg
    made = '.'.join(filter(None, (cfg['architecture'], cfg.get('tag'))))
    known = get_pretrained_cfg(name)
    assert known is not None
    if made != name or model.num_classes != known.num_classes:
        raise ValueError(
            f'{path.name} holds {made} with {model.num_classes} classes, expected {name} with {known.num_classes}'
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        whole = temporary.with_name(temporary.name + '.safetensors')
        try:
            save(model, whole, license=cfg.get('license'), **provenance)
            write_text(_record(target), digest_of(whole) + '\n')
            whole.replace(temporary)
        finally:
            whole.unlink(missing_ok=True)
    return target


def _record(path: Path) -> Path:
    return path.with_name(path.name + '.sha256')


def _ready(path: Path) -> Path | None:
    """A converted file that is there and as it was written; None where there is none.

    Raises:
        ValueError: Its checksum is not the recorded one.
    """
    if not path.is_file() or not _record(path).is_file():
        return None
    found, known = digest_of(path), _record(path).read_text().strip()
    if found != known:
        raise ValueError(f'{path}: the SHA-256 is {found}, recorded was {known}: remove the file to get it again')
    return path


def _tell(name: str, url: str, release: Release) -> None:
    """Source and licence, once: later calls find the file."""
    licence = getattr(get_pretrained_cfg(name), 'license', None) or 'see the page'
    text = f'{name}: weights of the authors, {url}; licence {licence}, {release.page}'
    tqdm.write(text, file=sys.stderr)


register_source('authors', AuthorsReleases())
