"""Fuse convolution, shortcut addition and ReLU into one oneDNN call, with weights packed once; CPUs only.

In eager mode an addition and a ReLU each read and write the whole map again, and every call of a convolution reorders
its weights. Both cost a compressed network, which computes less for each byte, more than a dense one.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import FeaturePyramidNetwork

_RELU_CALLS: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_, F.relu_, 'relu', 'relu_')
_ADD_CALLS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, 'add', 'add_')
_NOTHING = (nn.Identity, nn.Dropout)  # in evaluation mode


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
    _packed: Any = None

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
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        weight, unary = self._packed_weight(x), 'relu' if self.relu else None
        if other is None:
            act = unary or 'none'
            op = torch.ops.mkldnn._convolution_pointwise.default
            return op(x, weight, self.bias, *geometry, act, [], '')
        if self.in_place:
            op = torch.ops.mkldnn._convolution_pointwise_.binary
            return op(other, x, weight, self.bias, *geometry, 'add', 1.0, unary, [], '')
        op = torch.ops.mkldnn._convolution_pointwise.binary
        return op(x, other, weight, self.bias, *geometry, 'add', 1.0, unary, [], '')

    def _plain(self, x: Tensor, other: Tensor | None) -> bool:
        needs_grad = any(t is not None and t.requires_grad for t in (x, other, self.weight))
        return (
            x.dim() != 4
            or not x.numel()  # a head without boxes
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or x.device.type != 'cpu'
            or x.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or (needs_grad and torch.is_grad_enabled())
            or torch.is_autocast_enabled('cpu')
        )

    def _packed_weight(self, x: Tensor) -> Tensor:
        version = None if self.weight.is_inference() else self.weight._version
        key = (self.weight.data_ptr(), version)
        if self._packed is None or self._packed[0] != key:
            geometry = (self.padding, self.stride, self.dilation, self.groups)
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight.detach(), *geometry, tuple(x.shape))
            self._packed = key, packed
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != '_packed'}

    def extra_repr(self) -> str:
        return super().extra_repr() + (', relu' if self.relu else '')


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the second copies of weights that fused convolutions hold in oneDNN's own layout."""
    return sum(m.weight.nbytes for m in model.modules() if isinstance(m, FusedConv2d) and m._packed is not None)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # containers are opened; whatever else has no children is a step
        return not any(True for _ in m.children()) or super().is_leaf_module(m, module_qualified_name)


def fuse(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy in which convolutions took over the additions and ReLUs behind them, and how many did.

    The largest parts of the network that ``torch.fx`` can trace are rewritten; the others stay as they are.
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
        if count:
            module._modules[name] = new
        total += count
    return module, total


def _stays_open(module: nn.Module) -> bool:
    """Containers that cannot be called, and detectors: their stages stay modules of their own."""
    is_detector = isinstance(module, GeneralizedRCNN)
    is_backbone = any(isinstance(child, FeaturePyramidNetwork) for child in module.children())
    return is_detector or is_backbone or isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _rewrite(module: nn.Module, graph: fx.Graph) -> tuple[nn.Module, int]:
    traced = fx.GraphModule(module, graph, type(module).__name__)
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
    # what the module said of itself (feature_info, pretrained_cfg, ...) is asked of the result too
    for key, value in vars(module).items():
        if not key.startswith('_') and key not in vars(traced):
            traced.__dict__[key] = value
    return traced, took


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _plain_padding(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)
