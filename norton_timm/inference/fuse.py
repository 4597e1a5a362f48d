"""Fuse layers into oneDNN calls: a convolution with a shortcut addition and ReLU, a linear layer with ReLU; CPUs only.

In eager mode an addition and a ReLU each read and write the whole map again, and every call of a convolution reorders
its weights. Both cost a compressed network more than a dense one, because it computes less per byte.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from norton_timm.inference.onednn import (
    TO_FIRST,
    TO_LAST,
    Fused,
    FusedConv2d,
    FusedLinear,
    GlobalAverage,
    PackedCall,
    PixelProduct,
    below_autograd,
    fusable,
)

_RELU_CALLS: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_, F.relu_, 'relu', 'relu_')
_ADD_CALLS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, 'add', 'add_')
_NOTHING = (nn.Identity, nn.Dropout)  # in evaluation mode
_STATELESS = (nn.MaxPool2d, nn.AvgPool2d, nn.Flatten, nn.ReLU, GlobalAverage)


class FusedNetwork(fx.GraphModule):
    """A traced network that runs its packed layers one after the other, without module calls.

    It runs module by module on inputs that oneDNN's calls do not take, while there are hooks, and in the first pass
    after a change of weights.
    """

    def recompile(self) -> Any:
        """Write ``forward`` from the graph again."""
        code = super().recompile()
        cls = type(self)
        by_modules = cls.forward
        _programs.pop(self, None)

        @functools.wraps(by_modules)
        def forward(self: FusedNetwork, *args: Any, **kwargs: Any) -> Any:
            if kwargs or not all(map(fusable, args)):
                return by_modules(self, *args, **kwargs)
            program = _programs.get(self)
            current = program is not None and program.is_current()
            if program is not None and current and program.takes(args):
                if not program.is_unobserved():
                    return by_modules(self, *args)
                with below_autograd():
                    return program.run(*args)
            result = by_modules(self, *args)  # packs the weights
            if not current and all(m.packed() for m in self.modules() if isinstance(m, Fused)):
                _programs[self] = _Program(self)
            return result

        cls.forward = forward  # type: ignore[method-assign]
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedNetwork:
        return _with_attributes(super().__deepcopy__(memo), self, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, content = super().__reduce__()
        return _unpickle, (rebuild, content)


def _unpickle(rebuild: Callable[..., fx.GraphModule], content: tuple[Any, ...]) -> FusedNetwork:
    plain = rebuild(*content)
    return _with_attributes(FusedNetwork(plain, plain.graph), plain, {})


class _Program:
    """All steps of a network as one function; its convolutions and linear layers are packed."""

    def __init__(self, network: FusedNetwork) -> None:
        self._dims = (4,) if any(isinstance(m, FusedConv2d) for m in network.modules()) else range(2, 9)
        modules = dict(network.named_modules())
        graph = copy.deepcopy(network.graph)
        places: list[tuple[dict[str, Any], str, Any]] = []
        self._hooks: list[dict[int, Any]] = []
        self._parameters = list(network.parameters())
        self._fits = not any(node.op == 'get_attr' for node in graph.nodes)  # such a tensor may be replaced
        for node in [n for n in graph.nodes if n.op == 'call_module']:
            module = modules[str(node.target)]
            if node.kwargs or (step := _step_of(module)) is None:
                continue
            _replace(node, step)
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            places += [(module._parameters, name, p) for name, p in module._parameters.items()]
        called = [str(node.target).split('.') for node in network.graph.nodes if node.op == 'call_module']
        for name in dict.fromkeys('.'.join(path[: k + 1]) for path in called for k in range(len(path))):
            parent, _, key = name.rpartition('.')
            places.append((modules[parent]._modules, key, modules[name]))
        # compared by functions written in C, because all of this leaves the processor's cache between two passes
        self._owners, self._keys, self._owned = zip(*places)
        self._weights = [m.weight for m in modules.values() if isinstance(m, Fused) and not m.weight.is_inference()]
        self._state = self._versions()
        self.run = fx.GraphModule(network, graph).forward

    def takes(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether packed layers can run on inputs with this many dimensions; an image without a batch has too few."""
        return all(x.dim() in self._dims for x in inputs)

    def is_current(self) -> bool:
        """Whether the network still has the modules and weights that this program was made from."""
        return all(map(operator.is_, map(dict.get, self._owners, self._keys), self._owned)) and (
            self._versions() == self._state
        )

    def _versions(self) -> tuple[list[int], list[int]]:
        return list(map(operator.attrgetter('_version'), self._weights)), list(map(Tensor.data_ptr, self._weights))

    def is_unobserved(self) -> bool:
        """Whether nothing needs the modules: no tensor of the graph itself, no gradients, no hooks."""
        return (
            self._fits
            and not any(self._hooks)
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters))
        )


def _step_of(module: nn.Module) -> PackedCall | None:
    """A function that computes the same without a module call; None if there is none."""
    if isinstance(module, Fused):
        return module.packed()
    if type(module) in _STATELESS:
        forward = module.forward
        return lambda x: forward(x)  # torch.fx would look for a method in the class's file
    return None


def _replace(node: fx.Node, step: PackedCall) -> None:
    """Replace a module's call by a step; between two matrix products channels stay last."""
    graph, x = node.graph, node.args[0]
    with graph.inserting_before(node):
        if isinstance(step, PixelProduct):
            assert isinstance(x, fx.Node)
            was_last = x.op == 'call_method' and x.target == 'permute' and x.args[1:] == (TO_FIRST,)
            last = x.args[0] if was_last else graph.call_method('permute', (x, TO_LAST))
            product = graph.call_function(step.product, (last,))
            result = graph.call_method('permute', (product, TO_FIRST))
        else:
            result = graph.call_function(step, node.args)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    if isinstance(x, fx.Node) and not x.users:
        graph.erase_node(x)


_programs: weakref.WeakKeyDictionary[nn.Module, _Program] = weakref.WeakKeyDictionary()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # containers are traced through; a module without children is a step
        return not any(True for _ in m.children()) or super().is_leaf_module(m, module_qualified_name)


def fuse_network(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy in which convolutions and linear layers take over the additions and ReLUs that follow them.

    The largest parts of the network that ``torch.fx`` can trace are rewritten, also where only the weights get packed.
    Other parts keep their code, and their linear layers are packed.

    Args:
        model: the network; it is not changed.

    Returns:
        The copy in evaluation mode, and the number of layers that took something over.

    Example:
        >>> fused, count = fuse_network(model)
    """
    model = copy.deepcopy(model).eval()
    return _fuse_part(model)


def _fuse_part(module: nn.Module) -> tuple[nn.Module, int]:
    if not any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in module.modules()):
        return module, 0
    if type(module) is nn.Linear:
        return _fused(module) or module, 0
    if any(True for _ in module.children()) and not _stays_open(module) and not _has_options(module):
        try:
            graph = _Tracer().trace(module)
        except Exception:  # tracing runs the module's own code on stand-ins, which may fail in any way
            graph = None
        if graph is not None:
            return _rewrite(module, graph)
    total = 0
    for name, child in list(module.named_children()):
        new, count = _fuse_part(child)
        module._modules[name] = new
        total += count
    return module, total


def _stays_open(module: nn.Module) -> bool:
    """Whether children stay modules: in containers that cannot be called, and in modules that set ``parts_stay``."""
    return getattr(module, 'parts_stay', False) is True or isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _has_options(module: nn.Module) -> bool:
    """Whether ``forward`` has optional arguments: ``torch.fx`` would trace a tensor for each of them."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.default is not p.empty for p in parameters)


def _rewrite(module: nn.Module, graph: fx.Graph) -> tuple[nn.Module, int]:
    traced = FusedNetwork(module, graph, type(module).__name__)
    modules = dict(traced.named_modules())

    def kind(node: Any, kinds: tuple[type, ...]) -> bool:
        return isinstance(node, fx.Node) and node.op == 'call_module' and type(modules[str(node.target)]) in kinds

    def calls(node: fx.Node, functions: tuple[Any, ...]) -> bool:
        return node.op in ('call_function', 'call_method') and node.target in functions

    def free_link(node: fx.Node | None) -> fx.Node | None:
        """The convolution in a chain of fused sums that can take one more summand; None if there is none."""
        while node is not None and len(node.args) == 2:
            before: Any = node.args[1]
            open_ = kind(before, (FusedConv2d,)) and _only_user(before) is node
            node = before if open_ and not modules[str(before.target)].relu else None
        return node

    def absorb(gone: fx.Node, node: fx.Node) -> None:
        gone.replace_all_uses_with(node)
        graph.erase_node(gone)

    for node in list(graph.nodes):
        if kind(node, _NOTHING) and node.args:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif (
            kind(node, (nn.AdaptiveAvgPool2d,))
            and not node.kwargs
            and modules[str(node.target)].output_size in (1, (1, 1))
        ):
            traced.set_submodule(str(node.target), GlobalAverage())
    used = Counter(str(n.target) for n in graph.nodes if n.op == 'call_module')
    order = {node: k for k, node in enumerate(graph.nodes)}
    took = 0
    for node in list(graph.nodes):
        name = str(node.target)
        if (
            not kind(node, (nn.Conv2d, nn.Linear))
            or node.kwargs
            or used[name] > 1
            or (fused := _fused(modules[name])) is None
        ):
            continue
        modules[name] = fused
        traced.set_submodule(name, fused)
        taken = 0
        while isinstance(fused, FusedConv2d) and (addition := _only_user(node)) and calls(addition, _ADD_CALLS):
            other = _summand(addition, node)
            link = free_link(node)
            # the summand that is computed last takes over the addition
            if other is None or link is None or order[other] >= order[link]:
                break
            others = [u for u in other.users if u is not addition]
            # an alias, such as a slice, would see the change
            in_place = kind(other, (FusedConv2d,)) and all(kind(u, (FusedConv2d, FusedLinear)) for u in others)
            modules[str(link.target)].in_place = in_place and all(order[u] < order[link] for u in others)  # type: ignore[assignment]
            link.args = (*link.args, other)
            absorb(addition, node)
            taken += 1
        last = _only_user(node)
        if last is not None and (kind(last, (nn.ReLU,)) or calls(last, _RELU_CALLS)):
            fused.relu = True
            absorb(last, node)
            taken += 1
        took += taken > 0
    if not any(isinstance(m, Fused) for m in traced.modules()):
        return module, 0
    graph.lint()
    traced.recompile()
    return _with_attributes(traced, module, {}), took


def _with_attributes(traced: FusedNetwork, module: nn.Module, memo: dict[int, Any]) -> FusedNetwork:
    """Copy the module's own attributes (feature_info, pretrained_cfg, ...) to the traced network."""
    for key, value in vars(module).items():
        if not key.startswith('_') and key not in vars(traced):
            traced.__dict__[key] = copy.deepcopy(value, memo)
    return traced


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _summand(addition: fx.Node, node: fx.Node) -> fx.Node | None:
    """The tensor that is added to the node, None if it is not one node of the graph."""
    if len(addition.args) != 2 or addition.kwargs:
        return None
    other = addition.args[1] if addition.args[0] is node else addition.args[0]
    return other if isinstance(other, fx.Node) else None


def _fused(layer: nn.Module) -> Fused | None:
    if not isinstance(layer.weight, nn.Parameter) or layer._forward_hooks or layer._forward_pre_hooks:
        return None  # pruning and weight normalisation compute the weight in a hook
    if isinstance(layer, nn.Linear):
        return FusedLinear.from_linear(layer)
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == 'zeros' and not isinstance(layer.padding, str):
        return FusedConv2d.from_conv(layer)
    return None
