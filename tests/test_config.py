"""Configuration: inheritance, overrides, and every problem found at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import yaml

from detection.training.config import RunConfig, config_from_dict, load_config
from norton_timm.utils.config import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[1] / 'configs' / 'detection').glob('*.yaml'))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_shipped_files_load(path: Path) -> None:
    config = load_config(path)
    assert config.task == next((t for t in ('mask', 'keypoint') if t in path.stem), 'box')
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
@pytest.mark.parametrize('tag', ['norton.r043', 'norton.r078', *(f'coring.r{n}' for n in ('045', '049', '063', '077'))])
def test_every_published_backbone_has_torchvisions_schedule(task: str, tag: str) -> None:
    method, number = tag.split('.')
    suffix = {'norton': '_' + number, 'coring': '_coring_' + number}[method] if tag != 'norton.r078' else ''
    config = load_config(CONFIGS[0].parent / f'{task}{suffix}.yaml')
    assert config.model.backbone == f'{method}_resnet50.{number}'
    assert timm.get_pretrained_cfg(config.model.backbone) is not None
    optim = config.optim
    assert (config.task, optim.name, optim.schedule) == (task, 'sgd', 'multistep')
    assert (optim.lr, optim.lr_batch, optim.momentum, optim.weight_decay) == (0.02, 16, 0.9, 1e-4)
    assert (optim.epochs, optim.steps) == ((46, (36, 43)) if task == 'keypoint' else (26, (16, 22)))


@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
def test_strong_recipes(task: str) -> None:
    config = load_config(CONFIGS[0].parent / f'{task}_strong.yaml')
    assert (config.optim.name, config.optim.schedule, config.optim.ema) == ('adamw', 'cosine', 0.9998)
    assert (config.data.jitter, config.data.crop) == ((0.1, 2.0), (1024, 1024))
    assert bool(config.data.copy_paste) == (task == 'mask')


def test_children_change_only_what_they_name(tmp_path: Path) -> None:
    write(tmp_path / 'base.yaml', 'task: mask\noptim: {lr: 0.5, epochs: 3}\n')
    (tmp_path / 'sub').mkdir()
    child = write(tmp_path / 'sub' / 'child.yaml', 'base: ../base.yaml\noptim: {epochs: 7}\n')
    config = load_config(child)
    assert (config.task, config.optim.lr, config.optim.epochs) == ('mask', 0.5, 7)
    assert config.model == RunConfig().model


def test_overrides_and_values() -> None:
    config = load_config(
        None,
        ['optim.lr=1e-3', 'model.min_size=[96, 128]', 'optim.clip=null', 'model.rcnn.box_nms_thresh=0.4', 'seed=7'],
        {'task': 'keypoint', 'seed': 3, 'device': None},
    )
    assert config.optim.lr == 1e-3
    assert config.model.min_size == (96, 128)
    assert config.optim.clip is None
    assert config.model.rcnn == {'box_nms_thresh': 0.4}
    assert (config.task, config.seed, config.device) == ('keypoint', 7, 'auto')


def test_one_number_stands_for_a_list_of_one() -> None:
    assert config_from_dict({'model': {'min_size': 160}}).model.min_size == (160,)


def test_saved_file_gives_the_same_configuration(tmp_path: Path) -> None:
    config = load_config(CONFIGS[-1], ['optim.ema=0.99'])
    assert load_config(write(tmp_path / 'config.yaml', config.to_yaml())) == config
    assert yaml.safe_load(config.to_yaml())['optim']['ema'] == 0.99


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    path = write(
        tmp_path / 'bad.yaml',
        'task: boxes\n'
        'optim: {lr: fast, epoch: 3, amp: fp8}\n'
        'data: {batch_size: 0, root: /no/such/folder}\n'
        'modle: {backbone: resnet50}\n'
        'model: {backbone: resnet5O, anchor_sizes: [1, 2], weights: /no/weights.pt}\n',
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ['no-equals-sign'])
    message = str(caught.value)
    for part in (
        "task is 'boxes', expected one of box, mask, keypoint",
        "optim.lr is 'fast', expected a number",
        'unknown key optim.epoch: did you mean optim.epochs?',
        "optim.amp is 'fp8', expected one of none, bf16, fp16",
        'data.batch_size is 0, expected more than 0',
        'data.root: no folder /no/such/folder',
        'unknown key modle: did you mean model?',
        "model.backbone 'resnet5O' is unknown: did you mean resnet50?",
        'model.anchor_sizes is [1, 2], expected five sizes',
        'model.weights: no file /no/weights.pt',
        "override 'no-equals-sign' is not of the form key=value",
    ):
        assert part in message
    assert len(caught.value.problems) == 11
    assert '\n' not in message


@pytest.mark.parametrize(
    ('tree', 'problem'),
    [
        ({'seed': 1.5}, 'seed is 1.5, expected a whole number'),
        ({'seed': True}, 'seed is True, expected a whole number'),
        ({'channels_last': 'yes please'}, "channels_last is 'yes please', expected true or false"),
        ({'optim': 3}, 'optim is 3, expected keys: name, lr'),
        ({'optim': {'ema': 1.0}}, 'optim.ema is 1.0, expected a decay between 0 and 1'),
        ({'optim': {'lr': float('nan')}}, 'optim.lr is nan, expected a finite number'),
        ({'data': {'flip': 1.2}}, 'data.flip is 1.2, expected 0 to 1'),
        ({'data': {'jitter': [2.0, 1.0]}}, 'data.jitter is [2.0, 1.0], expected two factors'),
        ({'model': {'keypoint_layers': []}}, 'model.keypoint_layers is [], expected one width or more'),
        ({'model': {'mask_layers': ['a']}}, "model.mask_layers is ['a'], expected a list of int"),
        (
            {'model': {'rcnn': {'box_nms_treshold': 1}}},
            'unknown key model.rcnn.box_nms_treshold: did you mean box_nms_thresh?',
        ),
        ({'model': {'norm': 'frozen'}}, "model.norm 'frozen' needs model.pretrained or model.weights"),
        ({'data': {'copy_paste': 0.5}}, 'data.copy_paste is 0.5, expected 0 for task box: it needs masks'),
        ({'data': {'repeat_threshold': 0}}, 'data.repeat_threshold is 0.0, expected a fraction above 0, up to 1'),
        (
            {'data': {'flip_pairs': ['left_eye']}},
            "data.flip_pairs is ['left_eye'], expected names of two keypoints each",
        ),
        ({'data': {'limit': 0}}, 'data.limit is 0, expected more than 0'),
        ({'data': {'images': 0}}, 'data.limit is 0, expected more than 0'),
        ({'data': {'images': 8, 'limit': 4}}, 'data.images is 8, expected text'),
        ({'keep_checkpoints': 0}, 'keep_checkpoints is 0, expected more than 0'),
        ({'model': {'frozen_stages': 5}}, 'model.frozen_stages is 5, expected 0 to 4'),
    ],
)
def test_one_problem_one_message(tree: dict, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(tree)
    assert len(caught.value.problems) == 1
    assert problem in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'no configuration file .*missing\.yaml'):
        load_config(tmp_path / 'missing.yaml')
    with pytest.raises(FileNotFoundError, match=r'gone\.yaml'):
        load_config(write(tmp_path / 'orphan.yaml', 'base: gone.yaml\n'))
    with pytest.raises(ConfigError, match=r'loop\.yaml is its own base'):
        load_config(write(tmp_path / 'loop.yaml', 'base: loop.yaml\n'))
    with pytest.raises(ConfigError, match='is not valid YAML'):
        load_config(write(tmp_path / 'broken.yaml', 'task: [box\n'))
    with pytest.raises(ConfigError, match='holds a list'):
        load_config(write(tmp_path / 'list.yaml', '- box\n'))
