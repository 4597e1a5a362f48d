"""LowRankLinear: a linear layer of low rank, stored as two linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from norton_timm.utils import plain_layer, replace_module


class LowRankLinear(nn.Sequential):
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
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f'got rank {rank}, expected 1 to {min(in_features, out_features)}')
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
    def rank(self) -> int:
        """Width between the two layers."""
        return self[0].out_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self[1].out_features

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int) -> LowRankLinear:
        """The best approximation of this rank, a truncated SVD; each factor takes the roots of the singular values."""
        weight = linear.weight
        layer = cls(
            linear.in_features, linear.out_features, rank, linear.bias is not None, weight.device, weight.dtype
        )  # fmt: skip
        u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        root = s[:rank].sqrt()
        with torch.no_grad():
            layer[0].weight.copy_(root[:, None] * v[:rank])
            layer[1].weight.copy_(u[:, :rank] * root)
            if linear.bias is not None:
                layer[1].bias.copy_(linear.bias)
        for parameter in layer.parameters():
            parameter.requires_grad_(weight.requires_grad)
        return layer.train(linear.training)

    def weight_product(self) -> Tensor:
        """The weight (O, I) that the two layers stand for."""
        return self[1].weight @ self[0].weight


def factor_linears(model: nn.Module, ranks: dict[str, int]) -> dict[str, float]:
    """Replace linear layers by their truncated SVD, in place.

    Args:
        model: the network.
        ranks: rank by layer name.

    Returns:
        Squared relative error of each weight, by layer name.
    """
    errors = {}
    for name, rank in ranks.items():
        linear: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
        layer = LowRankLinear.from_linear(linear, rank)
        old = linear.weight.detach().double()
        lost = old - layer.weight_product().detach().double()
        errors[name] = float(lost.square().sum() / old.square().sum().clamp_min(1e-300))
        replace_module(model, name, layer)
    return errors


def factor_shapes(model: nn.Module, ranks: dict[str, int], device: str | None = None) -> None:
    """Replace linear layers by low-rank layers with random weights, in place.

    Args:
        model: the network.
        ranks: rank by layer name.
        device: device of the new weights; by default that of the old ones.

    Raises:
        ValueError: a name that is no plain linear layer, or a rank that the layer cannot have.
    """
    for name, rank in ranks.items():
        linear = plain_layer(model, name, nn.Linear, 'low-rank')
        weight, biased = linear.weight, linear.bias is not None
        layer = LowRankLinear(
            linear.in_features, linear.out_features, rank, biased, device or weight.device, weight.dtype
        )  # fmt: skip
        replace_module(model, name, layer.train(linear.training))
