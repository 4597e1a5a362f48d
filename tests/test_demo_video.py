"""tools/demo_video.py as a user runs it: videos in, annotated videos and figures out, one-line errors, Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from fake_clock import wait_until
from tool_runner import finish, start_tool

from detection.data.sample import draw_frames
from detection.demo import demo
from detection.demo.output import Output
from detection.demo.video import Frame, FrameSource, open_source
from detection.demo.video_writer import VideoWriter
from detection.training.checkpoint import detector_from_config, save_checkpoint
from detection.training.config import config_from_dict
from detection.visual.draw import color_of

TOOL = 'demo_video.py'
RANDOM = ['--random-weights', '--backbone', 'resnet18', '--imgsz', '64', '--device', 'cpu']


@pytest.fixture(scope='module')
def clip(tmp_path_factory) -> Path:
    """Twelve drawn frames at 29.97 FPS."""
    path = tmp_path_factory.mktemp('clip') / 'clip.mp4'
    with VideoWriter(path, Fraction(30000, 1001), (160, 120)) as writer:
        for image in draw_frames(12, (160, 120), seed=1):
            writer.write(image)
    return path


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """What train_det.py writes, of a tiny keypoint detector that is sure of everything."""
    config = config_from_dict(
        {
            'task': 'keypoint',
            'model': {
                'backbone': 'resnet18',
                'fpn_channels': 16,
                'box_head': 32,
                'keypoint_layers': [16],
                'min_size': 64,
                'rcnn': {'box_detections_per_img': 3},
            },
        }
    )
    meta = {
        'task': 'keypoint',
        'num_classes': 2,
        'class_names': ['__background__', 'person'],
        'label_to_category': {1: 1},
        'num_keypoints': 17,
        'keypoint_names': [],
        'skeleton': [[5, 6]],
    }
    model = detector_from_config(config, meta)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[1] += 5
    path = tmp_path_factory.mktemp('run') / 'checkpoint.pt'
    return save_checkpoint(path, {'model': model.state_dict(), 'config': config.to_dict(), 'meta': meta})


@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
def test_output_has_the_frames_and_the_rate_of_the_input(tool, clip, tmp_path, task):
    target = tmp_path / 'out.mp4'
    code, out, err = tool(
        TOOL, *RANDOM, '--task', task, '--input', clip, '--output', target, '--frames', 6, '--warmup', 1
    )
    assert code == 0, err
    with open_source(str(target)) as video:
        assert video.fps == Fraction(30000, 1001)
        frames = [f.image for f in video]
    assert len(frames) == 6 and frames[0].shape == (120, 160, 3)
    assert np.abs(frames[0][-3, 3].astype(int) - (200, 20, 20)).max() < 60  # the warning that weights are random
    figures = json.loads((tmp_path / 'out.json').read_text())
    assert figures['frames'] == 6 and figures['source_fps'] == pytest.approx(29.97, abs=1e-3)
    assert figures['models']['resnet18']['task'] == task and figures['models']['resnet18']['random_weights']
    assert cv2.imread(str(tmp_path / 'out.png')) is not None
    assert 'p95 ms' in out and 'FPS end to end' in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out.json', 'out.mp4', 'out.png']


def test_a_checkpoint_draws_its_classes_and_warns_of_nothing(tool, clip, tmp_path, checkpoint):
    target = tmp_path / 'out.mp4'
    code, _, err = tool(TOOL, '--weights', checkpoint, '--input', clip, '--output', target, '--device', 'cpu')
    assert code == 0, err
    with open_source(str(target)) as video:
        frames = [f.image for f in video]
    assert len(frames) == 12
    assert np.abs(frames[5][-2:].astype(int) - (200, 20, 20)).max() > 100
    with open_source(str(clip)) as video:
        original = [f.image for f in video]
    changed = np.abs(frames[5].astype(int) - original[5]).max(-1) > 60
    purple = np.abs(frames[5].astype(int) - color_of(1)).max(-1) < 60
    assert (changed & purple).any()
    assert not json.loads((tmp_path / 'out.json').read_text())['models']['resnet18']['random_weights']


def test_compare_writes_both_in_one_picture(tool, clip, tmp_path):
    target = tmp_path / 'out.mp4'
    arguments = [*RANDOM, '--compare', '--input', clip, '--output', target, '--frames', 5, '--warmup', 1]
    code, out, err = tool(TOOL, *arguments)
    assert code == 0, err
    with open_source(str(target)) as video:
        assert next(iter(video)).image.shape == (120, 322, 3)
    figures = json.loads((tmp_path / 'out.json').read_text())
    assert list(figures['models']) == ['resnet50', 'resnet18'] and figures['speed_up'] > 0
    assert 'resnet18 is' in out


def test_headless_on_the_built_in_clip_writes_only_what_was_asked(tool, tmp_path):
    figures = tmp_path / 'figures.json'
    code, _, err = tool(TOOL, *RANDOM, '--headless', '--frames', 5, '--json', figures)
    assert code == 0, err
    assert json.loads(figures.read_text())['source'] == 'drawn clip'


def test_two_runs_of_one_network_are_told_apart(checkpoint, tmp_path):
    args = argparse.Namespace(random_weights=False, compare=True, task=None, backbone='resnet18', weights=[])
    for name in ('dense', 'norton'):
        (tmp_path / name).mkdir()
        os.link(checkpoint, tmp_path / name / 'checkpoint.pt')
        args.weights.append(str(tmp_path / name / 'checkpoint.pt'))
    models = demo.choose_models(args)
    assert [facts.name for _, facts in models] == ['dense/resnet18', 'norton/resnet18']
    assert models[0][1].skeleton == [[5, 6]]


BAD = {
    'no weights': (['--headless'], 'no weights: give --weights CHECKPOINT'),
    'both': (['--weights', 'x', *RANDOM], 'exclude each other'),
    'one to compare': (['--weights', 'x', '--compare', '--headless'], 'two with --compare'),
    'missing weights': (['--weights', 'x', '--headless'], 'no weights x: expected a checkpoint'),
    'missing input': ([*RANDOM, '--headless', '--input', 'nope.mp4'], 'no input nope.mp4'),
    'empty input': ([*RANDOM, '--headless', '--input', ''], 'no input: got an empty name, expected a video'),
    'blank input': ([*RANDOM, '--output', 'x.mp4', '--input', ' '], 'no input: got an empty name'),
    'missing folder': ([*RANDOM, '--output', 'annotated', '--input', 'photos/'], 'no input photos/: expected a video'),
    'pattern': ([*RANDOM, '--output', 'annotated', '--input', 'photos/*.jpg'], 'no input photos/*.jpg'),
    'suffix': ([*RANDOM, '--output', 'x.avi'], "ends in '.avi', expected .mp4"),
    'folder': ([*RANDOM, '--output', 'none/x.mp4'], 'output folder none does not exist'),
    'warmup': ([*RANDOM, '--headless', '--warmup', '-1'], '--warmup -1, expected 0 or more'),
    'serve and output': ([*RANDOM, '--serve', '8000', '--output', 'x.mp4'], '--serve excludes'),
    'port': ([*RANDOM, '--serve', '0'], '--serve 0, expected a port'),
    'task': ([*RANDOM, '--task', 'pose'], "invalid choice: 'pose'"),
    'device': ([*RANDOM, '--headless', '--device', 'gpu'], "device 'gpu' cannot be used"),
    'backbone': (['--random-weights', '--headless', '--backbone', 'resnet49'], 'resnet49'),
    'score': ([*RANDOM, '--headless', '--score', '7'], 'score 7.0, expected'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_arguments_end_with_one_line_and_code_2(tool, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    code, _, err = tool(TOOL, *arguments)
    assert code == 2
    assert message in err and 'Traceback' not in err
    assert len([line for line in err.splitlines() if line.startswith('error:')]) == 1
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_what_they_seem(tool, tmp_path, clip):
    (tmp_path / 'noise.mp4').write_bytes(b'noise' * 1000)
    (tmp_path / 'noise.pt').write_bytes(b'noise' * 1000)
    for arguments in (
        [*RANDOM, '--headless', '--input', tmp_path / 'noise.mp4'],
        ['--weights', tmp_path / 'noise.pt', '--headless', '--input', clip],
    ):
        code, _, err = tool(TOOL, *arguments)
        assert code == 2 and 'is not a' in err and 'Traceback' not in err


def test_nothing_that_is_read_is_overwritten(tool, tmp_path, clip):
    video = tmp_path / 'clip.mp4'
    video.write_bytes(clip.read_bytes())
    (tmp_path / 'photos').mkdir()
    photo = tmp_path / 'photos' / 'a.png'
    cv2.imwrite(str(photo), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / 'link.mp4').symlink_to(video)
    before = {path: path.read_bytes() for path in (video, photo)}
    for arguments in (
        ['--input', video, '--output', video],
        ['--input', video, '--output', tmp_path / 'link.mp4'],
        ['--input', f'file://{video}', '--headless', '--json', video],
        ['--input', photo, '--output', photo.with_suffix('.mp4')],  # its histogram would be a.png
        ['--input', photo.parent, '--headless', '--json', photo.with_suffix('.json')],
        ['--input', photo.parent, '--output', photo.parent],
        ['--input', photo, '--output', photo],
    ):
        for overwrite in ([], ['--overwrite']):
            code, _, err = tool(TOOL, *RANDOM, *arguments, *overwrite)
            assert code == 2 and 'is read and would be overwritten' in err and 'Traceback' not in err
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize('there', ['out.mp4', 'out.json', 'out.png', 'other.json', 'other.png', 'out'])
def test_files_of_others_stay_unless_overwrite_is_given(tool, tmp_path, clip, there):
    path = tmp_path / there
    if there == 'out':
        (tmp_path / 'photos').mkdir()
        for name in ('a.jpg', 'b.png'):
            cv2.imwrite(str(tmp_path / 'photos' / name), np.zeros((40, 60, 3), np.uint8))
        arguments = ['--input', tmp_path / 'photos', '--output', path]
        path.mkdir()
        path = path / 'b.png'
    else:
        arguments = ['--input', clip, '--output', tmp_path / 'out.mp4', '--frames', 2]
    if 'other' in there:
        arguments += ['--json', tmp_path / 'other.json']
    path.write_bytes(b'mine')
    files = sorted(tmp_path.rglob('*'))
    code, _, err = tool(TOOL, *RANDOM, '--warmup', 0, *arguments)
    assert (
        code == 2
        and err.splitlines()[-1] == f'error: {path} exists: choose another name, or give --overwrite to replace it'
    )
    assert path.read_bytes() == b'mine' and sorted(tmp_path.rglob('*')) == files
    code, _, err = tool(TOOL, *RANDOM, '--warmup', 0, *arguments, '--overwrite')
    assert code == 0 and path.read_bytes() != b'mine', err


def test_a_file_is_not_written_twice_or_over_what_is_no_file(tool, tmp_path, clip):
    (tmp_path / 'folder.json').mkdir()
    for arguments, told in (
        (['--json', tmp_path / 'x.png'], 'x.png would be written twice'),
        (['--output', tmp_path / 'x.mp4', '--json', tmp_path / 'x.mp4'], 'x.mp4 would be written twice'),
        (['--json', tmp_path / 'folder.json'], 'is no plain file'),
        (['--json', '/dev/null', '--overwrite'], '/dev/null is no plain file'),
    ):
        code, _, err = tool(TOOL, *RANDOM, '--input', clip, '--headless', *arguments)
        assert code == 2 and told in err and 'Traceback' not in err
    assert [p.name for p in tmp_path.iterdir()] == ['folder.json']


# pictures


@pytest.mark.parametrize('made', [False, True])
def test_each_picture_of_a_folder_is_annotated_at_its_own_size(tool, tmp_path, checkpoint, made):
    photos, target = tmp_path / '2024', tmp_path / 'out'
    photos.mkdir()
    if made:
        target.mkdir()
    sizes = {'a.jpg': (120, 160), 'b.png': (90, 60), 'c d.bmp': (48, 200), 'e.JPEG': (64, 64), 'f.webp': (100, 80)}
    for k, (name, size) in enumerate(sizes.items()):
        image = next(iter(draw_frames(1, size[::-1], seed=k)))
        cv2.imencode(Path(name).suffix.lower(), image)[1].tofile(photos / name)
    (photos / 'notes.txt').write_text('no picture')
    code, out, err = tool(TOOL, '--weights', checkpoint, '--device', 'cpu', '--input', '2024', '--output', 'out')
    assert code == 0, err
    assert 'wrote out: 5 pictures' in out and 'of 160 x 120 and other sizes' in out
    assert sorted(p.name for p in target.iterdir()) == sorted(sizes)
    for name, size in sizes.items():
        before, after = (cv2.imread(str(folder / name)).astype(int) for folder in (photos, target))
        assert after.shape[:2] == size
        assert (np.abs(after - before).max(-1) > 60).any(), 'something is drawn'
    assert json.loads((tmp_path / 'out.json').read_text())['frames'] == 5


def test_a_picture_is_annotated_into_a_file_a_folder_or_a_video(tool, tmp_path):
    cv2.imwrite(str(tmp_path / 'a.jpg'), np.full((50, 70, 3), 90, np.uint8))
    for output, written in (('b.png', 'b.png'), ('there', 'there/a.jpg'), ('b.mp4', 'b.mp4')):
        code, _, err = tool(TOOL, *RANDOM, '--warmup', 0, '--input', 'a.jpg', '--output', output, '--overwrite')
        assert code == 0 and (tmp_path / written).is_file(), err
    assert cv2.imread(str(tmp_path / 'b_figures.png')) is not None
    for output, told in (
        ('x.avi', 'expected a folder for the pictures, .mp4, or a picture'),
        ('x/y', 'does not exist'),
    ):
        code, _, err = tool(TOOL, *RANDOM, '--input', 'a.jpg', '--output', output)
        assert code == 2 and told in err


def test_nothing_is_detected_on_padding(tool, tmp_path, monkeypatch):
    """Also where pictures of several sizes become one video."""
    from detection.demo.predictor import Predictor

    seen, prepare = [], Predictor.prepare
    monkeypatch.setattr(Predictor, 'prepare', lambda self, image: (seen.append(image.shape), prepare(self, image))[1])
    (tmp_path / 'photos').mkdir()
    for name, size in (('a.png', (40, 60)), ('b.png', (60, 40))):
        cv2.imwrite(str(tmp_path / 'photos' / name), np.full((*size, 3), 90, np.uint8))
    code, _, err = tool(TOOL, *RANDOM, '--warmup', 0, '--input', 'photos', '--output', 'out.mp4')
    assert code == 0, err
    assert seen == [(40, 60, 3), (60, 40, 3)]
    with open_source('out.mp4') as video:
        assert [f.image.shape for f in video] == [(40, 60, 3)] * 2


def test_live_frames_keep_their_times(tmp_path):
    class Still(FrameSource):
        name, fps, live = 'camera', Fraction(20), True

        def __iter__(self):
            return iter(())

    arrivals = [7.0, 7.12, 7.13, 7.51, 9.0]
    with Output(Still(), tmp_path / 'out.mp4') as output:
        for index, at in enumerate(arrivals):
            output(np.zeros((48, 64, 3), np.uint8), Frame(np.zeros((48, 64, 3), np.uint8), index, 0.0, Fraction(at)))
    with open_source(str(tmp_path / 'out.mp4')) as video:
        assert [float(f.at) for f in video] == pytest.approx([at - 7 for at in arrivals], abs=1e-4)


def test_without_a_display_the_error_says_what_to_do(tool, monkeypatch):
    monkeypatch.delenv('DISPLAY', raising=False)
    monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    if demo.window_problem() is None:
        pytest.skip('this system always has a display')
    code, _, err = tool(TOOL, *RANDOM)
    assert code == 2 and 'use --output FILE.mp4' in err


@pytest.mark.parametrize(
    ('sent', 'code', 'told'),
    [(signal.SIGINT, 130, 'interrupted after'), (signal.SIGTERM, 143, 'terminated after')],
)
def test_ctrl_c_and_kill_leave_a_playable_shorter_file(tmp_path, sent, code, told):
    target, log = tmp_path / 'out.mp4', tmp_path / 'log'
    with log.open('w') as err:
        process = start_tool(TOOL, *RANDOM, '--frames', 5000, '--output', target, stderr=err)
    # the bar counts frames that were written
    wait_until(lambda: re.search(r' [1-9]\d*/5000', log.read_text()) or process.poll() is not None, log.read_text)
    process.send_signal(sent)
    done = finish(process)
    assert done.code == code, log.read_text()
    assert 'Traceback' not in log.read_text() and told in log.read_text()
    with open_source(str(target)) as video:
        frames = sum(1 for _ in video)
    assert frames == json.loads(target.with_suffix('.json').read_text())['frames'] > 0
    assert f'{frames} frames' in done.out
    assert not list(tmp_path.glob('.*'))
