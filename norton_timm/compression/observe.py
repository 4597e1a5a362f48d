"""What one forward pass tells about a network's layers: their order, their norms, and the sums that they enter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.ops.misc import FrozenBatchNorm2d

from norton_timm.layers import ChannelMap, CPDConv2d
from norton_timm.utils import after_call, evaluating, removing

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
_KINDS = (nn.Conv2d, CPDConv2d, nn.Linear)
_ADDS = ('add', 'add_', '__add__', '__iadd__', '__radd__')


@dataclass
class Order:
    """The layers of a network, in the order in which they run.

    Attributes:
        layers: 2-d convolutions and linear layers by name.
        calls: how often each layer runs in one pass.
        positions: positions of each layer's output map, of its first call.
        numbers: how many numbers each layer reads and makes per image, in its first call.
        norms: the batch norm that reads a layer's output, by the layer's name; only norms that run once.
        joins: layer -> module whose output is added to what the layer makes. Of two layers in a sum the later one is
            named, because the other's output is known when it runs.
        blocks: residual blocks whose shortcut is their own input, which they could be replaced by.
    """

    layers: dict[str, Any] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    positions: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, tuple[int, int]] = field(default_factory=dict)
    norms: dict[str, Any] = field(default_factory=dict)
    joins: dict[str, str] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)

    def has_bias(self, name: str) -> bool:
        """Whether a layer's mean output can be set: by its bias, or by the norm after it."""
        return name in self.norms or getattr(self.layers[name], 'bias', None) is not None

    def shift(self, name: str, by: Tensor) -> None:
        """Add (O,) to a layer's mean output; without bias and norm nothing happens."""
        layer, norm = self.layers[name], self.norms.get(name)
        if getattr(layer, 'bias', None) is not None:
            layer.bias.data += by.to(layer.bias)
        elif norm is not None:
            norm.running_mean -= by.to(norm.running_mean)

    def scale(self, name: str) -> Tensor | None:
        """What the norm after a layer multiplies each output by (O,); None without a norm, or if it is not linear."""
        norm = self.norms.get(name)
        if norm is None:
            return None
        scale = (norm.running_var + norm.eps).rsqrt()
        return scale if norm.weight is None else scale * norm.weight.detach()


class _Sums(TorchFunctionMode):
    """Records the pairs of modules whose outputs are added, and whether one of them went through a ChannelMap."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, str] = {}  # by id: tensors are kept, or another could get the same
        self.keep: list[Tensor] = []
        self.sums: list[tuple[str, str, bool]] = []
        self.mapped: set[int] = set()  # outputs of a ChannelMap that changes nothing as yet

    def note(self, name: str, output: Tensor) -> None:
        self.keep.append(output)
        self.made.setdefault(id(output), name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, '__name__', '')
        terms = [a for a in args if isinstance(a, Tensor)] if name in _ADDS else []
        makers = [self.made.get(id(t)) for t in terms]
        out = func(*args, **(kwargs or {}))
        if len(terms) == 2:
            if all(makers) and terms[0].shape == terms[1].shape:
                self.sums.append((makers[0], makers[1], any(id(t) in self.mapped for t in terms)))  # type: ignore[arg-type]
            self.made.pop(id(out), None)  # of an addition in place
        return out


def observe(model: nn.Module, example_input: Any) -> Order:
    """Run a network once and note its layers.

    Example:
        >>> order = observe(timm.create_model('resnet18'), torch.rand(1, 3, 224, 224))
        >>> order.norms['conv1'], order.joins['layer1.1.conv2']
        (BatchNorm2d(64, ...), 'layer1.0.act2')
    """
    names = {m: n for n, m in model.named_modules()}
    order, sums = Order(), _Sums()
    makers: dict[int, str] = {}
    pairs: dict[str, Any] = {}
    finished: dict[str, int] = {}
    passes: dict[str, str | None] = {}  # module with equal shapes of input and output -> maker of its input
    norm_calls: Counter[Any] = Counter()

    def note(module: nn.Module, x: Any, out: Any) -> None:
        if not isinstance(out, Tensor):
            return
        name = names[module]
        if isinstance(module, _KINDS):
            order.layers.setdefault(name, module)
            order.calls[name] += 1
            last = out.shape[-1] if isinstance(module, nn.Linear) else out.shape[1]
            order.positions.setdefault(name, out[0].numel() // last if out.dim() > 1 else 1)
            order.numbers.setdefault(name, (x[0].numel(), out[0].numel()))
            makers[id(out)] = name
        elif isinstance(module, _BATCH_NORMS) and module.running_mean is not None:
            norm_calls[module] += 1
            if isinstance(x, Tensor) and id(x) in makers:
                pairs[makers[id(x)]] = module
        finished.setdefault(name, len(finished))
        if isinstance(x, Tensor) and x.shape == out.shape and any(True for _ in module.children()):
            passes[name] = sources.pop(module, None)
        if out is not x:  # the identity makes nothing
            sums.note(name, out)
        elif isinstance(module, ChannelMap):
            sums.mapped.add(id(out))

    sources: dict[Any, str | None] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        # a block takes one argument, by position: so does what would stand in its place
        x = args[0] if len(args) == 1 and not kwargs else None
        sources[module] = sums.made.get(id(x)) if isinstance(x, Tensor) else None

    hooks = [after_call(module, note) for module in model.modules()]
    hooks += [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    with removing(hooks), evaluating(model), sums:
        model(example_input)
    order.norms = {n: norm for n, norm in pairs.items() if norm_calls[norm] == 1 and order.calls[n] == 1}
    behind = {names[norm]: n for n, norm in order.norms.items() if type(getattr(norm, 'act', None)) in _NO_ACT}
    for one, other, mapped in sums.sums:
        first, last = sorted((one, other), key=finished.__getitem__)
        layer = behind.get(last, last)
        if layer in order.layers and order.calls[layer] == 1 and first != last:
            if not mapped:  # after pruning, the map gives other channels than what it reads
                order.joins[layer] = first
            inside = [b for b, source in passes.items() if layer.startswith(f'{b}.') and source == first and b]
            if inside:
                order.blocks.append(max(inside, key=len))
    return order


_NO_ACT = (type(None), nn.Identity)


def some_images(batches: list[Tensor], count: int) -> Tensor:
    """The first images of a list of batches."""
    return torch.cat(batches)[:count] if len(batches[0]) < count else batches[0][:count]
