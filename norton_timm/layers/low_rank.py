"""Layers of low rank, stored as two layers: linear ones, and convolutions whose outputs span few dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from norton_timm.utils import replace_module


class _LowRank(nn.Sequential):
    """Two layers whose weights multiply: (O, R) times (R, P), with P numbers read by each filter."""

    holds_factors = True
    __jit_unused_properties__ = ('weight',)

    @property
    def rank(self) -> int:
        """Width between the two layers."""
        return self[1].weight.shape[1]

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads type, device or shape of a layer's weight."""
        return self.weight_product().view(-1, *self[0].weight.shape[1:])

    @property
    def bias(self) -> nn.Parameter | None:
        """Bias of the second layer."""
        return self[1].bias

    def weight_product(self) -> Tensor:
        """The weight (O, P) that the two layers stand for."""
        return self[1].weight.flatten(1) @ self[0].weight.flatten(1)

    @torch.no_grad()
    def set_factors(self, second: Tensor, first: Tensor) -> None:
        """Set the weights.

        Args:
            second: (O, R).
            first: (R, P).
        """
        self[1].weight.copy_(second.view_as(self[1].weight))
        self[0].weight.copy_(first.view_as(self[0].weight))

    def _follow(self, dense: Any) -> None:
        """Take bias, mode, and whether it is trained from the dense layer, and the truncated SVD of its weight."""
        weight = dense.weight
        u, s, v = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
        root = s[: self.rank].sqrt()
        self.set_factors(u[:, : self.rank] * root, root[:, None] * v[: self.rank])
        if dense.bias is not None:
            with torch.no_grad():
                self[1].bias.copy_(dense.bias)
        for parameter in self.parameters():
            parameter.requires_grad_(weight.requires_grad)
        self.train(dense.training)


class LowRankLinear(_LowRank):
    """A linear layer of rank R: its weight (O, I) is ``second.weight @ first.weight``, (O, R) times (R, I).

    It consists of two ordinary linear layers, so code that handles linear layers handles this one too.

    Args:
        in_features: I.
        out_features: O.
        rank: R.
        bias: whether the second layer has a bias.

    Raises:
        ValueError: a rank below 1 or above min(I, O).

    Example:
        >>> layer = LowRankLinear.from_linear(nn.Linear(512, 256), rank=32)
        >>> layer(torch.rand(1, 512)).shape
        torch.Size([1, 256])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_rank(rank, in_features, out_features)
        super().__init__(
            nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype),
        )
        with torch.no_grad():
            self[0].weight.mul_(3**0.5)  # the product then starts with the variance of nn.Linear, 1 / (3 I)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self[0].in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self[1].out_features

    @classmethod
    def like(cls, linear: nn.Linear, rank: int, device: torch.device | str | None = None) -> LowRankLinear:
        """A layer with random weights in the place of ``linear``."""
        weight, biased = linear.weight, linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, rank, biased, device or weight.device, weight.dtype)
        return layer.train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int) -> LowRankLinear:
        """The best approximation of this rank, a truncated SVD; each factor takes the roots of the singular values."""
        layer = cls.like(linear, rank)
        layer._follow(linear)
        return layer


class LowRankConv2d(_LowRank):
    """A Kh x Kw convolution of rank R: one with R filters, without bias, then a 1x1 convolution (Zhang et al., 2015).

    Unlike CPD, which treats each filter alone, the R filters serve all outputs. Stride, padding (and its mode)
    and dilation are the first layer's. Both layers are ordinary convolutions.

    Args:
        conv: the dense convolution whose place it takes; not grouped.
        rank: R, from 1 to min(I * Kh * Kw, O).
        device: device of the weights; by default that of ``conv``.

    Raises:
        ValueError: a rank that the layer cannot have.

    Example:
        >>> layer = LowRankConv2d.from_conv(nn.Conv2d(64, 128, 3, padding=1), rank=32)
        >>> layer(torch.rand(1, 64, 8, 8)).shape
        torch.Size([1, 128, 8, 8])
    """

    def __init__(self, conv: nn.Conv2d, rank: int, device: torch.device | str | None = None) -> None:
        _check_rank(rank, conv.weight[0].numel(), conv.out_channels)
        at: dict[str, Any] = {'device': device or conv.weight.device, 'dtype': conv.weight.dtype}
        with torch.device(at['device']):  # timm's convolutions take neither device nor type nor padding mode
            make: Any = type(conv)
            first = make(conv.in_channels, rank, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False)
        first.padding_mode = conv.padding_mode
        second = nn.Conv2d(rank, conv.out_channels, 1, bias=conv.bias is not None, **at)
        super().__init__(first.to(conv.weight.dtype), second)

    @property
    def in_channels(self) -> int:
        """Width of the input."""
        return self[0].in_channels

    @property
    def out_channels(self) -> int:
        """Width of the output."""
        return self[1].out_channels

    @classmethod
    def like(cls, conv: nn.Conv2d, rank: int, device: torch.device | str | None = None) -> LowRankConv2d:
        """A layer with random weights in the place of ``conv``."""
        return cls(conv, rank, device).train(conv.training)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, rank: int) -> LowRankConv2d:
        """The truncated SVD of the weight (O, I * Kh * Kw)."""
        layer = cls.like(conv, rank)
        layer._follow(conv)
        return layer


LOW_RANK = (LowRankLinear, LowRankConv2d)


def can_factor(module: nn.Module) -> bool:
    """Whether a layer can become two of low rank: plain linear layers and convolutions that are not grouped."""
    return type(module) is nn.Linear or (type(module) in (nn.Conv2d, Conv2dSame) and module.groups == 1)


def low_rank_parts(model: nn.Module) -> set[nn.Module]:
    """The layers that low-rank layers consist of; they are not factored or decomposed again."""
    return {part for module in model.modules() if isinstance(module, LOW_RANK) for part in module}


def full_rank(module: Any) -> int:
    """The largest rank that a layer can have."""
    return min(module.weight[0].numel(), module.weight.shape[0])


def factor_layers(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, float]:
    """Replace linear layers and convolutions by their truncated SVD, in place.

    Args:
        model: the network.
        ranks: rank by layer name.

    Returns:
        Squared relative error of each weight, by layer name.
    """
    errors = {}
    for name, rank in ranks.items():
        dense: Any = model.get_submodule(name)
        linear = isinstance(dense, nn.Linear)
        layer = LowRankLinear.from_linear(dense, rank) if linear else LowRankConv2d.from_conv(dense, rank)
        old = dense.weight.detach().double().flatten(1)
        lost = old - layer.weight_product().detach().double()
        errors[name] = float(lost.square().sum() / old.square().sum().clamp_min(1e-300))
        replace_module(model, name, layer)
    return errors


def factor_shapes(model: nn.Module, ranks: Mapping[str, int], device: str | None = None) -> None:
    """Replace linear layers and convolutions by low-rank layers with random weights, in place.

    Args:
        model: the network.
        ranks: rank by layer name.
        device: device of the new weights; by default that of the old ones.

    Raises:
        ValueError: a name that is no such layer, or a rank that the layer cannot have.
    """
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        dense: Any = modules.get(name)
        if dense is None:
            raise ValueError(f'got a low-rank layer {name[:80]!r} that the network does not have')
        if not can_factor(dense):
            raise ValueError(
                f'got a low-rank layer {name!r}, expected a linear layer or a convolution there, not '
                f'{type(dense).__name__}'
            )
        kind: Any = LowRankLinear if isinstance(dense, nn.Linear) else LowRankConv2d
        replace_module(model, name, kind.like(dense, rank, device))


def _check_rank(rank: int, inputs: int, outputs: int) -> None:
    if not 1 <= rank <= min(inputs, outputs):
        raise ValueError(f'got rank {rank}, expected 1 to {min(inputs, outputs)}')
