"""The parameter-free shortcut of CIFAR ResNets (option A) as a module that pruning can follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def padding_index(in_channels: int, out_channels: int) -> list[int]:
    """The map of option A: symmetric zero padding, or symmetric cropping where there are fewer outputs than inputs.

    Returns:
        For each of the `out_channels` outputs, the index of its input channel, or -1 for zero.
    """
    low = (out_channels - in_channels) // 2
    return [j - low if 0 <= j - low < in_channels else -1 for j in range(out_channels)]


class ChannelMap(nn.Module):
    """Subsamples space and places each channel: output `j` is input `index[j]`, or zero where that is -1.

    Option A (He et al. 2015, section 4.2) pads with zero channels. A map from outputs to inputs stays exact when
    channels on either side are pruned, and keeps the stages independent of each other.

    Args:
        in_channels: Channels of the input (N, in_channels, H, W).
        out_channels: Channels of the output (N, out_channels, ceil(H / stride), ceil(W / stride)).
        stride: Spatial subsampling.
        index: One entry per output channel, in [-1, in_channels); by default symmetric zero padding.

    Raises:
        ValueError: `index` has another length than `out_channels`, or an entry outside that range.

    Example:
        >>> shortcut = ChannelMap(16, 32, stride=2)
        >>> shortcut(torch.rand(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, index: Sequence[int] | None = None):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        entries = padding_index(in_channels, out_channels) if index is None else list(index)
        if len(entries) != out_channels:
            raise ValueError(f'index has {len(entries)} entries, expected one per output channel ({out_channels})')
        self.index: Tensor  # declared here, because TorchScript cannot read it from the class
        self.register_buffer('index', torch.zeros(0, dtype=torch.long))
        self.set_index(entries, in_channels)

    @torch.jit.unused
    def set_index(self, index: Sequence[int] | Tensor, in_channels: int | None = None) -> None:
        """Replace the map and both channel counts in place, on the device of the old map."""
        entries = [int(i) for i in (index.tolist() if isinstance(index, Tensor) else index)]
        in_channels = self.in_channels if in_channels is None else in_channels
        bad = [i for i in entries if not -1 <= i < in_channels]
        if bad:
            raise ValueError(f'index entries {bad} are out of range: expected -1 (zero) or 0 to {in_channels - 1}')
        self.in_channels = in_channels
        self.out_channels = len(entries)
        self.index = torch.tensor(entries, dtype=torch.long, device=self.index.device)
        # plain numbers, so that compilers see a static choice between a view, a pad and a gather
        self.low = entries.index(0) if 0 in entries else 0
        self.high = self.out_channels - self.low - in_channels
        pads = [-1] * self.low + list(range(in_channels)) + [-1] * self.high
        self.contiguous = self.high >= 0 and entries == pads
        self.gaps = -1 in entries

    @property
    def identity(self) -> bool:
        """True where the map changes no channel (it may still subsample)."""
        return self.contiguous and self.in_channels == self.out_channels

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.contiguous:
            if self.low > 0 or self.high > 0:
                x = F.pad(x, [0, 0, 0, 0, self.low, self.high])
            return x
        if self.gaps:
            x = F.pad(x, [0, 0, 0, 0, 0, 1])  # the channel of zeros that index -1 counts from the end
            return x.index_select(1, self.index.remainder(self.in_channels + 1))
        return x.index_select(1, self.index)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        """Load an index of any length; a checkpoint from elsewhere has none, and the current one stays."""
        index = state_dict.get(prefix + 'index')
        if index is None:
            return
        try:
            self.set_index(index)
        except ValueError as error:
            errors.append(f'{prefix}index: {error}')

    def extra_repr(self) -> str:
        kind = 'identity' if self.identity else f'{self.in_channels} -> {self.out_channels}'
        return f'{kind}, stride={self.stride}'
