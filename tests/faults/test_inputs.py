"""A regression test for every defect that the fuzzers found in text, pictures, annotations and files of weights."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection.data.annotations import load_coco
from detection.data.coco import CocoDataset
from detection.data.decode import decode_rgb, read_picture
from detection.data.doctor import check_data
from detection.demo.server import read_settings
from detection.evaluation.coco_metrics import CocoEvaluator
from detection.training.checkpoint import load_checkpoint, load_detector
from detection.training.config import config_from_dict
from detection.training.config import load_config as detection_config
from norton_timm import CompressionSpec
from norton_timm.checkpoints.keys import read_checkpoint
from norton_timm.training.config import load_train_config
from norton_timm.training.sources import read_archive
from norton_timm.utils.config import ConfigError, read_plain
from norton_timm.utils.modules import not_finite

from .annotations import content
from .checkpoints import detector
from .gadgets import gadgets, pickles
from .pictures import add, pictures, png_of
from .texts import LAUGHS


@pytest.mark.parametrize(
    'text', [LAUGHS, 'a: &a [*a]', 'a: &a {b: *a}', '[' * 3000, '? {a: 1}\n: 2', 'a: 2001-99-99', '- ' * 3000]
)
def test_yaml_that_grows_or_holds_itself_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / 'run.yaml'
    path.write_text(text)
    for read in (detection_config, load_train_config, CompressionSpec.from_yaml):
        with pytest.raises(ValueError, match='not valid YAML'):
            read(path)


def test_yaml_with_a_few_aliases_is_fine() -> None:
    assert read_plain('a: &a [1, 2]\nb: [*a, *a]') == {'a': [1, 2], 'b': [[1, 2], [1, 2]]}


@pytest.mark.parametrize(
    'override', ['seed=1e30', 'optim.lr=.inf', 'x.' * 1500 + 'a=1', f'seed={10**400}', 'data.workers=100000']
)
def test_numbers_that_no_run_can_have(override: str) -> None:
    for read in (detection_config, load_train_config):
        with pytest.raises(ConfigError) as error:
            read(None, [override])
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    'tree',
    [
        {'optim': {'epochs': float('inf')}},
        {'save_every': 1e308},
        {'model': {'fpn_channels': 10**9}},
        {'data': {'batch_size': 10**12}},
        {'data': {'jitter': [1, float('inf')]}},
    ],
)
def test_sizes_that_no_machine_has(tree: dict) -> None:
    with pytest.raises(ConfigError, match='expected'):
        config_from_dict(tree)


def coco(folder: Path, **changes: object) -> Path:
    """The small valid data set; a key `list_number_field` changes one field."""
    tree = json.loads(json.dumps(content()))
    for key, value in changes.items():
        name, number, field = key.split('_', 2)
        tree[name][int(number)][field] = value
    (folder / 'annotations').mkdir()
    (folder / 'images').mkdir()
    for name in ('1.jpg', '2.jpg'):
        (folder / 'images' / name).write_bytes(pictures()[0])
    for prefix in ('instances', 'person_keypoints'):
        (folder / 'annotations' / f'{prefix}_train.json').write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        ({'images_0_file_name': 'a/..'}, 'image 1 has file name'),
        ({'images_0_file_name': 'a\0.jpg'}, 'image 1 has file name'),
        ({'images_0_width': 10**6, 'images_0_height': 10**6}, 'image 1 is 1000000x1000000'),
        ({'images_0_id': True}, r"images\[0\] has no int 'id'"),
        ({'categories_0_keypoints': 3}, 'category 1 has keypoints 3'),
        ({'categories_0_skeleton': [-1, 0]}, 'category 1 has skeleton'),
        ({'categories_0_sigmas': ['a']}, 'category 1 has sigmas'),
        ({'annotations_0_keypoints': 5}, 'annotation 1 has keypoints 5'),
        ({'annotations_0_keypoints': None}, 'annotation 1 has keypoints None'),
        ({'annotations_0_num_keypoints': []}, 'annotation 1 has num_keypoints'),
        ({'annotations_0_area': [1]}, r'annotation 1 has area \[1\]'),
        ({'annotations_0_bbox': [1e308, 1, 1, 1]}, 'annotation 1 has bbox'),
    ],
)
def test_annotations_that_would_break_later_are_refused_by_name(change: dict, told: str, tmp_path: Path) -> None:
    folder = coco(tmp_path, **change)
    with pytest.raises(ValueError, match=told):
        load_coco(folder / 'annotations' / 'instances_train.json')
    assert not check_data(folder, 'keypoint', ('train',)).ok


@pytest.mark.parametrize('name', ['../../../etc/passwd', '/etc/passwd', 'images/../../1.jpg', '/1.jpg', 'C:\\1.jpg'])
def test_a_name_never_leads_out_of_the_image_folder(name: str, tmp_path: Path) -> None:
    """The last part alone may say which picture of the folder is meant, unless it is another name's."""
    (tmp_path / 'data').mkdir()
    (tmp_path / '1.jpg').write_bytes(pictures()[0])
    folder = coco(tmp_path / 'data', images_0_file_name=name)
    if 'passwd' not in name:
        (folder / 'images' / '1.jpg').rename(folder / 'images' / 'b.jpg')
    with pytest.raises(ValueError, match=r'1 of 2 pictures are not in .*images, such as'):
        CocoDataset(folder, 'train', 'box')
    assert 'missing image' in {problem.kind for problem in check_data(folder, 'box', ('train',)).problems}


def test_deep_json_is_no_annotation_file(tmp_path: Path) -> None:
    (tmp_path / 'a.json').write_text('[' * 100_000)
    with pytest.raises(ValueError, match='not valid JSON'):
        load_coco(tmp_path / 'a.json')


@pytest.mark.parametrize(
    'mask',
    [
        {'size': [24, 32], 'counts': [2**31, 2**31]},
        {'size': [24, 32], 'counts': 'ZZZZZZZZ'},
        {'size': [24, 32], 'counts': [768, 'a']},
        {'size': [24], 'counts': [768]},
        [[1, 2, 'a', 4, 5, 6]],
        'text',
        7,
    ],
)
def test_masks_that_native_code_would_read_beyond_are_refused(mask: object, tmp_path: Path) -> None:
    folder = coco(tmp_path, annotations_0_segmentation=mask)
    with pytest.raises(ValueError, match='annotation 1 has a malformed segmentation'):
        CocoDataset(folder, 'train', 'mask')[0]
    with pytest.raises(ValueError, match='annotation 1 has a malformed segmentation'):
        CocoEvaluator(load_coco(folder / 'annotations' / 'instances_train.json'), 'mask')


@pytest.mark.parametrize(
    'polygon',
    [*([4, 12, 4, 12, 12, 4, 12, far] for far in (6.167657508635757e16, -2.3e16, 1e9)), [-300, 5, 300, 6] * 2000],
    ids=['far right', 'far left', 'billion', 'zigzag'],
)
def test_an_endless_outline_is_refused(polygon: list[float], tmp_path: Path) -> None:
    """The fuzzer's find: native code keeps every fifth of a pixel along it, and crashed."""
    folder = coco(tmp_path, annotations_0_segmentation=[polygon])
    with pytest.raises(ValueError, match=r'annotation 1 has a polygon of \d+ pixels around'):
        CocoDataset(folder, 'train', 'mask')[0]
    with pytest.raises(ValueError, match=r'annotation 1 has a polygon of \d+ pixels around'):
        CocoEvaluator(load_coco(folder / 'annotations' / 'instances_train.json'), 'mask')


def test_an_object_without_a_mask_neither_counts_nor_breaks_the_evaluation(tmp_path: Path) -> None:
    folder = coco(tmp_path, annotations_0_segmentation=None)
    dataset = CocoDataset(folder, 'train', 'mask')
    evaluator = CocoEvaluator(dataset.coco, 'mask', dataset.label_to_category)
    targets = [dataset[k][1] for k in range(2)]
    found = [
        {
            'boxes': t['boxes'],
            'labels': t['labels'],
            'scores': torch.ones(len(t['labels'])),
            'masks': t['masks'][:, None].float(),
        }
        for t in targets
    ]
    evaluator.process(targets, found)
    assert evaluator.evaluate()['segm']['AP'] == pytest.approx(1)


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'a.jpg')
    (tmp_path / 'b.jpg').symlink_to('/dev/zero')
    for name in ('a.jpg', 'b.jpg'):
        with pytest.raises(ValueError, match='not a plain file'):
            read_picture(tmp_path / name, oriented=False)


@pytest.mark.parametrize('data', [png_of(60_000, 60_000), png_of(30_000, 30_000, data=bytes(2**20))])
def test_a_small_file_of_many_pixels_is_not_decoded(data: bytes, tmp_path: Path) -> None:
    (tmp_path / 'a.png').write_bytes(data)
    with pytest.raises(ValueError, match=r'pixels, expected at most|that are no'):
        read_picture(tmp_path / 'a.png', oriented=False)
    with pytest.raises(ValueError, match=r'pixels, expected at most|that are no'):
        decode_rgb(data, 'a picture', oriented=True, most_pixels=4096 * 4096)


@pytest.mark.parametrize('number', range(17))
def test_every_kind_of_picture_is_read(number: int) -> None:
    picture = pictures()[number]
    try:
        image = decode_rgb(picture, 'x', oriented=False)
    except ValueError:
        pytest.skip('this OpenCV does not know the format')
    assert image.shape == (24, 32, 3) and image.dtype == np.uint8


def test_postscript_under_another_name_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / '1.jpg'
    stream = io.BytesIO()
    Image.new('RGB', (32, 24)).save(stream, 'EPS')
    path.write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match='no JPEG'):
        read_picture(path, oriented=False)


def test_an_archive_of_one_huge_member_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / 'a.tar.xz', 'w:xz') as tar:
        add(tar, 'd/train/a/a.jpg', bytes(50 * 2**20))
    with pytest.raises(ValueError, match='expected small images'):
        read_archive(tmp_path / 'a.tar.xz')


@pytest.mark.parametrize('number', range(len(gadgets())))
def test_pickles_that_run_code_are_refused_everywhere(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for new in (True, False):
        torch.save(
            {'model': {}, 'config': gadgets()[number], 'meta': {}},
            tmp_path / 'a.pt',
            _use_new_zipfile_serialization=new,
        )
        for read in (read_checkpoint, load_checkpoint, load_detector):
            with pytest.raises(ValueError, match=r'cannot be read|can be read'):
                read(tmp_path / 'a.pt')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.pt']


def test_pickles_that_unpack_to_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    for data, told in zip(pickles()[-6:-4], ('a tensor of shape', 'unpack to more')):
        (tmp_path / 'a.pt').write_bytes(data)
        with pytest.raises(ValueError, match=told):
            read_checkpoint(tmp_path / 'a.pt')


def test_one_flipped_bit_in_a_checkpoint_is_found(tmp_path: Path) -> None:
    torch.save({'model': {'a': torch.arange(1000.0)}, 'config': {}, 'meta': {}}, tmp_path / 'a.pt')
    data = bytearray((tmp_path / 'a.pt').read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 4
    (tmp_path / 'a.pt').write_bytes(data)
    with pytest.raises(ValueError, match='Bad CRC-32'):
        load_checkpoint(tmp_path / 'a.pt')


@pytest.mark.parametrize(
    ('where', 'value'),
    [
        ('meta', None),
        ('meta', {'task': 'box'}),
        ('config', []),
        ('config', {}),
        ('surgery', 3),
        ('ema', 7),
    ],
)
def test_a_checkpoint_that_makes_no_sense_is_refused(where: str, value: object, tmp_path: Path) -> None:
    kept = torch.load(io.BytesIO(detector()), weights_only=True)
    torch.save({**kept, where: value}, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='does not fit its own configuration'):
        load_detector(tmp_path / 'a.pt')


def test_a_checkpoint_that_describes_a_huge_network_allocates_nothing(tmp_path: Path) -> None:
    kept = torch.load(io.BytesIO(detector()), weights_only=True)
    kept['config']['model']['fpn_channels'] = 2**19
    torch.save(kept, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match=r'model\.fpn_channels is 524288, expected at most'):
        load_detector(tmp_path / 'a.pt')


@pytest.mark.parametrize('text', ['[' * 9000, '[1]', '7', 'x' * 20_000, '"a"'])
def test_messages_of_the_page(text: str) -> None:
    with pytest.raises(ValueError, match=r'expected an object|Expecting value'):
        read_settings(text)


def test_the_first_tensor_with_nan_is_named() -> None:
    tensors = {'a': torch.ones(3), 'b': torch.tensor([1, float('inf')]), 'c': torch.tensor([float('nan')])}
    assert not_finite(tensors) == 'b' and not_finite({'a': tensors['a']}) is None
