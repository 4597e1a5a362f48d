"""tools/train_cls.py and tools/eval_cls.py as a user runs them: killed, interrupted, over two processes."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import timm
import torch
from fake_clock import wait_until
from image_sets import write_archive
from safetensors.torch import load_file, save_file
from tool_runner import finish, run_process, start_tool, torchrun

import norton_timm


@pytest.fixture(scope='module')
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, dense weights and recipes."""
    folder = tmp_path_factory.mktemp('cls')
    write_archive(folder / 'images.tar', train=64, test=25)
    torch.manual_seed(0)
    save_file(timm.create_model('resnet20_cifar', num_classes=4).state_dict(), folder / 'dense.safetensors')
    (folder / 'norton.yaml').write_text("method: norton\nrank: {'*': 1}\nrates: 0.2\n")
    (folder / 'coring.yaml').write_text('method: coring\nrank: 0\nrates: 0.4\nshots: 2\n')
    return folder


def train(place: Path, output: Path, *overrides: str, recipe: str = 'norton', epochs: int = 2) -> list[object]:
    """The arguments of train_cls.py, its name in front."""
    return ['train_cls.py', 'resnet20_cifar', '--weights', place / 'dense.safetensors', '--data', place / 'images.tar',
            '--recipe', place / f'{recipe}.yaml', '--output', output, '--epochs', epochs, '--device', 'cpu',
            '--set', 'optim.batch_size=16', 'optim.lr=0.02', 'data.calibration=16', *overrides]  # fmt: skip


def equal(a: Path, b: Path) -> bool:
    one, two = load_file(a), load_file(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_train_then_evaluate(tool, place: Path, tmp_path: Path) -> None:
    code, out, err = tool(*train(place, tmp_path / 'run'))
    assert code == 0, err
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert (
        f'top1 {results["top1"]:.2f} %' in out and f'ms for one image on cpu, {torch.get_num_threads()} threads' in out
    )
    code, out, err = tool('eval_cls.py', tmp_path / 'run' / 'model.safetensors', '--device', 'cpu',
                          '--data', place / 'images.tar', '--output', tmp_path / 'figures.json',
                          '--batch-size', 7)  # fmt: skip
    assert code == 0, err
    figures = json.loads((tmp_path / 'figures.json').read_text())
    assert figures['top1'] == results['top1'] and figures['test_images'] == 25
    assert f'top-1 {figures["top1"]:.2f} %' in out


@pytest.mark.parametrize(('arguments', 'told'), [
    (['resnet20_cifar', '--epochs', '-1', '--set', 'optim.amp=x'], 'optim.amp is'),
    (['resnet21_cifar'], "model 'resnet21_cifar' is unknown"),
    (['resnet20_cifar', '--data', 'nowhere', '--set', 'distill.weight=0'], "no data set 'nowhere'"),
    (['resnet20_cifar', '--device', 'tpu7'], "device 'tpu7' cannot be used"),
    (['resnet20_cifar', '--config', 'nothing.yaml'], 'no configuration file'),
])  # fmt: skip
def test_bad_arguments(arguments: list[str], told: str, tool, tmp_path: Path) -> None:
    code, out, err = tool('train_cls.py', *arguments, '--output', tmp_path / 'run')
    assert (code, out) == (2, '') and told in err and err.count('\n') == 1
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('sent', 'code', 'told'), [
    (signal.SIGTERM, 143, 'error: terminated'), (signal.SIGINT, 130, 'error: interrupted'),
])  # fmt: skip
def test_asked_to_stop_it_says_so_and_keeps_the_checkpoint(
    sent: signal.Signals, code: int, told: str, place: Path, tmp_path: Path
) -> None:
    process = start_tool(*train(place, tmp_path / 'run', epochs=500))
    wait_until(lambda: (tmp_path / 'run' / 'checkpoint.pt').exists() or process.poll() is not None)
    process.send_signal(sent)
    ended, out, err = finish(process)
    assert ended == code, err
    advice = f'the same command goes on with the run in {tmp_path / "run"}'
    assert err.rstrip().splitlines()[-1] == f'{told}; {advice}' and 'Traceback' not in err and out == ''
    content = torch.load(tmp_path / 'run' / 'checkpoint.pt', weights_only=True)
    assert content['epoch'] >= 1


def test_nan_ends_with_one_line_and_code_1(tool, place: Path, tmp_path: Path) -> None:
    code, out, err = tool(*train(place, tmp_path / 'run', 'optim.lr=1e30', 'optim.warmup=0'))
    assert code == 1 and 'Traceback' not in err and out == ''
    assert err.rstrip().splitlines()[-1].startswith('error: loss is not finite in epoch 1')


@pytest.mark.parametrize('recipe', ['norton', 'coring'])
@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(recipe: str, place: Path, tmp_path: Path) -> None:
    """About two minutes: pytest tests/test_tools_cls.py -m slow."""
    names = ['checkpoint.pt'] if recipe == 'norton' else ['shot1.pt', 'checkpoint.pt']
    options = {'recipe': recipe, 'epochs': 6}
    code, _, err = run_process(*train(place, tmp_path / 'whole', 'shot_epochs=6', **options))
    assert code == 0, err
    draw, kills = random.Random(0), 0
    output = tmp_path / 'parts'
    for name in [*names, *names, 'calibrated.safetensors', 'config.yaml']:
        process = start_tool(*train(place, output, 'shot_epochs=6', **options))

        def there(file: Path = output / name, process=process) -> bool:
            return file.exists() or process.poll() is not None

        # the file is seen up to so much later, the kill may fall anywhere
        wait_until(there, every=draw.uniform(0.01, 1.5))
        process.kill()
        kills += finish(process).code == -signal.SIGKILL
    assert kills >= 1
    code, _, err = run_process(*train(place, output, 'shot_epochs=6', **options))
    assert code == 0, err
    assert equal(output / 'model.safetensors', tmp_path / 'whole' / 'model.safetensors')
    assert not [path.name for path in output.iterdir() if path.name.endswith('.part')]
    written = [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]
    assert [(r['run'], r['epoch']) for r in written] == [(n[:-3], e) for n in names for e in range(1, 7)]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(place: Path, tmp_path: Path) -> None:
    """About a minute: pytest tests/test_tools_cls.py -m slow."""
    settings, first = ['optim.batch_size=8'], tmp_path / 'first'
    code, _, err = run_process(*train(place, first, *settings, epochs=1), launcher=torchrun(2))
    assert code == 0, err
    settings += [f'start={first / "model.safetensors"}', 'start_share=0.5']
    code, _, err = run_process(*train(place, tmp_path / 'two', *settings, epochs=1), launcher=torchrun(2))
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / 'two' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['epoch'] for row in rows] == [1]
    model = tmp_path / 'two' / 'model.safetensors'
    assert norton_timm.load(model).num_classes == 4
    figures = []
    for launcher in ([], torchrun(2)):
        path = tmp_path / f'figures{len(figures)}.json'
        arguments = [model, '--data', place / 'images.tar', '--device', 'cpu', '--output', path]
        code, _, err = run_process('eval_cls.py', *arguments, launcher=launcher)
        assert code == 0, err
        figures.append(json.loads(path.read_text()))
    one, two = figures
    results = json.loads((tmp_path / 'two' / 'results.json').read_text())
    assert (one['top1'], one['top5'], one['test_images']) == (two['top1'], two['top5'], 25)
    assert one['top1'] == results['top1'] and one['loss'] == pytest.approx(two['loss'], rel=1e-5)
    assert one['loss'] == pytest.approx(results['loss'], rel=1e-5)  # both processes hold the network that was kept
