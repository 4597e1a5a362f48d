"""What the authors' file names say: architecture, pruning rates, rank and accuracy, also as a release page has them."""

from __future__ import annotations

import re
from dataclasses import dataclass

# dense network -> the authors' name of it
AUTHORS_NAMES = {
    'resnet50': 'resnet_50',
    'vgg16_bn_cifar': 'vgg_16_bn',
    'vgg19_bn_cifar': 'vgg_19_bn',
    'resnet56_cifar': 'resnet_56',
    'resnet110_cifar': 'resnet_110',
    'densenet40_cifar': 'densenet_40',
    'googlenet_cifar': 'googlenet',
    'mobilenetv2_cifar': 'mobilenet_v2',
}
_ENDING = re.compile(r'(\.pth)?\.tar$|\.pth?$')
_DETECTOR = re.compile(r'(faster|mask|keypoint)_?rcnn_?(cp)?resnet_?50_?fpn', re.IGNORECASE)
_TASKS = {'faster': 'box', 'mask': 'mask', 'keypoint': 'keypoint'}


@dataclass(frozen=True)
class AssetName:
    """What the name of a checkpoint says; None for what it does not say.

    Attributes:
        architecture: The dense network, such as `resnet56_cifar`; None for a name that has none of the authors'.
        task: `box`, `mask` or `keypoint` for a detector, None for a classifier.
        rates: Pruning rates in the authors' notation.
        rank: CPD rank.
        top1: Accuracy in %.
    """

    architecture: str | None
    task: str | None = None
    rates: str | None = None
    rank: int | None = None
    top1: float | None = None


def dotted(name: str) -> str:
    """The name that a release page gives a file: brackets and asterisks become dots, and a run of dots becomes one.

    Example:
        >>> dotted('resnet_56_[0.]+[0.18]*29_7_94.46.pt')
        'resnet_56_.0.+.0.18.29_7_94.46.pt'
    """
    return re.sub(r'\.{2,}', '.', re.sub(r'[][*]', '.', name))


def read_asset_name(name: str) -> AssetName:
    """Read a file name of the authors, as they wrote it or as a release page has it.

    Example:
        >>> read_asset_name('resnet_56_.0.+.0.18.29_7_94.46.pt')
        AssetName('resnet56_cifar', rates='[0.]+[0.18]*29', rank=7, top1=94.46)
    """
    detector = _DETECTOR.match(name)
    rest = (name[detector.end() :].lstrip('_-') if detector else name).lower()
    spelled = {base: text.replace('_', '[_-]?') for base, text in AUTHORS_NAMES.items()}
    base = next((b for b, text in spelled.items() if re.match(text + r'(?![0-9])', rest)), None)
    if base is None and detector:
        base = 'resnet50'
    rates, rank = rates_from_name(name)
    stem = _ENDING.sub('', name)
    top1 = re.search(r'_(\d{2}\.\d{1,3})$', stem)
    return AssetName(
        base, _TASKS[detector[1].lower()] if detector else None, rates, rank, float(top1[1]) if top1 else None
    )


def rates_from_name(name: str) -> tuple[str | None, int | None]:
    """Rates and rank from a file name: `resnet_50_pabs_[0.]+[0.1]*2+[0.4]*5+[0.75]*12_1_73.65.pt`.

    Release pages turn each run of `[`, `]` and `*` (and dots beside them) into a single dot. That form is read too:
    `resnet_50_pabs_.0.+.0.1.2+.0.4.5+.0.75.12_1_73.65.pt`.

    An accuracy is no rank.

    Returns:
        The rates in the authors' notation and the rank, None for what the name does not say.
    """
    match = re.search(r'_((?:\[|\.)\d[^_]*)(?:_(\d+)(?=_|\.(?!\d)|$))?', name)
    if match is None:
        return None, None
    text = match[1]
    text = _ENDING.sub('', text)
    rank = int(match[2]) if match[2] else None
    if text.startswith('['):
        return text, rank
    terms = [_dotted_term(term) for term in text.split('+')]
    return (None if None in terms else '+'.join(t for t in terms if t)), rank


def _dotted_term(term: str) -> str | None:
    """`.0.1.2` -> `[0.1]*2`, `.0.3` -> `[0.]*3`, `.0.12.` -> `[0.12]`: a closing dot is a bracket without count."""
    match = re.fullmatch(r'\.(\d+)(?:\.(\d+))?\.', term)
    if match:
        return f'[{match[1]}.{match[2] or ""}]'
    match = re.fullmatch(r'\.(\d+)(?:\.(\d+))?\.(\d+)', term)
    return f'[{match[1]}.{match[2] or ""}]*{match[3]}' if match else None
