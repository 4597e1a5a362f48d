"""tools/train_cls.py and tools/eval_cls.py as a user runs them: killed, interrupted, over two processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from image_sets import write_archive
from safetensors.torch import load_file, save_file

import norton_timm

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']


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


def train(place: Path, output: Path, *overrides: str, recipe: str = 'norton', epochs: int = 2) -> list[str]:
    return [str(ROOT / 'tools' / 'train_cls.py'), 'resnet20_cifar', '--weights', str(place / 'dense.safetensors'),
            '--data', str(place / 'images.tar'), '--recipe', str(place / f'{recipe}.yaml'), '--output', str(output),
            '--epochs', str(epochs), '--device', 'cpu', '--set', 'optim.batch_size=16', 'optim.lr=0.02',
            'data.calibration=16', *overrides]  # fmt: skip


def start(arguments: list[str], launcher: list[str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*(launcher or [sys.executable]), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        # a shell starts background jobs, such as this test run may be one, with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def finish(arguments: list[str], launcher: list[str] | None = None) -> tuple[int, str, str]:
    with start(arguments, launcher) as process:
        out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)


def equal(a: Path, b: Path) -> bool:
    one, two = load_file(a), load_file(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_train_then_evaluate(place: Path, tmp_path: Path) -> None:
    code, out, err = finish(train(place, tmp_path / 'run'))
    assert code == 0, err
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert f'top1 {results["top1"]:.2f} %' in out and 'ms for one image on cpu, 1 threads' in out
    code, out, err = finish([
        str(ROOT / 'tools' / 'eval_cls.py'), str(tmp_path / 'run' / 'model.safetensors'), '--device', 'cpu',
        '--data', str(place / 'images.tar'), '--output', str(tmp_path / 'figures.json'), '--batch-size', '7',
    ])  # fmt: skip
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
def test_bad_arguments(arguments: list[str], told: str, tmp_path: Path) -> None:
    code, out, err = finish([str(ROOT / 'tools' / 'train_cls.py'), *arguments, '--output', str(tmp_path / 'run')])
    assert (code, out) == (2, '') and told in err and err.count('\n') == 1
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('sent', 'code', 'told'), [
    (signal.SIGTERM, 143, 'error: terminated'), (signal.SIGINT, 130, 'error: interrupted'),
])  # fmt: skip
def test_asked_to_stop_it_says_so_and_keeps_the_checkpoint(
    sent: signal.Signals, code: int, told: str, place: Path, tmp_path: Path
) -> None:
    with start(train(place, tmp_path / 'run', epochs=500)) as process:
        wait_for(tmp_path / 'run' / 'checkpoint.pt', process)
        process.send_signal(sent)
        out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert err.rstrip().splitlines()[-1] == told and 'Traceback' not in err and out == ''
    content = torch.load(tmp_path / 'run' / 'checkpoint.pt', weights_only=True)
    assert content['epoch'] >= 1


def test_nan_ends_with_one_line_and_code_1(place: Path, tmp_path: Path) -> None:
    code, out, err = finish(train(place, tmp_path / 'run', 'optim.lr=1e30', 'optim.warmup=0'))
    assert code == 1 and 'Traceback' not in err and out == ''
    assert err.rstrip().splitlines()[-1].startswith('error: loss is not finite in epoch 1')


@pytest.mark.parametrize('recipe', ['norton', 'coring'])
@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(recipe: str, place: Path, tmp_path: Path) -> None:
    """About two minutes: pytest tests/test_tools_cls.py -m slow."""
    names = ['checkpoint.pt'] if recipe == 'norton' else ['shot1.pt', 'checkpoint.pt']
    options = {'recipe': recipe, 'epochs': 6}
    code, _, err = finish(train(place, tmp_path / 'whole', 'shot_epochs=6', **options))
    assert code == 0, err
    draw, kills = random.Random(int(time.time())), 0
    output = tmp_path / 'parts'
    for name in [*names, *names, 'calibrated.safetensors', 'config.yaml']:
        with start(train(place, output, 'shot_epochs=6', **options)) as process:
            wait_for(output / name, process)
            time.sleep(draw.uniform(0, 1.5))
            process.kill()
            process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 1
    code, _, err = finish(train(place, output, 'shot_epochs=6', **options))
    assert code == 0, err
    assert equal(output / 'model.safetensors', tmp_path / 'whole' / 'model.safetensors')
    assert not [path.name for path in output.iterdir() if path.name.endswith('.part')]
    written = [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]
    assert [(r['run'], r['epoch']) for r in written] == [(n[:-3], e) for n in names for e in range(1, 7)]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(place: Path, tmp_path: Path) -> None:
    """About a minute: pytest tests/test_tools_cls.py -m slow."""
    settings, first = ['optim.batch_size=8'], tmp_path / 'first'
    code, _, err = finish(train(place, first, *settings, epochs=1), TORCHRUN)
    assert code == 0, err
    settings += [f'start={first / "model.safetensors"}', 'start_share=0.5']
    code, _, err = finish(train(place, tmp_path / 'two', *settings, epochs=1), TORCHRUN)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / 'two' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['epoch'] for row in rows] == [1]
    model = tmp_path / 'two' / 'model.safetensors'
    assert norton_timm.load(model).num_classes == 4
    figures = []
    for launcher in (None, TORCHRUN):
        path = tmp_path / f'figures{len(figures)}.json'
        arguments = [str(model), '--data', str(place / 'images.tar'), '--device', 'cpu', '--output', str(path)]
        code, _, err = finish([str(ROOT / 'tools' / 'eval_cls.py'), *arguments], launcher)
        assert code == 0, err
        figures.append(json.loads(path.read_text()))
    one, two = figures
    results = json.loads((tmp_path / 'two' / 'results.json').read_text())
    assert (one['top1'], one['top5'], one['test_images']) == (two['top1'], two['top5'], 25)
    assert one['top1'] == results['top1'] and one['loss'] == pytest.approx(two['loss'], rel=1e-5)
    assert one['loss'] == pytest.approx(results['loss'], rel=1e-5)  # both processes hold the network that was kept
