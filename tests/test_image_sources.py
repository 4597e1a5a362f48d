"""Where images come from: archives, torchvision's CIFAR-10, folders; one clear error for each bad source."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_sets import NAMES, add, coloured, png, write_archive, write_cifar10, write_folder
from PIL import Image
from torchvision.datasets import CIFAR10

from norton_timm.training.data import ArrayData, LoadedData, Preprocessing
from norton_timm.training.sources import calibration_images, open_data, open_test_split, read_archive

CPU = torch.device('cpu')
PREPROCESSING = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


@pytest.mark.parametrize('name', ['set.tar', 'set.tar.xz'])
def test_archive(name: str, tmp_path: Path) -> None:
    train, test, classes = read_archive(write_archive(tmp_path / name, train=40, test=12))
    assert classes == list(NAMES[:4])
    for (images, labels), (count, seed) in ((train, (40, 0)), (test, (12, 1))):
        expected, of_class = coloured(count, seed=seed)
        order = torch.argsort(of_class, stable=True)  # by class, then by name
        assert images.dtype == torch.uint8
        assert torch.equal(images, expected[order]) and torch.equal(labels, of_class[order])


def test_torchvisions_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = write_cifar10(tmp_path / 'data')
    with pytest.raises(ValueError, match='corrupted'):  # the checksums are those of the real files
        open_data(str(tmp_path / 'data'), PREPROCESSING, CPU)

    def checksum(name: str) -> str:
        return hashlib.md5((tmp_path / 'data' / CIFAR10.base_folder / name).read_bytes()).hexdigest()

    for attribute in ('train_list', 'test_list'):
        monkeypatch.setattr(CIFAR10, attribute, [[n, checksum(n)] for n, _ in getattr(CIFAR10, attribute)])
    monkeypatch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': checksum('batches.meta')})
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / 'data'), 'cifar10'):
        data = open_data(source, PREPROCESSING, CPU)
        assert isinstance(data, ArrayData) and data.classes[3] == 'class3'
        for found, expected in ((data.train, splits['train']), (data.test, splits['test'])):
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_cifar10_finds_an_archive_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='cifar-10-batches-py'):
        open_data('cifar10', PREPROCESSING, CPU)
    Path('data').mkdir()
    write_archive(Path('data') / 'cifar10-some.tar')
    assert open_data('cifar10', PREPROCESSING, CPU).train_size == 64


@pytest.mark.parametrize('name', ['val', 'validation', 'test'])
def test_folder(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / 'val').rename(tmp_path / name)
    data = open_data(str(tmp_path), PREPROCESSING, CPU, workers=0)
    assert isinstance(data, LoadedData)
    assert (data.classes, data.train_size, data.test_size) == (list(NAMES[:4]), 32, 12)


def _empty(root: Path) -> Path:
    for split in ('train', 'val'):
        (root / split / 'cat').mkdir(parents=True)
    return root


def _two_sizes(path: Path) -> Path:
    with tarfile.open(path, 'w') as archive:
        for split in ('train', 'test'):
            for size in (16, 32):
                add(archive, f'{split}/cat/{size}.png', png(coloured(1, size=size)[0][0]))
    return path


def _archive_of(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, 'w') as archive:
        for name, content in members.items():
            add(archive, name.replace('__', '/'), content)
    return path


def _cut(path: Path) -> Path:
    content = write_archive(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def _text(path: Path) -> Path:
    path.write_text('no archive')
    return path


def _other_classes(root: Path) -> Path:
    write_folder(root)
    (root / 'val' / 'cat').rename(root / 'val' / 'cow')
    return root


def _only_train(root: Path) -> Path:
    (root / 'train' / 'cat').mkdir(parents=True)
    return root


IMAGE = png(coloured(1)[0][0])


@pytest.mark.parametrize(('make', 'told'), [
    (lambda p: Path('nothing'), "no data set 'nothing': expected cifar10, an archive"),
    (lambda p: Path('torch/nothing'), 'torch/nothing'),
    (lambda p: _text(p / 'a.tar'), 'a.tar: not an archive'),
    (lambda p: _cut(p / 'a.tar.xz'), 'a.tar.xz: not an archive'),
    (lambda p: _two_sizes(p / 'a.tar'), 'images of sizes'),
    (lambda p: _archive_of(p / 'a.tar'), 'expected train/CLASS/IMAGE'),
    (lambda p: _archive_of(p / 'a.tar', train__cat__1=IMAGE), 'expected test/CLASS/IMAGE'),
    (lambda p: _archive_of(p / 'a.tar', train__cat__1=IMAGE, test__cow__1=IMAGE), 'expected test/CLASS/IMAGE'),
    (lambda p: _archive_of(p / 'a.tar', train__cat__1=b'no image'), 'train/cat/1: not an image'),
    (lambda p: _archive_of(p / 'a.tar', train__cat__1=IMAGE[:200]), 'train/cat/1: not an image'),
    (lambda p: _archive_of(p / 'a.tar', train__cat__1=png(coloured(1, size=65)[0][0])), 'over 64 pixels'),
    (lambda p: _only_train(p / 'set'), 'lacks the folder val or test'),
    (lambda p: p, 'lacks the folder train'),
    (lambda p: _empty(p / 'set'), 'set: '),
    (lambda p: _other_classes(p / 'set'), 'train and val differ in the classes cat, cow'),
])  # fmt: skip
def test_bad_sources(make, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        open_data(str(make(tmp_path)), PREPROCESSING, CPU, workers=0)
    assert told in str(error.value) and '\n' not in str(error.value)


def test_augmentation_of_images_in_memory_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / 'a.tar')
    with pytest.raises(ValueError, match='auto_augment'):
        open_data(str(path), PREPROCESSING, CPU, augmentation={'auto_augment': 'rand-m9-n2'})


@pytest.mark.slow
def test_the_real_archive(data_dir: Path) -> None:
    """About a minute: pytest tests/test_image_sources.py -m slow."""
    path = data_dir / 'cifar10-jpeg.tar.xz'
    if not path.is_file():
        pytest.skip(f'{path} is missing')
    train, test, classes = read_archive(path)
    assert train[0].shape == (50_000, 3, 32, 32) and test[0].shape == (10_000, 3, 32, 32)
    assert train[1].bincount().tolist() == [5_000] * 10 and test[1].bincount().tolist() == [1_000] * 10
    assert classes[:3] == ['airplane', 'automobile', 'bird']


def test_a_test_split_needs_no_training_split(tmp_path: Path) -> None:
    whole = write_folder(tmp_path / 'whole', train=8, val=12)
    alone = write_folder(tmp_path / 'alone', train=8, val=12)
    shutil.rmtree(alone / 'train')
    found = [open_test_split(str(source), PREPROCESSING, CPU, workers=0) for source in (whole, alone, alone / 'val')]
    batches = [next(iter(data.test_batches(12))) for data in found]
    for data, (images, labels) in zip(found, batches):
        assert data.classes == list(NAMES[:4]) and data.test_size == 12
        assert torch.equal(images, batches[0][0]) and torch.equal(labels, batches[0][1])
    assert batches[0][1].bincount().tolist() == [3, 3, 3, 3]


def test_a_damaged_picture_of_a_test_split_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / 'set', train=4, val=8) / 'val'
    (folder / 'bird' / '0001.png').write_bytes(b'nothing')
    with pytest.raises(ValueError, match=r'bird/0001\.png'):
        list(open_test_split(str(folder), PREPROCESSING, CPU, workers=0).test_batches(8))


def test_pictures_for_calibration_are_others_only_where_a_file_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / 'set', train=20, val=4)
    model = timm.create_model('resnet20_cifar', num_classes=4)
    before = torch.cat(calibration_images(folder, model, 12))
    files = sorted((folder / 'train').rglob('*.png'))
    raw = {file: file.read_bytes() for file in files}
    left_out = 0
    for file in files:
        file.write_bytes(raw[file][:100])
        caplog.clear()
        after = torch.cat(calibration_images(folder, model, 12))
        file.write_bytes(raw[file])
        assert len(after) == 12
        if file.name not in caplog.text or torch.equal(after, before):
            assert torch.equal(after, before), 'a file that was not drawn changes nothing'
            continue
        left_out += 1
        lost = [k for k in range(12) if not any(torch.equal(before[k], image) for image in after)]
        assert len(lost) == 1 and torch.equal(after[:-1], torch.cat([before[: lost[0]], before[lost[0] + 1 :]]))
    assert left_out == 12


def test_grey_and_deep_pictures_are_read_as_rgb(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    model = timm.create_model('resnet20_cifar', num_classes=4)
    for name, picture in (('deep', Image.fromarray(ramp)), ('grey', Image.fromarray((ramp >> 8).astype(np.uint8)))):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / 'ramp.png')
    deep, grey = (calibration_images(tmp_path / name, model, 1)[0] for name in ('deep', 'grey'))
    assert deep.shape == (1, 3, 32, 32) and torch.equal(deep, grey) and deep.std() > 0.5
