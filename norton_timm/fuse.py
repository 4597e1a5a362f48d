"""Fuse convolution, shortcut addition and ReLU into one oneDNN call, with weights packed once; CPUs only.

In eager mode an addition and a ReLU each read and write the whole map again, and every call of a convolution reorders
its weights. Both cost a compressed network, which computes less for each byte, more than a dense one.
"""

from __future__ import annotations

import copy
import functools
import operator
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import FeaturePyramidNetwork

_RELU_CALLS: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_, F.relu_, 'relu', 'relu_')
_ADD_CALLS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, 'add', 'add_')
_NOTHING = (nn.Identity, nn.Dropout)  # in evaluation mode
_SMALL = 100_000_000  # MACs up to which a call's overhead tells


def available() -> bool:
    """Whether this build of PyTorch has oneDNN's fused convolutions."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_convolution_pointwise')


class FusedConv2d(nn.Conv2d):
    """``relu(conv(x) + other)`` where ``relu`` and ``other`` are optional; (N, I, H, W) -> (N, O, H', W').

    Runs plain operations where it is compiled, exported or differentiated, and off the CPU. From the first call on it
    holds its weights twice, the second time packed as oneDNN reads them; copies and pickles do not.

    Attributes:
        relu: whether a ReLU ends it.
        in_place: ``other`` may be overwritten with the result.
    """

    relu = False
    in_place = False
    _packed: tuple[Any, Callable[..., Tensor]] | None = None

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> FusedConv2d:
        """Take over the parameters of a convolution with zero padding in numbers."""
        result = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
            conv.groups, conv.bias is not None, device='meta',
        )  # fmt: skip
        result.weight, result.bias = conv.weight, conv.bias
        return result.train(conv.training)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if self._plain(x, other):
            y = super().forward(x)
            y = y if other is None else y + other
            return y.relu() if self.relu else y
        step = self.packed() or self._pack(x, other is not None)
        return step(x) if other is None else step(x, other)

    def _plain(self, x: Tensor, other: Tensor | None) -> bool:
        return (
            x.dim() != 4
            or self.weight.dtype != torch.float32
            or not (other is None or fusable(other))
            or not fusable(x)
            or (self.weight.requires_grad and torch.is_grad_enabled())
        )

    def packed(self) -> Callable[..., Tensor] | None:
        """The call that computes it with packed weights: None before the first input and after a change of weights."""
        if self._packed is None or self._packed[0] != _versions(self.weight, self.bias):
            return None
        return self._packed[1]

    def _pack(self, x: Tensor, adds: bool) -> Callable[..., Tensor]:
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        geometry = [list(self.padding), list(self.stride), list(self.dilation), self.groups]
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        step: Callable[..., Tensor]
        if not adds and is_pointwise(self) and pixels * weight.numel() <= _SMALL:
            step = _matrix_product(weight.flatten(1).contiguous(), bias, self.relu, pixels)
        else:
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, tuple(x.shape))
            step = _convolution(packed, bias, geometry, self.relu, adds, self.in_place)
        self._packed = _versions(self.weight, self.bias), step
        return step

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != '_packed'}

    def extra_repr(self) -> str:
        return super().extra_repr() + (', relu' if self.relu else '')


def fusable(x: Any) -> bool:
    """Whether oneDNN's calls take this input now: float32 on the CPU, not empty, without autograd or a tracer."""
    return (
        isinstance(x, Tensor)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type == 'cpu'
        and x.dtype == torch.float32
        and x.numel() > 0  # a head without boxes
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled('cpu')
    )


def is_pointwise(conv: nn.Conv2d, any_stride: bool = False) -> bool:
    """Whether a convolution multiplies each pixel, or each of a grid of pixels, by one matrix and does nothing else."""
    strides = any_stride or conv.stride == (1, 1)
    return conv.kernel_size == (1, 1) and strides and conv.padding == (0, 0) and conv.groups == 1


def _version(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.data_ptr(), None if tensor.is_inference() else tensor._version)


def _versions(weight: Tensor, bias: Tensor | None) -> Any:
    return _version(weight), _version(bias)


def _convolution(
    weight: Tensor, bias: Tensor | None, geometry: list[Any], relu: bool, adds: bool, in_place: bool
) -> Callable[..., Tensor]:
    """A convolution of oneDNN with everything but the maps bound."""
    act, unary = 'relu' if relu else 'none', 'relu' if relu else None
    padding, stride, dilation, groups = geometry
    plain, adding = torch.ops.mkldnn._convolution_pointwise.default, torch.ops.mkldnn._convolution_pointwise.binary
    inside = torch.ops.mkldnn._convolution_pointwise_.binary

    def convolve(x: Tensor) -> Tensor:
        return plain(x, weight, bias, padding, stride, dilation, groups, act, [], '')

    def convolve_and_add(x: Tensor, other: Tensor) -> Tensor:
        return adding(x, other, weight, bias, padding, stride, dilation, groups, 'add', 1.0, unary, [], '')

    def convolve_into(x: Tensor, other: Tensor) -> Tensor:
        return inside(other, x, weight, bias, padding, stride, dilation, groups, 'add', 1.0, unary, [], '')

    return (convolve_into if in_place else convolve_and_add) if adds else convolve


def _matrix_product(weight: Tensor, bias: Tensor | None, relu: bool, pixels: int) -> Callable[[Tensor], Tensor]:
    """A 1x1 convolution as oneDNN's matrix product, whose call costs half as much; ``weight`` (O, I)."""
    packed, act = torch.ops.mkldnn._reorder_linear_weight(weight, pixels), 'relu' if relu else 'none'
    product = torch.ops.mkldnn._linear_pointwise.default

    def multiply(x: Tensor) -> Tensor:
        return product(x.permute(0, 2, 3, 1), packed, bias, act, [], '').permute(0, 3, 1, 2)

    return multiply


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the second copies of weights that fused convolutions hold in oneDNN's own layout."""
    return sum(m.weight.nbytes for m in model.modules() if isinstance(m, FusedConv2d) and m._packed is not None)


class FusedNetwork(fx.GraphModule):
    """A traced network that runs its packed convolutions one after the other, without a module's call around each.

    On inputs that oneDNN's calls do not take, while a hook listens, and at the first pass after a change of weights it
    runs module by module.
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
            if program is not None and program.is_current():
                if not program.is_unobserved():
                    return by_modules(self, *args)
                with torch._C._AutoDispatchBelowAutograd():  # which takes 8 us of each call without gradients
                    return program.run(*args)
            result = by_modules(self, *args)  # packs the weights
            if all(m.packed() for m in self.modules() if isinstance(m, FusedConv2d)):
                _programs[self] = _Program(self)
            return result

        cls.forward = forward  # type: ignore[method-assign]
        return code

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, content = super().__reduce__()
        return _unpickle, (rebuild, content)


def _unpickle(rebuild: Callable[..., fx.GraphModule], content: tuple[Any, ...]) -> FusedNetwork:
    plain = rebuild(*content)
    return _with_attributes(FusedNetwork(plain, plain.graph), plain)


class _Program:
    """The steps of a network whose convolutions are all packed, as one function."""

    def __init__(self, network: FusedNetwork) -> None:
        modules = dict(network.named_modules())
        graph = copy.deepcopy(network.graph)
        places: list[tuple[dict[str, Any], str, Any]] = []
        self._hooks: list[dict[int, Any]] = []
        self._parameters = list(network.parameters())
        self._fits = not any(node.op == 'get_attr' for node in graph.nodes)  # a tensor that may be replaced
        for node in [n for n in graph.nodes if n.op == 'call_module']:
            parent, _, key = str(node.target).rpartition('.')
            module = modules[str(node.target)]
            places.append((modules[parent]._modules, key, module))
            if isinstance(module, FusedConv2d) and (step := module.packed()) is not None:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.call_function(step, node.args))
                graph.erase_node(node)
                self._hooks += [module._forward_hooks, module._forward_pre_hooks]
                places += [(module._parameters, name, module._parameters[name]) for name in ('weight', 'bias')]
        # compared by functions written in C: between two passes all of this has left the processor's cache
        self._owners, self._keys, self._owned = zip(*places)
        self._tensors = [t for t in self._owned if isinstance(t, Tensor) and not t.is_inference()]
        self._state = self._versions()
        self.run = fx.GraphModule(network, graph).forward

    def is_current(self) -> bool:
        """Whether the network still has the modules and weights that it was made of."""
        return all(map(operator.is_, map(dict.get, self._owners, self._keys), self._owned)) and (
            self._versions() == self._state
        )

    def _versions(self) -> tuple[list[int], list[int]]:
        return list(map(operator.attrgetter('_version'), self._tensors)), list(map(Tensor.data_ptr, self._tensors))

    def is_unobserved(self) -> bool:
        """Whether nothing asks for its modules: a tensor of the graph itself, gradients, or hooks."""
        return (
            self._fits
            and not any(self._hooks)
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters))
        )


_programs: weakref.WeakKeyDictionary[nn.Module, _Program] = weakref.WeakKeyDictionary()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # containers are opened; whatever else has no children is a step
        return not any(True for _ in m.children()) or super().is_leaf_module(m, module_qualified_name)


def fuse(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy in which convolutions took over the additions and ReLUs behind them, and how many did.

    The largest parts of the network that ``torch.fx`` can trace are rewritten, also for packed weights alone; the
    others stay as they are.
    """
    model = copy.deepcopy(model).eval()
    return _fuse_part(model)


def _fuse_part(module: nn.Module) -> tuple[nn.Module, int]:
    if not any(isinstance(m, nn.Conv2d) for m in module.modules()):
        return module, 0
    if any(True for _ in module.children()) and not _stays_open(module):
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
    """Containers that cannot be called, and detectors: their stages stay modules of their own."""
    is_detector = isinstance(module, GeneralizedRCNN)
    is_backbone = any(isinstance(child, FeaturePyramidNetwork) for child in module.children())
    return is_detector or is_backbone or isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _rewrite(module: nn.Module, graph: fx.Graph) -> tuple[nn.Module, int]:
    traced = FusedNetwork(module, graph, type(module).__name__)
    modules = dict(traced.named_modules())

    def kind(node: Any, kinds: tuple[type, ...]) -> bool:
        return isinstance(node, fx.Node) and node.op == 'call_module' and type(modules[str(node.target)]) in kinds

    def calls(node: fx.Node, functions: tuple[Any, ...]) -> bool:
        return node.op in ('call_function', 'call_method') and node.target in functions

    for node in list(graph.nodes):
        if kind(node, _NOTHING) and node.args:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    used = Counter(str(n.target) for n in graph.nodes if n.op == 'call_module')
    order = {node: k for k, node in enumerate(graph.nodes)}
    convs = [
        n
        for n in graph.nodes
        if kind(n, (nn.Conv2d,)) and used[str(n.target)] == 1 and _plain_padding(modules[str(n.target)])
    ]
    took = 0
    for conv in convs:
        fused = FusedConv2d.from_conv(modules[str(conv.target)])
        modules[str(conv.target)] = fused
        traced.set_submodule(str(conv.target), fused)
        taken: list[fx.Node] = []
        last = _only_user(conv)
        if last is not None and calls(last, _ADD_CALLS) and len(last.args) == 2 and not last.kwargs:
            other = last.args[1] if last.args[0] is conv else last.args[0]
            # the summand that is computed last takes the other one in
            if isinstance(other, fx.Node) and order[other] < order[conv]:
                users = [u for u in other.users if u is not last]
                fused.in_place = kind(other, (FusedConv2d,)) and all(order[u] < order[conv] for u in users)
                conv.args = (*conv.args, other)
                taken.append(last)
                last = _only_user(last)
            else:
                last = None
        if last is not None and (kind(last, (nn.ReLU,)) or calls(last, _RELU_CALLS)):
            fused.relu = True
            taken.append(last)
        if taken:
            taken[-1].replace_all_uses_with(conv)
            took += 1
            for node in reversed(taken):
                graph.erase_node(node)
    graph.lint()
    traced.recompile()
    return _with_attributes(traced, module), took


def _with_attributes(traced: FusedNetwork, module: nn.Module) -> FusedNetwork:
    """What the module said of itself (feature_info, pretrained_cfg, ...) is asked of the result too."""
    for key, value in vars(module).items():
        if not key.startswith('_') and key not in vars(traced):
            traced.__dict__[key] = value
    return traced


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _plain_padding(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)
