"""Which of a classifier's deployed forms is fastest in the runtime that its exported file is for."""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from norton_timm import export
from norton_timm.deploy import deploy, deployment_report
from norton_timm.fixed import distinct_forms
from norton_timm.layers import CPDConv2d
from norton_timm.measure import take_turns

log = logging.getLogger(__name__)

# channels in a block of these runtimes' kernels, with 256-bit and 512-bit vectors
_BLOCKS = (8, 16)
_SECONDS = 2.0


@torch.no_grad()
def export_variants(model: nn.Module, images: Tensor) -> list[nn.Module]:
    """Deployed networks with equal outputs, of which one or another is the fastest in an exported file's runtime.

    They are what :func:`norton_timm.deploy` chooses in PyTorch, and each form for all layers, with channels as they are
    or with channels of zeros that fill blocks of 8 or 16.

    Args:
        model: dense or compressed classifier; it is not changed.
        images: (N, C, H, W).
    """
    decomposed = any(isinstance(m, CPDConv2d) for m in model.modules())
    forms = [form for form in distinct_forms(model) if form != 'factored'] if decomposed else [None]
    variants = [deploy(model, images)]
    widths: list[dict[str, int]] = [] if decomposed else [{}]
    for multiple in (1, *_BLOCKS):
        made = [deploy(model, images, False, multiple, form) for form in forms]
        widened = deployment_report(made[0]).widened
        if widened in widths:
            continue
        widths.append(widened)
        variants += made
        if decomposed and multiple == _BLOCKS[0]:
            variants.append(deploy(model, images, channel_multiple=multiple))
    return variants


@torch.no_grad()
def fastest_variant(model: nn.Module, images: Tensor, kind: str) -> nn.Module:
    """The one of :func:`export_variants` that takes least time in the runtime of a format, in turns with the others.

    Args:
        model: dense or compressed classifier; it is not changed.
        images: (N, C, H, W), as many at a time as matter.
        kind: one of ``norton_timm.export.FORMATS``.

    Raises:
        ValueError: a package that is missing, or a network that the exporter cannot take.
    """
    variants = export_variants(model, images)
    if len(variants) == 1:
        return variants[0]
    with tempfile.TemporaryDirectory() as folder:
        calls = []
        for number, variant in enumerate(variants):
            path = Path(folder) / f'{number}{export.FORMATS[kind]}'
            export.write(variant, images, path)
            calls.append(partial(export.read(path), images))
        times = take_turns(calls, lambda: None, _SECONDS, passes=3).milliseconds()
    best = variants[min(range(len(variants)), key=lambda k: times[k])]
    log.info('%s, %s: the fastest of %d variants in %s, %.3f ms', *_told(best), len(variants), kind, min(times))
    return best


def _told(variant: nn.Module) -> tuple[str, str]:
    report = deployment_report(variant)
    forms = ' and '.join(sorted(set(report.forms.values()))) or 'dense'
    return forms, 'widened channels' if report.widened else 'channels as they are'
