"""CPDConv2d: a convolution whose filters are stored as canonical polyadic factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from norton_timm.tensors import CPFactors, cp_decompose

FORMS = ('factored', 'merged', 'dense', 'auto')

# up to this many products O * R * I * Kh * Kw, an elementwise product and a sum build and differentiate a kernel faster
# than O matrix products of inner size R, above all under autocast, which casts their operands (2 CPU cores)
_FEW_PRODUCTS = 100_000

IntPair = int | tuple[int, ...]


def _pair(value: IntPair) -> tuple[int, int]:
    if isinstance(value, str):
        raise ValueError(f'got padding {value!r}, expected numbers; from_conv translates names')
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def conv_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Padding of a convolution in numbers.

    Raises:
        ValueError: the padding is not symmetric (``'same'`` with an even kernel).
    """
    if not isinstance(conv.padding, str):
        return _pair(conv.padding)  # type: ignore[arg-type]
    if conv.padding == 'valid':
        return 0, 0
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
    if any(t % 2 for t in total):
        raise ValueError(f"got padding='same' with kernel {conv.kernel_size}: only symmetric padding is supported")
    return total[0] // 2, total[1] // 2


class CPDConv2d(nn.Module):
    """A 2-d convolution that stores every filter as a canonical polyadic decomposition (CPD) of rank R.

    Filter o is ``sum_r C[o, :, r] x A[o, :, r] x B[o, :, r]`` (NORTON, eq. 6): a 1x1, a Kh x 1 and a
    1 x Kw convolution. Rows are filter-major (``o * R + r``), so the last grouped convolution sums over r.

    The same parameters run in three forms with equal outputs, or in the one that ``auto`` picks:

    * ``factored``: 1x1, Kh x 1, 1 x Kw; it has the fewest multiply-accumulates;
    * ``merged``: 1x1, then one grouped Kh x Kw convolution; it passes over memory fewer times;
    * ``dense``: the full kernel is rebuilt (a small matrix product) and one ordinary convolution runs;
    * ``auto``: ``dense`` while training; otherwise the cheaper of ``merged`` and ``dense`` by a cost rule,
      or what :func:`norton_timm.tune_forms` measured. It never measures by itself, because then two runs of
      one script could differ in the last bit.

    Args:
        in_channels: I, channels of the input.
        out_channels: O, number of filters.
        kernel_size: (Kh, Kw) or one number.
        rank: R, components per filter.
        stride: as in :class:`torch.nn.Conv2d`, and so are ``padding``, ``dilation``, ``groups`` and ``bias``.
        form: one of ``FORMS``.

    Raises:
        ValueError: a rank below 1, an unknown form, or channels that the groups do not divide.

    Example:
        >>> layer = CPDConv2d(64, 128, 3, rank=2, padding=1)
        >>> layer(torch.rand(1, 64, 32, 32)).shape
        torch.Size([1, 128, 32, 32])
    """

    holds_factors = True
    __jit_unused_properties__ = ('weight',)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        rank: int,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        form: str = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f'got rank {rank}, expected an integer of at least 1')
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f'got groups={groups}, expected a divisor of {in_channels} and {out_channels} channels')
        self.in_channels, self.out_channels, self.rank, self.groups = in_channels, out_channels, rank, groups
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        (kh, kw), rows = self.kernel_size, out_channels * rank

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.pointwise = empty(rows, in_channels // groups, 1, 1)
        self.vertical = empty(rows, 1, kh, 1)
        self.horizontal = empty(out_channels, rank, 1, kw)
        self.bias = empty(out_channels) if bias else None
        self.form = form
        self.tuned: dict[bool, str] = {}  # measured form by training mode, set by tune_forms
        self.reset_parameters()

    @property
    def form(self) -> str:
        """How the layer runs: ``factored``, ``merged``, ``dense`` or ``auto``."""
        return self._form

    @form.setter
    def form(self, form: str) -> None:
        if form not in FORMS:
            raise ValueError(f'got form {form!r}, expected one of {", ".join(FORMS)}')
        self._form = form

    def reset_parameters(self) -> None:
        """Draw factors so that the kernel has the variance that ``nn.Conv2d`` starts with, 1 / (3 fan-in)."""
        fan_in = self.pointwise.shape[1] * self.kernel_size[0] * self.kernel_size[1]
        std = (1 / (3 * fan_in * self.rank)) ** (1 / 6)
        for factor in (self.pointwise, self.vertical, self.horizontal):
            nn.init.normal_(factor, std=std)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(fan_in**-0.5), fan_in**-0.5)

    @classmethod
    def like(
        cls, conv: nn.Conv2d, rank: int, form: str = 'auto', device: torch.device | str | None = None
    ) -> CPDConv2d:
        """A layer with random factors and the geometry of a convolution.

        Args:
            conv: gives channels, geometry, dtype, training mode, and whether gradients are needed.
            rank: R.
            form: one of ``FORMS``.
            device: device of the factors; by default that of the convolution.

        Raises:
            ValueError: padding that is not zeros, or asymmetric.
        """
        if conv.padding_mode != 'zeros':
            raise ValueError(f"got padding_mode={conv.padding_mode!r}, expected 'zeros'")
        layer = cls(
            conv.in_channels, conv.out_channels, _pair(conv.kernel_size), rank, _pair(conv.stride),
            conv_padding(conv), _pair(conv.dilation), conv.groups, conv.bias is not None, form,
            device=conv.weight.device if device is None else device, dtype=conv.weight.dtype,
        )  # fmt: skip
        return layer.requires_grad_(conv.weight.requires_grad).train(conv.training)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        rank: int,
        *,
        factors: CPFactors | None = None,
        generator: torch.Generator | None = None,
        form: str = 'auto',
    ) -> CPDConv2d:
        """Decompose a convolution, or take its decomposition from ``factors``.

        Raises:
            ValueError: padding that is not zeros, or asymmetric.

        Example:
            >>> layer = CPDConv2d.from_conv(nn.Conv2d(64, 128, 3, padding=1), rank=2)
            >>> layer.kernel().shape
            torch.Size([128, 64, 3, 3])
        """
        weight = conv.weight
        layer = cls.like(conv, rank, form, 'meta').to_empty(device=weight.device)
        if factors is None:
            factors = cp_decompose(weight.detach(), rank, generator=generator)
        layer.set_factors(factors)
        with torch.no_grad():
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer

    @torch.no_grad()
    def set_factors(self, factors: CPFactors) -> None:
        """Load ``A (O, Kh, R)``, ``B (O, Kw, R)``, ``C (O, I / groups, R)``, scaled to equal norms.

        With equal norms one learning rate is right for all three factors. A component with a zero column contributes
        nothing and is loaded unscaled: with all three columns at zero it would never get a gradient.
        """
        a, b, c = (f.detach().double() for f in factors[:3])
        norms = torch.stack([f.norm(dim=1) for f in (a, b, c)])  # (3, O, R)
        mean = norms.clamp_min(1e-300).log().mean(0).exp()
        live = (norms > 0).all(0)
        a, b, c = (f * (mean / n).where(live, 1)[:, None] for f, n in zip((a, b, c), norms))
        self.vertical.copy_(a.mT.reshape(self.vertical.shape))
        self.horizontal.copy_(b.mT.reshape(self.horizontal.shape))
        self.pointwise.copy_(c.mT.reshape(self.pointwise.shape))

    def factors(self) -> CPFactors:
        """The decomposition as the paper writes it: A (O, Kh, R), B (O, Kw, R), C (O, I / groups, R); NMSE 0."""
        o, r = self.out_channels, self.rank
        a, b, c = (p.detach().reshape(o, r, -1).mT for p in (self.vertical, self.horizontal, self.pointwise))
        return CPFactors(a, b, c, a.new_zeros(o))

    def merged_kernel(self) -> Tensor:
        """Kernel (O, R, Kh, Kw) of the grouped convolution of the merged form."""
        o, r, (kh, kw) = self.out_channels, self.rank, self.kernel_size
        return self.vertical.view(o, r, kh, 1) * self.horizontal.view(o, r, 1, kw)

    def kernel(self) -> Tensor:
        """The dense kernel (O, I / groups, Kh, Kw) that the factors stand for."""
        o, r, (kh, kw) = self.out_channels, self.rank, self.kernel_size
        spatial = self.merged_kernel()
        fan_in = self.in_channels // self.groups  # a Python number: torch.fx traces tensors only
        if o * r * fan_in * kh * kw <= _FEW_PRODUCTS:
            terms = self.pointwise.view(o, r, fan_in, 1, 1) * spatial[:, :, None]
            return terms.sum(1)
        return (self.pointwise.view(o, r, -1).transpose(1, 2) @ spatial.view(o, r, kh * kw)).view(o, -1, kh, kw)

    @property
    def weight(self) -> Tensor:
        """The dense kernel, for code that reads type, device or shape of a convolution's weight."""
        return self.kernel()

    def to_conv(self) -> nn.Conv2d:
        """An ordinary convolution with the dense kernel."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, device=self.pointwise.device, dtype=self.pointwise.dtype,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(self.kernel())
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
        for parameter in conv.parameters():
            parameter.requires_grad_(self.pointwise.requires_grad)
        return conv.train(self.training)

    def active_form(self) -> str:
        """The form that ``forward`` runs now: ``form`` itself, or what ``auto`` stands for."""
        if self.form != 'auto':
            return self.form
        if self.training in self.tuned:
            return self.tuned[self.training]
        if self.training:
            return 'dense'
        k, s = self.kernel_size[0] * self.kernel_size[1], self.stride[0] * self.stride[1]
        return 'merged' if prefers_merged(self.rank, self.in_channels // self.groups, k, s) else 'dense'

    def forward(self, input: Tensor) -> Tensor:  # called as the layer that it replaces
        form = self.active_form()
        if form == 'dense':
            return F.conv2d(input, self.kernel(), self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = F.conv2d(input, self.pointwise, groups=self.groups)
        if form == 'merged':
            kernel = self.merged_kernel()
            return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation, self.out_channels)
        (sh, sw), (ph, pw), (dh, dw) = self.stride, self.padding, self.dilation
        x = F.conv2d(x, self.vertical, None, (sh, 1), (ph, 0), (dh, 1), groups=self.out_channels * self.rank)
        return F.conv2d(x, self.horizontal, self.bias, (1, sw), (0, pw), (1, dw), groups=self.out_channels)

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, '
            f'stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, '
            f'bias={self.bias is not None}, form={self.form}'
        )


def prefers_merged(rank: int, fan_in: float, kernel: float, stride: float) -> bool:
    """Whether the merged form is cheaper than the dense one by a rule of thumb.

    The 1x1 convolution runs at input resolution. A grouped convolution takes about 4 times as long as its MACs say.

    Args:
        rank: R.
        fan_in: input channels of a group.
        kernel: positions of the kernel, Kh * Kw.
        stride: the product of both strides.
    """
    return rank * (fan_in * stride + 4 * kernel) < fan_in * kernel


def set_form(model: nn.Module, form: str) -> nn.Module:
    """Set the form of every CPDConv2d of ``model``; returns the model.

    Example:
        >>> model = set_form(model, 'factored')
    """
    for module in model.modules():
        if isinstance(module, CPDConv2d):
            module.form = form
    return model


@contextmanager
def use_form(model: nn.Module, form: str) -> Iterator[None]:
    """Run a block with every CPDConv2d in one form, then restore each layer's own form."""
    layers = [m for m in model.modules() if isinstance(m, CPDConv2d)]
    before = [layer.form for layer in layers]
    set_form(model, form)
    try:
        yield
    finally:
        for layer, old in zip(layers, before):
            layer.form = old
