"""The accuracy of networks on labelled images, at any input size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from norton_timm.training.data import Preprocessing
from norton_timm.training.label_free import resized
from norton_timm.training.loop import evaluate
from norton_timm.training.sources import open_test_split

_BATCH = 64


class LabelledAccuracy:
    """Gives the top-1 of a network on the test split of a data set; nothing is tuned or chosen on it.

    Args:
        source: see :func:`norton_timm.training.open_test_split`.
        model: the dense network. Its ``pretrained_cfg`` says how images are prepared, its ``num_classes`` how many
            classes there must be; their order is that of the class folders' names.
        size: height and width of the prepared images, if not the model's own.
        workers: loading processes.
        progress: show bars.

    Raises:
        ValueError: no such data set, or one with another number of classes.

    Example:
        >>> accuracy = LabelledAccuracy('photos/val', model)
        >>> accuracy(small, (160, 160))
        71.3
    """

    def __init__(
        self,
        source: str,
        model: nn.Module,
        size: tuple[int, int] | None = None,
        workers: int = 0,
        progress: bool = False,
    ) -> None:
        cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
        plain = Preprocessing.from_cfg(cfg)
        self.size = size or plain.input_size
        wanted = Preprocessing(self.size, plain.mean, plain.std, plain.interpolation, plain.crop_pct)
        self.device = next(model.parameters()).device
        self.data = open_test_split(source, wanted, self.device, workers=workers, progress=progress)
        outputs, found = getattr(model, 'num_classes', None), self.data.classes
        if outputs != len(found):
            told = ', '.join(found[:3]) + (', ...' if len(found) > 3 else '')
            raise ValueError(
                f'labelled images in {source}: got {len(found)} classes ({told}), expected {outputs}, as many as the '
                'network has outputs'
            )
        self.progress = progress

    @property
    def images(self) -> int:
        """How many labelled images there are."""
        return self.data.test_size

    def __call__(self, model: nn.Module, size: tuple[int, int] | None = None) -> float:
        """Top-1 in percent, of images that are resized to a height and width once they are prepared."""
        with tqdm(total=self.images, desc='accuracy', unit='image', disable=not self.progress, leave=False) as bar:
            return evaluate(_AtSize(model, size or self.size, bar), self.data, self.device, _BATCH)['top1']


class _AtSize(nn.Module):
    """A network that resizes its images (N, C, H, W), and counts them on a bar."""

    def __init__(self, model: nn.Module, size: tuple[int, int], bar: Any) -> None:
        super().__init__()
        self.model, self.size, self.bar = model, size, bar

    def forward(self, images: Tensor) -> Tensor:
        self.bar.update(len(images))
        return self.model(images if images.shape[-2:] == self.size else resized(images, self.size))
