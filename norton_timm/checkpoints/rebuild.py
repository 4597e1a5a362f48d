"""From a compressed network to its recipe, and from a recipe and tensors to the network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import BlurPool2d, DropPath
from torch import Tensor, nn

from norton_timm.checkpoints.recipe import CFG_KEYS, KWARGS, SETTINGS, WIDTHS, Recipe, check_kwargs, is_whole
from norton_timm.checkpoints.shapes import (
    Owned,
    base_name,
    build_base,
    decompose_shapes,
    first_channels,
    fit_tensors,
    owned_tensors,
    runs_through,
)
from norton_timm.graph import feature_entries, is_feature_extractor
from norton_timm.layers import LOW_RANK, ChannelMap, CPDConv2d, DroppedBlock, drop_blocks, factor_shapes, first_conv
from norton_timm.utils import tensors_in

_REGISTERED = ('_parameters', '_buffers', '_modules')
# state that does not define a network; `scales` of RoI pooling are set by the first image
_STATE = ('training', 'grad_checkpointing', 'tuned', 'num_classes', 'scales')


def recipe_of(
    model: nn.Module, architecture: str | None, model_kwargs: Mapping[str, Any] | None, metadata: dict[str, Any]
) -> Recipe:
    """The recipe of a compressed network; a trial shows that it builds the same modules, shapes and settings.

    Raises:
        ValueError: the base network is not known, or the network cannot be built from it.
    """
    known = getattr(model, 'norton_base', None) or {}
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    name = architecture or known.get('architecture') or cfg.get('architecture')
    if not name:
        raise ValueError(
            f'got a {type(model).__name__} that does not say which timm model it was made from, expected '
            "save(..., architecture='resnet50', model_kwargs={...}); torchvision's are called 'torchvision/googlenet'"
        )
    name = base_name(str(name))
    if model_kwargs is None:
        kwargs = _derive_kwargs(model, name, known.get('model_kwargs'))
    else:
        kwargs = {k: list(v) if isinstance(v, tuple) else v for k, v in model_kwargs.items()}
    check_kwargs(kwargs)
    owned = owned_tensors(model)
    recipe = Recipe(
        architecture=name, model_kwargs=kwargs, metadata=metadata, **_replaced_layers(model),
        features=[int(e['num_chs']) for e in feature_entries(model) if 'num_chs' in e],
        frozen=[n for n, o in owned.items() if isinstance(o.tensor, nn.Parameter) and not o.tensor.requires_grad],
        channels_last=[n for n, o in owned.items() if _is_channels_last(o.tensor)],
        pretrained_cfg={k: list(v) if isinstance(v, tuple) else v for k, v in cfg.items() if k in CFG_KEYS},
    )  # fmt: skip
    base = _decomposed_base(recipe)
    _check_modules(model, base, name, kwargs)
    shapes = {n: list(o.tensor.shape) for n, o in owned_tensors(base).items() if not o.persistent}
    cut = {n: list(o.tensor.shape) for n, o in owned.items() if n in shapes and list(o.tensor.shape) != shapes[n]}
    recipe = dataclasses.replace(recipe, buffers=cut)
    stored = {n: o.tensor.detach() for n, o in owned.items() if o.persistent}
    shapes_only = {n: t.cpu() if _holds_index(base, n) else t.to('meta') for n, t in stored.items()}
    _install(base, recipe, shapes_only)
    recipe = dataclasses.replace(recipe, numbers=_compare(model, base, owned))
    rebuild(Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))), shapes_only)  # the checks of a load
    return recipe


def _replaced_layers(model: nn.Module) -> dict[str, Any]:
    """Fields of a recipe for the layers that replaced those of the dense network."""
    layers, low_rank, maps, dropped = {}, {}, {}, []
    for path, module in model.named_modules():
        if isinstance(module, CPDConv2d):
            tuned = {('train' if k else 'eval'): form for k, form in module.tuned.items()}
            form = {'form': module.form} if module.form != 'auto' else {}
            layers[path] = {'rank': module.rank, **form, **tuned}
        elif isinstance(module, LOW_RANK):
            low_rank[path] = module.rank
        elif isinstance(module, DroppedBlock):
            dropped.append(path)
        elif isinstance(module, ChannelMap):
            maps[path] = module.in_channels
    return {'layers': layers, 'low_rank': low_rank, 'maps': maps, 'dropped': dropped}


def _holds_index(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition('.')[0]), ChannelMap)


def _is_channels_last(tensor: Tensor) -> bool:
    # by strides, because a 1x1 kernel is contiguous in both formats and convolutions look at its strides
    if tensor.dim() != 4:
        return False
    plain = torch.empty(tensor.shape, device='meta')
    return plain.stride() != tensor.stride() == torch.empty_like(plain, memory_format=torch.channels_last).stride()


def _derive_kwargs(model: nn.Module, name: str, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments that build a network like ``model``: those it was made with, updated from its present attributes."""
    made = getattr(model, '_model_args', {}) if known is None else known
    kwargs = {k: list(v) if isinstance(v, tuple) else v for k, v in made.items() if k in KWARGS and v is not None}
    info: Any = getattr(model, 'feature_info', None)
    if is_feature_extractor(model):
        kwargs.update(features_only=True, out_indices=[int(i) for i in info.out_indices])
    elif isinstance(getattr(model, 'num_classes', None), int):
        kwargs['num_classes'] = model.num_classes
    base = build_base(name, kwargs)
    more: dict[str, Any] = {}
    if _pool(model) not in (None, _pool(base)):
        more['global_pool'] = _pool(model)
    stem, dense_stem = first_conv(model), first_conv(base)
    if stem and dense_stem and stem[1].in_channels != dense_stem[1].in_channels:
        more['in_chans'] = stem[1].in_channels
    for key in ('drop_rate', 'drop_path_rate'):
        drops = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
        value = float(getattr(model, 'drop_rate', 0) or 0) if key == 'drop_rate' else max(drops, default=0.0)
        if value and key not in kwargs and not is_feature_extractor(model):
            more[key] = value
    return {**kwargs, **more}


def _pool(model: nn.Module) -> str | None:
    for owner in (model, getattr(model, 'head', None)):
        pool = getattr(owner, 'global_pool', None)
        kind = pool if isinstance(pool, str) else getattr(pool, 'pool_type', None)
        if isinstance(kind, str):
            return kind
    return None


def _check_modules(model: nn.Module, base: nn.Module, name: str, kwargs: Mapping[str, Any]) -> None:
    ours, theirs = ({n: type(m) for n, m in net.named_modules()} for net in (model, base))
    for path in [*ours, *theirs]:
        if ours.get(path) is not theirs.get(path):
            told = [t.__name__ if t else 'nothing' for t in (ours.get(path), theirs.get(path))]
            raise ValueError(
                f'got a network that is not {name} with {kwargs}: {path or "the network"} is {told[0]}, there '
                f'{told[1]}; give save(..., architecture=, model_kwargs=) what it was built with'
            )


def _compare(model: nn.Module, built: nn.Module, owned: Mapping[str, Owned]) -> dict[str, Any]:
    """Numbers to set after building; any other difference is an error."""
    numbers: dict[str, Any] = {}
    for (path, ours), theirs in zip(model.named_modules(), built.modules()):
        for key, value in vars(ours).items():
            other = vars(theirs).get(key, value)
            if key.startswith('_') or key in _STATE or not _is_plain(value) or not _is_plain(other) or value == other:
                continue
            where = f'{path}.{key}' if path else key
            if key not in WIDTHS + SETTINGS:
                raise ValueError(f'got {where} = {value}, expected {other} as in the network that the file would build')
            numbers[where] = value
    for name, made in owned_tensors(built).items():
        if not made.persistent and not torch.equal(made.tensor, owned[name].tensor.to(made.tensor.device)):
            raise ValueError(f'got a buffer {name} that was changed and is not part of a state dict')
    return numbers


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def surgery_of(model: nn.Module) -> dict[str, Any]:
    """What compression changed in a network, as plain values; for networks that are not built by name.

    :func:`repeat_surgery` repeats it on the dense network, with the tensors.
    """
    cut = {
        n: list(o.tensor.shape)
        for n, o in owned_tensors(model).items()
        if not o.persistent and isinstance(o.places[0][0], BlurPool2d)
    }
    recipe = Recipe(architecture='', buffers=cut, **_replaced_layers(model))
    return {key: value for key, value in recipe.to_dict().items() if key != 'architecture'}


def repeat_surgery(model: nn.Module, surgery: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Turn a dense network into the compressed one again, in place; afterwards all its parameters take gradients.

    Args:
        model: the dense network; only the shapes of its weights matter.
        surgery: what :func:`surgery_of` returned for the compressed network.
        tensors: the state dict of the compressed network.

    Raises:
        ValueError: surgery and tensors do not fit the network.
    """
    features = [int(e['num_chs']) for e in feature_entries(model) if 'num_chs' in e]
    recipe = Recipe.from_dict({**surgery, 'architecture': '', 'features': features})
    _replace_layers(model, recipe)
    _install(model, recipe, tensors)


def rebuild(recipe: Recipe, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The compressed network, in evaluation mode, holding ``tensors``.

    Raises:
        ValueError: recipe and tensors do not make a network.
    """
    widest = max((n for t in tensors.values() for n in t.shape), default=0)
    for key in ('num_classes', 'in_chans', 'head_hidden_size'):
        if not isinstance(width := recipe.model_kwargs.get(key) or 0, int) or width > widest:
            raise ValueError(f'model_kwargs: got {key}={recipe.model_kwargs[key]}, which no tensor is wide enough for')
    model = _decomposed_base(recipe)
    size = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size') or (3, 224, 224)
    _install(model, recipe, tensors)
    # tensors in plain attributes (anchors, say) do not move to the meta device with the rest
    constants = any(tensors_in(v) for m in model.modules() for k, v in vars(m).items() if k not in _REGISTERED)
    if first_conv(model) is not None and not constants:
        channels = recipe.model_kwargs.get('in_chans') or size[0]
        dtype = next(model.parameters()).dtype
        runs_through(model, torch.empty(2, channels, *size[-2:], device='meta', dtype=dtype))
    model.norton_base = {'architecture': recipe.architecture, 'model_kwargs': dict(recipe.model_kwargs)}  # type: ignore[assignment]
    return model


def _decomposed_base(recipe: Recipe) -> nn.Module:
    base = build_base(recipe.architecture, recipe.model_kwargs)
    _replace_layers(base, recipe)
    return base


def _replace_layers(model: nn.Module, recipe: Recipe) -> None:
    drop_blocks(model, recipe.dropped)
    decompose_shapes(model, {name: facts['rank'] for name, facts in recipe.layers.items()})
    factor_shapes(model, recipe.low_rank, 'meta')


def _install(model: nn.Module, recipe: Recipe, tensors: Mapping[str, Tensor]) -> None:
    owned = owned_tensors(model)
    tensors = dict(tensors)
    for name, shape in recipe.buffers.items():
        if name not in owned or owned[name].persistent:
            raise ValueError(f'got a buffer {name[:80]!r} that the network does not have')
        old = owned[name].tensor
        if len(shape) != old.dim() or any(n > most for n, most in zip(shape, old.shape)):
            raise ValueError(f'got buffer {name} of shape {shape}, expected at most {tuple(old.shape)}')
        tensors[name] = first_channels(old, tuple(shape))
    for name in recipe.channels_last:
        if name not in tensors or tensors[name].dim() != 4:
            raise ValueError(f'got channels_last for {name[:80]!r}, which is no tensor of four dimensions')
        plain = tensors[name]
        tensors[name] = torch.empty_like(plain, memory_format=torch.channels_last).copy_(plain)
    fit_tensors(model, tensors, recipe.maps)
    for name, facts in recipe.layers.items():
        layer: CPDConv2d = model.get_submodule(name)  # type: ignore[assignment]
        layer.form = facts.get('form', 'auto')
        layer.tuned = {k == 'train': facts[k] for k in ('eval', 'train') if k in facts}
    frozen = set(recipe.frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
    for where, value in recipe.numbers.items():
        _set_number(model, where, value)
    _set_features(model, recipe.features)
    cfg = getattr(model, 'pretrained_cfg', None)
    if isinstance(cfg, dict):
        cfg.update({k: tuple(v) if isinstance(v, list) else v for k, v in recipe.pretrained_cfg.items()})


def _set_number(model: nn.Module, where: str, value: Any) -> None:
    path, _, key = where.rpartition('.')
    modules = dict(model.named_modules())
    old = vars(modules[path]).get(key, where) if path in modules else where
    whole = key in WIDTHS and is_whole(value) and is_whole(old) and 1 <= value <= old
    setting = key in SETTINGS and (value is None or (isinstance(value, (int, float)) and abs(value) <= 1000))
    if old is where or not (whole or setting):
        raise ValueError(f'numbers: got {where[:80]} = {str(value)[:20]}, which the network does not have or allow')
    setattr(modules[path], key, value)


def _set_features(model: nn.Module, channels: list[int]) -> None:
    entries = [e for e in feature_entries(model) if 'num_chs' in e]
    if len(entries) != len(channels) or any(n > e['num_chs'] for n, e in zip(channels, entries)):
        raise ValueError(f'features: got {channels[:8]}, expected at most {[e["num_chs"] for e in entries]}')
    for entry, n in zip(entries, channels):
        entry['num_chs'] = n
