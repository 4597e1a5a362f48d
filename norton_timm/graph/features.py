"""What a timm model says about its widths (feature_info, num_features, ...): read before surgery, updated after it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from norton_timm.layers import LOW_RANK, is_counted, nearest_handler
from norton_timm.utils import after_call, before_call, evaluating, removing

Shapes = dict[str, tuple[int, ...]]


def feature_entries(model: nn.Module) -> list[dict[str, Any]]:
    """The model's ``feature_info`` as its own list of dicts; empty where it has none."""
    info = getattr(model, 'feature_info', None)
    entries = getattr(info, 'info', info)
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, (list, tuple)) else []


def is_feature_extractor(model: nn.Module) -> bool:
    """Whether the model says that its outputs are features (``features_only=True``).

    A network with heads may carry the ``feature_info`` of its encoder: :func:`are_features` looks at the outputs.
    """
    return hasattr(getattr(model, 'feature_info', None), 'out_indices')


def are_features(model: nn.Module, outputs: Any) -> bool:
    """Whether outputs of a model are the feature maps that its ``feature_info`` describes, one for each index."""
    if not is_feature_extractor(model):
        return False
    maps = list(outputs.values()) if isinstance(outputs, dict) else outputs
    if not isinstance(maps, (list, tuple)) or not all(isinstance(m, Tensor) and m.dim() > 2 for m in maps):
        return False
    entries, indices = feature_entries(model), list(model.feature_info.out_indices)  # type: ignore[union-attr, arg-type]
    if len(maps) != len(indices) or max(indices, default=-1) >= len(entries):
        return False
    return all(entries[k].get('num_chs') in (m.shape[1], m.shape[-1]) for k, m in zip(indices, maps))


class _Claim(NamedTuple):
    """A number of channels that a module states, and where it can be measured."""

    module: str
    key: str | int  # an attribute, or the number of an entry of `feature_info`
    point: str  # key of the shapes
    dim: int


class Metadata:
    """Where the numbers of channels in a model's metadata can be measured, found while they are still right.

    Make one before surgery and call `refresh` after it. Modules inside the model, such as an encoder with a
    ``feature_info`` of its own, are looked at as well.

    Args:
        model: the network before surgery.
        example_input: what its ``forward`` takes.
    """

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        self._extractors = {name for name, m in model.named_modules() if is_feature_extractor(m)}
        shapes = self._measure(model, example_input)
        self._claims: list[_Claim] = []

        def claim(module: str, key: str | int, value: Any, *points: str) -> None:
            for point in points:
                shape = shapes.get(point, ())
                # channels lie behind the batch, or last
                dim = next((d for d in (1, len(shape) - 1) if 0 < d < len(shape) and shape[d] == value), None)
                if dim is not None:
                    self._claims.append(_Claim(module, key, point, dim))
                    return

        for name, module in model.named_modules():
            for k, entry in enumerate(feature_entries(module)):
                claim(name, k, entry.get('num_chs'), f'{name}|feature{k}')
        for key in ('num_features', 'head_hidden_size'):
            claim('', key, getattr(model, key, None), f'|{key}')
        for name, head in _heads(model):
            claim(name, 'in_features', vars(head).get('in_features'), f'{name}|enters', f'{name}|last')
            for key in ('num_features', 'hidden_size'):
                claim(name, key, vars(head).get(key), f'{name}|last', f'{name}|enters')

    def refresh(self, model: nn.Module, example_input: Any) -> None:
        """Write the numbers of channels after surgery into ``model``; this runs it once."""
        shapes = self._measure(model, example_input)
        for module, key, point, dim in self._claims:
            owner, width = model.get_submodule(module), shapes[point][dim]
            if isinstance(key, int):
                feature_entries(owner)[key]['num_chs'] = width
            else:
                setattr(owner, key, width)

    def _measure(self, model: nn.Module, example_input: Any) -> Shapes:
        """Shapes of all tensors that the metadata describes, from one forward pass."""
        shapes: Shapes = {f'{name}|last': (0, _last_width(head)) for name, head in _heads(model)}
        hooks = []

        def note(point: str, value: Any) -> None:
            if isinstance(value, Tensor):
                shapes[point] = tuple(value.shape)

        def note_input(point: str, module: nn.Module, x: Any) -> None:
            note(point, x)

        def note_output(point: str, module: nn.Module, x: Any, output: Any) -> None:
            note(point, output)

        def note_features(name: str, module: nn.Module, x: Any, outputs: Any) -> None:
            maps = list(outputs.values()) if isinstance(outputs, dict) else outputs
            if isinstance(maps, (list, tuple)):
                for index, output in zip(module.feature_info.out_indices, maps):  # type: ignore[union-attr, arg-type]
                    note(f'{name}|feature{index}', output)

        for name, module in model.named_modules():
            if name in self._extractors:
                hooks.append(after_call(module, partial(note_features, name)))
                continue
            for k, entry in enumerate(feature_entries(module)):
                try:
                    place, point = module.get_submodule(entry.get('module', '')), f'{name}|feature{k}'
                except AttributeError:
                    continue
                if entry.get('hook_type') == 'forward_pre':
                    hooks.append(before_call(place, partial(note_input, point)))
                else:
                    hooks.append(after_call(place, partial(note_output, point)))
        for name, head in _heads(model):
            hooks.append(before_call(head, partial(note_input, f'{name}|enters')))
        with removing(hooks), evaluating(model):
            if '' in self._extractors or not hasattr(model, 'forward_features'):
                model(example_input)
            else:
                features = model.forward_features(example_input)
                note('|num_features', features)
                if hasattr(model, 'forward_head') and isinstance(features, Tensor):
                    note('|head_hidden_size', model.forward_head(features, pre_logits=True))
        return shapes


def _heads(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of several layers that note how wide their input is."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(vars(module).get('in_features'), int) and any(True for _ in module.children()) and _layers(module)
    ]


def _layers(head: nn.Module) -> list[nn.Module]:
    """Convolutions and linear layers of a head, in order; one of low rank counts as one."""
    parts = {m for low in head.modules() if isinstance(low, LOW_RANK) for m in low}
    return [m for m in head.modules() if isinstance(m, LOW_RANK) or (is_counted(m) and m not in parts)]


def _last_width(head: nn.Module) -> int:
    """Width of what the last layer of a head reads."""
    last = _layers(head)[-1]
    handler = nearest_handler(last)
    return last.in_features if handler is None else handler.widths(last)[0]  # type: ignore[return-value]
