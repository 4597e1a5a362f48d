"""Our timm entrypoints: the CIFAR families, and every compressed network by tag. Importing this registers them."""

from norton_timm.models import densenet_cifar, googlenet_cifar, mobilenetv2_cifar, resnet_cifar, vgg_cifar

from norton_timm.models import entrypoints  # isort: skip  (its configurations are made from the ones above)
from norton_timm.models.authors import convert_authors_checkpoint
from norton_timm.models.compressed import published_accuracy, spec_of, tags
from norton_timm.models.dense import dense_model, read_recipe, set_input_size, set_normalisation

__all__ = [
    'convert_authors_checkpoint', 'dense_model', 'densenet_cifar', 'entrypoints', 'googlenet_cifar',
    'mobilenetv2_cifar', 'published_accuracy', 'read_recipe', 'resnet_cifar', 'set_input_size', 'set_normalisation',
    'spec_of', 'tags', 'vgg_cifar',
]  # fmt: skip
