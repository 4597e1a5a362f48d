"""Follow the channels of every tensor through one forward pass.

One no-grad forward runs under a ``TorchFunctionMode`` with hooks on the layers that own channels. Every
tensor carries a label per channel; operations tie, map or freeze labels. No symbolic tracing, so control
flow that depends on shapes or values is fine. An operation without a rule freezes the channels that enter
it: we then prune less, never wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from norton_timm.graph.channels import ChannelLabels, Channels, Slot
from norton_timm.graph.rules import apply_rule
from norton_timm.layers import MIXES, PASSES, LayerHandler, handler_of
from norton_timm.utils import evaluating, removing, tensors_in, tied_modules


class ChannelTracer(ChannelLabels, TorchFunctionMode):
    """Runs a model once and records slots, ties and frozen labels.

    Attributes:
        slots: every traced dimension of the model's parameters.
        frozen: label -> why it must stay.
        unknown: name of an operation without a rule -> how often it was met.
    """

    def __init__(self, model: nn.Module) -> None:
        ChannelLabels.__init__(self)
        TorchFunctionMode.__init__(self)
        self.model = model
        self.slots: list[Slot] = []
        self.unknown: dict[str, int] = {}
        self._depth = 0
        self._calls: dict[nn.Module, tuple[np.ndarray, np.ndarray]] = {}
        self._names = {m: n for n, m in model.named_modules()}
        self._owned: dict[int, tuple[str, nn.Module]] = {}
        for name, module in model.named_modules():
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                self._owned[id(tensor)] = (f'{name}.{key}'.lstrip('.'), module)
        self._tied = tied_modules(model)
        for module in model.modules():  # constants kept as plain attributes, such as anchors
            for value in vars(module).values():
                for tensor in tensors_in(value):
                    if id(tensor) not in self._owned:
                        self.set_channels(tensor, None)

    def _note_origin(self, tensor: Tensor, where: str) -> None:
        """A tensor that no traced operation made hides its producers: freeze all channels so far."""
        if tensor in self._of or id(tensor) in self._owned:
            return
        self.freeze(range(len(self._parent)), f'reaches {where} through code that cannot be traced')
        self.set_channels(tensor, None)

    # ---- the run

    def run(self, example_input: Any, freeze_outputs: bool) -> Any:
        """One forward pass in evaluation mode; the model's training flags are restored."""
        hooks = []
        for module in self.model.modules():
            if handler_of(module) is not None:
                hooks.append(module.register_forward_pre_hook(self._enter))
                hooks.append(module.register_forward_hook(self._leave))
        with removing(hooks), evaluating(self.model), self:
            for tensor in tensors_in(example_input):
                self.set_channels(tensor, None)
            outputs = self.model(example_input)
        for tensor in tensors_in(outputs):
            found = self.channels(tensor)
            if tensor not in self._of:
                self._note_origin(tensor, 'the output')
            elif found and freeze_outputs:
                self.freeze(found.labels, 'output of the model')
        self._of.clear()
        return outputs

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Label a layer's output; at depth 1 our own tensor calls are not traced."""
        try:
            if self._depth == 1:
                if out is args[0]:  # an identity ChannelMap: its output needs labels of its own
                    out = out.detach()
                self._label_output(module, args[0], out)
        finally:
            self._depth -= 1
        return out

    def _label_output(self, module: nn.Module, x: Tensor, out: Tensor) -> None:
        name = self._names[module]
        self._note_origin(x, name)
        found = self.channels(x)
        handler = handler_of(module)
        assert handler is not None  # only such modules have hooks
        if handler.role == MIXES:
            if found:
                self.freeze(found.labels, f'normalised over channels by {name}')
            self.set_channels(out, found if found and out.shape == x.shape else None)
        elif handler.role == PASSES:
            if found and module in self._tied:
                self.freeze(found.labels, f'{name} shares parameters with another layer')
            if found and module not in self._calls:
                self._calls[module] = (found.labels, found.labels)
                self.slots.append(Slot(name, module, 'channel', found.labels))
            elif found:
                self.tie(found.labels, self._calls[module][0])
            self.set_channels(out, found)
        else:
            self._layer(module, handler, name, found, out)

    def _layer(self, module: nn.Module, handler: LayerHandler, name: str, found: Channels | None, out: Tensor) -> None:
        """A layer that reads channels and makes new ones."""
        dim, groups = handler.channel_dim(out), handler.groups(module)
        n_in, n_out = handler.widths(module)
        if found and (found.dim != dim or len(found.labels) != n_in):
            self.freeze(found.labels, f'enters {name} on another dimension')
            found = None
        if found:
            reads = found.labels
        else:
            reads = self.new_labels(n_in)
            self.freeze(reads, f'input of {name} without channels to follow')
        if module in self._calls:  # shared layer: the same channels at every call
            before, makes = self._calls[module]
            self.tie(reads, before)
            self.set_channels(out, Channels(makes, dim))
            return
        if groups > 1 and groups == n_in:
            makes = np.repeat(reads, n_out // n_in)
            self.slots.append(Slot(name, module, 'depthwise', makes))
        else:
            makes = self.new_labels(n_out)
            if groups > 1:  # the groups must stay equally wide: tie equal places in them
                for labels in (reads, makes):
                    width = len(labels) // groups
                    for g in range(1, groups):
                        self.tie(labels[g * width : (g + 1) * width], labels[:width])
            self.slots += [Slot(name, module, 'in', reads), Slot(name, module, 'out', makes)]
        if module in self._tied:
            self.freeze([*reads.tolist(), *makes.tolist()], f'{name} shares parameters with another layer')
        self._calls[module] = (reads, makes)
        self.set_channels(out, Channels(makes, dim))

    # ---- functions between layers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._depth:
            return out
        name = getattr(func, '__name__', str(func)).split('.')[0]
        inputs = tensors_in(args) + tensors_in(kwargs)
        for tensor in inputs:
            self._note_origin(tensor, name)
            self._label_owned(tensor)
        outputs = tensors_in(out)
        labelled = [(t, c) for t in inputs if (c := self.channels(t))]
        if labelled and (outputs or name == '__setitem__'):
            if apply_rule(self, name, args, kwargs, labelled, outputs):
                return out
            self.unknown[name] = self.unknown.get(name, 0) + 1
            for _, found in labelled:
                self.freeze(found.labels, f'enters {name}, an operation without a rule')
        for tensor in outputs:
            if id(tensor) not in self._owned:
                self.set_channels(tensor, None)
        return out

    def _label_owned(self, tensor: Tensor) -> None:
        """A per-channel parameter used outside of layers (layer scale) has channels of its own."""
        if id(tensor) not in self._owned or self.channels(tensor):
            return
        wide = [d for d, n in enumerate(tensor.shape) if n > 1]
        if len(wide) == 1 and isinstance(tensor, nn.Parameter):
            name, module = self._owned[id(tensor)]
            labels = self.new_labels(tensor.shape[wide[0]])
            self.slots.append(Slot(name, module, 'param', labels, wide[0]))
            self.set_channels(tensor, Channels(labels, wide[0]))
