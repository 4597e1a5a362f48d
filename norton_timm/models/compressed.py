"""The builder behind `norton_*` and `coring_*`: timm's own base network, then the shapes of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import PretrainedCfg, get_pretrained_cfg, model_entrypoint
from timm.models.resnet import ResNet
from torch import nn

from norton_timm.compression import CompressionSpec, exact_rates, layout_of
from norton_timm.models.builder import build_network, tag_of
from norton_timm.models.cifar import CifarNet
from norton_timm.models.densenet_cifar import DenseNetCifar
from norton_timm.models.googlenet_cifar import GoogLeNetCifar
from norton_timm.models.mobilenetv2_cifar import MobileNetV2Cifar
from norton_timm.models.resnet_cifar import ResNetCifar
from norton_timm.models.vgg_cifar import VGGCifar

_HERE = Path(__file__).parent
_TRACE_SIZE = 64  # pixels; shapes do not depend on it, and 224 would take ten times as long

_FAMILIES: dict[str, type[CifarNet]] = {
    'vgg16_bn_cifar': VGGCifar,
    'vgg19_bn_cifar': VGGCifar,
    'resnet56_cifar': ResNetCifar,
    'resnet110_cifar': ResNetCifar,
    'densenet40_cifar': DenseNetCifar,
    'googlenet_cifar': GoogLeNetCifar,
    'mobilenetv2_cifar': MobileNetV2Cifar,
}
_FEATURES = {'mobilenetv2_100': {'feature_cls': 'getter'}}  # of timm's networks whose stages are nested
RELEASES = {'norton': 'pvti/NORTON@v0.1.0', 'coring': 'pvti/CORING@v0.1.0'}  # the authors' checkpoints
PAPERS = {
    'norton': 'Enhanced Network Compression Through Tensor Decompositions and Pruning',
    'coring': 'Efficient tensor decomposition-based filter pruning',
}


@cache
def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((_HERE / name).read_text(encoding='utf-8'))


def tags() -> dict[str, dict[str, dict[str, Any]]]:
    """Every tag: method -> base network -> tag -> its row in `tags.yaml`."""
    return _read('tags.yaml')


def published_accuracy(name: str) -> dict[str, float]:
    """The authors' figures for `norton_resnet50.r078`, or for a base such as `resnet50`: top1, maybe top5, in %."""
    table = _read('accuracy.yaml')
    variant, _, tag = name.partition('.')
    method, _, base = variant.partition('_')
    if method in ('norton', 'coring'):
        return dict(table[method].get(base, {}).get(tag, {}))
    return dict(table['dense'].get(variant, {}))


def uniform_rates(model: nn.Module, rate: float) -> str:
    """A list of rates for a timm ResNet without a published one: stem 0, stages `rate` / 2, inner widths `rate`.

    Stage outputs are summed over a whole stage, so removing a channel there costs more accuracy than inside a block.
    """
    layout = layout_of(model)
    if layout is None or not isinstance(model, ResNet):
        raise ValueError(f'rates of {type(model).__name__} cannot be made uniform: give them by number or layer name')
    inner = sum(len(getattr(model, f'layer{i}')) for i in (1, 2, 3, 4))
    return f'[0.]+[{rate / 2:g}]*{len(layout) - inner - 1}+[{rate:g}]*{inner}'


def compressed_cfgs() -> dict[str, dict[str, Any] | PretrainedCfg]:
    """`pretrained_cfg` of every tag, from its base's."""
    cfgs: dict[str, dict[str, Any] | PretrainedCfg] = {}
    for method, bases in tags().items():
        for base, rows in bases.items():
            dense = get_pretrained_cfg(base, allow_unregistered=False)
            assert dense is not None
            keep = ('num_classes', 'input_size', 'pool_size', 'crop_pct', 'interpolation', 'mean', 'std', 'classifier')
            cfg = {key: getattr(dense, key) for key in keep}
            if not base.endswith('_cifar'):  # trained with torchvision's recipe, as the authors' baseline is
                cfg.update(input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation='bilinear')
            cfg.update(paper_name=PAPERS[method], license='apache-2.0')
            # a decomposed stem has no `.weight` that timm could adapt to other image channels; ours does it on load
            stem_is_dense = method == 'coring' or not base.endswith('_cifar')
            cfg['first_conv'] = dense.first_conv if stem_is_dense else None
            for tag in rows:
                name = f'{method}_{base}.{tag}'
                cfgs[name] = dict(cfg, url=f'authors:{RELEASES[method]}') if published_accuracy(name) else dict(cfg)
    return cfgs


def spec_of(
    name: str,
    rank: int | Mapping[str, int] | None = None,
    rates: str | float | Sequence[float] | Mapping[str, float] | None = None,
) -> CompressionSpec:
    """The recipe of a tag such as `norton_resnet50.r078`, with another rank or other rates where given.

    The layers to decompose are named by pattern, because the authors decompose all 3x3 convolutions, the stem of the
    CIFAR networks included, also where that saves nothing.

    Raises:
        ValueError: An unknown name or tag, or a rank for CORING, which never decomposes.

    Example:
        >>> spec = spec_of('norton_resnet50.r078')
        >>> small, report = compress(model, spec_of('norton_resnet50', rank=2))
    """
    variant, _, tag = name.partition('.')
    method, _, base = variant.partition('_')
    rows = tags().get(method, {}).get(base)
    if rows is None:
        known = [f'{m}_{b}' for m, bases in tags().items() for b in bases]
        raise ValueError(f'unknown compressed network {variant!r}, expected one of {", ".join(known)}')
    tag = tag or next(iter(rows))
    if tag not in rows:
        raise ValueError(f'unknown tag {tag!r} of {variant}, expected one of {", ".join(rows)}')
    row = dict(rows[tag])
    uniform = row.pop('rate', None)
    if uniform is not None:
        row['rates'] = uniform_rates(model_entrypoint(base)(pretrained=False, device='meta'), uniform)
    if rates is not None:
        row['rates'] = rates
    if method == 'coring' and rank:
        raise ValueError(f'rank is {rank!r}, expected 0 or none: {variant} is pruned, never decomposed')
    if rank is not None:
        row['rank'] = rank
    return spec_for(method, base, **row)


def spec_for(method: str, base: str, **fields: Any) -> CompressionSpec:
    """A recipe in the authors' sense: one rank holds for every 3x3 convolution, the stem of CIFAR networks included."""
    rank = fields.pop('rank', 0)
    if method == 'norton' and isinstance(rank, int) and not isinstance(rank, bool):
        CompressionSpec(method=method, rank=rank)  # a plain number is checked before it is put behind a pattern
        rank = {'*' if base.endswith('_cifar') else 'layer*': rank}
    return CompressionSpec(method=method, rank=rank, **fields)


def build_compressed(method: str, base: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Builds a compressed network of the zoo through timm's builder.

    Args:
        method: 'norton' or 'coring'.
        base: timm's (or our) name of the dense network.
        pretrained: As in `timm.create_model`.
        kwargs: What the dense network takes, and `rank=`, `rates=` (other settings than the tag's) and `form=` (of
            every CPDConv2d).

    Raises:
        ValueError: An unknown tag, a bad rank, rates or form, or no weights for `pretrained=True`.
    """
    variant = f'{method}_{base}'
    rank, rates, form = (kwargs.pop(key, None) for key in ('rank', 'rates', 'form'))
    tag = tag_of(variant, kwargs.get('pretrained_cfg'))
    spec = spec_of(f'{variant}.{tag}' if tag else variant, rank, rates)
    if pretrained and not _own_source(kwargs) and not same_shapes(spec, spec_of(f'{variant}.{tag}')):
        raise ValueError(
            f'pretrained=True with rank={rank!r}, rates={rates!r}: the weights of {variant}.{tag} have its own rank '
            'and rates; leave them out, or name your file with pretrained_cfg_overlay=dict(file=...)'
        )
    model_cls = partial(compressed_model, base, spec, form)
    features = dict(_FAMILIES[base].feature_cfg) if base in _FAMILIES else dict(_FEATURES.get(base, {}))
    model = build_network(model_cls, variant, pretrained, feature_cfg=features, **kwargs)
    if tag and not same_shapes(spec, spec_of(f'{variant}.{tag}')):  # another network than the tag's has no tag
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'tag': ''}  # type: ignore
    return model


def compressed_model(base: str, spec: CompressionSpec, form: str | None = None, **kwargs: Any) -> nn.Module:
    """The dense network with the shapes of `spec`; its head is added last, since outputs are never pruned."""
    from norton_timm.compression import reshape
    from norton_timm.layers import set_form

    num_classes, pool = kwargs.pop('num_classes', None), kwargs.pop('global_pool', 'avg')
    model = model_entrypoint(base)(pretrained=False, num_classes=num_classes or 10, global_pool=pool or 'avg', **kwargs)
    rates = spec.rate_list()
    if rates is not None:
        spec = CompressionSpec.from_dict({**spec.to_dict(), 'rates': exact_rates(model, rates)})
    size = 32 if base.endswith('_cifar') else _TRACE_SIZE
    parameter = next(model.parameters())
    image = torch.zeros(1, model.in_chans, size, size, device=parameter.device, dtype=parameter.dtype)
    model = reshape(model, spec, image)
    if form is not None:
        set_form(model, form)
    if num_classes == 0 or not pool:
        model.reset_classifier(0 if num_classes is None else num_classes, pool)
    return model


def _own_source(kwargs: dict[str, Any]) -> bool:
    """Whether the caller named the weights, so that they may have any shape."""
    cfg, overlay = kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay') or {}
    source = cfg.get('source') if isinstance(cfg, dict) else cfg.source if isinstance(cfg, PretrainedCfg) else None
    return bool(source) or any(overlay.get(key) for key in ('file', 'url', 'state_dict', 'hf_hub_id'))


def same_shapes(a: CompressionSpec, b: CompressionSpec) -> bool:
    """Whether two recipes give one network the same shapes; zeros at the end of a list of rates do not count."""

    def key(spec: CompressionSpec) -> tuple[Any, Any]:
        rates = [] if spec.rates == 0 else spec.rate_list()  # one rate of 0 is a list of zeros
        if rates is None:
            return spec.rank, spec.rates
        while rates and rates[-1] == 0:
            rates.pop()
        return spec.rank, rates

    return key(a) == key(b)
