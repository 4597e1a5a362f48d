"""Checkpoints of the authors' releases, and of the usual CIFAR code, read into our networks.

NORTON's files hold `{'state_dict', 'rank', 'compress_rate'}` with factors as `NAME.feature.{pointwise, vertical,
horizontal}.weight`, rows rank-major (r * O + o); ours are filter-major (o * R + r). CORING's hold dense pruned
convolutions. Both may carry DataParallel's `module.`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from norton_timm.checkpoints import (
    FACTOR_KEY,
    compress_rate_option,
    convert_state_dict,
    filters_in,
    guess_architecture,
    head_name,
    network_prefix,
    network_tensors,
    rates_from_name,
    read_checkpoint,
    width_in,
)
from norton_timm.compression import format_rates, layout_of, parse_rates, widths_of
from norton_timm.models.compressed import compressed_model, same_shapes, spec_for, spec_of, tags

log = logging.getLogger(__name__)


def convert_authors_checkpoint(path: str | Path, architecture: str | None = None) -> nn.Module:
    """Reads a checkpoint of the authors of NORTON or CORING.

    Shapes are taken from the tensors; the rank and rates that the file or its name states must agree with them. The tag
    is the one whose layers have these widths; a network with other widths has none. A network that is part of a larger
    one, such as a detector's backbone, is returned without classifier.

    Args:
        path: A `.pt` or `.pth.tar` file.
        architecture: The dense network, such as `resnet50` or `vgg16_bn_cifar`; None guesses it from the tensors.

    Returns:
        `norton_<architecture>` or `coring_<architecture>` (the dense network where nothing is compressed) with the
        weights loaded, in evaluation mode.

    Raises:
        ValueError: The file cannot be read safely, or does not fit: everything that is wrong is listed.

    Example:
        >>> model = convert_authors_checkpoint('resnet_56.pt', 'resnet56_cifar')
        >>> save(model, 'resnet56.safetensors')
    """
    path = Path(path)
    payload = read_checkpoint(path)
    tensors = network_tensors(payload)
    place = network_prefix(tensors)
    tensors = {name.removeprefix(place): t for name, t in tensors.items() if name.startswith(place)}
    base = architecture or guess_architecture(tensors)
    if not timm.is_model(base):
        raise ValueError(f'unknown architecture {base!r}, expected a dense network such as resnet50 or resnet56_cifar')
    head = head_name(tensors)
    num_classes = len(tensors[f'{head}.weight']) if head else 0
    dense = timm.create_model(base, num_classes=num_classes or 10)
    problems: list[str] = []
    rank = _rank(payload, tensors, path.name, problems)
    rates = _rates(payload, tensors, path.name, dense, problems)
    tag = _tag(base, rank, rates, dense, tensors)
    model = _build(base, rank, rates, tag, num_classes, problems)
    if model is not None:
        converted = convert_state_dict(tensors, model)
        problems += _differences(converted, model, ignore_head=bool(place))
    if problems or model is None:
        raise ValueError(f'{path} does not fit {base}: ' + '; '.join(problems))
    model.load_state_dict(converted)
    return model.eval()


def _rank(payload: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, problems: list[str]) -> int:
    """The CPD rank of the decomposed layers, 0 where there are none."""
    found = set()
    for key, tensor in tensors.items():
        factor = FACTOR_KEY.fullmatch(key)
        if factor and factor[2] == 'pointwise':
            outputs = filters_in(factor[1], tensors)
            if outputs and len(tensor) % outputs == 0:
                found.add(len(tensor) // outputs)
            else:
                problems.append(f'{key} has {len(tensor)} rows, expected a multiple of its {outputs} filters')
    if len(found) > 1:
        problems.append(f'decomposed layers have ranks {sorted(found)}, expected one rank')
    rank = min(found, default=0)
    for stated in (payload.get('rank'), rates_from_name(name)[1]):
        if isinstance(stated, int) and found and stated != rank:
            problems.append(f'the rank is stated as {stated}, but the tensors have rank {rank}')
            break
    return rank


def _rates(
    payload: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, dense: nn.Module, problems: list[str]
) -> str | None:
    """The pruning rates in the authors' notation; None where nothing is pruned."""
    layout = layout_of(dense)
    if layout is None:
        problems.append(f'no layout of {type(dense).__name__} is known')
        return None
    stated = payload.get('compress_rate') or rates_from_name(name)[0]
    if stated is not None:
        try:
            listed = _listed(stated, len(layout))
            wrong = _disagreeing(tensors, dense, listed)
        except (ValueError, TypeError) as error:
            problems.append(f'compress_rate: {error}')
            return None
        if wrong:
            problems.append(f'the tensors disagree with compress_rate {stated}: {_some(wrong)}')
        return format_rates(listed) if any(listed) else None
    option = compress_rate_option(payload)
    if option is not None:
        try:
            listed = _listed(option, len(layout))
            wrong = _disagreeing(tensors, dense, listed)
        except (ValueError, TypeError) as error:
            wrong = [str(error)]
        if not wrong:
            return format_rates(listed) if any(listed) else None
        log.warning('args.compress_rate %s is not what the tensors have, which decide: %s', option, _some(wrong, 2))
    rates = [_entry_rate(tensors, dense, names, problems) for names in layout]
    return format_rates(rates) if any(rates) else None


def _listed(rates: Any, entries: int) -> list[float]:
    """A list of rates from a text or a list; the authors write `[0.]*100` for "nothing pruned"."""
    listed = parse_rates(rates) if isinstance(rates, str) else [float(rate) for rate in rates]
    return listed[:entries]


def _disagreeing(tensors: Mapping[str, Tensor], dense: nn.Module, rates: list[float]) -> list[str]:
    """Layers that have other widths than the rates give them."""
    actual = {name: (width_in(tensors, name), expected) for name, expected in widths_of(dense, rates).items()}
    return [
        f'{n} has {w} channels instead of {expected}' for n, (w, expected) in actual.items() if w not in (0, expected)
    ]


def _tag(base: str, rank: int, rates: str | None, dense: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """The tag whose layers have the widths of the tensors, which many lists of rates give; None where none has."""
    method = 'norton' if rank else 'coring'
    if not (rank or rates) or base not in tags()[method]:
        return None
    specs = {tag: spec_of(f'{method}_{base}.{tag}') for tag in tags()[method][base]}
    own = spec_of(f'{method}_{base}', rates=rates or 0.0, **({'rank': rank} if rank else {}))
    fits = [
        tag
        for tag, spec in specs.items()
        if spec.rank == own.rank and not _disagreeing(tensors, dense, spec.rate_list() or [])
    ]
    if len(fits) > 1:
        fits.sort(key=lambda tag: not same_shapes(specs[tag], own))
        log.warning('the tags %s have the same widths; taken for %s', ', '.join(fits), fits[0])
    return fits[0] if fits else None


def _entry_rate(tensors: Mapping[str, Tensor], dense: nn.Module, names: list[str], problems: list[str]) -> float:
    """The shortest rate that gives every layer of an entry the width it has in the checkpoint."""
    pairs = set()
    for name in names:
        full = dense.get_submodule(name).out_channels
        if name.startswith('trans'):  # a transition keeps a share of what reaches it
            full = len(tensors.get(f'{name.rpartition(".")[0]}.bn1.weight', [0] * full))
        width = width_in(tensors, name)
        if width:
            pairs.add((full, width))
    if not pairs:
        return 0.0
    candidates = [round(1 - width / full, digits) for digits in range(1, 8) for full, width in pairs]
    candidates += [1 - (width + 0.5) / full for full, width in pairs]
    for rate in candidates:
        if 0 <= rate < 1 and all(int(full * (1 - rate)) == width for full, width in pairs):
            return rate
    problems.append(f'no pruning rate gives {", ".join(names)} their widths {sorted(w for _, w in pairs)}')
    return 0.0


def _build(
    base: str, rank: int, rates: str | None, tag: str | None, num_classes: int, problems: list[str]
) -> nn.Module | None:
    method = 'norton' if rank else 'coring'
    settings: dict[str, Any] = dict(rates=rates or 0.0)
    if rank:
        settings['rank'] = rank
    try:
        if not rank and not rates:
            model = timm.create_model(base, num_classes=num_classes)
            model.pretrained_cfg = {**model.pretrained_cfg, 'tag': ''}  # timm's default tag stands for other weights
            return model
        name = f'{method}_{base}'
        if tag is not None:
            return timm.create_model(f'{name}.{tag}', num_classes=num_classes)
        if timm.is_model(name):
            return timm.create_model(name, num_classes=num_classes, **settings)
        return compressed_model(base, spec_for(method, base, **settings), num_classes=num_classes)
    except ValueError as error:
        problems.append(str(error))
        return None


def _differences(converted: Mapping[str, Tensor], model: nn.Module, ignore_head: bool) -> list[str]:
    """Everything that keeps a state dict from being loaded, grouped."""
    own = model.state_dict()
    optional = ('.num_batches_tracked', '.index')
    missing = [n for n in own if n not in converted and not n.endswith(optional)]
    extra = [n for n in converted if n not in own]
    shapes = [
        f'{n} is {tuple(converted[n].shape)} instead of {tuple(own[n].shape)}'
        for n in own
        if n in converted and converted[n].shape != own[n].shape
    ]
    told = [('missing', missing), ('not expected', extra), ('shapes', shapes)]
    return [f'{kind}: {_some(names)}' for kind, names in told if names]


def _some(names: list[str], limit: int = 5) -> str:
    return ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')
