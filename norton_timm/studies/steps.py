"""Training steps of compressed networks, timed beside the uncompressed network and the authors' own block."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from norton_timm.layers import CPDConv2d, use_form
from norton_timm.profiling import take_turns

Row = dict[str, Any]
Data = tuple[Tensor, Tensor, torch.dtype]  # images, labels, precision of the step


@contextmanager
def clock() -> Iterator[Callable[[], float]]:
    """Time the block; the function it gives returns the seconds, so far or once the block has ended."""
    start, end = time.perf_counter(), None
    yield lambda: (end if end is not None else time.perf_counter()) - start
    end = time.perf_counter()


class RankMajorCPD(nn.Module):
    """The block of NORTON's code: 1x1, then depthwise Kh x 1 and 1 x Kw on R * O channels, then a sum over R.

    Channel r * O + o belongs to component r of filter o. It takes the factors of a `CPDConv2d` and computes the same.
    """

    def __init__(self, layer: CPDConv2d) -> None:
        super().__init__()
        if layer.groups != 1:
            raise ValueError(f'got groups={layer.groups}, expected 1')
        self.shape = layer.rank, layer.out_channels
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        rows = layer.out_channels, layer.rank
        self.pointwise, self.vertical, self.horizontal = (
            nn.Parameter(f.detach().reshape(*rows, *shape).transpose(0, 1).flatten(0, 1).clone())
            for f, shape in (
                (layer.pointwise, (layer.in_channels, 1, 1)),
                (layer.vertical, (1, layer.kernel_size[0], 1)),
                (layer.horizontal, (1, 1, layer.kernel_size[1])),
            )
        )
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        (sh, sw), (ph, pw), (dh, dw) = self.stride, self.padding, self.dilation
        rows = self.shape[0] * self.shape[1]
        x = F.conv2d(x, self.pointwise)
        x = F.conv2d(x, self.vertical, None, (sh, 1), (ph, 0), (dh, 1), groups=rows)
        x = F.conv2d(x, self.horizontal, None, (1, sw), (0, pw), (1, dw), groups=rows)
        x = x.unflatten(1, self.shape).sum(1)
        return x if self.bias is None else x + self.bias.view(1, -1, 1, 1)


def with_authors_block(model: nn.Module) -> nn.Module:
    """A copy of `model` with the authors' block, of the same factors, in place of every CPDConv2d."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CPDConv2d):
            model.set_submodule(name, RankMajorCPD(layer))
    return model


def benchmark_training(rounds: int, seed: int) -> list[Row]:
    """One optimiser step: the uncompressed network, ours with each layer dense or factored, and the authors' block.

    ResNet-56 at rank 2 with batches of 256, ResNet-50 r078 with batches of 32, in float32 and in mixed precision
    (bfloat16). All run channels_last; the authors' block also in PyTorch's default layout, as their code runs it. The
    variants take turns, so that a busy machine slows all alike; the fastest round of each counts.
    """
    import norton_timm  # noqa: F401  registers the models

    rows = []
    for base, ours, batch, size in (
        ('resnet56_cifar', 'norton_resnet56_cifar.r071', 256, 32),
        ('resnet50', 'norton_resnet50.r078', 32, 224),
    ):
        for precision in (torch.float32, torch.bfloat16):
            torch.manual_seed(seed)
            plain, model = (timm.create_model(name, pretrained=False) for name in (base, ours))
            data = torch.randn(batch, 3, size, size), torch.randint(10, (batch,)), precision
            seconds = _fastest_steps(_variants(plain, model, data), rounds)
            row: Row = {'model': ours, 'precision': str(precision).partition('.')[2], 'batch': batch}
            row |= {f'{label}_s': value for label, value in seconds.items()}
            row['dense_over_uncompressed'] = seconds['dense'] / seconds['uncompressed']
            for label in ('factored', 'authors_block', 'authors_block_channels_last'):
                row[f'{label}_over_dense'] = seconds[label] / seconds['dense']
            rows.append(row)
    return rows


def _variants(plain: nn.Module, model: nn.Module, data: Data) -> dict[str, Callable[[], None]]:
    last, authors = torch.channels_last, with_authors_block(model)
    return {
        'uncompressed': _training_step(plain, 'auto', data, last),
        'dense': _training_step(model, 'dense', data, last),
        'factored': _training_step(model, 'factored', data, last),
        'authors_block': _training_step(copy.deepcopy(authors), 'auto', data, torch.contiguous_format),
        'authors_block_channels_last': _training_step(authors, 'auto', data, last),
    }


def _fastest_steps(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of some rounds of each step; the steps take turns."""
    turns = take_turns(list(steps.values()), lambda: None, 0.0, rounds)
    return {label: min(turns.passes(call)) / 1000 for call, label in enumerate(steps)}


def _training_step(model: nn.Module, form: str, data: Data, layout: torch.memory_format) -> Callable[[], None]:
    images, labels, precision = data
    model.train().to(memory_format=layout)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step() -> None:
        with use_form(model, form):
            optimizer.zero_grad()
            with torch.autocast('cpu', precision, enabled=precision != torch.float32):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

    return step
