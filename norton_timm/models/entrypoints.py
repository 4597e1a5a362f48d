"""Entrypoints of the compressed networks; the tags are data in `tags.yaml`."""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from norton_timm.models.compressed import build_compressed, compressed_cfgs

default_cfgs = generate_default_cfgs(compressed_cfgs())


@register_model
def norton_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50, compressed by NORTON."""
    return build_compressed('norton', 'resnet50', pretrained, **kwargs)


@register_model
def norton_vgg16_bn_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-16 with batch norm for CIFAR, compressed by NORTON."""
    return build_compressed('norton', 'vgg16_bn_cifar', pretrained, **kwargs)


@register_model
def norton_resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for CIFAR, compressed by NORTON."""
    return build_compressed('norton', 'resnet56_cifar', pretrained, **kwargs)


@register_model
def norton_resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110 for CIFAR, compressed by NORTON."""
    return build_compressed('norton', 'resnet110_cifar', pretrained, **kwargs)


@register_model
def norton_densenet40_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DenseNet-40 for CIFAR, compressed by NORTON."""
    return build_compressed('norton', 'densenet40_cifar', pretrained, **kwargs)


@register_model
def norton_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18, compressed by NORTON."""
    return build_compressed('norton', 'resnet18', pretrained, **kwargs)


@register_model
def norton_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34, compressed by NORTON."""
    return build_compressed('norton', 'resnet34', pretrained, **kwargs)


@register_model
def norton_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101, compressed by NORTON."""
    return build_compressed('norton', 'resnet101', pretrained, **kwargs)


@register_model
def norton_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-152, compressed by NORTON."""
    return build_compressed('norton', 'resnet152', pretrained, **kwargs)


@register_model
def norton_resnet50d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50-D, compressed by NORTON."""
    return build_compressed('norton', 'resnet50d', pretrained, **kwargs)


@register_model
def coring_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50, compressed by CORING."""
    return build_compressed('coring', 'resnet50', pretrained, **kwargs)


@register_model
def coring_vgg16_bn_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-16 with batch norm for CIFAR, compressed by CORING."""
    return build_compressed('coring', 'vgg16_bn_cifar', pretrained, **kwargs)


@register_model
def coring_resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for CIFAR, compressed by CORING."""
    return build_compressed('coring', 'resnet56_cifar', pretrained, **kwargs)


@register_model
def coring_densenet40_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DenseNet-40 for CIFAR, compressed by CORING."""
    return build_compressed('coring', 'densenet40_cifar', pretrained, **kwargs)


@register_model
def coring_googlenet_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GoogLeNet for CIFAR, compressed by CORING."""
    return build_compressed('coring', 'googlenet_cifar', pretrained, **kwargs)


@register_model
def coring_mobilenetv2_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 for CIFAR, compressed by CORING."""
    return build_compressed('coring', 'mobilenetv2_cifar', pretrained, **kwargs)


@register_model
def coring_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18, compressed by CORING."""
    return build_compressed('coring', 'resnet18', pretrained, **kwargs)


@register_model
def coring_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34, compressed by CORING."""
    return build_compressed('coring', 'resnet34', pretrained, **kwargs)


@register_model
def coring_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101, compressed by CORING."""
    return build_compressed('coring', 'resnet101', pretrained, **kwargs)


@register_model
def coring_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-152, compressed by CORING."""
    return build_compressed('coring', 'resnet152', pretrained, **kwargs)


@register_model
def coring_resnet50d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50-D, compressed by CORING."""
    return build_compressed('coring', 'resnet50d', pretrained, **kwargs)


@register_model
def norton_vgg19_bn_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 with batch norm for CIFAR, compressed by NORTON."""
    return build_compressed('norton', 'vgg19_bn_cifar', pretrained, **kwargs)


@register_model
def coring_vgg19_bn_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 with batch norm for CIFAR, compressed by CORING."""
    return build_compressed('coring', 'vgg19_bn_cifar', pretrained, **kwargs)


@register_model
def coring_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2, compressed by CORING."""
    return build_compressed('coring', 'mobilenetv2_100', pretrained, **kwargs)
