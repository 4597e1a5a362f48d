"""Benchmark of compressed networks: the forms that `deploy` chooses against every layer in one fixed form."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import nn

from norton_timm.compression import CompressionSpec, compress
from norton_timm.inference import deploy, deployment_report, distinct_forms, fuse_network, onednn_available
from norton_timm.layers import CPDConv2d
from norton_timm.models import dense_model
from norton_timm.profiling import make_input, synchronise, take_turns

# those of the tested models that have layers to decompose
MODELS = (
    'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet50d', 'wide_resnet50_2', 'seresnet50', 'ecaresnet50t',
    'resnetv2_50', 'vgg16_bn', 'densenet121', 'inception_v3', 'regnety_008', 'cspresnet50', 'darknet53',
    'res2net50_26w_4s', 'skresnet50', 'googlenet_cifar', 'resnet56_cifar', 'vgg16_bn_cifar', 'densenet40_cifar',
)  # fmt: skip


@torch.no_grad()
def benchmark_forms(
    name: str, rank: int = 1, rate: float = 0.3, batch: int = 1, seconds: float = 3.0
) -> dict[str, Any]:
    """Compress a network with random weights, deploy it, and measure it in turns with its fixed forms.

    Everything but the forms is the same on all sides: norms folded, channels-last, additions and ReLUs fused.

    Args:
        name: a timm model.
        rank: of the decomposed layers.
        rate: of filters that are dropped.
        batch: images at a time.
        seconds: about how long to measure.

    Returns:
        Milliseconds by form, and those of ``deploy`` over the slowest and the fastest fixed form.

    Raises:
        ValueError: an unknown name, or a network without a layer that can be decomposed.
    """
    dense = dense_model(name)
    spec = CompressionSpec(rank=rank, rates=rate)
    small = compress(dense, spec, make_input(dense, None))[0].eval().requires_grad_(False)
    if not any(isinstance(m, CPDConv2d) for m in small.modules()):
        raise ValueError(f'{name}: got no layer that can be decomposed')
    images = make_input(small, None).repeat(batch, 1, 1, 1)
    networks: dict[str, nn.Module] = {'deployed': deploy(small, images)}
    forms = distinct_forms(small)
    for form in forms:
        fixed = deploy(small, images, autotune=False, form=form)
        networks[form] = fuse_network(fixed)[0] if onednn_available() and not images.is_cuda else fixed
    calls = [partial(network, images) for network in networks.values()]
    turns = take_turns(calls, partial(synchronise, images), seconds, passes=3)
    times = dict(zip(networks, turns.milliseconds()))
    fixed_times = [times[form] for form in forms]
    report = deployment_report(networks['deployed'])
    return {
        'model': name, 'batch': batch, **{f'{form}_ms': ms for form, ms in times.items()},
        'over_slowest': times['deployed'] / max(fixed_times), 'over_fastest': times['deployed'] / min(fixed_times),
        'chosen': report.chosen, 'layers': dict(Counter(report.forms.values())),
    }  # fmt: skip
