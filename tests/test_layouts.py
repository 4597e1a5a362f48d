"""Data sets as label tools write them: the same pictures and objects are found as in COCO's own layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection.data.coco import CocoDataset, find_data
from detection.data.doctor import check_data
from detection.data.layouts import find_annotations, match_pictures

NAMES = ('cat one.png', 'b.png', 'c.png')


def content(names: dict[str, str] | None = None, categories: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Three pictures of different sizes, one object each; ``names`` replaces file names."""
    return {
        'images': [
            {'id': k, 'file_name': (names or {}).get(name, name), 'width': 40 + k, 'height': 30}
            for k, name in enumerate(NAMES, 1)
        ],
        'annotations': [
            {'id': k, 'image_id': k, 'category_id': 1, 'bbox': [2, 3, 4 + k, 5], 'area': 5 * (4 + k), 'iscrowd': 0}
            for k in (1, 2, 3)
        ],
        'categories': categories or [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'dog'}],
    }


def write(root: Path, annotations: str, pictures: str, tree: dict[str, Any], values: int = 0) -> None:
    """An annotation file, and pictures whose values say which one they are."""
    (root / annotations).parent.mkdir(parents=True, exist_ok=True)
    (root / annotations).write_text(json.dumps(tree))
    (root / pictures).mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(NAMES, 1):
        Image.fromarray(np.full((30, 40 + k, 3), values + k, np.uint8)).save(root / pictures / name)


def renamed(change: Callable[[str], str]) -> dict[str, str]:
    return {name: change(name) for name in NAMES}


ROBOFLOW = [
    {'id': 0, 'name': 'pets', 'supercategory': 'none'},
    {'id': 1, 'name': 'cat', 'supercategory': 'pets'},
    {'id': 2, 'name': 'dog', 'supercategory': 'pets'},
]
# annotation file and folder of pictures of the two splits, and the content
LAYOUTS: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    'coco': ('annotations/instances_train2017.json', 'train2017', 'annotations/instances_val2017.json', 'val2017', {}),
    'roboflow': (
        'train/_annotations.coco.json', 'train', 'valid/_annotations.coco.json', 'valid', {'categories': ROBOFLOW},
    ),
    'cvat, an export a split': (
        'train/annotations/instances_default.json', 'train/images', 'validation/annotations/instances_default.json',
        'validation/images/default', {},
    ),
    'cvat, subsets': (
        'annotations/instances_Train.json', 'images/Train', 'annotations/instances_Validation.json',
        'images/Validation', {},
    ),
    'label studio': (
        'train/result.json', 'train/images', 'val/result.json', 'val/images', {'names': renamed('images/{}'.format)},
    ),
    'label studio on windows': (
        'train/result.json', 'train/images/7', 'val/result.json', 'val/images/7',
        {'names': renamed('images\\7\\{}'.format)},
    ),
    'label studio, local files': (
        'train/result.json', 'train/images', 'val/result.json', 'val/images',
        {'names': renamed(lambda name: '/data/local-files/?d=media/upload/' + name.replace(' ', '%20'))},
    ),
    'fiftyone': ('train/labels.json', 'train/data', 'val/labels.json', 'val/data', {}),
    'via': ('train/via_export_coco.json', 'train', 'val/via_project_2Aug_coco.json', 'val', {}),
    'labelme': (
        'train/annotations.json', 'train/JPEGImages', 'val/annotations.json', 'val/JPEGImages',
        {'names': renamed('JPEGImages\\{}'.format)},
    ),
    'labelme2coco': ('train.json', 'train', 'val.json', 'val', {'names': renamed('/home/ann/pets/{}'.format)}),
    'urls': (
        'annotations/train.json', 'images/train', 'annotations/val.json', 'images/val',
        {'names': renamed(lambda name: f'https://host/bucket/{name.replace(" ", "%20")}?sign=1')},
    ),
    'windows paths': (
        'annotations/instances_train.json', 'train', 'annotations/instances_val.json', 'val',
        {'names': renamed('D:\\pets\\raw\\{}'.format)},
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_label_tools_layout_is_read_as_it_is(name: str, tmp_path: Path) -> None:
    train, train_folder, val, val_folder, changes = LAYOUTS[name]
    write(tmp_path, train, train_folder, content(**changes))
    write(tmp_path, val, val_folder, content(**changes), values=100)
    splits = ('Train', 'Validation') if name == 'cvat, subsets' else ('train', 'val')
    assert find_data(tmp_path).root == tmp_path
    for split, values in zip(splits, (0, 100)):
        data = CocoDataset(tmp_path, split, 'box')
        assert data.class_names == ['__background__', 'cat', 'dog']
        for index in range(3):
            image, target = data.load(index)
            assert image.shape == (30, 41 + index, 3) and (image == values + index + 1).all()
            assert target['boxes'].tolist() == [[2, 3, 7 + index, 8]]
    report = check_data(tmp_path, 'box', splits)
    assert report.ok, report.text()


def test_an_export_without_splits_tells_the_setting(tmp_path: Path) -> None:
    write(tmp_path, 'labels.json', 'data', content())
    with pytest.raises(ValueError, match=r'splits found .*: labels; data.train_split and data.val_split name others'):
        find_annotations(tmp_path, 'train', 'box')
    assert len(CocoDataset(tmp_path, 'labels', 'box')) == 3
    (tmp_path / 'cvat').mkdir()
    write(tmp_path / 'cvat', 'annotations/instances_default.json', 'images', content())
    with pytest.raises(ValueError, match=r'splits found .*: default; data.train_split'):
        find_annotations(tmp_path / 'cvat', 'train', 'box')
    assert len(CocoDataset(tmp_path / 'cvat', 'default', 'box')) == 3


def test_two_files_for_a_split_are_named(tmp_path: Path) -> None:
    for name in ('a', 'b'):
        write(tmp_path, f'val/{name}.json', 'val', content())
    with pytest.raises(ValueError, match=r'several files for split .*a.json, val/b.json'):
        find_annotations(tmp_path, 'val', 'box')


def test_pictures_elsewhere_are_found_by_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / 'data', 'annotations/instances_train.json', 'raw/pictures', content())
    write(tmp_path / 'data', 'annotations/instances_val.json', 'raw/pictures/val', content(), values=100)
    with pytest.raises(ValueError, match=r'no image folder .*data.images=FOLDER'):
        CocoDataset(tmp_path / 'data', 'train', 'box')
    monkeypatch.chdir(tmp_path)
    for images in ('raw/pictures', 'data/raw/pictures', tmp_path / 'data' / 'raw' / 'pictures'):
        for split, value in (('train', 1), ('val', 101)):
            assert (CocoDataset(tmp_path / 'data', split, 'box', images=images).load(0)[0] == value).all()
        assert check_data(tmp_path / 'data', 'box', images=images).ok
    with pytest.raises(ValueError, match=re.escape('data.images: no folder nowhere')):
        CocoDataset(tmp_path / 'data', 'train', 'box', images='nowhere')


@pytest.mark.parametrize(
    ('names', 'files', 'found'),
    [
        (['a.jpg'], ['a.jpg'], {'a.jpg': 'a.jpg'}),
        (['images/a.jpg', 'images/b.jpg'], ['a.jpg', 'b.jpg'], {'images/a.jpg': 'a.jpg', 'images/b.jpg': 'b.jpg'}),
        (['a%20b.jpg', 'c%.jpg'], ['a b.jpg', 'c%.jpg'], {'a%20b.jpg': 'a b.jpg', 'c%.jpg': 'c%.jpg'}),
        (['a%20b.jpg'], ['a b.jpg', 'a%20b.jpg'], {'a%20b.jpg': 'a%20b.jpg'}),
        (['x\\cam\\1.jpg'], ['cam/1.jpg', '1.jpg'], {'x\\cam\\1.jpg': 'cam/1.jpg'}),
        (['/x/cam1/1.jpg', '/x/cam2/1.jpg'], ['cam1/1.jpg', 'cam2/1.jpg'],
         {'/x/cam1/1.jpg': 'cam1/1.jpg', '/x/cam2/1.jpg': 'cam2/1.jpg'}),
        (['/x/1.jpg'], ['deep/er/1.jpg'], {'/x/1.jpg': 'deep/er/1.jpg'}),
        (['\u00e9.jpg', 'o\u0308.jpg'], ['e\u0301.jpg', '\u00f6.jpg'],
         {'\u00e9.jpg': 'e\u0301.jpg', 'o\u0308.jpg': '\u00f6.jpg'}),
        # what could be another picture is missing
        (['/x/1.jpg'], ['cam1/1.jpg', 'cam2/1.jpg'], {}),
        (['cam1/1.jpg', 'cam2/1.jpg'], ['cam2/1.jpg', '1.jpg', 'cam1/2.jpg'], {'cam2/1.jpg': 'cam2/1.jpg'}),
        (['a/1.jpg', 'b/1.jpg'], ['1.jpg'], {}),
        (['1.jpg'], ['train/1.jpg'], {}),
        (['x/1.jpg', '1.jpg'], ['1.jpg'], {'1.jpg': '1.jpg'}),
        (['../1.jpg', '/etc/passwd'], ['2.jpg'], {}),
    ],
)  # fmt: skip
def test_names_lead_to_the_file_that_they_can_only_mean(
    names: list[str], files: list[str], found: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / '1.jpg').write_bytes(b'another')
    for file in files:
        (tmp_path / 'images' / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'images' / file).write_bytes(b'')
    pictures = match_pictures(names, [tmp_path / 'images'])
    assert set(pictures.missing) == set(names) - set(found)
    assert {name: pictures.path(name) for name in found} == {n: tmp_path / 'images' / f for n, f in found.items()}


def test_a_missing_picture_is_not_taken_from_another_split(tmp_path: Path) -> None:
    write(tmp_path, 'annotations/instances_train.json', 'images/train', content())
    write(tmp_path, 'annotations/instances_val.json', 'images/val', content(), values=100)
    (tmp_path / 'images/val/b.png').unlink()
    with pytest.raises(
        ValueError, match=r"instances_val.json: 1 of 3 pictures are not in .*images/val, such as 'b.png'"
    ):
        CocoDataset(tmp_path, 'val', 'box')
    report = check_data(tmp_path, 'box')
    assert [p.kind for p in report.problems] == ['missing image'] and 'images/val/b.png' in report.text()


@pytest.mark.parametrize(('other', 'folder'), [('default', 'images/default/cam1'), ('holdout', 'images/Holdout')])
def test_a_picture_elsewhere_is_not_taken_from_a_split_of_any_name(other: str, folder: str, tmp_path: Path) -> None:
    names = renamed(lambda name: f'../{name}')
    write(tmp_path, 'annotations/instances_train.json', 'pictures/train', content(names))
    write(tmp_path, f'annotations/instances_{other}.json', folder, content(), values=100)
    with pytest.raises(ValueError, match=r'3 of 3 pictures are not in .*; data.images=FOLDER'):
        CocoDataset(tmp_path, 'train', 'box')
    assert not check_data(tmp_path, 'box', ('train',)).ok
    assert (CocoDataset(tmp_path, 'train', 'box', images='pictures').load(0)[0] == 1).all()


def test_a_category_that_only_holds_others_together_is_no_class(tmp_path: Path) -> None:
    """Roboflow's number 0, but none that has objects or that stands for itself, as COCO's person."""
    own = [{'id': 1, 'name': 'person', 'supercategory': 'person'}, {'id': 2, 'name': 'bag', 'supercategory': 'person'}]
    same = [{'id': 0, 'name': 'cat', 'supercategory': 'none'}, {'id': 1, 'name': 'cat', 'supercategory': 'cat'}]
    used = [{'id': 1, 'name': 'pets'}, {'id': 2, 'name': 'dog', 'supercategory': 'pets'}]
    for number, (categories, names) in enumerate(
        ((own, ['person', 'bag']), (same, ['cat']), (used, ['pets', 'dog']), (ROBOFLOW, ['cat', 'dog']))
    ):
        root = tmp_path / str(number)
        write(root, 'train/_annotations.coco.json', 'train', content(categories=categories))
        assert CocoDataset(root, 'train', 'box').class_names[1:] == names
        assert check_data(root, 'box', ('train',)).ok
