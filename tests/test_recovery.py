"""A whole run: compress, repair, train, keep; it goes on from wherever it was stopped, and refuses another's folder."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from image_sets import write_archive
from safetensors.torch import load_file, save_file

import norton_timm
from norton_timm.checkpoints.file import load, read_metadata
from norton_timm.compression.repair import reestimate_batch_norm
from norton_timm.models.dense import set_normalisation
from norton_timm.training.config import load_train_config
from norton_timm.training.loop import Trainer, evaluate
from norton_timm.training.run import Recovery, evaluate_file

CPU = torch.device('cpu')
NORTON = "method: norton\nrank: {'*': 2}\nrates: 0.2\n"
CORING = 'method: coring\nrank: 0\nrates: 0.4\nshots: 3\n'


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    """Images of four colours, and a dense network that knows them a little."""
    archive = write_archive(tmp_path / 'images.tar', train=64, test=24)
    torch.manual_seed(0)
    save_file(timm.create_model('resnet20_cifar', num_classes=4).state_dict(), tmp_path / 'dense.safetensors')
    (tmp_path / 'norton.yaml').write_text(NORTON)
    (tmp_path / 'coring.yaml').write_text(CORING)
    return {'data.source': str(archive), 'weights': str(tmp_path / 'dense.safetensors'), 'model': 'resnet20_cifar'}


def config(inputs: dict[str, str], recipe: str | None = 'norton', *overrides: str):
    folder = Path(inputs['weights']).parent
    values = {**inputs, 'recipe': recipe and str(folder / f'{recipe}.yaml')}
    plain = ['optim.epochs=2', 'optim.batch_size=16', 'optim.lr=0.02', 'data.calibration=16', *overrides]
    return load_train_config(None, plain, values)


def run(given, folder: Path) -> dict:
    return Recovery(given, folder, CPU, progress=False).run()


@pytest.mark.parametrize('amp', ['none', 'bf16'])
def test_a_whole_run(inputs: dict[str, str], tmp_path: Path, amp: str) -> None:
    settings = ('data.mean=[0.5,0.5,0.5]', 'data.std=[0.2,0.2,0.2]', 'optim.ema=0.5', f'optim.amp={amp}')
    given = config(inputs, 'norton', *settings)
    results = run(given, tmp_path / 'run')
    assert json.loads((tmp_path / 'run' / 'results.json').read_text()) == results
    dense, model = timm.create_model('resnet20_cifar', num_classes=4), load(tmp_path / 'run' / 'model.safetensors')
    image = torch.zeros(1, 3, 32, 32)
    for name, key in ((dense, 'macs_dense'), (model, 'macs')):
        assert norton_timm.count(name, image).macs == results[key]
    assert results['params'] < results['params_dense'] and 0 < results['nmse'] < 1
    assert all(0 <= results[k] <= 100 for k in ('top1_dense', 'top1_compressed', 'top1_repaired', 'top1'))
    assert model.pretrained_cfg['mean'] == (0.5, 0.5, 0.5)
    provenance = read_metadata(tmp_path / 'run' / 'model.safetensors')['provenance']
    assert provenance['top1'] == results['top1'] and provenance['epochs'] == 2
    assert str(tmp_path) not in json.dumps(results)
    found = evaluate_file(str(tmp_path / 'run' / 'model.safetensors'), inputs['data.source'], CPU)
    assert (found['top1'], found['test_images'], found['mean']) == (results['top1'], 24, [0.5, 0.5, 0.5])
    assert found['loss'] == pytest.approx(results['loss'], rel=1e-5)  # in full precision


def test_the_stages_are_what_they_say(inputs: dict[str, str], tmp_path: Path) -> None:
    given = config(inputs, 'norton', 'optim.epochs=0')
    recovery = Recovery(given, tmp_path / 'run', CPU, progress=False)
    results, data = recovery.run(), recovery.data
    dense = timm.create_model('resnet20_cifar', num_classes=4)
    dense.load_state_dict(load_file(inputs['weights']))
    spec = norton_timm.CompressionSpec.from_yaml(Path(inputs['weights']).parent / 'norton.yaml')
    plain, _ = norton_timm.compress(dense, spec)
    repaired, _ = norton_timm.compress(dense, spec, calibration=data.calibration_batches(16))
    for key, network in (('top1_dense', dense), ('top1_compressed', plain), ('top1_repaired', repaired)):
        assert results[key] == evaluate(network, data, CPU)['top1'], key
    assert results['top1'] == results['top1_repaired'] and results['epochs'] == 0
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()
    kept = load(tmp_path / 'run' / 'model.safetensors').state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in repaired.state_dict().items())


def test_a_run_goes_on_from_a_compressed_network(inputs: dict[str, str], tmp_path: Path) -> None:
    first = run(config(inputs, 'norton'), tmp_path / 'first')
    start = f'start={tmp_path / "first" / "model.safetensors"}'
    second = run(config(inputs, 'norton', start, 'optim.epochs=1'), tmp_path / 'second')
    assert second['top1_start'] == first['top1'] and second['top1_repaired'] == first['top1_repaired']
    assert (second['epochs'], second['epochs_before'], first['epochs_before']) == (1, 2, 0)
    assert second['config']['start'] == 'model.safetensors' and second['macs'] == first['macs']
    weights = [load_file(tmp_path / name / 'model.safetensors') for name in ('first', 'second')]
    assert not all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    between = run(config(inputs, 'norton', start, 'optim.epochs=1', 'start_share=0.25'), tmp_path / 'between')
    mean = load_file(tmp_path / 'between' / 'model.safetensors')
    assert between['epochs'] == 1 and between['start_share'] == 0.25
    # the statistics of averaged weights are their own, not the average of both ends'
    measured = Recovery(config(inputs), tmp_path / 'data', CPU, progress=False).data
    network, batches = load(tmp_path / 'between' / 'model.safetensors'), measured.train_batches(1, 16, 0)
    reestimate_batch_norm(network, list(itertools.islice(batches, 4)))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, mean[name], msg=name)
    for name, value in mean.items():
        if value.is_floating_point() and 'running' not in name:
            torch.testing.assert_close(value, 0.25 * weights[0][name] + 0.75 * weights[1][name])
    for recipe, wrong in (('coring', start), (None, f'start={inputs["weights"]}')):
        with pytest.raises(ValueError):
            run(config(inputs, recipe, wrong), tmp_path / 'third')

    dense = timm.create_model('resnet20_cifar', num_classes=4)
    dense.load_state_dict(load_file(inputs['weights']))
    spec = norton_timm.CompressionSpec.from_yaml(Path(inputs['weights']).parent / 'norton.yaml')
    plain = norton_timm.save(norton_timm.compress(dense, spec)[0], tmp_path / 'plain.safetensors')
    none = run(config(inputs, 'norton', f'start={plain}', 'optim.epochs=0'), tmp_path / 'fourth')
    assert none['top1'] == none['top1_start'] == first['top1_compressed'] and none['epochs_before'] == 0


def test_another_teacher(inputs: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(1)
    teacher = timm.create_model('resnet20_cifar', num_classes=4)
    save_file(teacher.state_dict(), tmp_path / 'teacher.safetensors')
    other = f'distill.teacher={tmp_path / "teacher.safetensors"}'
    own, taught = (run(config(inputs, 'norton', *more), tmp_path / str(len(more))) for more in ((), (other,)))
    assert own['top1_teacher'] is None and taught['config']['distill']['teacher'] == 'teacher.safetensors'
    data = Recovery(config(inputs), tmp_path / 'data', CPU, progress=False).data
    assert taught['top1_teacher'] == evaluate(teacher, data, CPU)['top1']
    for key in ('top1_dense', 'top1_repaired', 'macs'):
        assert own[key] == taught[key], key
    weights = [load_file(tmp_path / name / 'model.safetensors') for name in ('0', '1')]
    assert not all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_dense_training(inputs: dict[str, str], tmp_path: Path) -> None:
    given = config({**inputs}, None, 'weights=null', 'distill.weight=0')
    results = run(given, tmp_path / 'run')
    assert results['spec'] is None and results['top1_dense'] is None and results['macs'] == results['macs_dense']


@pytest.mark.parametrize('recipe', ['norton', 'coring'])
def test_a_run_stopped_anywhere_ends_with_the_same_network(
    recipe: str, inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every few steps it is stopped and started again, also between the rounds of a K-shot recipe."""
    given = config(inputs, recipe, 'shot_epochs=2')
    run(given, tmp_path / 'whole')
    step_of, steps = Trainer._step, 0

    def step(self, batches):
        nonlocal steps
        steps += 1
        if steps % 7 == 0:
            raise KeyboardInterrupt
        return step_of(self, batches)

    monkeypatch.setattr(Trainer, '_step', step)
    stops = 0
    while not (tmp_path / 'parts' / 'results.json').exists():
        torch.manual_seed(stops)
        try:
            run(given, tmp_path / 'parts')
        except KeyboardInterrupt:
            stops += 1
            assert stops < 20
    assert stops >= (1 if recipe == 'norton' else 4)
    whole, parts = (load_file(tmp_path / name / 'model.safetensors') for name in ('whole', 'parts'))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    names = ['checkpoint'] if recipe == 'norton' else ['shot1', 'shot2', 'checkpoint']
    for folder in ('whole', 'parts'):
        written = [json.loads(line) for line in (tmp_path / folder / 'metrics.jsonl').read_text().splitlines()]
        assert [(row['run'], row['epoch']) for row in written] == [(n, e) for n in names for e in (1, 2)]


def test_rounds_are_trained_between(inputs: dict[str, str], tmp_path: Path) -> None:
    kept = [run(config(inputs, 'coring', f'shot_epochs={n}', 'optim.epochs=0'), tmp_path / str(n)) for n in (0, 1)]
    networks = [load_file(tmp_path / str(n) / 'model.safetensors') for n in (0, 1)]
    assert kept[0]['macs'] == kept[1]['macs']
    assert not all(torch.equal(networks[0][k], networks[1][k]) for k in networks[0])
    assert (tmp_path / '1' / 'shot2.pt').is_file() and not (tmp_path / '0' / 'shot1.pt').exists()


def test_the_folder_of_another_run_is_refused(inputs: dict[str, str], tmp_path: Path) -> None:
    run(config(inputs, 'norton', 'optim.epochs=0'), tmp_path / 'run')
    before = (tmp_path / 'run' / 'config.yaml').read_bytes()
    with pytest.raises(ValueError, match='another configuration'):
        run(config(inputs, 'norton', 'optim.epochs=0', 'seed=1'), tmp_path / 'run')
    assert (tmp_path / 'run' / 'config.yaml').read_bytes() == before


def test_what_is_wrong_leaves_the_folder_free(inputs: dict[str, str], tmp_path: Path) -> None:
    for wrong, told in (
        ({'data.source': 'nowhere'}, 'nowhere'),
        ({'model': 'resnet56_cifar'}, 'does not fit'),
        ({'model': 'resnet18'}, r'\(32, 32\)'),
    ):
        with pytest.raises(ValueError, match=told):
            run(config({**inputs, **wrong}), tmp_path / 'run')
    with pytest.raises(ValueError, match='needs a trained dense network'):
        run(config(inputs, 'norton', 'weights=null'), tmp_path / 'run')
    teacher = f'distill.teacher={inputs["weights"]}'
    for given in (config(inputs, None, teacher), config(inputs, 'norton', teacher, 'distill.weight=0')):
        with pytest.raises(ValueError, match='for a run that distils nothing'):
            run(given, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name', ['model.safetensors', 'calibrated.safetensors', 'checkpoint.pt'])
@pytest.mark.parametrize('key', ['weights', 'distill.teacher'])
def test_a_run_does_not_write_over_what_it_reads(name: str, key: str, inputs: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    folder.mkdir()
    own = Path(shutil.copy(inputs['weights'], folder / name))
    before = own.read_bytes()
    given = config(inputs, 'norton', f'{key}={own}')
    with pytest.raises(ValueError, match='is read and would be overwritten by a run in'):
        run(given, folder)
    assert own.read_bytes() == before and list(folder.iterdir()) == [own]


def test_a_recipe_by_output_error_takes_the_calibration_images(inputs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / 'norton.yaml').write_text(f'{NORTON}criterion: output_error\n')
    with pytest.raises(ValueError, match=r'data\.calibration: got 0 with a recipe by output_error'):
        run(config(inputs, 'norton', 'data.calibration=0'), tmp_path / 'run')
    results = run(config(inputs, 'norton', 'optim.epochs=0'), tmp_path / 'run')
    assert results['top1_compressed'] is None and 0 <= results['top1_repaired'] <= 100
    assert results['params'] < results['params_dense']


def test_evaluation_refuses_what_does_not_fit(inputs: dict[str, str], tmp_path: Path) -> None:
    weights = Path(inputs['weights'])
    with pytest.raises(ValueError, match='does not fit'):  # ten classes by default
        evaluate_file('resnet20_cifar', inputs['data.source'], CPU, weights=weights)
    with pytest.raises(ValueError, match='no pretrained weights'):
        evaluate_file('resnet20_cifar', inputs['data.source'], CPU)
    path = norton_timm.save(timm.create_model('resnet20_cifar'), tmp_path / 'ten.safetensors')
    with pytest.raises(ValueError, match=r'10 classes, but .* has 4'):
        evaluate_file(str(path), inputs['data.source'], CPU)
    with pytest.raises(ValueError, match='expected one of them'):
        evaluate_file(str(path), inputs['data.source'], CPU, weights=weights)


@pytest.mark.parametrize('overrides', [[], ['data.mean=[0.1,0.2,0.3]', 'data.std=[0.5,0.6,0.7]']])
@pytest.mark.parametrize('recorded', [None, ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))])
def test_the_normalisation_is_the_files_unless_given_and_is_told(
    recorded, overrides: list[str], inputs: dict[str, str], tmp_path: Path, caplog
) -> None:
    if recorded:
        dense = timm.create_model('resnet20_cifar', num_classes=4)
        set_normalisation(dense, *recorded)
        norton_timm.save(dense, inputs['weights'])
    with caplog.at_level('INFO'):
        made = Recovery(config(inputs, 'norton', *overrides), tmp_path / 'run', CPU)
    cifar = timm.get_pretrained_cfg('resnet20_cifar')
    mean, std = recorded or (cifar.mean, cifar.std)
    source = f'as {inputs["weights"]} says' if recorded else 'those of resnet20_cifar'
    if overrides:
        mean, std, source = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 'as given'
    cfg = made.dense.pretrained_cfg
    assert (tuple(cfg['mean']), tuple(cfg['std'])) == (mean, std)
    told = [', '.join(f'{v:.4g}' for v in numbers) for numbers in (mean, std)]
    assert f'normalised with mean ({told[0]}) and std ({told[1]}), {source}' in caplog.text
    assert ('does not say how its images were normalised' in caplog.text) == (not recorded and not overrides)
    images = torch.cat([images for images, _ in made.data.test_batches(64)])
    pixels = images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5 and pixels.std() > 0.1  # 0..1 again: it is what is used


def test_a_teacher_with_another_normalisation_is_told(inputs: dict[str, str], tmp_path: Path, caplog) -> None:
    for name, mean in (('same', (0.4914, 0.4822, 0.4465)), ('other', (0.5, 0.5, 0.5))):
        teacher = timm.create_model('resnet20_cifar', num_classes=4)
        set_normalisation(teacher, mean, timm.get_pretrained_cfg('resnet20_cifar').std)
        norton_timm.save(teacher, tmp_path / f'{name}.safetensors')
        caplog.clear()
        Recovery(config(inputs, 'norton', f'distill.teacher={tmp_path / name}.safetensors'), tmp_path / name, CPU)
        assert ('normalised in another way' in caplog.text) == (name == 'other')


@pytest.mark.parametrize('damage', ['', '{"top1_dense": 1', '[1]', '\0\0'])
def test_damaged_figures_of_a_stopped_run_are_told(damage: str, inputs: dict[str, str], tmp_path: Path) -> None:
    given = config(inputs)
    Recovery(given, tmp_path / 'run', CPU)
    (tmp_path / 'run' / 'stages.json').write_text(damage)
    with pytest.raises(ValueError, match=r'stages\.json is damaged: move it away'):
        Recovery(given, tmp_path / 'run', CPU)
    assert (tmp_path / 'run' / 'stages.json').read_text() == damage
