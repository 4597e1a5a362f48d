"""Follow the channels of every tensor through one forward pass.

One forward pass without gradients runs under a ``TorchFunctionMode``, with hooks on the layers that own channels.
Every tensor carries a label per channel; operations tie, map or freeze labels. Nothing is traced symbolically, so
control flow that depends on shapes or values is fine. An operation without a rule freezes the channels that enter
it: we then prune less, never wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from norton_timm.graph.channels import ChannelCount, ChannelLabels, Channels, Slot
from norton_timm.graph.features import are_features
from norton_timm.graph.rules import apply_rule
from norton_timm.layers import MIXES, PASSES, LayerHandler, handler_of, has_computed_weight
from norton_timm.utils import evaluating, first_input, removing, tensors_in, tied_modules


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
        self.outside: dict[str, nn.Module] = {}
        self._know_constants()

    def _know_constants(self) -> None:
        """Constants kept as plain attributes, such as anchors, have no channels to follow."""
        for module in self.model.modules():
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

    def run(self, example_input: Any, freeze_outputs: bool | None) -> Any:
        """One forward pass in evaluation mode; the model's training flags are restored.

        Where layers did not run, a second pass in training mode follows them: some heads run in training only.

        Args:
            example_input: what ``forward`` takes.
            freeze_outputs: keep the channels of the outputs; None: unless they are the features that the model's
                ``feature_info`` describes.
        """
        hooks = []
        for module in self.model.modules():
            if handler_of(module) is not None:
                hooks.append(module.register_forward_pre_hook(self._enter))
                hooks.append(module.register_forward_hook(self._leave, with_kwargs=True))
        with removing(hooks), evaluating(self.model):
            outputs = self._pass(example_input)
            if freeze_outputs is None:
                freeze_outputs = not are_features(self.model, outputs)
            self._end(outputs, freeze_outputs)
            missing = self._not_run()
            if missing:
                self._training_pass(example_input, missing)
        for name, module in self.outside.items():
            for slot in self.slots:
                if slot.module is module:
                    self.freeze(slot.labels, f'the weight of {name} is used outside of the layer as well')
        self._of.clear()
        return outputs

    def _pass(self, example_input: Any) -> Any:
        with self:
            for tensor in tensors_in(example_input):
                self.set_channels(tensor, None)
            return self.model(example_input)

    def _end(self, outputs: Any, freeze_outputs: bool) -> None:
        """Freeze what reaches the end of a pass."""
        found = tensors_in(outputs)
        if not found:
            self.freeze(range(len(self._parent)), f'the output is a {type(outputs).__name__} that shows no tensor')
        for tensor in found:
            channels = self.channels(tensor)
            if tensor not in self._of:
                self._note_origin(tensor, 'the output')
            elif channels and freeze_outputs:
                self.freeze(channels.labels, 'output of the model')
        owned = [(tensor, channels) for tensor, channels in self._of.items() if id(tensor) in self._owned]
        self._of.clear()
        for tensor, channels in owned:  # the same parameters in another pass
            self.set_channels(tensor, channels)
        self._know_constants()

    def _not_run(self) -> list[str]:
        """Names of layers that own channels and were not called."""
        return [
            name
            for name, module in self.model.named_modules()
            if (handler := handler_of(module)) and handler.role != MIXES and module not in self._calls
        ]

    def _training_pass(self, example_input: Any, missing: list[str]) -> None:
        """A pass in which only containers are in training mode, so that statistics and random numbers stay."""
        for module in self.model.modules():
            module.training = any(True for _ in module.children())
        try:
            with torch.random.fork_rng(devices=[]):
                self._end(self._pass(example_input), True)
        except Exception as error:  # the network's own code, which may want targets, in whatever way it says so
            self._of.clear()
            reason = f'{missing[0]} did not run, and may read them in training ({type(error).__name__})'
            self.freeze(range(len(self._parent)), reason)
        finally:
            self.model.eval()

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        """Label a layer's output; at depth 1 our own tensor calls are not traced."""
        try:
            if self._depth == 1:
                x = first_input(args, kwargs)
                if out is x:  # an identity ChannelMap: its output needs labels of its own
                    out = out.detach()
                self._label_output(module, x, out)
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
        reason = f'{name} shares parameters with another layer' if module in self._tied else ''
        if has_computed_weight(module):
            reason = f'the weight of {name} is computed by a hook'
        if reason:
            self.freeze([*reads.tolist(), *makes.tolist()], reason)
        self._calls[module] = (reads, makes)
        self.set_channels(out, Channels(makes, dim))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._depth:
            return out
        name = getattr(func, '__name__', str(func)).split('.')[0]
        inputs = tensors_in(args) + tensors_in(kwargs)
        if isinstance(out, (int, torch.Size)):
            return self._count_channels(out, name, args, kwargs)
        outputs = tensors_in(out)
        for tensor in inputs:
            self._note_origin(tensor, name)
            self._label_owned(tensor)
            if outputs and id(tensor) in self._owned:
                self._note_outside(*self._owned[id(tensor)])
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

    def _count_channels(self, out: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A shape, or one number of it, in which the number of channels remembers what it counts."""
        found = self.channels(args[0]) if args and isinstance(args[0], Tensor) else None
        if found is None or name not in ('__get__', 'size'):
            return out
        count = ChannelCount(len(found.labels), found.labels)
        if isinstance(out, torch.Size):
            return torch.Size([*out[: found.dim], count, *out[found.dim + 1 :]]) if len(out) > found.dim else out
        dim = args[1] if len(args) > 1 else kwargs.get('dim')
        return count if name == 'size' and dim in (found.dim, found.dim - args[0].dim()) else out

    def _note_outside(self, name: str, module: nn.Module) -> None:
        """A function reads a tensor of a layer, which must then stay as the function wants it."""
        if handler_of(module) is not None:
            self.outside.setdefault(name.rpartition('.')[0], module)

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
