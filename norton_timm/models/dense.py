"""What a compression starts from: a timm model with weights from timm, from a file, or random, and a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import is_model
from torch import nn

from norton_timm.checkpoints import network_tensors, preprocessing_in, read_checkpoint, read_metadata
from norton_timm.compression import CompressionSpec
from norton_timm.models.builder import adapt_state_dict
from norton_timm.models.compressed import spec_of
from norton_timm.utils import undisturbed


def dense_model(name: str, pretrained: bool = False, checkpoint: Path | None = None, **kwargs: Any) -> nn.Module:
    """A timm model in evaluation mode. Its `pretrained_cfg` says how images are prepared, as the file does if it does.

    Args:
        name: timm's name, with or without a tag.
        pretrained: load the published weights.
        checkpoint: load these instead: .safetensors, or a pickle of tensors and plain data.
        kwargs: for the model's constructor.

    Raises:
        ValueError: an unknown name, both sources, weights that are not there or do not fit.

    Example:
        >>> model = dense_model('resnet50', pretrained=True)
        >>> model = dense_model('resnet56_cifar', checkpoint=Path('resnet56.pt'), num_classes=10)
    """
    if not is_model(name.partition('.')[0]) or ':' in name:
        near = difflib.get_close_matches(name.partition('.')[0], timm.list_models(), 3)
        raise ValueError(f'got model {name!r}, expected a timm name' + (f' such as {", ".join(near)}' if near else ''))
    if pretrained and checkpoint is not None:
        raise ValueError('got pretrained weights and a checkpoint, expected one of them')
    try:
        model = timm.create_model(name, pretrained=pretrained, **kwargs).eval()
    except Exception as error:  # a download fails in as many ways as there are servers and caches
        raise ValueError(f'cannot make {name}: {" ".join(str(error).split())[:1000]}') from error
    if checkpoint is not None:
        load_weights(model, checkpoint)
        cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
        model.pretrained_cfg = {**cfg, **preprocessing_in(checkpoint)}  # type: ignore[assignment]
    return model


def set_normalisation(model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Record in a timm model's configuration how its images were normalised.

    Args:
        model: the network; files saved of it carry the record.
        mean: of red, green and blue, for values in 0..1.
        std: of the same; None for both leaves the model's own.

    Raises:
        ValueError: one without the other, not three numbers, or a deviation of 0.
    """
    if mean is None and std is None:
        return
    if mean is None or std is None or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f'got mean {mean} and std {std}, expected three numbers each, std above 0')
    known: Any = getattr(model, 'pretrained_cfg', None) or {}
    model.pretrained_cfg = {**known, 'mean': tuple(mean), 'std': tuple(std)}  # type: ignore[assignment]


def set_input_size(model: nn.Module, size: int | tuple[int, int] | None) -> None:
    """Record in a timm model's configuration the size of its images, for which files saved of it are evaluated.

    Args:
        model: the network.
        size: pixels a side, or (height, width); None leaves the model's own.
    """
    known: Any = getattr(model, 'pretrained_cfg', None) or {}
    if size is not None:
        channels = next(iter(known.get('input_size') or (3,)))
        height, width = (size, size) if isinstance(size, int) else size
        model.pretrained_cfg = {**known, 'input_size': (channels, height, width)}  # type: ignore[assignment]


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a dense network's weights from a file, all of them.

    Raises:
        ValueError: a file that is missing or damaged, would run code, or does not fit the network.
    """
    if path.suffix == '.safetensors':
        try:
            with undisturbed():
                tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f'{path}: not a safetensors file: {" ".join(str(error).split())[:200]}') from None
    else:
        tensors = network_tensors(read_checkpoint(path))
    try:
        model.load_state_dict(adapt_state_dict(tensors, model))
    except RuntimeError as error:
        told = ' '.join(str(error).split())
        raise ValueError(f'{path} does not fit {type(model).__name__}: {told[:300]}') from None


def read_recipe(source: str | None = None, **fields: Any) -> CompressionSpec:
    """A recipe, with single fields given or changed.

    Args:
        source: a YAML file, a tag such as ``norton_resnet50.r078``, or a network that ``tools/compress.py`` wrote.
        fields: of ``CompressionSpec``.

    Raises:
        ValueError: neither a source nor ranks or rates, a file without a recipe, or a recipe that makes no sense.
    """
    rates = fields.get('rates')
    if isinstance(rates, str) and '[' not in rates:  # a plain number from a command line
        try:
            fields['rates'] = float(rates)
        except ValueError:
            raise ValueError(f'rates: got {rates[:60]!r}, expected a number or [rate]*count joined by +') from None
    if source is None:
        if not {'rank', 'rates'} & set(fields):
            raise ValueError('got no recipe, expected --spec FILE, --rank or --rates, or a budget such as --macs 0.5')
        return CompressionSpec.from_dict(fields)
    is_tag = source.startswith(('norton_', 'coring_')) and not Path(source).exists()
    if source.endswith('.safetensors'):
        found = read_metadata(source).get('spec')
        if not isinstance(found, dict):
            raise ValueError(f'{source} holds no recipe, expected a file of tools/compress.py')
        spec = CompressionSpec.from_dict(found)
    else:
        spec = spec_of(source) if is_tag else CompressionSpec.from_yaml(Path(source))
    return CompressionSpec.from_dict({**spec.to_dict(), **fields})
