"""Sources of images: labelled data sets (CIFAR-10, archives of small images, folders, timm's named data sets), and
images for calibration.
"""

from __future__ import annotations

import logging
import lzma
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import torch
from timm.data import create_dataset, create_reader, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from norton_timm.training.data import ArrayData, Batch, ClassificationData, LoadedData, Preprocessing
from norton_timm.utils import DAMAGE, picture_size, read_rgb, refuse_postscript

log = logging.getLogger(__name__)

_TESTS = ('val', 'validation', 'test')  # folders of a test split
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
    progress: bool = False,
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
        progress: show a bar while an archive is read.

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
        arrays = read_archive(path, progress)
    elif (path / 'cifar-10-batches-py').is_dir():
        arrays = _read_cifar10(path)
    else:
        train, test, classes = _open_timm(source)
        return LoadedData(train, test, classes, preprocessing, device, workers, augmentation)
    if augmentation:
        raise ValueError(f'augmentation {sorted(augmentation)} needs a folder of images; {source} is held in memory')
    return ArrayData(*arrays, preprocessing, device)


def open_test_split(
    source: str, preprocessing: Preprocessing, device: torch.device, *, workers: int = 4, progress: bool = False
) -> ClassificationData:
    """Labelled images to measure accuracy on: all that :func:`open_data` takes, and folders without a training split.

    Args:
        source: as for :func:`open_data`; or a folder in which each class has a folder, or whose folder `val` (or
            `test`) has. A picture there that cannot be read is an error, because it would change the figure.
        preprocessing: what the network expects.
        device: where batches come out.
        workers: loading processes.
        progress: show a bar while an archive is read.

    Raises:
        ValueError: nothing is there, or it is not such a data set.

    Example:
        >>> data = open_test_split('photos/val', preprocessing, torch.device('cpu'))
        >>> evaluate(model, data, torch.device('cpu'))['top1']
    """
    path = Path(source)
    if not path.is_dir() or (path / 'train').is_dir() or (path / 'cifar-10-batches-py').is_dir():
        return open_data(source, preprocessing, device, workers=workers, progress=progress)
    split = next((path / name for name in _TESTS if (path / name).is_dir()), path)
    pictures = PictureFolder(split)
    if '' in pictures.classes:
        raise ValueError(f'{split}: got images outside of class folders, expected CLASS/IMAGE')
    return LoadedData([], pictures, pictures.classes, preprocessing, device, workers)


class PictureFolder(Dataset):
    """The pictures of a folder and of its subfolders, which name their classes; one that is damaged is an error.

    Args:
        folder: where they are.

    Attributes:
        files: paths, in the natural order of their names.
        labels: class of each.
        classes: names by label; the folder itself is the class ''.
        transform: what is done to each picture; None gives it as it is.

    Raises:
        ValueError: no pictures there.

    Example:
        >>> picture, label = PictureFolder(Path('photos/val'))[0]
    """

    def __init__(self, folder: Path) -> None:
        try:
            reader: Any = create_reader('', root=str(folder))
        except RuntimeError as error:
            raise ValueError(f'{folder}: {" ".join(str(error).split())[:200]}') from None
        self.files = [Path(path) for path, _ in reader.samples]
        self.labels = [label for _, label in reader.samples]
        self.classes = sorted(reader.class_to_idx, key=lambda name: reader.class_to_idx[name])
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: int) -> tuple[Any, int]:
        picture = read_rgb(self.files[k], self.files[k])
        return (picture if self.transform is None else self.transform(picture)), self.labels[k]


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


def read_archive(path: Path, progress: bool = False) -> tuple[Batch, Batch, list[str]]:
    """Images of one size in a tar archive, as uint8 arrays: training split, test split, class names.

    Args:
        path: the archive.
        progress: show a bar.

    Raises:
        ValueError: no such archive, other folders than `train` and `test`, unreadable images, or several sizes.
    """
    found: dict[str, list[tuple[str, str, np.ndarray]]] = {'train': [], 'test': []}
    try:
        bar = tqdm(
            total=path.stat().st_size, desc=f'reading {path.name}', unit='B', unit_scale=True, disable=not progress,
            leave=False,
        )  # fmt: skip
        with bar, path.open('rb') as file, tarfile.open(fileobj=file) as archive:
            for number, member in enumerate(archive):
                bar.update(file.tell() - bar.n)
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
        names = [n for n in _TESTS if (path / n).is_dir()]
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
    path: Path, model: nn.Module, count: int = 512, size: Sequence[int] | None = None, progress: bool = False
) -> list[Tensor]:
    """Batches (N, 3, H, W) of some images, drawn at random but the same each time.

    Args:
        path: a folder of images (in subfolders too; where there is a folder ``train``, only that), or an archive of
            small images ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``. A file of a folder that cannot be read is left
            out, which the log says.
        model: a timm model; its ``pretrained_cfg`` says how images are resized, cropped and normalised.
        count: how many images; all of them where there are fewer.
        size: height and width in pixels, if not the model's own.
        progress: show a bar.

    Raises:
        ValueError: a count below 1, nothing at the path, or no image that can be read.

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
        data = open_data(str(path), wanted, torch.device('cpu'), progress=progress)
        return [images for images, _ in data.calibration_batches(count, _BATCH)]
    if not path.is_dir():
        raise ValueError(f'calibration: no folder of images and no archive at {path}')
    folder = path / 'train' if (path / 'train').is_dir() else path
    try:
        pictures = PictureFolder(folder)
    except ValueError as error:
        raise ValueError(f'calibration: no images that can be read: {error}') from None
    pictures.transform = create_transform(**{**cfg, 'input_size': (3, height, width)})
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
    images: list[Tensor] = []
    damaged: list[str] = []
    with tqdm(total=min(count, len(order)), desc='reading images', disable=not progress, leave=False) as bar:
        for k in order:
            try:
                images.append(pictures[k][0])
            except (RuntimeError, *DAMAGE) as error:
                damaged.append(' '.join(str(error).split())[:200])
                continue
            bar.update()
            if len(images) == count:
                break
    if not images:
        raise ValueError(f'calibration: no images that can be read: {damaged[0]}')
    if damaged:
        log.warning('calibration: files that cannot be read were left out, %d: %s', len(damaged), damaged[0])
    return list(torch.stack(images).split(_BATCH))
