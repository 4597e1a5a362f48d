"""Trained networks and their images for studies: a folder of ImageNet networks, and ResNets for CIFAR-10."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from norton_timm.models import dense_model
from norton_timm.training import Preprocessing, open_data, scores

IMAGENET = ('resnet50', 'resnet18', 'mobilenetv2_100', 'tf_efficientnet_lite0')
CIFAR = ('resnet56_cifar', 'resnet44_cifar', 'resnet32_cifar', 'resnet20_cifar')
_LOADER = 'imagenet_nets.py'
_UNLABELLED, _TEST = 'sample1000', 'nips2017'
_IMAGENET_IMAGES, _CIFAR_IMAGES = 1000, 500  # unlabelled ones, by default
_BATCH = 500


@dataclass
class TrainedNetwork:
    """A trained classifier with images.

    Attributes:
        name: of the network.
        model: in evaluation mode.
        images: (N, 3, H, W), normalised: for compression and tuning, without labels.
        test_images: (M, 3, H, W), normalised; nothing else may look at them.
        test_labels: (M,).
        data: name of the images.
    """

    name: str
    model: nn.Module
    images: Tensor
    test_images: Tensor
    test_labels: Tensor
    data: str

    @cached_property
    def top1_dense(self) -> float:
        """Accuracy of the network on the test images, in percent."""
        return self.top1(self.model)

    def top1(self, model: nn.Module) -> float:
        """Accuracy of another network on the test images, in percent.

        Raises:
            FloatingPointError: it gives NaN or infinity.
        """
        found = scores(model, self.test_images)
        if not found.isfinite().all():
            raise FloatingPointError(f'{self.name}: the compressed network answers with NaN or infinite numbers')
        return 100 * float((found.argmax(1) == self.test_labels).double().mean())


class TrainedNetworks:
    """Where trained networks are. One is held in memory at a time.

    Args:
        imagenet: folder with `imagenet_nets.py`, a module with two functions: `network(name)` returns a timm model and
            its preprocessing, `images(set, **preprocessing, count=None)` images (N, 3, 224, 224) and labels (N,) of the
            sets `sample1000` (for compression) and `nips2017` (for testing).
        cifar: folder with `resnet20_cifar10.th` and so on, trained with ImageNet's mean and standard deviation.
        data: CIFAR-10, see :func:`norton_timm.training.open_data`.
        images: how many unlabelled images to use; by default 1000 of ImageNet's and 500 of CIFAR-10's.

    Example:
        >>> networks = TrainedNetworks(Path('imagenet'), Path('weights'), 'cifar10.tar')
        >>> networks.open('resnet20_cifar').top1_dense
        91.73
    """

    def __init__(self, imagenet: Path, cifar: Path, data: str, images: int | None = None) -> None:
        if images is not None and images < 1:
            raise ValueError(f'images: got {images}, expected at least 1')
        self.imagenet, self.cifar, self.data, self.images = imagenet, cifar, data, images
        self._held: TrainedNetwork | None = None

    def check(self, names: Sequence[str]) -> None:
        """See that what these networks need is there.

        Raises:
            ValueError: an unknown network, or nothing where its weights or images should be.
        """
        for name in names:
            if name not in (*IMAGENET, *CIFAR):
                raise ValueError(f'networks: got {name!r}, expected some of {", ".join((*IMAGENET, *CIFAR))}')
            file = self._file(name)
            if not file.is_file():
                option = '--imagenet' if name in IMAGENET else '--dense'
                raise ValueError(f'{name}: no file {file}: {option} names the folder that holds {file.name}')
        if set(names) & set(CIFAR):
            _ = self._cifar10

    def data_name(self, name: str) -> str:
        """Name of a network's images."""
        return _TEST if name in IMAGENET else Path(self.data).name

    def image_count(self, name: str) -> int:
        """How many unlabelled images a network gets."""
        return self.images or (_IMAGENET_IMAGES if name in IMAGENET else _CIFAR_IMAGES)

    def open(self, name: str) -> TrainedNetwork:
        """A network with its images.

        Raises:
            ValueError: it cannot be loaded, or there are too few images.
        """
        if self._held is None or self._held.name != name:
            self._held = None
            network = self._open_imagenet(name) if name in IMAGENET else self._open_cifar(name)
            got, wanted = len(network.images), self.image_count(name)
            if got != wanted:
                raise ValueError(f'{name}: got {got} unlabelled images, expected {wanted}: --images asks for fewer')
            self._held = network
        return self._held

    def _file(self, name: str) -> Path:
        if name in IMAGENET:
            return self.imagenet / _LOADER
        return self.cifar / f'{name.removesuffix("_cifar")}_cifar10.th'

    def _open_imagenet(self, name: str) -> TrainedNetwork:
        spec: Any = importlib.util.spec_from_file_location('imagenet_nets', self._file(name))
        loader = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(loader)
            model, preprocessing = loader.network(name)
            images, _ = loader.images(_UNLABELLED, **preprocessing, count=self.image_count(name))
            test_images, labels = loader.images(_TEST, **preprocessing)
        except Exception as error:  # the user's code
            raise ValueError(f'{name}: {self._file(name)}: {type(error).__name__}: {error}') from error
        return TrainedNetwork(name, model.eval(), images, test_images, labels, self.data_name(name))

    @cached_property
    def _cifar10(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Unlabelled images, test images and labels, and how many classes there are."""
        wanted = Preprocessing((32, 32), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        data = open_data(self.data, wanted, torch.device('cpu'))
        batches = data.calibration_batches(self.image_count(CIFAR[0]))
        images = torch.cat([images for images, _ in batches])
        test_images, labels = (torch.cat(parts) for parts in zip(*data.test_batches(_BATCH)))
        return images, test_images, labels, len(data.classes)

    def _open_cifar(self, name: str) -> TrainedNetwork:
        images, test_images, labels, classes = self._cifar10
        model = dense_model(name, checkpoint=self._file(name), num_classes=classes)
        return TrainedNetwork(name, model, images, test_images, labels, self.data_name(name))
