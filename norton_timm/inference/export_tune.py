"""Choose the deployed form of a classifier that is fastest in the runtime of its exported file."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.inference import export
from norton_timm.inference.deploy import deploy, deployment_report
from norton_timm.inference.forms import distinct_forms
from norton_timm.layers import CPDConv2d
from norton_timm.profiling import take_turns

log = logging.getLogger(__name__)

# channels in a block of these runtimes' kernels, with 256-bit and 512-bit vectors
_BLOCKS = (8, 16)
_SECONDS = 1.0


def export_variants(model: nn.Module, images: Tensor) -> Iterator[nn.Module]:
    """Deployed networks with equal outputs, as candidates for the fastest one in another runtime.

    One is the choice of :func:`norton_timm.deploy` in PyTorch. The others have one form for all layers, without and
    with channels of zeros that fill blocks of 8 or 16.

    Args:
        model: dense or compressed classifier; it is not changed.
        images: (N, C, H, W).
    """
    decomposed = any(isinstance(m, CPDConv2d) for m in model.modules())
    forms = [form for form in distinct_forms(model) if form != 'factored'] if decomposed else [None]
    yield deploy(model, images)
    widths: list[dict[str, int]] = [] if decomposed else [{}]
    for multiple in (1, *_BLOCKS):
        fixed = (deploy(model, images, False, multiple, form) for form in forms)
        first = next(fixed)
        widened = deployment_report(first).widened
        if widened in widths:
            continue
        widths.append(widened)
        yield first
        yield from fixed
        if decomposed and multiple == _BLOCKS[0]:
            yield deploy(model, images, channel_multiple=multiple)


@torch.no_grad()
def fastest_variant(model: nn.Module, images: Tensor, kind: str) -> nn.Module:
    """The fastest of :func:`export_variants` in the runtime of a format.

    Each variant is measured in turns with the fastest one so far, so at most two are in memory.

    Args:
        model: dense or compressed classifier; it is not changed.
        images: (N, C, H, W), with the batch size that matters.
        kind: one of ``norton_timm.inference.FORMATS``.

    Raises:
        ValueError: a package that is missing, or a network that the exporter cannot take.

    Example:
        >>> fast = fastest_variant(model, torch.rand(1, 3, 224, 224), 'onnx')
    """
    with tempfile.TemporaryDirectory() as folder:
        best: tuple[nn.Module, Callable[[], Any]] | None = None
        for number, variant in enumerate(export_variants(model, images)):
            path = Path(folder) / f'{number}{export.FORMATS[kind]}'
            export.write_exported(variant, images, path)
            challenger = variant, partial(export.read_exported(path), images)
            if best is None:
                best = challenger
                continue
            times = take_turns([best[1], challenger[1]], lambda: None, _SECONDS, passes=3).relative()
            log.info('%s: %s %.3f of the time of %s', kind, _told(variant), times[1], _told(best[0]))
            best = challenger if times[1] < 1 else best
    assert best is not None  # deploy's own choice at least
    return best[0]


def _told(variant: nn.Module) -> str:
    report = deployment_report(variant)
    forms = report.chosen or ' and '.join(sorted(set(report.forms.values()))) or 'dense'
    return f'{forms} ({"widened" if report.widened else "not widened"})'
