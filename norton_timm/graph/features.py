"""What a timm model says of itself (feature_info, num_features, ...): read before surgery, made true after."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from norton_timm.utils import evaluating, removing


def feature_entries(model: nn.Module) -> list[dict[str, Any]]:
    """The model's ``feature_info`` as its own list of dicts; empty where it has none."""
    info = getattr(model, 'feature_info', None)
    entries = getattr(info, 'info', info)
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, (list, tuple)) else []


def is_feature_extractor(model: nn.Module) -> bool:
    """Whether the model's outputs are the features that its ``feature_info`` describes (``features_only=True``)."""
    return hasattr(getattr(model, 'feature_info', None), 'out_indices')


def _measure(model: nn.Module, example_input: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of everything the metadata speaks of, from one forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = []
    if not is_feature_extractor(model):
        for number, entry in enumerate(feature_entries(model)):
            try:
                module = model.get_submodule(entry.get('module', ''))
            except AttributeError:
                continue

            def record(_: nn.Module, args: Any, out: Any = None, key: str = f'feature{number}') -> None:
                value = args[0] if out is None else out
                if isinstance(value, Tensor):
                    shapes[key] = tuple(value.shape)

            if entry.get('hook_type') == 'forward_pre':
                hooks.append(module.register_forward_pre_hook(record))
            else:
                hooks.append(module.register_forward_hook(record))
    with removing(hooks), evaluating(model):
        if hasattr(model, 'forward_features') and not is_feature_extractor(model):
            features = model.forward_features(example_input)
            shapes['num_features'] = tuple(features.shape) if isinstance(features, Tensor) else ()
            if hasattr(model, 'forward_head') and isinstance(features, Tensor):
                hidden = model.forward_head(features, pre_logits=True)
                shapes['head_hidden_size'] = tuple(hidden.shape)
        else:
            outputs = model(example_input)
            if is_feature_extractor(model):
                outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
                for index, output in zip(model.feature_info.out_indices, outputs):  # type: ignore[union-attr]
                    shapes[f'feature{index}'] = tuple(output.shape)
    return shapes


class Metadata:
    """Where a model's own numbers of channels can be read off, found while they are still true.

    Args:
        model: the network before surgery.
        example_input: what its ``forward`` takes.
    """

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        shapes = _measure(model, example_input)
        self._dims: dict[str, int] = {}
        for key, value in self._claims(model).items():
            shape = shapes.get(key, ())
            for dim in (1, len(shape) - 1):  # NCHW first, then channels last
                if 0 < dim < len(shape) and shape[dim] == value:
                    self._dims[key] = dim
                    break
        self._heads = [
            name
            for name, m in model.named_modules()
            if not isinstance(m, nn.Linear)
            and isinstance(getattr(m, 'in_features', None), int)
            and isinstance(getattr(m, 'fc', None), (nn.Linear, nn.Conv2d))
        ]

    @staticmethod
    def _claims(model: nn.Module) -> dict[str, int]:
        claims = {f'feature{k}': int(e['num_chs']) for k, e in enumerate(feature_entries(model)) if 'num_chs' in e}
        for name in ('num_features', 'head_hidden_size'):
            if isinstance(getattr(model, name, None), int):
                claims[name] = getattr(model, name)
        return claims

    def refresh(self, model: nn.Module, example_input: Any) -> None:
        """Write the numbers that hold after surgery into ``model``; this runs it once."""
        shapes = _measure(model, example_input)
        infos = feature_entries(model)
        for key, dim in self._dims.items():
            if key.startswith('feature'):
                infos[int(key[7:])]['num_chs'] = shapes[key][dim]
            else:
                setattr(model, key, shapes[key][dim])
        for name in self._heads:
            head = model.get_submodule(name)
            fc = head.fc
            width = fc.in_channels if isinstance(fc, nn.Conv2d) else fc.in_features  # type: ignore[union-attr]
            if getattr(head, 'num_features', None) == head.in_features:
                head.num_features = width
            head.in_features = width
