"""Fold batch norms into the convolutions that feed them; the network computes the same with fewer layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from timm import layers as timm_layers
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from torchvision.ops.misc import FrozenBatchNorm2d

from norton_timm.layers import handler_of
from norton_timm.utils import before_call, evaluating, removing, replace_module, tensors_in, tied_modules

_ACTIVATING = (timm_layers.BatchNormAct2d, timm_layers.SyncBatchNormAct, timm_layers.FrozenBatchNormAct2d)
FOLDED_NORMS: tuple[type, ...] = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, *_ACTIVATING)


class _Readers(TorchDispatchMode):
    """Runs a model once and records which operations read each convolution's output, and its weight.

    Args:
        weights: the layer of every weight that a norm can be folded into.

    Attributes:
        pairs: (layer, norm) -> calls in which the norm was the only reader of the layer's output.
        calls: layer or norm -> its calls.
        shared: layers whose weight an operation outside of the layer reads too.
    """

    def __init__(self, weights: Mapping[Tensor, nn.Module]) -> None:
        super().__init__()
        self.shared: set[nn.Module] = set()
        self._weights = weights
        self._running: list[nn.Module | None] = [None]
        self.pairs: Counter[tuple[nn.Module, nn.Module]] = Counter()
        self.calls: Counter[nn.Module] = Counter()
        self._made: MutableMapping[Tensor, list[Any]] = WeakTensorKeyDictionary()  # [layer, norm, reads elsewhere]
        self._entries: list[list[Any]] = []
        self._in_norm = False

    def run(self, layer: nn.Module, x: Tensor) -> None:
        self._running.append(layer)

    def made(self, layer: nn.Module, out: Tensor) -> None:
        self._running.pop()
        entry = [layer, None, 0]
        self.calls[layer] += 1
        self._made[out] = entry
        self._entries.append(entry)

    def enter(self, norm: nn.Module, x: Tensor) -> None:
        self.calls[norm] += 1
        entry = self._made.get(x)
        if entry is not None:
            if entry[1] is not None:
                entry[2] += 1
            entry[1] = norm
        self._in_norm = True

    def leave(self) -> None:
        self._in_norm = False

    def read(self, values: Any) -> None:
        for tensor in tensors_in(values):
            entry = self._made.get(tensor)
            if entry is not None:
                entry[2] += 1
            layer = self._weights.get(tensor)
            if layer is not None and layer is not self._running[-1]:
                self.shared.add(layer)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._in_norm:
            self.read(args)
            self.read(kwargs or {})
        return func(*args, **(kwargs or {}))

    def finish(self) -> None:
        for layer, norm, elsewhere in self._entries:
            if norm is not None and not elsewhere:
                self.pairs[layer, norm] += 1


def _foldable_pairs(model: nn.Module, example_input: Any) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of a layer and the norm that is the only reader of its output, at every call of both."""
    scaled = [module for module in model.modules() if _scales(module)]
    readers, hooks = _Readers({getattr(layer, _scales(layer)): layer for layer in scaled}), []
    for module in model.modules():
        if _scales(module):
            hooks.append(before_call(module, readers.run))
            hooks.append(module.register_forward_hook(lambda m, _, out: readers.made(m, out)))
        elif type(module) in FOLDED_NORMS:
            hooks.append(before_call(module, readers.enter))
            hooks.append(module.register_forward_hook(lambda *_: readers.leave()))
    with removing(hooks), evaluating(model), readers:
        readers.read(model(example_input))
    readers.finish()
    tied = tied_modules(model)
    return [
        (layer, norm)
        for (layer, norm), count in readers.pairs.items()
        if count == readers.calls[layer] == readers.calls[norm]
        and layer not in tied
        and layer not in readers.shared
        and isinstance(layer._parameters.get(_scales(layer)), nn.Parameter)  # pruning computes it in a hook
        and getattr(norm, 'running_mean', None) is not None
        and not (_transposed(layer) and layer.groups > 1)
    ]


def _scales(layer: nn.Module) -> str:
    """Name of the parameter that a norm can be folded into, '' if there is none."""
    handler = handler_of(layer)
    return '' if handler is None else handler.scales


def _transposed(layer: Any) -> bool:
    return bool(getattr(layer, 'transposed', False))


@torch.no_grad()
def _absorb(layer: Any, norm: Any) -> None:
    """Give the layer the scale and shift of the norm."""
    old = getattr(layer, _scales(layer))
    weight, bias = fuse_conv_bn_weights(
        old.double(), None if layer.bias is None else layer.bias.double(),
        norm.running_mean.double(), norm.running_var.double(), norm.eps,
        None if norm.weight is None else norm.weight.double(), None if norm.bias is None else norm.bias.double(),
        transpose=_transposed(layer),
    )  # fmt: skip
    old.copy_(weight)
    layer.bias = nn.Parameter(bias.to(old.dtype), old.requires_grad)


def fold_batch_norm(model: nn.Module, example_input: Any) -> dict[str, str]:
    """Fold, in place, every batch norm that is the only reader of one convolution's output.

    A CPDConv2d takes the norm into its last factor and its bias. The activation of timm's ``BatchNormAct2d`` stays.
    A norm stays if it stands before a convolution, or if another operation reads its input too.

    Args:
        model: a network in evaluation mode; one forward pass finds the readers of each output.
        example_input: what its ``forward`` takes.

    Returns:
        Name of the layer that absorbed each norm, by the norm's name.

    Example:
        >>> folded = fold_batch_norm(model.eval(), torch.rand(1, 3, 224, 224))
    """
    names = {m: n for n, m in model.named_modules()}
    folded = {}
    for layer, norm in _foldable_pairs(model, example_input):
        _absorb(layer, norm)
        replace_module(model, names[norm], norm.act if isinstance(norm, _ACTIVATING) else nn.Identity())
        folded[names[norm]] = names[layer]
    return folded
