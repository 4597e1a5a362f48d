"""Sources of images: labelled data sets (CIFAR-10, archives of small images, folders, timm's named data sets), and
images for calibration.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import torch
from timm.data import ImageDataset, create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

from norton_timm.training.data import ArrayData, Batch, ClassificationData, LoadedData, Preprocessing
from norton_timm.utils import DAMAGE, picture_size, read_rgb, refuse_postscript

_BATCH = 128
_LARGEST = 64  # pixels a side of images that are held in memory
_LARGEST_FILE, _MOST_FILES = 2**20, 4_000_000  # bytes of one such image, and how many


def open_data(
    source: str,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    workers: int = 4,
    augmentation: Mapping[str, Any] | None = None,
) -> ClassificationData:
    """Training and test split of a data set.

    Args:
        source: `cifar10` (found in `data/`), an archive of small images `train/CLASS/*.jpg` and `test/CLASS/*.jpg`, a
            folder with torchvision's `cifar-10-batches-py`, a folder with `train` and `val` (or `test`) in which each
            class has a folder, or a name that `timm.data.create_dataset` knows, such as `hfds/timm/mini-imagenet`.
        preprocessing: what the network expects.
        device: where batches come out.
        workers: loading processes; images held in memory need none.
        augmentation: arguments of `timm.data.create_loader` for training; images held in memory are cropped and
            flipped instead and take none.

    Raises:
        ValueError: nothing is there, or it is not such a data set; the message says what to pass.

    Example:
        >>> preprocessing = Preprocessing.from_cfg(model.pretrained_cfg)
        >>> data = open_data('cifar10', preprocessing, torch.device('cpu'))
    """
    augmentation = dict(augmentation or {})
    if source == 'cifar10':
        source = str(_find_cifar10(Path('data')))
    path = Path(source)
    if path.is_file():
        arrays = read_archive(path)
    elif (path / 'cifar-10-batches-py').is_dir():
        arrays = _read_cifar10(path)
    else:
        train, test, classes = _open_timm(source)
        return LoadedData(train, test, classes, preprocessing, device, workers, augmentation)
    if augmentation:
        raise ValueError(f'augmentation {sorted(augmentation)} needs a folder of images; {source} is held in memory')
    return ArrayData(*arrays, preprocessing, device)


def _find_cifar10(folder: Path) -> Path:
    if (folder / 'cifar-10-batches-py').is_dir():
        return folder
    found = sorted(folder.glob('cifar10*.tar*')) if folder.is_dir() else []
    if not found:
        raise ValueError(
            f'no CIFAR-10 in {folder.resolve()}: put the folder cifar-10-batches-py (the Python version) or an '
            'archive cifar10*.tar.xz there, or pass the path of either'
        )
    return found[0]


def read_archive(path: Path) -> tuple[Batch, Batch, list[str]]:
    """Images of one size in a tar archive, as uint8 arrays: training split, test split, class names.

    Raises:
        ValueError: no such archive, other folders than `train` and `test`, unreadable images, or several sizes.
    """
    found: dict[str, list[tuple[str, str, np.ndarray]]] = {'train': [], 'test': []}
    try:
        with tarfile.open(path) as archive:
            for number, member in enumerate(archive):
                if member.size > _LARGEST_FILE or number >= _MOST_FILES:  # a few bytes may unpack to any size
                    raise ValueError(
                        f'{path}: {member.name[:80]} of {member.size:,} bytes, file {number + 1:,}; expected small '
                        f'images of at most {_LARGEST_FILE:,} bytes, {_MOST_FILES:,} at most'
                    )
                parts = PurePosixPath(member.name).parts
                if member.isfile() and len(parts) >= 3 and parts[-3] in found:
                    content = cast(IO[bytes], archive.extractfile(member)).read()
                    found[parts[-3]].append((parts[-2], parts[-1], _decode(content, f'{path}: {member.name}')))
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f'{path}: not an archive that can be read: {" ".join(str(error).split())[:200]}') from None
    classes = sorted({name for name, _, _ in found['train']})
    splits = []
    for split, rows in found.items():
        rows.sort(key=lambda row: row[:2])  # the order in an archive depends on the disk that it was made from
        if not rows or {name for name, _, _ in rows} != set(classes):
            raise ValueError(f'{path}: expected {split}/CLASS/IMAGE for each class of the training split')
        sizes = {image.shape for _, _, image in rows}
        if len(sizes) > 1:
            raise ValueError(f'{path}: images of sizes {sorted(s[:2] for s in sizes)[:3]}, expected one size')
        images = torch.from_numpy(np.stack([image for _, _, image in rows])).permute(0, 3, 1, 2)
        splits.append((images, torch.tensor([classes.index(name) for name, _, _ in rows])))
    return splits[0], splits[1], classes


def _decode(content: bytes, name: str) -> np.ndarray:
    if max(size := picture_size(content, name)) > _LARGEST:
        raise ValueError(f'{name} has {size} pixels; unpack archives of images over {_LARGEST} pixels')
    return np.asarray(read_rgb(content, name))


def _read_cifar10(root: Path) -> tuple[Batch, Batch, list[str]]:
    try:
        splits = [CIFAR10(str(root), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(f'{root}: {" ".join(str(error).split())[:200]}') from None
    train, test = ((torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for s in splits)
    return train, test, list(splits[0].classes)


def _open_timm(source: str) -> tuple[Any, Any, list[str]]:
    """Two map-style data sets without transforms, and the class names."""
    path = Path(source)
    if path.is_dir():
        names = [n for n in ('val', 'validation', 'test') if (path / n).is_dir()]
        if not (path / 'train').is_dir() or not names:
            raise ValueError(f'{path} lacks the folder {"val or test" if (path / "train").is_dir() else "train"}')
        name, roots, splits = '', (str(path), str(path)), ('train', names[0])
    elif '/' in source and source.split('/')[0] in ('hfds', 'torch'):
        name, roots, splits = source, ('data', 'data'), ('train', 'validation')
    else:
        raise ValueError(
            f'no data set {source!r}: expected cifar10, an archive, a folder with train/ and val/, or a name of '
            'timm such as hfds/timm/mini-imagenet or torch/cifar100'
        )
    refuse_postscript()
    try:
        train, test = (create_dataset(name, root=r, split=s) for r, s in zip(roots, splits))
    except (RuntimeError, ValueError, AssertionError, ImportError, OSError) as error:
        raise ValueError(f'{source}: {" ".join(str(error).split())[:300]}') from None
    classes, others = _class_names(train), _class_names(test)
    if not classes:
        raise ValueError(f'{source}: the data set does not name its classes')
    if others != classes:  # each split numbers its own classes, so that labels would mean different things
        differ = sorted(set(classes) ^ set(others))
        raise ValueError(f'{source}: {splits[0]} and {splits[1]} differ in the classes {", ".join(differ[:3])}')
    return train, test, classes


def _class_names(dataset: Any) -> list[str]:
    holder = dataset if hasattr(dataset, 'class_to_idx') else getattr(dataset, 'reader', None)
    to_index: dict[str, int] = getattr(holder, 'class_to_idx', {})
    return sorted(to_index, key=lambda name: to_index[name])


def calibration_images(
    path: Path, model: nn.Module, count: int = 512, size: Sequence[int] | None = None
) -> list[Tensor]:
    """Batches (N, 3, H, W) of some images, drawn at random but the same each time.

    Args:
        path: a folder of images (in subfolders too; where there is a folder ``train``, only that), or an archive of
            small images ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``.
        model: a timm model; its ``pretrained_cfg`` says how images are resized, cropped and normalised.
        count: how many images; all of them where there are fewer.
        size: height and width in pixels, if not the model's own.

    Raises:
        ValueError: a count below 1, nothing at the path, or files that are no images.

    Example:
        >>> images = calibration_images(Path('data/imagenet'), model, count=256)
        >>> small, report = compress(model, spec, calibration=images)
    """
    if count < 1:
        raise ValueError(f'calibration images: got {count}, expected at least 1')
    cfg = resolve_data_config(pretrained_cfg=getattr(model, 'pretrained_cfg', None))
    height, width = size or cfg['input_size'][1:]
    if path.is_file():
        wanted = Preprocessing((height, width), cfg['mean'], cfg['std'], cfg['interpolation'], cfg['crop_pct'])
        batches = open_data(str(path), wanted, torch.device('cpu')).calibration_batches(count, _BATCH)
        return [images for images, _ in batches]
    if not path.is_dir():
        raise ValueError(f'calibration: no folder of images and no archive at {path}')
    folder = path / 'train' if (path / 'train').is_dir() else path
    refuse_postscript()
    try:
        images = ImageDataset(str(folder), transform=create_transform(**{**cfg, 'input_size': (3, height, width)}))
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
        return list(torch.stack([images[k][0] for k in chosen]).split(_BATCH))
    except (RuntimeError, *DAMAGE) as error:
        told = ' '.join(str(error).split())[:200]
        raise ValueError(f'calibration: {folder}: no images that can be read: {told}') from None
