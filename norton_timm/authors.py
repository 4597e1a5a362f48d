"""Checkpoints of the authors' releases, and of the usual CIFAR code, read into our networks.

NORTON's files hold `{'state_dict', 'rank', 'compress_rate'}` with factors as `NAME.feature.{pointwise, vertical,
horizontal}.weight`, rows rank-major (r * O + o); ours are filter-major (o * R + r). CORING's hold dense pruned
convolutions. Both may carry DataParallel's `module.`.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from norton_timm.layers import CPDConv2d
from norton_timm.layouts import layout_of, widths_of
from norton_timm.models._compressed import compressed_model, make_spec, same_shapes, spec_of, tags
from norton_timm.pickles import load_plain
from norton_timm.shortcut import ChannelMap, padding_index
from norton_timm.spec import format_rates, parse_rates

log = logging.getLogger(__name__)

_FACTOR = re.compile(r'(.+)\.feature\.(pointwise|vertical|horizontal)\.weight')


def convert_authors_checkpoint(path: str | Path, architecture: str | None = None) -> nn.Module:
    """Reads a checkpoint of the authors of NORTON or CORING.

    Shapes are taken from the tensors; the rank and rates that the file or its name states must agree with them. Of a
    network that is part of a larger one, as the backbone of a detector is, it is returned without classifier.

    Args:
        path: A `.pt` or `.pth.tar` file.
        architecture: The dense network, such as `resnet50` or `vgg16_bn_cifar`; told from the tensors when None.

    Returns:
        `norton_<architecture>` or `coring_<architecture>` (the dense network where nothing is compressed) with the
        weights loaded, in evaluation mode.

    Raises:
        ValueError: The file cannot be read safely, or does not fit: everything that is wrong is listed.
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
    model = _build(base, rank, rates, num_classes, problems)
    if model is not None:
        converted = convert_state_dict(tensors, model)
        problems += _differences(converted, model, ignore_head=bool(place))
    if problems or model is None:
        raise ValueError(f'{path} does not fit {base}: ' + '; '.join(problems))
    model.load_state_dict(converted)
    return model.eval()


def convert_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames and reorders tensors of the authors' or the usual CIFAR code for `model`; ours pass unchanged.

    Where `model` has option-A shortcuts and the file says nothing about them, their maps are set to the symmetric
    padding (or cropping) of whatever widths there are, which is what all code with such files does.
    """
    modules = dict(model.named_modules())
    own = set(model.state_dict())
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix('module.')
        factor = _FACTOR.fullmatch(name)
        if factor:
            module = modules.get(factor[1])
            if isinstance(module, CPDConv2d):
                tensor = _filter_major(tensor, module.rank, factor[2])
            name = f'{factor[1]}.{factor[2]}'
        if name not in own:
            name = re.sub(r'^(linear|classifier\.1)\.', f'{_head_of(model)}.', name)
        converted[name] = tensor
    for name, module in modules.items():
        if isinstance(module, ChannelMap) and f'{name}.index' not in converted:
            index = padding_index(module.in_channels, module.out_channels)
            converted[f'{name}.index'] = torch.tensor(index, dtype=torch.long)
    return converted


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Loads a pickled checkpoint with plain data and tensors only.

    Raises:
        ValueError: No such file, not a checkpoint, or one that would run code when unpickled.
    """
    if not path.is_file():
        raise ValueError(f'checkpoint {str(path)!r} does not exist')
    payload = load_plain(path, [argparse.Namespace, *_numpy_scalars()])
    if not isinstance(payload, dict):
        raise ValueError(f'{path} holds a {type(payload).__name__}, expected a dictionary of tensors')
    return payload


def network_tensors(payload: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name, without DataParallel's prefix.

    Raises:
        ValueError: There are none.
    """
    for key in ('state_dict', 'model'):
        if isinstance(payload.get(key), dict):
            payload = payload[key]
            break
    tensors = {str(k).removeprefix('module.'): v for k, v in payload.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError('the checkpoint holds no tensors, neither at its top nor under state_dict or model')
    return tensors


def network_prefix(tensors: Mapping[str, Tensor]) -> str:
    """Where a ResNet lies inside a larger network, such as `backbone.body.` in a detector; '' for the network itself."""
    first = re.compile(r'(.+\.)?layer1\.0\.conv1\.(weight|feature\.pointwise\.weight)')
    found = next((match for name in tensors if (match := first.fullmatch(name))), None)
    return (found[1] or '') if found else ''


def guess_architecture(tensors: Mapping[str, Tensor]) -> str:
    """The dense network that has these tensor names.

    Raises:
        ValueError: None of the published ones.
    """
    if any(name.startswith('features.conv0.') for name in tensors):
        convs = len({name.split('.')[1] for name in tensors if name.startswith('features.conv')})
        return {13: 'vgg16_bn_cifar', 16: 'vgg19_bn_cifar'}.get(convs, f'VGG with {convs} convolutions')
    if any(name.startswith('dense1.') for name in tensors):
        return 'densenet40_cifar'
    if any(name.startswith('inception_a3.') for name in tensors):
        return 'googlenet_cifar'
    if 'features.1.conv.0.weight' in tensors:
        return 'mobilenetv2_cifar'
    blocks = [len({n.split('.')[1] for n in tensors if n.startswith(f'layer{i}.')}) for i in (1, 2, 3, 4)]
    if blocks[3] == 0 and blocks[0] and blocks[0] == blocks[1] == blocks[2]:
        return f'resnet{6 * blocks[0] + 2}_cifar'
    deep = 'layer1.0.conv3.weight' in tensors
    known: dict[tuple[bool, tuple[int, ...]], str] = {
        (True, (3, 4, 6, 3)): 'resnet50',
        (True, (3, 4, 23, 3)): 'resnet101',
        (True, (3, 8, 36, 3)): 'resnet152',
        (False, (2, 2, 2, 2)): 'resnet18',
        (False, (3, 4, 6, 3)): 'resnet34',
    }
    found = known.get((deep, tuple(blocks)))
    if found is None:
        some = ', '.join(list(tensors)[:3])
        raise ValueError(
            f'unknown architecture (tensors {some}, ...): expected a ResNet, or a VGG, DenseNet-40, GoogLeNet or '
            'MobileNetV2 for CIFAR'
        )
    return found


def head_name(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the classifier in a state dict, None where there is none."""
    names = ('fc', 'linear', 'classifier.linear2', 'classifier.1', 'classifier')
    return next((name for name in names if f'{name}.weight' in tensors), None)


def rates_from_name(name: str) -> tuple[str | None, int | None]:
    """Rates and rank from a file name: `resnet_50_pabs_[0.]+[0.1]*2+[0.4]*5+[0.75]*12_1_73.65.pt`.

    Also in the form that release pages give it, where runs of `[`, `]` and `*` (and dots beside them) are single
    dots: `resnet_50_pabs_.0.+.0.1.2+.0.4.5+.0.75.12_1_73.65.pt`.

    Returns:
        The rates in the authors' notation and the rank, None for what the name does not say.
    """
    match = re.search(r'_((?:\[|\.)\d[^_]*)(?:_(\d+)(?=[_.]|$))?', name)
    if match is None:
        return None, None
    text = match[1]
    if text.endswith(('.pt', '.pth', '.tar')):
        text = re.sub(r'(\.pth)?\.tar$|\.pth?$', '', text)
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


def _rank(payload: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, problems: list[str]) -> int:
    """The CPD rank of the decomposed layers, 0 where there are none."""
    found = set()
    for key, tensor in tensors.items():
        factor = _FACTOR.fullmatch(key)
        if factor and factor[2] == 'pointwise':
            outputs = _filters(factor[1], tensors)
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


def _filters(layer: str, tensors: Mapping[str, Tensor]) -> int:
    """Number of filters of a decomposed layer: the length of its bias, else of the batch norm that follows it."""
    parent, _, last = layer.rpartition('.')
    prefix = f'{parent}.' if parent else ''
    follower = last.replace('conv', 'norm' if parent == 'features' else 'bn')
    if f'{layer}.bias' in tensors:
        return len(tensors[f'{layer}.bias'])
    if prefix.startswith('dense') or (layer == 'conv1' and 'dense1.0.bn1.weight' in tensors):
        return _dense_growth(layer, tensors)
    norm = tensors.get(f'{prefix}{follower}.weight')
    return len(norm) if norm is not None else 0


def _dense_growth(layer: str, tensors: Mapping[str, Tensor]) -> int:
    """In DenseNet the norm comes first: a layer's filters are the growth up to the next norm."""
    norms = [n for n in tensors if re.fullmatch(r'(dense\d\.\d+|trans\d)\.bn1\.weight|bn\.weight', n)]
    if layer == 'conv1':
        return len(tensors[norms[0]])
    here = norms.index(f'{layer.rpartition(".")[0]}.bn1.weight')
    return len(tensors[norms[here + 1]]) - len(tensors[norms[here]])


def _width(tensors: Mapping[str, Tensor], name: str) -> int:
    """Output channels that the checkpoint has for a layer, 0 where it has no such layer."""
    if f'{name}.weight' in tensors:
        return len(tensors[f'{name}.weight'])
    return _filters(name, tensors) if f'{name}.feature.pointwise.weight' in tensors else 0


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
            listed = parse_rates(stated) if isinstance(stated, str) else [float(rate) for rate in stated]
            listed = listed[: len(layout)]  # the authors write [0.]*100 for "nothing pruned"
            expected = widths_of(dense, listed)
        except (ValueError, TypeError) as error:
            problems.append(f'compress_rate: {error}')
            return None
        actual = {layer: _width(tensors, layer) for names in layout for layer in names}
        wrong = [
            f'{n} has {w} channels instead of {expected[n]}' for n, w in actual.items() if w not in (0, expected[n])
        ]
        if wrong:
            problems.append(f'the tensors disagree with compress_rate {stated}: {_some(wrong)}')
        return format_rates(listed) if any(listed) else None
    rates = [_entry_rate(tensors, dense, names, problems) for names in layout]
    return format_rates(rates) if any(rates) else None


def _entry_rate(tensors: Mapping[str, Tensor], dense: nn.Module, names: list[str], problems: list[str]) -> float:
    """The shortest rate that gives every layer of an entry the width it has in the checkpoint."""
    pairs = set()
    for name in names:
        full = dense.get_submodule(name).out_channels
        if name.startswith('trans'):  # a transition keeps a share of what reaches it
            full = len(tensors.get(f'{name.rpartition(".")[0]}.bn1.weight', [0] * full))
        width = _width(tensors, name)
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


def _build(base: str, rank: int, rates: str | None, num_classes: int, problems: list[str]) -> nn.Module | None:
    method = 'norton' if rank else 'coring'
    settings: dict[str, Any] = dict(rates=rates or 0.0)
    if rank:
        settings['rank'] = rank
    try:
        if not rank and not rates:
            return timm.create_model(base, num_classes=num_classes)
        name = f'{method}_{base}'
        if timm.is_model(name):
            spec = spec_of(name, **settings)
            for tag in tags()[method][base]:
                if same_shapes(spec, spec_of(f'{name}.{tag}')):
                    return timm.create_model(f'{name}.{tag}', num_classes=num_classes)
            return timm.create_model(name, num_classes=num_classes, **settings)
        return compressed_model(base, make_spec(method, base, **settings), num_classes=num_classes)
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


def _filter_major(tensor: Tensor, rank: int, kind: str) -> Tensor:
    """Rows r * O + o -> o * R + r; `horizontal` also becomes (O, R, 1, K)."""
    if tensor.dim() != 4 or len(tensor) % rank:
        return tensor  # the comparison of shapes tells
    outputs = len(tensor) // rank
    rows = tensor.reshape(rank, outputs, *tensor.shape[1:]).transpose(0, 1)
    if kind == 'horizontal':
        return rows.reshape(outputs, rank, *tensor.shape[2:])
    return rows.reshape(tensor.shape)


def _head_of(model: nn.Module) -> str:
    return 'classifier' if isinstance(getattr(model, 'classifier', None), (nn.Linear, nn.Identity)) else 'fc'


def _numpy_scalars() -> list[Any]:
    """What a NumPy number in a checkpoint (an accuracy) is pickled as; none of it runs code."""
    import numpy as np
    from numpy.dtypes import Float32DType, Float64DType, Int64DType

    try:
        from numpy._core.multiarray import scalar
    except ImportError:  # NumPy 1
        from numpy.core.multiarray import scalar  # type: ignore[no-redef]
    return [scalar, np.dtype, Float64DType, Float32DType, Int64DType]
