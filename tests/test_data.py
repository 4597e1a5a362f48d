"""COCO data sets against the JSON itself, and messages for broken ones."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from tool_runner import ROOT, run_python
from torch.utils.data import DataLoader
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from detection.data.annotations import load_coco, match_classes, mirror_indices, unpaired
from detection.data.coco import CocoDataset, collate, find_data
from detection.data.decode import decode_rgb
from detection.data.figures import KEYPOINT_NAMES
from detection.data.layouts import find_annotations
from detection.data.sample import write_sample
from detection.data.transforms import build_transforms
from detection.tasks import TASKS


@pytest.fixture(scope='module')
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp('sample'), train=24, val=8, size=(96, 96))


def raw(root: Path, kind: str, split: str) -> dict:
    return json.loads((root / 'annotations' / f'{kind}_{split}2017.json').read_text())


def write(root: Path, content: Any, split: str = 'train', kind: str = 'instances', images: bool = True) -> Path:
    """A data set of our own: the annotation file as given, a grey picture for every image in it."""
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    (root / f'{split}2017').mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / 'annotations' / f'{kind}_{split}2017.json').write_text(text)
    if images and isinstance(content, dict):
        for image in content.get('images', ()):
            picture = np.full((image['height'], image['width'], 3), 90, np.uint8)
            cv2.imwrite(str(root / f'{split}2017' / image['file_name']), picture)
    return root


def small(**changes: Any) -> dict[str, Any]:
    """A valid set of one image with one object."""
    box = [10.0, 5.0, 20.0, 10.0]
    polygon = [[10.0, 5.0, 30.0, 5.0, 30.0, 15.0, 10.0, 15.0]]
    return {
        'images': [{'id': 7, 'file_name': 'a.png', 'width': 64, 'height': 48}],
        'annotations': [{'id': 1, 'image_id': 7, 'category_id': 3, 'bbox': box, 'segmentation': polygon}],
        'categories': [{'id': 3, 'name': 'cat'}, {'id': 9, 'name': 'dog'}],
        **changes,
    }


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('task', TASKS)
def test_targets_are_the_annotations_of_real_coco(tiny_coco: Path, task: str, split: str) -> None:
    data = CocoDataset(tiny_coco, split, task)
    content = raw(tiny_coco, 'person_keypoints' if task == 'keypoint' else 'instances', split)
    assert len(data) == len(content['images']) == 50
    assert data.num_classes == (2 if task == 'keypoint' else 91)
    reference = COCO(str(data.annotation_file))
    empty = 0
    for index in range(50):
        image, target = data[index]
        assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
        records = [a for a in content['annotations'] if a['image_id'] == target['image_id'] and not a['iscrowd']]
        boxes = np.array([a['bbox'] for a in records], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(target['boxes'], boxes, atol=0.02)
        assert target['labels'].tolist() == [a['category_id'] for a in records]
        assert target['labels'].dtype == torch.int64
        height, width = image.shape[1:]
        assert (target['boxes'] >= 0).all() and (target['boxes'] <= torch.tensor([width, height] * 2)).all()
        if task == 'mask':
            assert target['masks'].shape == (len(records), height, width)
            for record, mask in zip(records, target['masks'].numpy()):
                np.testing.assert_array_equal(mask, reference.annToMask(record))
        if task == 'keypoint':
            points = np.array([a['keypoints'] for a in records], np.float32).reshape(-1, 17, 3)
            np.testing.assert_array_equal(target['keypoints'], points)
        empty += not records
    assert empty > 0


def test_images_are_rgb(tmp_path: Path) -> None:
    write(tmp_path, small())
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[..., 2] = 255  # red, in OpenCV's order
    cv2.imwrite(str(tmp_path / 'train2017/a.png'), picture)
    image, _ = CocoDataset(tmp_path, 'train', 'box')[0]
    assert image.mean((1, 2)).tolist() == [1, 0, 0]


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    write(tmp_path, small())
    for channels in (1, 4):
        cv2.imwrite(str(tmp_path / 'train2017/a.png'), np.full((48, 64, channels), 51, np.uint8))
        image, _ = CocoDataset(tmp_path, 'train', 'box')[0]
        assert image.shape == (3, 48, 64)
        torch.testing.assert_close(image.unique(), torch.tensor([0.2]))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(stream := io.BytesIO(), 'PNG', exif=exif)
    wanted = cv2.imdecode(np.frombuffer(stream.getvalue(), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.array_equal(decode_rgb(stream.getvalue(), 'x', oriented=True), wanted)
    assert np.array_equal(decode_rgb(stream.getvalue(), 'x', oriented=False), pixels)


@pytest.mark.parametrize('damage', [(b'MM\0*', b'MMw*'), (b'MM\0*\0\0\0\x08', b'MM\0*\xff\xff\xff\xff')])
def test_a_picture_with_damaged_exif_data_is_taken_as_it_is_stored(damage: tuple[bytes, bytes]) -> None:
    """Pillow raises SyntaxError and others; the pixels are whole."""
    pixels = np.full((24, 32, 3), 90, np.uint8)
    exif = Image.Exif()
    exif.endian = '>'
    exif[0x0112] = 6
    Image.fromarray(pixels).save(stream := io.BytesIO(), 'JPEG', exif=exif)
    data = stream.getvalue().replace(*damage)
    assert data != stream.getvalue()
    assert decode_rgb(data, 'x', oriented=True).shape == (24, 32, 3)


def test_labels_of_coco_are_its_category_ids_with_gaps(tiny_coco: Path) -> None:
    data = CocoDataset(tiny_coco, 'val', 'box')
    assert len(data.class_names) == 91
    assert (data.class_names[1], data.class_names[12], data.class_names[90]) == ('person', 'N/A', 'toothbrush')
    assert len(data.label_to_category) == 80
    assert all(label == category for label, category in data.label_to_category.items())


def test_labels_of_other_data_count_from_one(tmp_path: Path) -> None:
    data = CocoDataset(write(tmp_path, small()), 'train', 'box')
    assert data.class_names == ['__background__', 'cat', 'dog']
    assert data.label_to_category == {1: 3, 2: 9}
    assert data[0][1]['labels'].tolist() == [1]


def test_crowds_and_boxes_without_area_are_no_targets_and_others_are_clipped(tmp_path: Path) -> None:
    boxes = [[-5, -5, 20, 20], [60, 40, 30, 30], [10, 10, 0, 5], [70, 10, 5, 5], [1, 1, 8, 8]]
    records = [{'id': i + 1, 'image_id': 7, 'category_id': 3, 'bbox': box} for i, box in enumerate(boxes)]
    records[4]['iscrowd'] = 1
    data = CocoDataset(write(tmp_path, small(annotations=records)), 'train', 'box')
    assert data[0][1]['boxes'].tolist() == [[0, 0, 15, 15], [60, 40, 64, 48]]
    # the evaluator still sees all of them
    assert len(data.coco.anns) == 5


def test_objects_without_a_mask_are_left_out_of_the_mask_task_only(tmp_path: Path) -> None:
    content = small()
    blank = {'image_id': 7, 'category_id': 9, 'bbox': [1, 1, 5, 5]}
    content['annotations'] += [{'id': 2, 'segmentation': [], **blank}, {'id': 3, **blank}]
    write(tmp_path, content)
    assert len(CocoDataset(tmp_path, 'train', 'box')[0][1]['boxes']) == 3
    target = CocoDataset(tmp_path, 'train', 'mask')[0][1]
    assert target['labels'].tolist() == [1]
    assert int(target['masks'].sum()) == 200


def test_persons_without_keypoints_stay_unless_left_out(tiny_coco: Path) -> None:
    every = CocoDataset(tiny_coco, 'train', 'keypoint')
    labelled = CocoDataset(tiny_coco, 'train', 'keypoint', min_keypoints=1)
    count = sum(len(every[i][1]['boxes']) for i in range(50))
    records = [a for a in raw(tiny_coco, 'person_keypoints', 'train')['annotations'] if not a['iscrowd']]
    assert count == len(records)
    assert sum(len(labelled[i][1]['boxes']) for i in range(50)) == sum(a['num_keypoints'] > 0 for a in records) < count


def test_keypoint_layout_comes_from_the_file(sample: Path) -> None:
    data = CocoDataset(sample, 'val', 'keypoint')
    assert data.keypoint_names == KEYPOINT_NAMES
    assert data.num_keypoints == 17
    assert ('left_knee', 'left_ankle') in {
        tuple(sorted((KEYPOINT_NAMES[a], KEYPOINT_NAMES[b])))[::-1] for a, b in data.skeleton
    }
    assert data.num_classes == 2
    assert data.class_names == ['__background__', 'person']


def test_other_keypoints_and_skeletons(tmp_path: Path) -> None:
    names = ['tip', 'L_wing', 'R_wing']
    content = small(categories=[{'id': 4, 'name': 'bird', 'keypoints': names, 'skeleton': [[1, 2], [1, 3]]}])
    points = [1, 2, 2, 3, 4, 2, 9, 9, 1]
    content['annotations'] = [{'id': 0, 'image_id': 7, 'category_id': 4, 'bbox': [0, 0, 30, 30], 'keypoints': points}]
    data = CocoDataset(write(tmp_path, content, kind='bird_keypoints'), 'train', 'keypoint')
    assert data.num_keypoints == 3
    assert data.flip_indices == (0, 2, 1)
    assert data.skeleton == ((0, 1), (0, 2))
    assert data[0][1]['keypoints'].flatten().tolist() == points
    assert data.coco.anns[1]['num_keypoints'] == 3  # id 0, which COCOeval cannot match, is renumbered


def test_mirror_indices_by_name_and_by_pair() -> None:
    assert mirror_indices(KEYPOINT_NAMES) == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
    assert mirror_indices(['elbow_l', 'elbow_r', 'Left Foot', 'Right Foot', 'l.ear']) == (1, 0, 3, 2, 4)
    assert mirror_indices(['a', 'b', 'c'], [('a', 'c')]) == (2, 1, 0)
    assert mirror_indices(['a', 'b', 'c'], [(1, 2)]) == (0, 2, 1)
    pairs = ['front_l_paw', 'front_r_paw', 'hand_R_1', 'hand_L_1', 'LAnkle', 'RAnkle', 'hipL', 'hipR', 'tail', 'RLeg']
    assert mirror_indices(pairs) == (1, 0, 3, 2, 5, 4, 7, 6, 8, 9)
    assert unpaired(pairs, mirror_indices(pairs)) == ['RLeg']
    assert unpaired(['nose', 'curl', 'roller'], (0, 1, 2)) == []
    for wrong in ([('a', 'x')], [(0, 7)], [('a', 'b'), ('b', 'c')], [('a', 'a')]):
        with pytest.raises(ValueError, match='flip pair'):
            mirror_indices(['a', 'b', 'c'], wrong)


@pytest.mark.parametrize('task', TASKS)
def test_torchvision_trains_on_a_batch_with_and_without_objects(sample: Path, task: str) -> None:
    augment = build_transforms(task, True, jitter=(0.5, 1.5), crop=(96, 96), color=0.5)
    data = CocoDataset(sample, 'train', task, augment, seed=0)
    images, targets = collate([data[3], data[5], data[0]])
    assert len(targets[1]['boxes']) == 0
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=data.num_classes)
    losses = model(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_augmentation_depends_on_seed_epoch_and_index_only(sample: Path) -> None:
    def run(workers: int, epoch: int, seed: int | None) -> list[torch.Tensor]:
        augment = build_transforms('box', True, jitter=(0.5, 1.5), crop=(80, 80), color=0.5)
        data = CocoDataset(sample, 'train', 'box', augment, seed=seed)
        loader = DataLoader(data, 5, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0)
        next(iter(loader))  # the epoch must also reach workers that already run
        data.set_epoch(epoch)
        return [image for images, _ in loader for image in images]

    def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b))

    first = run(0, 3, 11)
    assert equal(first, run(2, 3, 11))
    assert not equal(first, run(0, 4, 11))
    assert not equal(first, run(0, 3, 12))
    torch.manual_seed(0)
    free = run(0, 0, None)
    torch.manual_seed(0)
    assert equal(free, run(0, 0, None))
    assert not equal(free, run(0, 0, None))


def test_limit_takes_the_first_images_with_objects(tmp_path: Path) -> None:
    annotations = [
        {'id': k, 'image_id': image, 'category_id': 1, 'bbox': [1, 1, 20, 20], 'area': 400, 'iscrowd': crowd,
         'segmentation': [[1, 1, 21, 1, 21, 21]], 'keypoints': [2, 2, v], 'num_keypoints': int(v > 0)}
        for k, (image, crowd, v) in enumerate([(2, 1, 2), (3, 0, 0), (5, 0, 2), (6, 0, 2)], 1)
    ]  # fmt: skip
    content = {
        'images': [{'id': i, 'file_name': f'{i}.jpg', 'width': 32, 'height': 32} for i in range(1, 7)],
        'categories': [{'id': 1, 'name': 'person', 'keypoints': ['nose'], 'skeleton': []}],
        'annotations': annotations,
    }
    for kind in ('instances', 'person_keypoints'):
        write(tmp_path, content, kind=kind)
    assert CocoDataset(tmp_path, 'train', 'box', limit=2).image_ids == [3, 5]
    keypoint = CocoDataset(tmp_path, 'train', 'keypoint', limit=2)
    assert keypoint.image_ids == [5, 6]
    assert [keypoint[i][1]['image_id'] for i in range(len(keypoint))] == [5, 6]
    with pytest.raises(ValueError, match='has 3 images with objects for task mask; expected at least 4'):
        CocoDataset(tmp_path, 'train', 'mask', limit=4)


def test_find_data_prefers_the_path_then_data_coco_then_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        'detection.data.coco.ensure_sample', lambda root: write_sample(root, train=1, val=1, size=(64, 64))
    )
    assert find_data(sample).root == sample
    drawn = find_data(None)
    assert drawn.root == Path('data/sample') and 'sample' in drawn.name
    assert len(CocoDataset(drawn.root, 'val', 'keypoint')) == 1
    write(tmp_path / 'data/coco', small())
    assert find_data(None).root == Path('data/coco')
    for wrong in (tmp_path / 'nowhere', tmp_path):
        with pytest.raises(ValueError, match='expected'):
            find_data(wrong)


def test_other_folder_layouts(tmp_path: Path) -> None:
    write(tmp_path, small())
    (tmp_path / 'annotations/instances_train2017.json').rename(tmp_path / 'annotations/instances_train.json')
    (tmp_path / 'images').mkdir()
    (tmp_path / 'train2017').rename(tmp_path / 'images/train')
    assert CocoDataset(tmp_path, 'train', 'box')[0][0].shape == (3, 48, 64)
    (tmp_path / 'annotations/instances_train.json').rename(tmp_path / 'labels.json')
    (tmp_path / 'images/train').rename(tmp_path / 'pictures')
    data = CocoDataset(tmp_path, 'x', 'box', annotations=tmp_path / 'labels.json', images=tmp_path / 'pictures')
    assert data[0][0].shape == (3, 48, 64)


def broken(**changes: Any) -> Callable[[dict], dict]:
    def apply(content: dict) -> dict:
        content['annotations'][0].update(changes)
        return content

    return apply


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{"images": [', 'is not valid JSON'),
        ('[]', 'the file holds a list; expected an object'),
        ({'images': []}, "there is no list 'annotations'"),
        (small(images=[{'id': 7, 'file_name': 'a.png', 'width': 64}]), "images[0] has no int 'height'"),
        (small(images=[]), 'refers to image 7, which is not in the file'),
        (small(categories=[]), 'refers to category 3, which is not in the file'),
        (small(images=small()['images'] * 2), 'images[1] has id 7 again; expected unique ids'),
        (broken(bbox=[1, 2, 3])(small()), 'annotation 1 has bbox [1, 2, 3]; expected four finite numbers'),
        (broken(bbox=[1, 2, float('nan'), 3])(small()), 'expected four finite numbers'),
        (small(annotations=[{'id': 1}]), "annotations[0] has no int 'image_id'"),
        (small(annotations=[], images=[]), 'lists no images'),
        (
            broken(keypoints=[1, 1, 2])(small(categories=[{'id': 3, 'name': 'x', 'keypoints': ['a', 'b']}])),
            'annotation 1 has 3 keypoint numbers; expected 6, for 2 names',
        ),
    ],
    ids=lambda v: v if isinstance(v, str) and v[0] not in '{[' else 'set',
)
def test_broken_annotations_are_named_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    write(tmp_path, content, images=False)
    with pytest.raises(ValueError) as error:
        CocoDataset(tmp_path, 'train', 'box')
    assert message in str(error.value)
    assert 'instances_train2017.json' in str(error.value)
    assert '\n' not in str(error.value)


def test_missing_files_and_unknown_names_say_what_there_is(tmp_path: Path, sample: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown task 'boxes'; expected one of box, mask, keypoint"):
        CocoDataset(sample, 'train', 'boxes')
    with pytest.raises(ValueError, match=r"splits found for task 'box': train2017, val2017"):
        CocoDataset(sample, 'test', 'box')
    with pytest.raises(ValueError, match='does not exist'):
        find_annotations(tmp_path / 'nowhere', 'train', 'box')
    with pytest.raises(ValueError, match='cannot read annotation file'):
        load_coco(tmp_path / 'nothing.json')
    write(tmp_path, small())
    with pytest.raises(ValueError, match='no category with a list of keypoints'):
        write(tmp_path, small(), kind='person_keypoints')
        CocoDataset(tmp_path, 'train', 'keypoint')
    write(tmp_path, small(), 'train_old')
    (tmp_path / 'annotations/instances_train2014.json').write_text('{}')
    with pytest.raises(ValueError, match=r'several files .*instances_train2014.json, annotations/instances_train2017'):
        CocoDataset(tmp_path, 'train', 'box')


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda p: p.unlink(), 'cannot read image .*a.png: No such file'),
        (lambda p: p.write_bytes(b''), 'cannot read image .*a.png: 0 bytes'),
        (lambda p: p.write_text('no image'), 'cannot read image .*a.png: 8 bytes that are no JPEG'),
        (lambda p: cv2.imwrite(str(p), np.zeros((64, 48, 3), np.uint8)), r'a.png is 48x64 pixels; .* says 64x48'),
    ],
    ids=['missing', 'empty', 'text', 'other size'],
)
def test_unreadable_images_are_named(tmp_path: Path, spoil: Callable, message: str) -> None:
    data = CocoDataset(write(tmp_path, small()), 'train', 'box')
    spoil(tmp_path / 'train2017/a.png')
    with pytest.raises(ValueError, match=message):
        data[0]


def test_malformed_masks_are_named(tmp_path: Path) -> None:
    code = {'size': [10, 10], 'counts': [100]}
    for outline in ({'counts': 5}, [[1, 2, 3, 4, 5, 'six']], code):
        write(tmp_path, broken(segmentation=outline)(small()))
        with pytest.raises(ValueError, match='annotation 1 has a ma'):
            CocoDataset(tmp_path, 'train', 'mask')[0]


def test_sizes_and_labels_without_reading_images(sample: Path) -> None:
    data = CocoDataset(sample, 'train', 'box')
    assert data.height_and_width(0) == (96, 96)
    for index in range(len(data)):
        assert data.labels_of(index) == data[index][1]['labels'].tolist()


def test_labels_of_a_trained_network_are_matched_by_name(tmp_path: Path) -> None:
    """Another order, other ids and unused categories change nothing: label 1 stays what the network calls by it."""
    names = ['__background__', 'cat', 'dog']
    swapped = small(categories=[{'id': 0, 'name': 'ant'}, {'id': 3, 'name': 'dog'}, {'id': 9, 'name': 'cat'}])
    data = CocoDataset(write(tmp_path / 'a', swapped), 'train', 'box', class_names=names)
    assert data.label_to_category == {1: 9, 2: 3} and data.class_names == names and data.num_classes == 3
    plain = CocoDataset(write(tmp_path / 'b', small()), 'train', 'box')
    for index in range(len(plain)):  # the file swaps the two names, so the labels swap
        assert data.labels_of(index) == [3 - label for label in plain.labels_of(index)]
    fewer = small(categories=[{'id': 3, 'name': 'dog'}, {'id': 9, 'name': 'dog'}])
    for content, told in (
        (fewer, "the name 'dog' stands for several"),
        (small(), 'has objects of cat; the network knows'),
    ):
        path = write(tmp_path / str(len(told)), content) / 'annotations'
        with pytest.raises(ValueError, match=told):
            match_classes(load_coco(next(path.glob('instances_train*'))), 'box', ['__background__', 'dog', 'fish'])


def test_other_keypoints_than_the_networks_are_refused(tmp_path: Path) -> None:
    content = small(categories=[{'id': 4, 'name': 'bird', 'keypoints': ['tip', 'tail']}])
    points = [1, 2, 2, 3, 4, 2]
    content['annotations'] = [{'id': 1, 'image_id': 7, 'category_id': 4, 'bbox': [0, 0, 30, 30], 'keypoints': points}]
    root = write(tmp_path, content, kind='person_keypoints')
    assert CocoDataset(root, 'train', 'keypoint', keypoint_names=['tip', 'tail']).num_keypoints == 2
    for other in (['tail', 'tip'], ['tip']):
        with pytest.raises(ValueError, match='has keypoints tip, tail; the network finds ' + ', '.join(other)):
            CocoDataset(root, 'train', 'keypoint', keypoint_names=other)


def test_few_open_files_are_enough(sample: Path) -> None:
    """As after `ulimit -n 100`: by PyTorch's default a loading process has no file left, and the run waits for ever."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from detection.data import CocoDataset, eval_loader
from detection.training.config import DataConfig
from detection.training.loader import train_loader
data = CocoDataset({str(sample)!r}, 'train', 'mask', seed=0)
print(sum(len(targets) for _, targets in eval_loader(data, 24, 2)))
print(sum(len(targets) for _, targets in train_loader(data, DataConfig(batch_size=12, workers=2), 0)))
"""
    done = run_python('-c', code, cwd=ROOT, limit_s=120)
    assert (done.code, done.out.split()) == (0, ['24', '24']), done.err
