"""Compile an inference network with PyTorch, at its first call or ahead of time, with its weights as constants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn import functional as F

from norton_timm.inference.onednn import FusedConv2d, is_pointwise
from norton_timm.profiling import synchronise, take_turns
from norton_timm.utils import replace_module


def frozen_weights() -> Any:
    """A context in which compiled networks hold their weights as constants, packed once.

    torch.compile's own option ``freezing`` comes too late to have an effect (PyTorch 2.15): it packs the weights again
    at every call, and a dense ResNet-50 takes 1.5 times as long.
    """
    return inductor.patch(freezing=True)


@torch.no_grad()
def compiled(model: nn.Module, example_input: Tensor) -> nn.Module:
    """``torch.compile`` of a copy, for inputs of this shape, with its weights as constants."""
    result: Any = torch.compile(copy.deepcopy(model), dynamic=False)
    with frozen_weights():
        result(example_input)
    return result


@torch.no_grad()
def compiled_ahead(model: nn.Module, example_input: Tensor, folder: Path) -> Callable[[Tensor], Any]:
    """The network as machine code made by AOTInductor, for inputs of this shape on this kind of processor.

    Unlike a result of torch.compile it checks nothing at each call. The network is compiled twice, with 1x1
    convolutions as convolutions and as matrix products; the faster program is returned.

    Args:
        model: an inference network that ``torch.export`` takes.
        example_input: what its ``forward`` takes.
        folder: existing folder for the two packages.

    Example:
        >>> images = torch.rand(1, 3, 224, 224)
        >>> program = compiled_ahead(deploy(model, images), images, Path('packages'))
        >>> scores = program(images)
    """
    programs: list[Callable[[Tensor], Any]] = []
    for name, network in (('convolutions', model), ('products', _with_products(model))):
        with frozen_weights():
            exported = torch.export.export(network, (example_input,))
            path = torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / f'{name}.pt2'))
        programs.append(torch._inductor.aoti_load_package(path))
    calls = [partial(program, example_input) for program in programs]
    times = take_turns(calls, partial(synchronise, example_input), seconds=1.0, passes=5).milliseconds()
    return min(zip(programs, times), key=lambda pair: pair[1])[0]


class _Product(nn.Module):
    """A 1x1 convolution with its addition and ReLU, as a matrix product; (N, I, H, W) -> (N, O, H, W)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().flatten(1).contiguous(), requires_grad=False)
        self.bias = conv.bias
        self.stride = conv.stride
        self.relu = isinstance(conv, FusedConv2d) and conv.relu

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        x = input[:, :, :: self.stride[0], :: self.stride[1]]
        y = F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)
        y = y if other is None else y + other
        return y.relu() if self.relu else y


def _with_products(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, conv in list(model.named_modules()):
        if type(conv) in (nn.Conv2d, FusedConv2d) and is_pointwise(conv, any_stride=True):  # type: ignore[arg-type]
            replace_module(model, name, _Product(conv))  # type: ignore[arg-type]
    return model
