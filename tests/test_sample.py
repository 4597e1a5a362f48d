"""The drawn data set: files, annotations and their agreement with each other."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from detection.data import figures, sample


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.write_sample(tmp_path_factory.mktemp('sample'), train=48, val=24, size=(160, 128), seed=3)


def read(root: Path, kind: str, split: str) -> dict:
    return json.loads((root / 'annotations' / f'{kind}_{split}2017.json').read_text())


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file()}


def test_same_seed_same_files_and_other_seed_other_pictures(tmp_path: Path) -> None:
    for name, seed in (('a', 7), ('b', 7), ('c', 8)):
        sample.write_sample(tmp_path / name, train=6, val=4, size=(96, 96), seed=seed)
    first, again, other = (files(tmp_path / name) for name in 'abc')
    assert first == again
    assert set(first) == set(other)
    assert all(first[f] != other[f] for f in first if f.endswith('.jpg'))


def test_training_and_validation_pictures_differ(root: Path) -> None:
    assert (root / 'train2017/000000000001.jpg').read_bytes() != (root / 'val2017/000000000001.jpg').read_bytes()


def test_a_picture_does_not_depend_on_how_many_are_drawn(tmp_path: Path, root: Path) -> None:
    fewer = sample.write_sample(tmp_path, train=5, val=0, size=(160, 128), seed=3)
    for name in ('000000000001.jpg', '000000000005.jpg'):
        assert (fewer / 'train2017' / name).read_bytes() == (root / 'train2017' / name).read_bytes()


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('kind', ['instances', 'person_keypoints'])
def test_pycocotools_reads_it_and_every_picture_has_the_size_written(root: Path, kind: str, split: str) -> None:
    coco = COCO(str(root / 'annotations' / f'{kind}_{split}2017.json'))
    assert len(coco.imgs) == {'train': 48, 'val': 24}[split]
    for record in coco.imgs.values():
        image = cv2.imread(str(root / f'{split}2017' / record['file_name']))
        assert image.shape == (record['height'], record['width'], 3) == (128, 160, 3)
    assert len(coco.anns) == len(coco.dataset['annotations'])


@pytest.mark.parametrize('split', ['train', 'val'])
def test_it_has_empty_pictures_a_crowd_and_every_category(root: Path, split: str) -> None:
    content = read(root, 'instances', split)
    used = {a['image_id'] for a in content['annotations']}
    assert len(used) < len(content['images'])
    assert {a['category_id'] for a in content['annotations']} == {1, 2, 3, 4}
    crowds = [a for a in content['annotations'] if a['iscrowd']]
    assert crowds
    assert all(isinstance(a['segmentation']['counts'], list) and a['category_id'] == 1 for a in crowds)
    assert all(isinstance(a['segmentation'], list) for a in content['annotations'] if not a['iscrowd'])


@pytest.mark.parametrize('split', ['train', 'val'])
def test_box_and_area_are_those_of_the_mask(root: Path, split: str) -> None:
    coco = COCO(str(root / 'annotations' / f'instances_{split}2017.json'))
    for record in coco.anns.values():
        mask = coco.annToMask(record)
        ys, xs = np.nonzero(mask)
        x, y, w, h = record['bbox']
        assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert record['area'] == mask.sum() > 0


def test_masks_do_not_overlap_much(root: Path) -> None:
    """Masks are of what is visible; polygons fill holes, so a little overlap remains."""
    coco = COCO(str(root / 'annotations' / 'instances_train2017.json'))
    both = total = 0
    for image_id in coco.imgs:
        masks = [coco.annToMask(a) for a in coco.imgToAnns[image_id]]
        if masks:
            depth = np.sum(masks, axis=0)
            both, total = both + int((depth > 1).sum()), total + int((depth > 0).sum())
    assert both < 0.04 * total


def test_polygons_rasterise_to_the_mask_they_outline() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        pose = figures.random_pose(rng)
        joints = figures.person_joints((80, 70), 100, pose)
        mask = np.zeros((140, 160), np.uint8)
        figures.paint(mask, figures.person_shapes(joints, 100, pose, figures.random_look(rng)), smooth=False)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        filled = cv2.drawContours(np.zeros_like(mask), contours, -1, 1, -1)
        raster = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(sample._polygons(mask > 0), 140, 160)))
        assert (filled & raster).sum() / (filled | raster).sum() > 0.97


def test_uncompressed_run_lengths_decode_to_the_mask() -> None:
    rng = np.random.default_rng(0)
    for mask in (rng.random((7, 9)) > 0.5, np.ones((4, 3), bool), np.zeros((4, 3), bool), np.eye(5, dtype=bool)):
        code = mask_utils.frPyObjects(sample._uncompressed_rle(mask), *mask.shape)
        np.testing.assert_array_equal(mask_utils.decode(code).astype(bool), mask)


def test_keypoints_lie_where_their_visibility_says(root: Path) -> None:
    coco = COCO(str(root / 'annotations' / 'person_keypoints_train2017.json'))
    seen = {0: 0, 1: 0, 2: 0}
    for record in coco.anns.values():
        points = np.array(record['keypoints']).reshape(17, 3)
        assert record['num_keypoints'] == (points[:, 2] > 0).sum()
        if record['iscrowd']:
            assert not points.any()
            continue
        near = cv2.dilate(coco.annToMask(record), np.ones((5, 5), np.uint8))
        for x, y, v in points:
            seen[v] += 1
            if v == 0:
                assert x == y == 0
            else:
                assert 0 <= x < 160 and 0 <= y < 128
            if v == 2:
                assert near[y, x]
    # most are visible, but occluded and cut-off ones occur
    assert seen[2] > 0.6 * sum(seen.values())
    assert seen[1] > 20
    assert seen[0] > 10


def test_persons_face_the_viewer_so_their_left_is_at_the_right() -> None:
    rng = np.random.default_rng(0)
    left = [i for i, name in enumerate(figures.KEYPOINT_NAMES) if name in ('left_shoulder', 'left_hip', 'left_ear')]
    for _ in range(20):
        joints = figures.person_joints((100, 100), 120, figures.random_pose(rng))
        assert all(joints[i, 0] > joints[i + 1, 0] for i in left)


def test_keypoint_files_name_what_coco_names(root: Path, tiny_coco: Path) -> None:
    ours = read(root, 'person_keypoints', 'val')['categories']
    assert ours == json.loads((tiny_coco / 'annotations/person_keypoints_val2017.json').read_text())['categories']


def test_ensure_sample_draws_once(tmp_path: Path) -> None:
    root = sample.ensure_sample(tmp_path / 'set', train=4, val=2, size=(64, 64))
    before = files(root)
    (root / 'train2017/000000000001.jpg').write_bytes(b'kept')
    sample.ensure_sample(root, train=4, val=2, size=(64, 64))
    assert (root / 'train2017/000000000001.jpg').read_bytes() == b'kept'
    sample.ensure_sample(root, train=4, val=2, size=(64, 64), seed=1)
    sample.ensure_sample(root, train=4, val=2, size=(64, 64), seed=0)
    assert files(root) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['set']


def test_ensure_sample_in_several_threads_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(sample.ensure_sample, tmp_path / 'set', train=4, val=2, size=(64, 64)) for _ in range(4)]
        assert {job.result() for job in jobs} == {tmp_path / 'set'}
    assert [p.name for p in tmp_path.iterdir()] == ['set']
    assert len(list((tmp_path / 'set/train2017').iterdir())) == 4


def test_ensure_sample_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / 'mine.txt').write_text('mine')
    with pytest.raises(ValueError, match='is not a sample set'):
        sample.ensure_sample(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError('disk full')

    monkeypatch.setattr(sample, '_write_split', broken)
    with pytest.raises(OSError, match='disk full'):
        sample.ensure_sample(tmp_path / 'set')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'wrong', [{'size': (32, 200)}, {'train': -1}], ids=['smaller than a figure', 'negative number of pictures']
)
def test_nonsense_is_refused_before_anything_is_written(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ValueError, match='expected'):
        sample.write_sample(tmp_path / 'set', **wrong)
    assert not (tmp_path / 'set').exists()


def test_frames_move_smoothly_and_repeat_with_the_seed() -> None:
    frames = list(sample.draw_frames(12, (160, 120), seed=1))
    assert all(f.shape == (120, 160, 3) and f.dtype == np.uint8 for f in frames)
    np.testing.assert_array_equal(frames[5], list(sample.draw_frames(6, (160, 120), seed=1))[5])
    for before, after in itertools.pairwise(frames):
        changed = (before != after).any(2).mean()
        assert 0.005 < changed < 0.35
