"""Batches of images: the same ones each time, each image once over all processes, augmented and normalised rightly."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from image_sets import coloured, write_folder
from PIL import Image
from torch import Tensor

from norton_timm.training import data as image_data
from norton_timm.training.data import ArrayData, ClassificationData, Preprocessing, crop_and_flip
from norton_timm.training.sources import open_data
from norton_timm.utils import read_rgb

CPU = torch.device('cpu')
PREPROCESSING = Preprocessing((32, 32), (0.5, 0.4, 0.3), (0.25, 0.2, 0.1), crop_pct=0.9)


def arrays(train: int = 50, test: int = 23) -> ArrayData:
    """Every image has a label of its own, so that batches tell which images they hold."""
    splits = [(coloured(n, seed=seed)[0], torch.arange(n)) for seed, n in enumerate((train, test))]
    return ArrayData(splits[0], splits[1], [str(n) for n in range(train)], PREPROCESSING, CPU)


def labels(batches) -> list[int]:
    return [int(label) for _, batch in batches for label in batch]


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, of: int = 2) -> None:
    monkeypatch.setattr(image_data, 'rank', lambda: rank)
    monkeypatch.setattr(image_data, 'world_size', lambda: of)


def test_crop_and_flip_is_what_a_loop_over_pixels_gives() -> None:
    images = torch.randint(1, 256, (20, 3, 8, 6), dtype=torch.uint8)
    offsets, flips = torch.randint(9, (2, 20)), torch.rand(20) < 0.5
    assert flips.any() and not flips.all()
    found = crop_and_flip(images, offsets, flips)
    for n, (image, flip) in enumerate(zip(images, flips)):
        expected = torch.zeros(3, 8, 6, dtype=torch.uint8)
        for y in range(8):
            for x in range(6):
                row, column = y + int(offsets[0, n]) - 4, x + int(offsets[1, n]) - 4
                if 0 <= row < 8 and 0 <= column < 6:
                    expected[:, y, x] = image[:, row, column]
        assert torch.equal(found[n], expected.flip(2) if flip else expected)


def test_test_split_is_normalised_and_not_augmented() -> None:
    data = arrays()
    images = torch.cat([batch for batch, _ in data.test_batches(8)])
    mean, std = (torch.tensor(v)[:, None, None] for v in (PREPROCESSING.mean, PREPROCESSING.std))
    expected = (coloured(23, seed=1)[0].float() / 255 - mean) / std
    torch.testing.assert_close(images, expected)
    assert images.is_contiguous(memory_format=torch.channels_last)
    calibration = data.calibration_batches(20, 8)
    assert [len(batch) for batch, _ in calibration] == [8, 8, 4]
    picked = torch.tensor(labels(calibration))
    assert len(set(picked.tolist())) == 20
    seen = torch.cat([batch for batch, _ in calibration])
    torch.testing.assert_close(seen, (coloured(50)[0][picked].float() / 255 - mean) / std)


def source(kind: str, tmp_path: Path) -> ClassificationData:
    if kind == 'arrays':
        return arrays()
    root = write_folder(tmp_path / 'set', train=24, val=9)
    workers = int(kind.removeprefix('folder'))
    return open_data(str(root), PREPROCESSING, CPU, workers=workers, augmentation={'re_prob': 0.5})


@pytest.mark.parametrize('kind', ['arrays', 'folder0', 'folder2'])
def test_an_epoch_can_be_repeated(kind: str, tmp_path: Path) -> None:
    data = source(kind, tmp_path)
    runs: list[list[tuple[Tensor, Tensor]]] = []
    for epoch, seed in ((3, 5), (3, 5), (4, 5), (3, 6)):
        torch.rand(len(runs) + 1)  # what was drawn before must not matter
        runs.append(list(data.train_batches(epoch, 8, seed)))
    for a, b in zip(runs[0], runs[1], strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for other in runs[2:]:
        assert not torch.equal(runs[0][0][0], other[0][0])
    assert all(len(batch) == 8 for batch, _ in runs[0])
    first, second = data.calibration_batches(10), data.calibration_batches(10)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def test_processes_share_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = arrays()
    whole = [batch for _, batch in data.train_batches(1, 16, 0)]
    parts, tested = [], []
    for rank in (0, 1):
        as_process(monkeypatch, rank)
        parts.append([batch for _, batch in data.train_batches(1, 8, 0)])
        tested += labels(data.test_batches(4))
    assert len(whole) == len(parts[0]) == len(parts[1]) == 3
    for batch, a, b in zip(whole, *parts):
        assert len(a) == len(b) == 8
        assert sorted(torch.cat([a, b]).tolist()) == sorted(batch.tolist())
    seen = torch.cat([*parts[0], *parts[1]]).tolist()
    assert len(set(seen)) == len(seen) == 48
    assert sorted(tested) == list(range(23))


def test_processes_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(str(write_folder(tmp_path, train=26, val=9)), PREPROCESSING, CPU, workers=0)
    indices: dict[str, list[int]] = {'train': [], 'test': []}
    part = image_data._Part

    def noting(dataset, share):
        indices['train' if dataset is data.train else 'test'] += share
        return part(dataset, share)

    monkeypatch.setattr(image_data, '_Part', noting)
    for rank in (0, 1):
        as_process(monkeypatch, rank)
        assert sum(len(b) for _, b in data.train_batches(0, 4, 0)) == 12
        list(data.test_batches(4))
    assert len(set(indices['train'])) == len(indices['train']) == 24
    assert sorted(indices['test']) == list(range(9))


def test_folder_is_resized_cropped_and_normalised(tmp_path: Path) -> None:
    data = open_data(str(write_folder(tmp_path, val=12, size=40)), PREPROCESSING, CPU, workers=0)
    batches = list(data.test_batches(5))
    assert [len(batch) for batch, _ in batches] == [5, 5, 2]
    images, found = torch.cat([b for b, _ in batches]), labels(batches)
    assert images.shape == (12, 3, 32, 32)
    assert found == sorted(found) and set(found) == {0, 1, 2, 3}  # in order of the classes' names
    originals, of_class = coloured(12, seed=1, size=40)
    mean, std = (torch.tensor(v) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    for c in range(4):
        expected = (originals[of_class == c].float().mean((0, 2, 3)) / 255 - mean) / std
        torch.testing.assert_close(images[torch.tensor(found) == c].mean((0, 2, 3)), expected, atol=0.1, rtol=0)


def test_images_of_another_size_are_refused() -> None:
    split = coloured(8), coloured(8)
    wanted = Preprocessing((224, 224), PREPROCESSING.mean, PREPROCESSING.std)
    with pytest.raises(ValueError, match=r'\(32, 32\).*\(224, 224\)'):
        ArrayData(split[0], split[1], ['a'] * 4, wanted, CPU)


def test_preprocessing_of_a_network() -> None:
    cfg = {'input_size': (3, 20, 24), 'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6), 'interpolation': 'bilinear',
           'crop_pct': 0.8, 'url': 'nowhere'}  # fmt: skip
    assert Preprocessing.from_cfg(cfg) == Preprocessing((20, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 'bilinear', 0.8)


@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path, suffix: str) -> None:
    """As OpenCV reads them."""
    values = np.linspace(0, 65535, 12288).reshape(96, 128).astype(np.uint16)
    path = tmp_path / f'gray{suffix}'
    cv2.imwrite(str(path), values)
    assert np.array_equal(np.asarray(read_rgb(path, path)), np.repeat((values >> 8)[..., None], 3, axis=2))
    cv2.imwrite(str(tmp_path / 'float.tif'), values.astype(np.float32))
    with pytest.raises(ValueError, match='a picture of float numbers; expected 8 or 16 bits'):
        read_rgb(tmp_path / 'float.tif', 'float.tif')
    plain = b'P5 128 96 65535\n' + values.astype('>u2').tobytes()
    assert np.array_equal(np.asarray(read_rgb(plain, 'a.pgm'))[..., 0], values >> 8)
    Image.fromarray(values.astype(np.int32)).save(tmp_path / 'long.tif')
    with pytest.raises(ValueError, match='a picture of 32-bit whole numbers; expected 8 or 16 bits'):
        read_rgb(tmp_path / 'long.tif', 'long.tif')
