"""Images for the repair after compression, and new batch-norm statistics from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Batches = Iterable[Any]


def without_labels(batch: Any) -> Any:
    """The images of a batch (images, labels), a tuple or a loader's list; other batches come back as they are."""
    if isinstance(batch, tuple) and batch:
        return batch[0]
    loaded = isinstance(batch, list) and batch and isinstance(batch[0], Tensor) and batch[0].dim() == 4
    return batch[0] if loaded else batch


def images_of(batches: Batches, model: nn.Module) -> Iterator[Tensor]:
    """The images of each batch, labels left out, on the model's device and in its type.

    Raises:
        ValueError: no batch, something that is neither a tensor nor a tuple that starts with one, images of several
            sizes, or NaN in them.
    """
    parameter = next(model.parameters())
    empty, size = True, None
    for batch in batches:
        images = without_labels(batch)
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise ValueError(f'calibration: got {type(images).__name__}, expected batches of images (N, C, H, W)')
        if size is not None and images.shape[1:] != size:
            raise ValueError(
                f'calibration: got images of {tuple(images.shape[1:])} after {tuple(size)}, expected one size'
            )
        images = images.to(parameter.device, parameter.dtype)
        if not images.isfinite().all():
            raise ValueError(f'calibration: got NaN or infinity as {parameter.dtype}, expected finite images')
        empty, size = False, images.shape[1:]
        yield images
    if empty:
        raise ValueError('calibration: got no batch, expected at least one')


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Batches) -> None:
    """Set every batch norm's running mean and variance to the averages over ``batches``, in place.

    Args:
        model: the network.
        batches: images (N, C, H, W) of one size; labels, if any, are ignored.

    Raises:
        ValueError: no batch, or batches that are not images of one size.

    Example:
        >>> reestimate_batch_norm(model, [torch.rand(32, 3, 224, 224)])
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes, momenta = {m: m.training for m in model.modules()}, [m.momentum for m in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        for images in images_of(batches, model):
            model(images)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
