"""Key names and row order in other people's checkpoints: the authors' releases, and the usual CIFAR code."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.layers import ChannelMap, CPDConv2d, padding_index
from norton_timm.utils import load_plain

FACTOR_KEY = re.compile(r'(.+)\.feature\.(pointwise|vertical|horizontal)\.weight')


def convert_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames and reorders tensors of the authors' or the usual CIFAR code for `model`; ours pass unchanged.

    Where `model` has option-A shortcuts and the file says nothing about them, their maps are set to the symmetric
    padding (or cropping) between the widths on both sides, as all code with such files does.
    """
    modules = dict(model.named_modules())
    own = set(model.state_dict())
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix('module.')
        factor = FACTOR_KEY.fullmatch(name)
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


def compress_rate_option(payload: Mapping[str, Any]) -> Any:
    """The pruning rates among the options (`args`) of the script that wrote a checkpoint; None where there are none.

    Its `rank` is not the rank of a decomposition: torchvision's scripts keep the number of the process there.
    """
    args = payload.get('args')
    options = vars(args) if isinstance(args, argparse.Namespace) else args
    return options.get('compress_rate') or None if isinstance(options, dict) else None


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
    """Prefix of a ResNet inside a larger network, such as `backbone.body.`; '' for the network itself."""
    first = re.compile(r'(.+\.)?layer1\.0\.conv1\.(weight|feature\.pointwise\.weight)')
    found = next((match for name in tensors if (match := first.fullmatch(name))), None)
    return (found[1] or '') if found else ''


def guess_architecture(tensors: Mapping[str, Tensor]) -> str:
    """The dense network that has these tensor names.

    Raises:
        ValueError: It is none of the published ones.
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


def filters_in(layer: str, tensors: Mapping[str, Tensor]) -> int:
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
    """Filters of a DenseNet layer, where the norm comes first: the growth up to the next norm."""
    norms = [n for n in tensors if re.fullmatch(r'(dense\d\.\d+|trans\d)\.bn1\.weight|bn\.weight', n)]
    if layer == 'conv1':
        return len(tensors[norms[0]])
    here = norms.index(f'{layer.rpartition(".")[0]}.bn1.weight')
    return len(tensors[norms[here + 1]]) - len(tensors[norms[here]])


def width_in(tensors: Mapping[str, Tensor], name: str) -> int:
    """Output channels that the checkpoint has for a layer, 0 where it has no such layer."""
    if f'{name}.weight' in tensors:
        return len(tensors[f'{name}.weight'])
    return filters_in(name, tensors) if f'{name}.feature.pointwise.weight' in tensors else 0


def _filter_major(tensor: Tensor, rank: int, kind: str) -> Tensor:
    """Rows r * O + o -> o * R + r; `horizontal` also becomes (O, R, 1, K)."""
    if tensor.dim() != 4 or len(tensor) % rank:
        return tensor  # the comparison of shapes reports it
    outputs = len(tensor) // rank
    rows = tensor.reshape(rank, outputs, *tensor.shape[1:]).transpose(0, 1)
    if kind == 'horizontal':
        return rows.reshape(outputs, rank, *tensor.shape[2:])
    return rows.reshape(tensor.shape)


def _head_of(model: nn.Module) -> str:
    return 'classifier' if isinstance(getattr(model, 'classifier', None), (nn.Linear, nn.Identity)) else 'fc'


def _numpy_scalars() -> list[Any]:
    """Types that occur in the pickle of a NumPy number (an accuracy in a checkpoint); none of them runs code."""
    import numpy as np
    from numpy.dtypes import Float32DType, Float64DType, Int64DType

    try:
        from numpy._core.multiarray import scalar
    except ImportError:  # NumPy 1
        from numpy.core.multiarray import scalar  # type: ignore[no-redef]
    return [scalar, np.dtype, Float64DType, Float32DType, Int64DType]
