"""Configuration of a classification run: the shipped files, overrides, and every problem found at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from norton_timm.training.config import TrainConfig, load_train_config
from norton_timm.utils.config import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'classification'


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.yaml')), ids=lambda p: p.stem)
def test_shipped_files_load(path: Path, tmp_path: Path) -> None:
    assert path.read_text().startswith('# ')
    config = load_train_config(path)
    again = tmp_path / 'again.yaml'
    again.write_text(config.to_yaml())
    assert load_train_config(again) == config != TrainConfig()


def test_the_papers_settings() -> None:
    for name, values in (
        ('cifar10', (0.05, 0.9, 5e-4, 0.0, 256, 400)),
        ('imagenet', (0.01, 0.99, 1e-4, 0.1, 256, 200)),
    ):
        o = load_train_config(CONFIGS / f'{name}.yaml').optim
        assert (o.lr, o.momentum, o.weight_decay, o.smoothing, o.batch_size, o.epochs) == values
        assert (o.name, o.schedule) == ('sgd', 'cosine')
    assert load_train_config(CONFIGS / 'coring_cifar10.yaml').shot_epochs > 0
    modern = load_train_config(CONFIGS / 'modern.yaml')
    assert modern.optim.ema and modern.data.mixup and modern.data.augmentation['auto_augment'].startswith('rand-')
    dense = load_train_config(CONFIGS / 'dense_cifar10.yaml')
    assert dense.model == 'resnet56_cifar' and dense.distill.weight == 0 and dense.weights is None


def test_files_values_and_overrides_in_that_order(tmp_path: Path) -> None:
    (tmp_path / 'base.yaml').write_text('optim: {lr: 0.1, epochs: 3}\nseed: 4\n')
    (tmp_path / 'run.yaml').write_text('base: base.yaml\noptim: {epochs: 5, weight_decay: 1e-5}\n')
    config = load_train_config(
        tmp_path / 'run.yaml', ['optim.epochs=7'], {'optim.epochs': 6, 'seed': 8, 'device': None}
    )
    assert (config.optim.lr, config.optim.epochs, config.optim.weight_decay, config.seed) == (0.1, 7, 1e-5, 8)
    assert config.device == 'auto'
    assert load_train_config(None, ['optim.epochs=0']).optim.epochs == 0
    assert yaml.safe_load(config.to_yaml())['optim']['epochs'] == 7


@pytest.mark.parametrize(('override', 'told'), [
    ('optim.amp=half', 'expected one of none, bf16, fp16'),
    ('optim.name=sdg', "'sdg' is unknown: did you mean sgd"),
    ('optim.schedule=step', 'expected one of cosine'),
    ('optim.lr=0', 'expected more than 0'),
    ('optim.lr=.nan', 'expected a finite number'),
    ('optim.epochs=-1', 'expected 0 or more'),
    ('optim.accumulate=0', 'expected more than 0'),
    ('optim.clip=-1', 'expected more than 0'),
    ('optim.momentum=1', 'expected 0 to below 1'),
    ('optim.momentum=0', 'optim.momentum is 0'),
    ('optim.ema=1.5', 'expected 0 to below 1'),
    ('distill.weight=1.5', 'expected 0 to 1'),
    ('start=nowhere.safetensors', 'start: no file nowhere.safetensors'),
    ('distill.teacher=nowhere.safetensors', 'distill.teacher: no file nowhere.safetensors'),
    ('start_share=0.5', 'above 0 only with a start'),
    ('distill.temperature=0', 'expected more than 0'),
    ('data.mean=[0.5, 0.5, 0.5]', 'expected both or neither'),
    ('data.mixup=-1', 'expected 0 or more'),
    ('model=resnet51', 'did you mean resnet51q'),
    ('weights=nowhere.safetensors', 'no file nowhere.safetensors'),
    ('optim.rate=1', 'unknown key optim.rate'),
    ('seed=x', "seed is 'x', expected a whole number"),
])  # fmt: skip
def test_one_problem(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_train_config(None, [override])
    assert len(error.value.problems) == 1 and told in str(error.value)


def test_all_problems_at_once() -> None:
    overrides = ['optim.amp=half', 'seed=-1', 'data.std=[1, 0, 1]', 'data.mean=[1, 1, 1]', 'nothing=1']
    with pytest.raises(ConfigError) as error:
        load_train_config(None, overrides)
    assert len(error.value.problems) == 4 and '\n' not in str(error.value)
    with pytest.raises(ConfigError, match='mixup pairs images'):
        load_train_config(None, ['data.mixup=0.2', 'optim.batch_size=7'])
    with pytest.raises(ConfigError, match='weights and pretrained'):
        load_train_config(None, [f'weights={__file__}', 'pretrained=true'])
