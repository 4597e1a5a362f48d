"""Small sets of images that a small network can learn, in each of the forms that can be read."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NAMES = ('apple', 'bird', 'cat', 'dog', 'elk', 'fox', 'goat', 'hen', 'ibis', 'jay')


def coloured(count: int, classes: int = 4, seed: int = 0, size: int = 32) -> tuple[Tensor, Tensor]:
    """Noisy images (N, 3, size, size), uint8, each class of its own colour, and labels (N,), in turn."""
    draw = np.random.default_rng(seed)
    colours = np.random.default_rng(99).integers(40, 216, (classes, 3))
    labels = np.arange(count) % classes
    images = colours[labels][:, :, None, None] + draw.normal(0, 40, (count, 3, size, size))
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def png(image: Tensor) -> bytes:
    """A file of one image (3, H, W), without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, 'PNG')
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_archive(path: Path, train: int = 64, test: int = 16, classes: int = 4, size: int = 32) -> Path:
    """An archive `train/CLASS/N.png`, `test/CLASS/N.png`, its members out of order."""
    members = []
    for split, count, seed in (('train', train, 0), ('test', test, 1)):
        for k, (image, label) in enumerate(zip(*coloured(count, classes, seed, size))):
            members.append((f'set/{split}/{NAMES[label]}/{k:04d}.png', png(image)))
    with tarfile.open(path, 'w:xz' if path.suffix == '.xz' else 'w') as archive:
        for at in np.random.default_rng(2).permutation(len(members)):
            add(archive, *members[at])
    return path


def write_folder(root: Path, train: int = 32, val: int = 12, classes: int = 4, size: int = 40) -> Path:
    """Folders `train/CLASS/N.png` and `val/CLASS/N.png`."""
    for split, count, seed in (('train', train, 0), ('val', val, 1)):
        for k, (image, label) in enumerate(zip(*coloured(count, classes, seed, size))):
            path = root / split / NAMES[label] / f'{k:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
    return root


def write_cifar10(root: Path, train: int = 50, test: int = 20) -> dict[str, tuple[Tensor, Tensor]]:
    """The folder `cifar-10-batches-py` with few images; returns what is in it."""
    folder = root / 'cifar-10-batches-py'
    folder.mkdir(parents=True)
    splits = {'train': coloured(train, 10, 0), 'test': coloured(test, 10, 1)}
    files = {f'data_batch_{k + 1}': ('train', slice(k, None, 5)) for k in range(5)}
    for name, (split, some) in {**files, 'test_batch': ('test', slice(None))}.items():
        images, labels = (part[some] for part in splits[split])
        content = {'data': images.flatten(1).numpy(), 'labels': labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': [f'class{k}' for k in range(10)]}))
    order = [k for start in range(5) for k in range(start, train, 5)]
    splits['train'] = tuple(part[order] for part in splits['train'])  # type: ignore[assignment]
    return splits
