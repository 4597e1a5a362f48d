"""The recipe in a file: all that is needed beside the tensors to build a compressed network again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from norton_timm.layers import FORMS

FORMAT = 1
KWARGS = (
    'num_classes', 'in_chans', 'global_pool', 'features_only', 'out_indices', 'output_stride', 'drop_rate',
    'drop_path_rate', 'drop_block_rate', 'act_layer', 'norm_layer', 'aux_logits', 'transform_input',
    'init_weights', 'min_size', 'max_size', 'trainable_backbone_layers', 'num_keypoints',
    'head_hidden_size',
)  # fmt: skip
WIDTHS = ('num_features', 'head_hidden_size', 'in_features', 'hidden_size')  # whole numbers that surgery lowers
SETTINGS = ('eps', 'momentum', 'p', 'drop_prob', 'drop_rate', 'negative_slope')  # numbers that users change
CFG_KEYS = (
    'architecture', 'tag', 'num_classes', 'input_size', 'pool_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean',
    'std', 'first_conv', 'classifier', 'license',
)  # fmt: skip
_MOST = 1_000_000  # larger numbers of classes, channels or pixels are a broken file


@dataclass(frozen=True)
class Recipe:
    """How to build a compressed network, without its tensors.

    Attributes:
        architecture: timm's name of the dense network, or ``torchvision/`` and torchvision's name.
        model_kwargs: arguments of its constructor; ``KWARGS`` lists the names allowed.
        layers: decomposed layers: rank, form, and the forms measured for inference and training.
        low_rank: rank of each linear layer or convolution that became two.
        dropped: blocks that were left out.
        maps: input channels of each :class:`ChannelMap`.
        buffers: shape of each buffer that is not stored and that surgery cut.
        numbers: other numbers that differ from the dense network's, by dotted attribute.
        features: channels of each entry of ``feature_info``.
        frozen: parameters that take no gradient.
        channels_last: tensors in that memory format.
        pretrained_cfg: timm's description of input, preprocessing and head.
        metadata: what the caller of ``save`` added.
    """

    architecture: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    low_rank: dict[str, int] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    maps: dict[str, int] = field(default_factory=dict)
    buffers: dict[str, list[int]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    features: list[int] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    channels_last: list[str] = field(default_factory=list)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without empty fields."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {'format': FORMAT, **{k: v for k, v in values.items() if v not in ({}, [])}}

    @classmethod
    def from_dict(cls, values: Any) -> Recipe:
        """Inverse of :meth:`to_dict`, for values that are not trusted.

        Raises:
            ValueError: another format, or a malformed field.
        """
        if not isinstance(values, dict):
            raise ValueError(f'got a recipe of type {type(values).__name__}, expected a mapping')
        values = dict(values)
        version = values.pop('format', None)
        if version != FORMAT or isinstance(version, bool):
            raise ValueError(f'got format {str(version)[:20]!r}, this version of norton_timm reads format {FORMAT}')
        defaults = {f.name: f.default_factory for f in dataclasses.fields(cls) if f.name != 'architecture'}
        unknown = [k for k in values if k not in defaults and k != 'architecture']
        if unknown or not isinstance(values.get('architecture'), str):
            raise ValueError(f'got a recipe with {unknown[:3] or "no architecture"}, expected {", ".join(defaults)}')
        for key, make in defaults.items():
            if not isinstance(values.get(key, make()), type(make())):  # type: ignore[operator,misc]
                raise ValueError(f'got {key} of type {type(values[key]).__name__}, expected {type(make()).__name__}')  # type: ignore[operator,misc]
        recipe = cls(**values)
        check_kwargs(recipe.model_kwargs)
        for name, facts in recipe.layers.items():
            _check_layer(name, facts)
        counts = [
            *recipe.low_rank.values(),
            *recipe.maps.values(),
            *recipe.features,
            *(n for s in recipe.buffers.values() for n in _list(s)),
        ]
        if any(not is_whole(n) or n < 1 for n in counts):
            raise ValueError('got channels in the recipe that are not whole numbers of at least 1')
        _check_cfg(recipe.pretrained_cfg)
        names = [*recipe.frozen, *recipe.channels_last, *recipe.dropped]
        if any(not isinstance(n, str) for n in names):
            raise ValueError('got a name of a parameter or block that is no text')
        return recipe


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number of plausible size, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and -_MOST <= value <= _MOST


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Check the arguments of a model's constructor.

    Raises:
        ValueError: a name that is not in ``KWARGS``, or a value that is no plain number or name.
    """
    for key, value in kwargs.items():
        if key not in KWARGS:
            raise ValueError(f'model_kwargs: got {str(key)[:40]!r}, expected some of {", ".join(KWARGS)}')
        for v in value if isinstance(value, (list, tuple)) and len(value) <= 64 else [value]:
            plain = v is None or isinstance(v, bool) or is_whole(v) or (isinstance(v, str) and len(v) <= 40)
            if not plain and not (isinstance(v, float) and math.isfinite(v)):
                raise ValueError(f'model_kwargs: got {key}={str(value)[:40]!r}, expected a plain number or name')


def _check_cfg(cfg: Mapping[str, Any]) -> None:
    for key, value in cfg.items():
        flat = value if isinstance(value, list) else [value]
        sizes = key in ('input_size', 'pool_size') and value is not None
        good = len(flat) <= 16 and all(v is None or isinstance(v, (bool, int, float, str)) for v in flat)
        if key not in CFG_KEYS or not good or (sizes and not all(is_whole(v) and v > 0 for v in flat)):
            raise ValueError(f'pretrained_cfg: got {str(key)[:40]}={str(value)[:40]!r}, expected plain values')
        if key == 'architecture' and not isinstance(value, str):
            raise ValueError(f'pretrained_cfg: got architecture {str(value)[:40]!r}, expected a name')


def _check_layer(name: str, facts: Any) -> None:
    good = isinstance(facts, dict) and set(facts) <= {'rank', 'form', 'eval', 'train'} and is_whole(facts.get('rank'))
    if not good or not 1 <= facts['rank'] <= 4096:
        raise ValueError(f'layers: got {str(facts)[:60]} for {name[:80]!r}, expected a rank of 1 to 4096')
    for key in ('form', 'eval', 'train'):
        if facts.get(key, 'auto') not in FORMS:
            raise ValueError(f'layers: got {key} {str(facts[key])[:20]!r}, expected one of {", ".join(FORMS)}')
