"""What layers read and give on calibration images: means and second moments at some places of the maps."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from norton_timm.utils import at_least_float32

_CHUNK = 32  # images whose patches are held at a time
_SAMPLES = 3  # samples wanted for each number that a filter reads
_LEAST_SAMPLES = 4096
MOST_INPUTS = 8192  # of a filter: second moments of more do not fit into memory


def places_of(positions: int, inputs: int, images: int, generator: torch.Generator) -> Tensor:
    """Random places of an output map at which a layer is sampled, enough of them for a least-squares fit.

    Args:
        positions: of the map.
        inputs: P, numbers that each filter reads.
        images: number of images that are sampled.
        generator: source of the places.

    Returns:
        Indices into the flattened map, at most ``positions``.
    """
    wanted = max(_SAMPLES * inputs, _LEAST_SAMPLES)
    return torch.randperm(positions, generator=generator)[: max(8, -(-wanted // images))]


def samples_of(layer: Any, x: Tensor, places: Tensor) -> Tensor:
    """What the filters of a layer see at some places of the output map: (N * places, P).

    Args:
        layer: a convolution, dense or decomposed, or a linear layer.
        x: its input: (N, I, H, W), or (N, ..., I) of a linear layer.
        places: indices into the flattened output map, or into the positions of a linear layer's input.

    Returns:
        P is I * Kh * Kw, of all groups.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, places].flatten(0, 1)
    (kh, kw), (sh, sw), (dh, dw) = (tuple(map(int, t)) for t in (layer.kernel_size, layer.stride, layer.dilation))
    if isinstance(layer, Conv2dSame):
        x = pad_same(x, [kh, kw], [sh, sw], [dh, dw])
    elif isinstance(layer, nn.Conv2d):
        mode = 'constant' if layer.padding_mode == 'zeros' else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    else:
        ph, pw = layer.padding
        x = F.pad(x, (pw, pw, ph, ph))
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    rows = (places // width * sh)[:, None, None] + dh * torch.arange(kh, device=x.device)[:, None]
    columns = (places % width * sw)[:, None, None] + dw * torch.arange(kw, device=x.device)
    index = (rows * x.shape[3] + columns).flatten()
    seen = x.flatten(2)[:, :, index].view(*x.shape[:2], len(places), kh * kw)
    return seen.transpose(1, 2).flatten(2).flatten(0, 1)


def outputs_at(y: Tensor, places: Tensor, linear: bool = False) -> Tensor:
    """A map (N, O, H, W), or the output (N, ..., O) of a linear layer, at some places: (N, places, O)."""
    if linear:
        return y.reshape(y.shape[0], -1, y.shape[-1])[:, places]
    return y.flatten(2)[:, :, places].transpose(1, 2)


class Moments:
    """Sums over samples (M, P) of what a layer reads and (M, O) of what it should give.

    Products are summed in float32 at least, about the first samples' mean, so that float32 holds them.

    Example:
        >>> moments = Moments()
        >>> moments.add(samples_of(conv, x, places), outputs_at(conv(x), places).flatten(0, 1))
        >>> moments.gram(centred=True).shape
        torch.Size([576, 576])
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift_x = self._shift_y = torch.zeros(())
        self._xx = self._xy = self._x = self._y = torch.zeros(())

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add samples (M, P), and outputs (M, O) that belong to them."""
        x, y = at_least_float32(x), None if y is None else at_least_float32(y)
        if not self.count:
            self._shift_x = x.mean(0)
            self._shift_y = torch.zeros(()) if y is None else y.mean(0)
        x = x - self._shift_x
        self._xx = self._xx + x.mT @ x
        self._x = self._x + x.sum(0)
        if y is not None:
            y = y - self._shift_y
            self._xy = self._xy + x.mT @ y
            self._y = self._y + y.sum(0)
        self.count += len(x)

    def __add__(self, other: Moments) -> Moments:
        """Moments of the samples of both."""
        if not other.count or not self.count:
            return self if self.count else other
        both = Moments()
        both.count = self.count + other.count
        both._shift_x, both._shift_y = self._shift_x, self._shift_y
        dx, dy = other._shift_x - self._shift_x, other._shift_y - self._shift_y
        n = other.count
        both._x, both._y = self._x + other._x + n * dx, self._y + other._y + n * dy
        cross_terms = torch.outer(other._x, dx)
        both._xx = self._xx + other._xx + cross_terms + cross_terms.mT + n * torch.outer(dx, dx)
        if self._xy.dim():
            both._xy = (
                self._xy + other._xy + torch.outer(other._x, dy) + torch.outer(dx, other._y) + n * torch.outer(dx, dy)
            )
        return both

    @property
    def mean(self) -> Tensor:
        """Mean (P,) of what is read."""
        return self._shift_x + self._x / self.count

    @property
    def mean_output(self) -> Tensor:
        """Mean (O,) of what should be given."""
        return self._shift_y + self._y / self.count

    def gram(self, centred: bool) -> Tensor:
        """Second moments (P, P) of what is read, about its mean or about zero."""
        mean = self._x / self.count
        gram = self._xx / self.count - torch.outer(mean, mean)
        return gram if centred else gram + torch.outer(self.mean, self.mean)

    def cross(self, centred: bool) -> Tensor:
        """Second moments (P, O) of what is read with what should be given."""
        cross = self._xy / self.count - torch.outer(self._x / self.count, self._y / self.count)
        return cross if centred else cross + torch.outer(self.mean, self.mean_output)


def add_samples(moments: Moments, layer: Any, x: Tensor, y: Tensor | None, places: Tensor) -> None:
    """Add a layer's input, and outputs (N, places, O) that it should give, a few images at a time."""
    for k in range(0, len(x), _CHUNK):
        wanted = None if y is None else y[k : k + _CHUNK].flatten(0, 1)
        moments.add(samples_of(layer, x[k : k + _CHUNK], places), wanted)
