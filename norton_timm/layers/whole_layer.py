"""Whole-layer decompositions, the alternatives that NORTON's Fig. 1 compares with; TensorLy does the decomposing."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.layers.cpd_conv import conv_padding

WHOLE_LAYER_METHODS = ('cp', 'reshaped_cp', 'tucker2')


class WholeLayerConv2d(nn.Sequential):
    """A convolution replaced by a chain of smaller ones, from a decomposition of its whole weight.

    - `cp`: CPD of the fourth-order weight, 4 sublayers 1x1, Kh x 1, 1 x Kw, 1x1 (Lebedev et al., 2015);
    - `reshaped_cp`: CPD of the weight as `(O, I, Kh*Kw)`, 3 sublayers 1x1, depthwise Kh x Kw, 1x1 (Phan et al., 2020);
    - `tucker2`: Tucker on the channel modes, 3 sublayers 1x1, Kh x Kw, 1x1 (Kim et al., 2016).

    Built by `from_conv`; runs like any `nn.Sequential`.
    """

    method: str

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, method: str, rank: int | tuple[int, int], *, n_iter: int = 200, seed: int = 0
    ) -> WholeLayerConv2d:
        """Decompose a convolution.

        Args:
            conv: ungrouped, with zero padding.
            method: one of `METHODS`.
            rank: R of the CPD; for `tucker2` `(output rank, input rank)` or one number for both, at most O and I.
            n_iter: bound on TensorLy's iterations.
            seed: of TensorLy's random fill-in where its SVD start has too few columns.

        Raises:
            ValueError: unknown method, a rank out of range, groups, padding that is not zeros or asymmetric, NaN.
        """
        if method not in WHOLE_LAYER_METHODS:
            raise ValueError(f'method: got {method!r}, expected one of {", ".join(WHOLE_LAYER_METHODS)}')
        if conv.groups != 1:
            raise ValueError(f'conv: got groups={conv.groups}, expected 1: the whole layer is one tensor')
        if conv.padding_mode != 'zeros':
            raise ValueError(f"conv: got padding_mode={conv.padding_mode!r}, expected 'zeros'")
        if not torch.isfinite(conv.weight).all():
            raise ValueError('conv: the weight has NaN or infinite values')
        ranks = _check_rank(conv, method, rank)
        weight = conv.weight.detach().to('cpu', torch.float64)
        build = {'cp': _cp, 'reshaped_cp': _reshaped_cp, 'tucker2': _tucker2}[method]
        layer = cls(*build(conv, weight, ranks, n_iter, seed))
        layer.method = method
        last = layer[-1]
        assert isinstance(last, nn.Conv2d)
        if conv.bias is not None and last.bias is not None:
            with torch.no_grad():
                last.bias.copy_(conv.bias)
        for parameter in layer.parameters():
            parameter.requires_grad_(conv.weight.requires_grad)
        return layer.to(conv.weight.device, conv.weight.dtype).train(conv.training)

    def kernel(self) -> Tensor:
        """The dense kernel `(O, I, Kh, Kw)` that the chain stands for."""
        weights = [layer.weight for layer in self if isinstance(layer, nn.Conv2d)]
        first, last = weights[0][:, :, 0, 0], weights[-1][:, :, 0, 0]
        if self.method == 'tucker2':
            return torch.einsum('op,pqhw,qi->oihw', last, weights[1], first)
        spatial = weights[1][:, 0] if len(weights) == 3 else weights[1][:, 0] * weights[2][:, 0]
        return torch.einsum('or,rhw,ri->oihw', last, spatial, first)

    def to_conv(self) -> nn.Conv2d:
        """An ordinary convolution with the dense kernel."""
        convs = [layer for layer in self if isinstance(layer, nn.Conv2d)]
        kernel = self.kernel()
        pairs = {name: _combined(convs, name) for name in ('stride', 'padding', 'dilation')}
        bias = convs[-1].bias
        conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2:], bias=bias is not None, **pairs)  # type: ignore[arg-type]
        conv = conv.to(kernel.device, kernel.dtype)
        with torch.no_grad():
            conv.weight.copy_(kernel)
            if bias is not None and conv.bias is not None:
                conv.bias.copy_(bias)
        for parameter in conv.parameters():
            parameter.requires_grad_(convs[0].weight.requires_grad)
        return conv.train(self.training)


def _check_rank(conv: nn.Conv2d, method: str, rank: int | tuple[int, int]) -> tuple[int, int]:
    two = method == 'tucker2'
    given = list(rank) if two and isinstance(rank, (tuple, list)) else [rank, rank]
    ranks: list[int] = [r for r in given if type(r) is int and r >= 1]
    limits = (conv.out_channels, conv.in_channels)
    good = len(given) == len(ranks) == 2
    if not good or (two and isinstance(rank, (tuple, list)) and any(r > top for r, top in zip(ranks, limits))):
        wanted = f'(1..{limits[0]}, 1..{limits[1]}) or one integer' if two else 'an integer >= 1'
        raise ValueError(f'rank: got {rank!r}, expected {wanted}')
    return (min(ranks[0], limits[0]), min(ranks[1], limits[1])) if two else (ranks[0], ranks[1])


def _conv(like: nn.Conv2d, weight: Tensor, axes: str, bias: bool = False) -> nn.Conv2d:
    """A sublayer with this weight; it takes stride, padding and dilation of `like` along the axes named (h, w)."""
    kh, kw = weight.shape[2:]
    padding = conv_padding(like)
    at = [axis in axes for axis in 'hw']
    groups = weight.shape[0] if axes and weight.shape[1] == 1 else 1
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (kh, kw),
        stride=(like.stride[0] if at[0] else 1, like.stride[1] if at[1] else 1),
        padding=(padding[0] if at[0] else 0, padding[1] if at[1] else 0),
        dilation=(like.dilation[0] if at[0] else 1, like.dilation[1] if at[1] else 1),
        groups=groups,
        bias=bias,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        conv.weight.copy_(weight)
    return conv


def _parafac(tensor: Tensor, rank: int, n_iter: int, seed: int) -> list[Tensor]:
    """Factors with the weights spread evenly over the modes."""
    import tensorly
    from tensorly.decomposition import parafac

    tensorly.set_backend('numpy')
    scale = float(tensor.abs().max()) or 1.0
    with warnings.catch_warnings():
        # a rank above a mode's size is usual here; TensorLy fills the missing columns at random
        warnings.filterwarnings('ignore', message='Trying to compute SVD with n_eigenvecs')
        found: Any = parafac(
            (tensor / scale).numpy(), rank, n_iter_max=n_iter, init='svd', normalize_factors=True, random_state=seed
        )
    share = torch.as_tensor(found.weights * scale).abs() ** (1 / tensor.ndim)
    return [torch.as_tensor(factor) * share for factor in found.factors]


def _cp(conv: nn.Conv2d, weight: Tensor, ranks: tuple[int, int], n_iter: int, seed: int) -> list[nn.Conv2d]:
    o, i, h, w = _parafac(weight, ranks[0], n_iter, seed)
    return [
        _conv(conv, i.T[:, :, None, None], ''),
        _conv(conv, h.T[:, None, :, None], 'h'),
        _conv(conv, w.T[:, None, None, :], 'w'),
        _conv(conv, o[:, :, None, None], '', conv.bias is not None),
    ]


def _reshaped_cp(conv: nn.Conv2d, weight: Tensor, ranks: tuple[int, int], n_iter: int, seed: int) -> list[nn.Conv2d]:
    o, i, k = _parafac(weight.flatten(2), ranks[0], n_iter, seed)
    return [
        _conv(conv, i.T[:, :, None, None], ''),
        _conv(conv, k.T.reshape(-1, 1, *weight.shape[2:]), 'hw'),
        _conv(conv, o[:, :, None, None], '', conv.bias is not None),
    ]


def _tucker2(conv: nn.Conv2d, weight: Tensor, ranks: tuple[int, int], n_iter: int, seed: int) -> list[nn.Conv2d]:
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend('numpy')
    found: Any = partial_tucker(
        weight.numpy(), rank=list(ranks), modes=[0, 1], n_iter_max=n_iter, init='svd', random_state=seed
    )
    (core, (o, i)), _ = found
    middle = _conv(conv, torch.as_tensor(core.copy()), 'hw')
    return [
        _conv(conv, torch.as_tensor(i.copy()).T[:, :, None, None], ''),
        middle,
        _conv(conv, torch.as_tensor(o.copy())[:, :, None, None], '', conv.bias is not None),
    ]


def _combined(convs: list[nn.Conv2d], name: str) -> tuple[int, int]:
    """The setting of the one convolution that the chain replaces: per axis the value that is not neutral."""
    neutral = 0 if name == 'padding' else 1
    values = [getattr(conv, name) for conv in convs]
    rows, cols = ([v[axis] for v in values if v[axis] != neutral] for axis in (0, 1))
    return (rows or [neutral])[0], (cols or [neutral])[0]
