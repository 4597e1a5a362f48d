"""Convolutions and linear layers that oneDNN runs together with an addition and a ReLU, on packed weights; CPUs only.

This module is the only one that uses private parts of PyTorch: the operators `torch.ops.mkldnn._*` and four functions
of `torch._C`. `onednn_available` tries all of them once. Where one is missing or takes other arguments, layers run
as plain PyTorch, and the log says so.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger(__name__)

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # channels
_SMALL = 100_000_000  # MACs up to which a call's overhead matters
PackedCall = Callable[..., Tensor]


@functools.cache
def onednn_available() -> bool:
    """Whether this build of PyTorch has oneDNN's fused operators and they compute the right values."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            same = _operators_agree()
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).partition('\n')[0]
        log.warning("layers run as plain PyTorch, slower: oneDNN's operators cannot be used (%s)", reason)
        return False
    if not same:
        log.warning("layers run as plain PyTorch, slower: oneDNN's operators compute something else")
    return same


def _operators_agree() -> bool:
    """Call every private operator on a tiny layer and compare with the public ones."""
    x, other = torch.randn(1, 3, 5, 5), torch.randn(1, 4, 5, 5)
    conv, linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(6, 5)
    rows = torch.randn(7, 6)
    geometry: list[Any] = [[1, 1], [1, 1], [1, 1], 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *geometry, tuple(x.shape))
    plain = conv(x)
    _is_plain_input(x)
    with below_autograd():
        found = [
            _convolution(packed, conv.bias, geometry, True, False, False)(x),
            _convolution(packed, conv.bias, geometry, True, True, False)(x, other),
            _convolution(packed, conv.bias, geometry, False, True, True)(x, other.clone()),
            _product(linear.weight.detach(), linear.bias, True, len(rows))(rows),
        ]
    expected = [plain.relu(), (plain + other).relu(), plain + other, linear(rows).relu()]
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, expected))


def below_autograd() -> AbstractContextManager[Any]:
    """A context in which operators skip autograd, which takes 8 us per call even without gradients."""
    return torch._C._AutoDispatchBelowAutograd()


class Fused(nn.Module):
    """A layer that oneDNN runs together with a ReLU.

    It runs plain operations where it is compiled, exported or differentiated, and on other devices. From its first call
    on it also holds a copy of its weights, packed as oneDNN reads them; copies and pickles of the layer do not have it.
    Weights that change are packed again. Two changes go unnoticed: in place through ``.data``, and in place to weights
    made in inference mode, because PyTorch counts no version for those.

    Attributes:
        relu: whether the layer ends with a ReLU.
    """

    weight: Tensor
    bias: Any  # a tensor or None
    relu = False
    _packed: tuple[Any, PackedCall, Tensor] | None = None

    def packed(self) -> PackedCall | None:
        """The layer as one call with packed weights; None before the first input and after a change of weights."""
        if self._packed is None or self._packed[0] != self._version():
            return None
        return self._packed[1]

    def _version(self) -> Any:
        weight = self.weight
        # the bias is not packed, so its values may change
        return weight.data_ptr(), None if weight.is_inference() else weight._version, id(self.bias)

    def _keep(self, step: PackedCall) -> PackedCall:
        # with the weight itself, so that no other tensor can get its address
        self._packed = self._version(), step, self.weight.detach()
        return step

    def _plain(self, *inputs: Tensor | None) -> bool:
        own = (self.weight, self.bias)
        return (
            self.weight.dtype != torch.float32
            or not all(fusable(x) for x in inputs if x is not None)
            or (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in own))
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != '_packed'}

    def extra_repr(self) -> str:
        return super().extra_repr() + (', relu' if self.relu else '')


class FusedConv2d(Fused, nn.Conv2d):
    """``relu(conv(x) + other)`` where ``relu`` and ``other`` are optional; (N, I, H, W) -> (N, O, H', W').

    Attributes:
        in_place: ``other`` may be overwritten with the result.
    """

    in_place = False

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> FusedConv2d:
        """Take over the parameters of a convolution with zero padding in numbers."""
        result = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
            conv.groups, conv.bias is not None, device='meta',
        )  # fmt: skip
        result.weight, result.bias = conv.weight, conv.bias
        return result.train(conv.training)

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if input.dim() != 4 or self._plain(input, other):
            y = super().forward(input)
            y = y if other is None else y + other
            return y.relu() if self.relu else y
        step = self.packed() or self._pack(input, other is not None)
        return step(input) if other is None else step(input, other)

    def _pack(self, x: Tensor, adds: bool) -> PackedCall:
        weight = self.weight.detach()
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        if not adds and is_pointwise(self) and pixels * weight.numel() <= _SMALL:
            return self._keep(PixelProduct(_product(weight.flatten(1).contiguous(), self.bias, self.relu, pixels)))
        geometry = [list(self.padding), list(self.stride), list(self.dilation), self.groups]
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, tuple(x.shape))
        return self._keep(_convolution(packed, self.bias, geometry, self.relu, adds, self.in_place))


class FusedLinear(Fused, nn.Linear):
    """``relu(linear(x))`` where ``relu`` is optional; (..., I) -> (..., O).

    PyTorch's own product uses MKL. On an AMD EPYC that takes two to five times as long for more than one row.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> FusedLinear:
        """Take over the parameters of a linear layer."""
        result = cls(linear.in_features, linear.out_features, linear.bias is not None, device='meta')
        result.weight, result.bias = linear.weight, linear.bias
        return result.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() < 2 or self._plain(input):
            y = super().forward(input)
            return y.relu() if self.relu else y
        step = self.packed()
        if step is None:
            step = self._keep(_product(self.weight.detach(), self.bias, self.relu, math.prod(input.shape[:-1])))
        return step(input)


class GlobalAverage(nn.Module):
    """Mean of each channel, (N, C, H, W) -> (N, C, 1, 1), in a third of the time of ``nn.AdaptiveAvgPool2d(1)``."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # the ONNX exporter of detectors takes no traced window
            return F.adaptive_avg_pool2d(input, 1)
        return F.avg_pool2d(input, input.shape[-2:])


def fusable(x: Any) -> bool:
    """Whether oneDNN's calls take this input now: float32 on the CPU, not empty, without autograd or a tracer."""
    return onednn_available() and _is_plain_input(x)


def _is_plain_input(x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.is_cpu
        and x.dtype is torch.float32
        and x.numel() > 0  # a head without boxes
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._len_torch_dispatch_stack()  # counters and tracers of operations do not know oneDNN's
    )


def is_pointwise(conv: nn.Conv2d, any_stride: bool = False) -> bool:
    """Whether a convolution is one matrix product per pixel: 1x1, ungrouped, unpadded, with stride 1 or any stride."""
    strides = any_stride or conv.stride == (1, 1)
    return conv.kernel_size == (1, 1) and strides and conv.padding == (0, 0) and conv.groups == 1


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the packed copies of weights that fused layers hold for oneDNN."""
    return sum(m.weight.nbytes for m in model.modules() if isinstance(m, Fused) and m._packed is not None)


def _convolution(
    weight: Tensor, bias: Tensor | None, geometry: list[Any], relu: bool, adds: bool, in_place: bool
) -> PackedCall:
    """A convolution of oneDNN as a function of its input maps alone."""
    act, unary = 'relu' if relu else 'none', 'relu' if relu else None
    padding, stride, dilation, groups = geometry
    # `_op` skips the Python method that calls an overload, 66 times in a pass of a ResNet-50
    conv, in_place_conv = torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_
    plain, adding, inside = conv.default._op, conv.binary._op, in_place_conv.binary._op

    def convolve(x: Tensor) -> Tensor:
        return plain(x, weight, bias, padding, stride, dilation, groups, act, [], '')

    def convolve_and_add(x: Tensor, other: Tensor) -> Tensor:
        return adding(x, other, weight, bias, padding, stride, dilation, groups, 'add', 1.0, unary, [], '')

    def convolve_into(x: Tensor, other: Tensor) -> Tensor:
        return inside(other, x, weight, bias, padding, stride, dilation, groups, 'add', 1.0, unary, [], '')

    return (convolve_into if in_place else convolve_and_add) if adds else convolve


class PixelProduct:
    """A 1x1 convolution as a matrix product, with half the cost of a call; (N, I, H, W) -> (N, O, H, W).

    Attributes:
        product: the same with channels last, (N, H, W, I) -> (N, H, W, O).
    """

    def __init__(self, product: PackedCall) -> None:
        self.product = product

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.permute(TO_LAST)).permute(TO_FIRST)


def _product(weight: Tensor, bias: Tensor | None, relu: bool, rows: int) -> PackedCall:
    """A matrix product of oneDNN as a function of its input (``rows``, I) alone; ``weight`` is (O, I)."""
    packed, act = torch.ops.mkldnn._reorder_linear_weight(weight, rows), 'relu' if relu else 'none'
    product = torch.ops.mkldnn._linear_pointwise.default._op

    def multiply(x: Tensor) -> Tensor:
        return product(x, packed, bias, act, [], '')

    return multiply
