"""Entrypoints of ours; importing this registers them with timm."""

from norton_timm.models import densenet_cifar, googlenet_cifar, mobilenetv2_cifar, resnet_cifar, vgg_cifar

from norton_timm.models import compressed  # isort: skip  (its configurations are made from the ones above)
from norton_timm.models._compressed import published_accuracy, spec_of, tags, uniform_rates

__all__ = [
    'compressed',
    'densenet_cifar',
    'googlenet_cifar',
    'mobilenetv2_cifar',
    'published_accuracy',
    'resnet_cifar',
    'spec_of',
    'tags',
    'uniform_rates',
    'vgg_cifar',
]
