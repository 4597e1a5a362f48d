"""Our timm entrypoints: the CIFAR families, and every compressed network by tag. Importing this registers them."""

from norton_timm.models import densenet_cifar, googlenet_cifar, mobilenetv2_cifar, resnet_cifar, vgg_cifar

from norton_timm.models import entrypoints  # isort: skip  (its configurations are made from the ones above)
from norton_timm.models.authors import convert_authors_checkpoint
from norton_timm.models.compressed import published_accuracy, spec_of, tags
from norton_timm.models.dense import dense_model, read_recipe, set_input_size, set_normalisation
from norton_timm.models.hub import push_to_hub, save_for_hub
from norton_timm.models.released import AuthorsReleases, released_detector

__all__ = [
    'AuthorsReleases', 'convert_authors_checkpoint', 'dense_model', 'densenet_cifar', 'entrypoints',
    'googlenet_cifar', 'mobilenetv2_cifar', 'published_accuracy', 'push_to_hub', 'read_recipe', 'released_detector',
    'resnet_cifar', 'save_for_hub', 'set_input_size', 'set_normalisation', 'spec_of', 'tags', 'vgg_cifar',
]  # fmt: skip
