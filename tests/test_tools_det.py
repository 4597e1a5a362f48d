"""tools/train_det.py and tools/eval_det.py as a user runs them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
import torch
from fake_clock import wait_until
from tool_runner import finish, run_process, start_tool, torchrun

from detection import training
from detection.data.sample import write_sample
from detection.training.checkpoint import load_checkpoint
from detection.training.engine import DetectorTrainer

TINY = ['--workers', '0', '--device', 'cpu', '--set', 'model.min_size=64', '--set', 'model.max_size=96',
        '--set', 'model.fpn_channels=16', '--set', 'model.box_head=16', '--set', 'model.mask_layers=[8]',
        '--set', 'model.keypoint_layers=[8]', '--set', 'data.batch_size=2']  # fmt: skip


@pytest.fixture(scope='module')
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp('sample'), train=6, val=3, size=(96, 96))


@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
def test_train_then_evaluate(task: str, tool, sample: Path, tmp_path: Path) -> None:
    code, out, _ = tool('train_det.py', '--task', task, '--data', sample, '--iterations', 2, '--output', 'run', *TINY)
    assert code == 0
    assert 'norton_resnet50.r078, random weights, trained from scratch' in out
    assert 'AP50' in out
    folder = tmp_path / 'run'
    names = {'checkpoint.pt', 'config.yaml', 'metrics.jsonl', 'predictions.jpg', 'results.json'}
    assert {p.name for p in folder.iterdir() if p.is_file()} == names
    assert cv2.imread(str(folder / 'predictions.jpg')).std() > 10
    results = json.loads((folder / 'results.json').read_text())
    assert [len(figures) for figures in results.values()] == {'box': [12], 'mask': [12, 12], 'keypoint': [12, 10]}[task]

    code, out, _ = tool('eval_det.py', 'run/checkpoint.pt', '--data', sample, '--workers', 0, '--device', 'cpu')
    assert code == 0
    again = json.loads((folder / 'eval_val.json').read_text())
    assert again == {kind: pytest.approx(figures, abs=1e-3) for kind, figures in results.items()}

    code, out, _ = tool('eval_det.py', 'run/checkpoint.pt', '--data', sample, '--workers', 0, '--device', 'cpu',
                        '--flip', '--report', 'report', '--output', 'flipped.json')  # fmt: skip
    assert code == 0
    assert '3 images, with their mirror images' in out
    assert json.loads((tmp_path / 'flipped.json').read_text()).keys() == results.keys()
    assert {p.name for p in (tmp_path / 'report').iterdir()} == {
        'categories.csv', 'errors.json', 'precision_recall.png', 'worst.jpg'
    }  # fmt: skip


def test_resume_goes_on_where_it_stopped(tool, sample: Path, tmp_path: Path) -> None:
    common = ['--task', 'box', '--data', sample, '--backbone', 'resnet18', *TINY]
    assert tool('train_det.py', *common, '--iterations', 2)[0] == 0
    code, out, _ = tool('train_det.py', *common, '--iterations', 4, '--resume', '--set', 'log_every=1')
    assert code == 0
    assert '4 iterations of 2 images' in out
    assert 'from iteration 2' in out
    rows = [json.loads(line) for line in (tmp_path / 'runs' / 'box' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['iteration'] for row in rows if 'loss' in row] == [2, 3, 4]


def test_a_folder_with_a_run_is_continued_or_refused(tool, sample: Path, tmp_path: Path) -> None:
    common = ['--task', 'box', '--data', sample, '--backbone', 'resnet10t', *TINY, '--iterations', 2]
    assert tool('train_det.py', *common)[0] == 0
    before = (tmp_path / 'runs' / 'box' / 'checkpoint.pt').read_bytes()
    code, _, err = tool('train_det.py', *common, '--set', 'optim.lr=0.01')
    assert code == 2 and 'holds a run with another configuration' in err
    assert (tmp_path / 'runs' / 'box' / 'checkpoint.pt').read_bytes() == before
    code, out, err = tool('train_det.py', *common)
    assert code == 0, err
    assert 'from iteration 2' in out


@pytest.mark.parametrize('name', ['best.pt', 'checkpoint_00000002.pt'])
def test_weights_in_the_runs_folder_are_not_overwritten(name: str, tool, sample: Path, tmp_path: Path) -> None:
    (tmp_path / 'runs' / 'box').mkdir(parents=True)
    own = tmp_path / 'runs' / 'box' / name
    own.write_bytes(b'weights')
    code, _, err = tool('train_det.py', '--task', 'box', '--data', sample, *TINY, '--weights', own)
    assert code == 2 and 'is read and would be overwritten by a run in runs/box: choose another folder' in err
    assert own.read_bytes() == b'weights'


def test_an_evaluation_does_not_write_over_the_annotations(tool, sample: Path, tmp_path: Path) -> None:
    common = ['--task', 'box', '--data', sample, '--backbone', 'resnet10t', *TINY, '--iterations', 1]
    assert tool('train_det.py', *common)[0] == 0
    annotations = next((sample / 'annotations').glob('instances_val*.json'))
    before = annotations.read_bytes()
    code, _, err = tool(
        'eval_det.py', 'runs/box/checkpoint.pt', '--data', sample, '--workers', 0, '--output', annotations
    )
    assert code == 2 and 'is read and would be overwritten: choose another --output' in err
    assert annotations.read_bytes() == before


@pytest.mark.usefixtures('heeds_ctrl_c')
@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('moment', ['data', 'step 2'])
def test_a_stopped_run_says_how_to_go_on(
    moment: str, sent: signal.Signals, tool, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ['--task', 'box', '--data', sample, '--backbone', 'resnet10t', *TINY, '--iterations', 4]
    read, step = training.training_sets, DetectorTrainer._step

    def stopped(call, now):
        def wrapped(*args):
            if now(*args):
                signal.raise_signal(sent)
            return call(*args)

        return wrapped

    with monkeypatch.context() as patch:
        if moment == 'data':
            patch.setattr(training, 'training_sets', stopped(read, lambda *_: True))
        else:
            patch.setattr(DetectorTrainer, '_step', stopped(step, lambda trainer, _: trainer.iteration == 1))
        done = tool('train_det.py', *common)
    assert done.code == 128 + sent
    word = 'interrupted' if sent == signal.SIGINT else 'terminated'
    told = {
        'data': 'no checkpoint was written yet, the same command begins again',
        'step 2': f'the same command goes on from {Path("runs/box/checkpoint.pt")}',
    }[moment]
    assert done.error_lines() == [f'error: {word}; {told}']
    code, out, err = tool('train_det.py', *common)
    assert code == 0, err
    assert ('from iteration 2' in out) == (moment == 'step 2')


@pytest.mark.parametrize('resume', [[], ['--resume']])
@pytest.mark.parametrize('damage', ['cut', 'bit', 'empty', 'text', 'other'])
def test_a_damaged_checkpoint_is_told_and_left_alone(
    damage: str, resume: list[str], tool, sample: Path, tmp_path: Path
) -> None:
    latest = tmp_path / 'run' / 'checkpoint.pt'
    latest.parent.mkdir()
    torch.save({'model': {'a': torch.arange(999.0)}}, latest)
    whole = latest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    content = {'cut': whole[:-100], 'bit': bytes(flipped), 'empty': b'', 'text': b'hello', 'other': whole}[damage]
    latest.write_bytes(content)
    common = ['--task', 'box', '--data', sample, '--iterations', 4, '--output', 'run', *TINY, *resume]
    code, _, err = tool('train_det.py', *common)
    assert code == 2 and err.count('\n') == 1, err
    reason = 'it lacks config, meta' if damage == 'other' else 'is not a checkpoint that can be read'
    assert str(Path('run/checkpoint.pt')) in err and reason in err and 'another configuration' not in err
    assert 'move it away to begin anew' in err and 'copy an older one' not in err
    (latest.parent / 'checkpoint_00000002.pt').write_bytes(whole)
    code, _, err = tool('train_det.py', *common)
    assert code == 2 and 'copy an older one (checkpoint_00000002.pt) over it' in err
    assert latest.read_bytes() == content and len(list(latest.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ('arguments', 'parts'),
    [
        ([], ['--task is missing', 'box, mask or keypoint']),
        (['--task', 'boxes'], ["task is 'boxes'", 'box, mask, keypoint']),
        (['--task', 'box', '--data', 'nowhere'], ['nowhere']),
        (['--task', 'box', '--backbone', 'norton_resnet50.r999'], ['r999']),
        (['--task', 'box', '--backbone', 'resnet5'], ['resnet5', 'did you mean']),
        (['--task', 'box', '--device', 'gpu'], ["device 'gpu' cannot be used", 'cuda']),
        (['--task', 'box', '--iterations', '0'], ['optim.iterations is 0']),
        (['--task', 'box', '--iterations', 'many'], ['--iterations', 'many']),
        (['--task', 'box', '--set', 'optim.speed=1'], ['unknown key optim.speed']),
        (['--task', 'box', '--set', 'model.rcnn.colour=1'], ['colour']),
        (['--task', 'box', '--config', 'none.yaml'], ['none.yaml']),
        (['--task', 'box', '--resume'], ['--resume', 'checkpoint.pt']),
        (['--tusk', 'box'], ['--tusk']),
    ],
    ids=lambda v: ' '.join(v)[:40],
)
def test_wrong_arguments_to_training(
    arguments: list[str], parts: list[str], tool, sample: Path, tmp_path: Path
) -> None:
    data = [] if '--data' in arguments else ['--data', str(sample)]
    code, _, err = tool('train_det.py', *arguments, *data)
    lines = [line for line in err.splitlines() if not line.startswith(('train', 'evaluate'))]
    assert code == 2, err
    assert len(lines) == 1, err
    assert all(part in lines[0] for part in parts)
    assert not (tmp_path / 'runs').exists()


def test_unreadable_image_stops_training_with_its_name(tool, sample: Path, tmp_path: Path) -> None:
    broken = tmp_path / 'broken'
    shutil.copytree(sample, broken)
    for image in (broken / 'train2017').iterdir():
        image.write_bytes(b'no image')
    arguments = ['--task', 'box', '--data', broken, '--iterations', 1, '--backbone', 'resnet18', *TINY]
    for workers in (0, 1):
        code, _, err = tool('train_det.py', *arguments, '--workers', workers)
        assert code == 2
        message = [line for line in err.splitlines() if line.startswith('error:')]
        assert len(message) == 1
        assert 'cannot read image' in message[0]
    assert not (tmp_path / 'runs' / 'box' / 'checkpoint.pt').exists()


def test_wrong_arguments_to_evaluation(tool, sample: Path, tmp_path: Path) -> None:
    (tmp_path / 'text.pt').write_text('nothing')
    for arguments, part in (
        (['none.pt'], 'no checkpoint file none.pt'),
        (['text.pt'], 'text.pt is not a checkpoint'),
        ([], 'checkpoint'),
        (['text.pt', '--batch-size', '0'], '--batch-size must be 1 or more'),
    ):
        code, _, err = tool('eval_det.py', *arguments)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert part in err


@pytest.mark.slow
def test_three_processes_evaluate_as_one(sample: Path, tiny_coco: Path, tool, tmp_path: Path) -> None:
    """As a user starts them, with torchrun; figures must agree to the last digit."""
    for task, data in (('keypoint', tiny_coco), ('mask', sample)):
        output = tmp_path / task
        assert (
            tool('train_det.py', '--task', task, '--data', data, '--iterations', 2, '--output', output, *TINY)[0] == 0
        )
        texts = []
        for processes in (1, 2, 3):
            result = output / f'{processes}.json'
            code, _, err = run_process('eval_det.py', output / 'checkpoint.pt', '--data', data, '--output', result,
                                       '--workers', 0, '--device', 'cpu', '--batch-size', 1,
                                       launcher=torchrun(processes))  # fmt: skip
            assert code == 0, err
            texts.append(result.read_text())
        assert texts[0] == texts[1] == texts[2]


def test_data_are_checked_without_training(tool, sample: Path, tmp_path: Path) -> None:
    code, out, _ = tool('train_det.py', '--task', 'mask', '--data', sample, '--check-data')
    assert code == 0
    assert 'the data can be used' in out
    broken = tmp_path / 'broken'
    shutil.copytree(sample, broken)
    next((broken / 'train2017').glob('*.*')).unlink()
    code, out, _ = tool('train_det.py', '--task', 'mask', '--data', broken, '--check-data')
    assert code == 1
    assert 'ERROR: missing image (1)' in out
    assert out.splitlines()[-1] == 'the data must be repaired first'
    assert not (tmp_path / 'runs').exists()


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_with_the_same_weights(sample: Path, tmp_path: Path) -> None:
    """SIGKILL leaves no time for anything; the kills fall into steps, writes of checkpoints and the evaluation."""
    chance = random.Random(0)

    def start(output: Path) -> subprocess.Popen:
        arguments = ['--task', 'box', '--data', sample, '--backbone', 'resnet18', '--iterations', 30, '--output',
                     output, *TINY, '--set', 'log_every=1', '--set', 'save_every=0.001']  # fmt: skip
        if (output / 'checkpoint.pt').exists():
            arguments.append('--resume')
        return start_tool('train_det.py', *arguments, stdout=subprocess.DEVNULL)

    whole = start(tmp_path / 'whole')
    killed, rows = tmp_path / 'killed', tmp_path / 'killed' / 'metrics.jsonl'
    for k in range(1, 6):
        process = start(killed)

        def far_enough(least: int = 5 * k, process: subprocess.Popen[str] = process) -> bool:
            steps = rows.read_text().count('loss_classifier') if rows.exists() else 0
            return steps >= least or process.poll() is not None

        # seen up to so much later, the kill may fall anywhere in a step
        wait_until(far_enough, every=chance.uniform(0.001, 0.1))
        assert process.poll() is None, process.communicate()[1]
        process.kill()
        assert process.wait() == -signal.SIGKILL
        if process.stderr:
            process.stderr.close()
    for process in (start(killed), whole):
        code, _, err = finish(process)
        assert code == 0, err
    expected, got = (load_checkpoint(tmp_path / name / 'checkpoint.pt') for name in ('whole', 'killed'))
    assert got['iteration'] == expected['iteration'] == 30
    assert all(torch.equal(value, got['model'][key]) for key, value in expected['model'].items())
    assert got['results'] == expected['results']
    steps = [json.loads(line)['iteration'] for line in rows.read_text().splitlines() if 'loss_classifier' in line]
    assert steps == list(range(1, 31))


@pytest.mark.slow
def test_two_processes_train_one_run(sample: Path, tmp_path: Path) -> None:
    arguments = ['--task', 'keypoint', '--data', sample, '--iterations', 2, '--output', tmp_path / 'run', *TINY]
    code, out, err = run_process('train_det.py', *arguments, launcher=torchrun(2), cwd=tmp_path)
    assert code == 0, err[-2000:]
    assert out.count('2 processes') == 1
    assert '2 iterations of 4 images' in out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_dies_and_comes_back_leaves_a_whole_run(sample: Path, tmp_path: Path) -> None:
    """Two torchrun agents as two nodes: one is killed with its process, the other goes on alone, then both again.

    pytest tests/test_tools_det.py -m slow -k comes_back
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        endpoint = f'127.0.0.1:{free.getsockname()[1]}'
    output = tmp_path / 'run'
    rows = output / 'metrics.jsonl'

    def agent(name: str) -> subprocess.Popen:
        launcher = ['-m', 'torch.distributed.run', '--nnodes=1:2', '--nproc-per-node=1', '--max-restarts=5',
                    '--rdzv-backend=c10d', '--rdzv-id=run', f'--rdzv-endpoint={endpoint}',
                    '--rdzv-conf=last_call_timeout=2,keep_alive_interval=1', '--local-addr=127.0.0.1']  # fmt: skip
        arguments = ['--task', 'box', '--data', sample, '--backbone', 'resnet18', '--iterations', 600, '--output',
                     output, '--resume', *TINY, '--set', 'log_every=1', '--set', 'save_every=5',
                     '--set', 'data.batch_size=1']  # fmt: skip
        env = {'GLOO_SOCKET_IFNAME': 'lo', 'PYTHONUNBUFFERED': '1'}
        # a file: a full pipe that nobody reads would stop the run
        with (tmp_path / f'{name}.log').open('w') as log:
            return start_tool(
                'train_det.py', *arguments, launcher=launcher, env=env, stdout=log, stderr=subprocess.STDOUT
            )

    def started(processes: int) -> int:
        """How often a run with so many processes began; its first process prints it."""
        word = f', {processes} process' + ('es' if processes > 1 else '') + '\n'
        return sum(path.read_text().count(word) for path in tmp_path.glob('*.log'))

    def steps() -> int:
        return len(rows.read_text().splitlines()) if rows.exists() else 0

    def wait(condition: Callable[[], bool], *alive: subprocess.Popen) -> None:
        def logs() -> list[str]:
            return [p.read_text()[-2000:] for p in tmp_path.glob('*.log')]

        def reached() -> bool:
            ended = [process for process in alive if process.poll() is not None]
            return condition() or (not ended or pytest.fail(f'a process ended: {logs()}'))

        wait_until(reached, why=logs, every=0.05)

    first = agent('first')
    wait(lambda: listening(endpoint), first)  # the first agent keeps the meeting point
    second = agent('second')
    try:
        wait(lambda: started(2) == 1 and steps() > 15, first, second)
        alone = started(1)
        children = Path(f'/proc/{second.pid}/task/{second.pid}/children').read_text().split()
        assert len(children) == 1
        for process in (second.pid, *map(int, children)):  # as when the machine goes down
            os.kill(process, signal.SIGKILL)
        second.wait()
        wait(lambda: started(1) == alone + 1, first)
        reached = steps()
        wait(lambda: steps() > reached + 5, first)
        second = agent('second-again')
        wait(lambda: started(2) == 2, first, second)
        assert [first.wait(), second.wait()] == [0, 0]
    finally:
        for process in (first, second):
            if process.poll() is None:
                process.kill()
    assert load_checkpoint(output / 'checkpoint.pt')['iteration'] == 600
    logged = [json.loads(line)['iteration'] for line in rows.read_text().splitlines() if 'loss_classifier' in line]
    assert logged == list(range(1, 601))
    assert json.loads((output / 'results.json').read_text())['bbox'].keys() >= {'AP', 'AP50'}


def listening(endpoint: str) -> bool:
    host, port = endpoint.split(':')
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0
