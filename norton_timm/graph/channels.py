"""The vocabulary of channel tracing: labels of channels, slots of parameters, and which operations keep channels."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

ZERO = -1  # label of a channel that is constantly zero


class Channels(NamedTuple):
    """Labels of a tensor's channels and the dimension they lie on."""

    labels: np.ndarray
    dim: int


class ChannelCount(int):
    """A number of channels that a network read off a tensor's shape; it remembers which ones.

    A product with plain numbers still counts these channels. Every other operation gives a plain number.
    """

    labels: np.ndarray

    def __new__(cls, value: int, labels: np.ndarray) -> ChannelCount:
        """A number that counts the channels with these labels."""
        count = super().__new__(cls, value)
        count.labels = labels
        return count

    def __mul__(self, other: object) -> int:
        if isinstance(other, int) and not isinstance(other, ChannelCount):
            return ChannelCount(int(self) * other, self.labels)
        return int(self) * other  # type: ignore[operator]

    __rmul__ = __mul__


@dataclass(eq=False)
class Slot:
    """One dimension of one module's parameters, with the label of each index.

    ``kind`` is ``out`` (makes channels), ``in`` (reads them), ``depthwise``, ``channel`` (a norm or another
    per-channel layer) or ``param`` (a parameter used outside of layers, along ``dim``).
    """

    name: str
    module: nn.Module
    kind: str
    labels: np.ndarray
    dim: int = 0


UNARY = frozenset(
    """relu relu_ relu6 hardtanh hardtanh_ silu silu_ hardswish hardswish_ hardsigmoid hardsigmoid_ gelu gelu_ sigmoid
    sigmoid_ tanh tanh_ mish leaky_relu leaky_relu_ elu elu_ selu dropout dropout2d feature_dropout clamp clamp_
    contiguous clone to float half bfloat16 double type_as max_pool2d max_pool2d_with_indices avg_pool2d lp_pool2d
    adaptive_avg_pool2d adaptive_max_pool2d interpolate upsample identity detach alias neg abs exp softplus square
    sqrt pow requires_grad_""".split()
)
BINARY = frozenset(
    """add add_ __add__ __iadd__ __radd__ mul mul_ __mul__ __imul__ __rmul__ sub sub_ __sub__ __isub__ div div_
    __truediv__ __itruediv__ true_divide maximum minimum""".split()
)


class ChannelLabels:
    """Labels of channels, joined by union-find, and the tensors that carry them.

    Attributes:
        frozen: label -> why it must stay.
    """

    def __init__(self) -> None:
        self.frozen: dict[int, str] = {}
        self._parent: list[int] = []
        # None means known, without channels to follow
        self._of: MutableMapping[Tensor, Channels | None] = WeakTensorKeyDictionary()

    def new_labels(self, n: int) -> np.ndarray:
        """Labels of ``n`` new channels."""
        labels = np.arange(len(self._parent), len(self._parent) + n)
        self._parent += labels.tolist()
        return labels

    def find(self, label: int) -> int:
        """The label that represents all labels tied to this one."""
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def tie(self, a: np.ndarray, b: np.ndarray, why: str = 'added to zero padding') -> np.ndarray:
        """Make two label lists equal, index by index; a channel that meets a hard-coded zero must stay."""
        for i, j in zip(a.tolist(), b.tolist()):
            if i != ZERO and j != ZERO:
                self._parent[self.find(i)] = self.find(j)
            elif i != j:
                self.freeze([max(i, j)], why)
        return np.where(a == ZERO, b, a)

    def freeze(self, labels: Iterable[int], why: str) -> None:
        """Mark channels that must stay; the first reason counts."""
        for label in labels:
            if label != ZERO:
                self.frozen.setdefault(int(label), why)

    def channels(self, tensor: Tensor) -> Channels | None:
        """The channels of a tensor, None where it has none to follow."""
        return self._of.get(tensor)

    def set_channels(self, tensor: Tensor, channels: Channels | None) -> None:
        """Record the channels of a tensor."""
        self._of[tensor] = channels
