"""What is killed: each tool on tiny settings, what it leaves behind, and what must be equal in the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY = [
    '--workers',
    0,
    '--device',
    'cpu',
    '--set',
    'model.min_size=64',
    '--set',
    'model.max_size=96',
    '--set',
    'model.fpn_channels=16',
    '--set',
    'model.box_head=16',
    '--set',
    'data.batch_size=2',
    '--set',
    'log_every=1',
    '--set',
    'save_every=0.7',
    '--set',
    'tensorboard=false',
]


@dataclass(frozen=True)
class Scenario:
    """A tool and its run.

    Attributes:
        name: in the report.
        tool: the script.
        command: its arguments for a folder; asked again for every start.
        result: what the finished run left, to compare with that of a run in peace; None: nothing to compare.
        steps: how far the kept state of a run is, -1 where there is none.
        keeps: whether SIGTERM and Ctrl-C must leave a checkpoint of the step at which they came.
    """

    name: str
    tool: str
    command: Callable[[Path], list[object]]
    result: Callable[[Path], Any] = lambda folder: None
    steps: Callable[[Path], int] = lambda folder: -1
    keeps: bool = False


def prepare(place: Path) -> None:
    """The data that all scenarios read."""
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from detection.data.sample import write_sample

    from .pictures import add, png_file

    write_sample(place / 'sample', train=6, val=3, size=(96, 96))
    import tarfile

    with tarfile.open(place / 'images.tar', 'w') as tar:
        for split, count in (('train', 64), ('test', 12)):
            for k in range(count):
                add(tar, f'set/{split}/class{k % 4}/{k:04d}.png', png_file(k))
    torch.manual_seed(0)
    save_file(timm.create_model('resnet20_cifar', num_classes=4).state_dict(), place / 'dense.safetensors')
    (place / 'norton.yaml').write_text("method: norton\nrank: {'*': 1}\nrates: 0.2\n")
    for k in range(3):
        Image.effect_noise((96, 72), 60 + k).convert('RGB').save(place / f'{k}.png')


def train_box(place: Path, output: Path) -> list[object]:
    """Arguments of train_det.py for a short run on the small data set."""
    run = ['--task', 'box', '--backbone', 'resnet18', '--iterations', 14]
    return [*run, '--data', place / 'sample', '--output', output, *TINY]


def _train_det(place: Path) -> Callable[[Path], list[object]]:
    def command(folder: Path) -> list[object]:
        resume = ['--resume'] if (folder / 'run' / 'checkpoint.pt').exists() else []
        return [*train_box(place, folder / 'run'), '--seed', 3, '--deterministic', *resume]

    return command


def _trained(folder: Path) -> Any:
    from detection.training.checkpoint import load_checkpoint

    content = load_checkpoint(folder / 'run' / 'checkpoint.pt')
    rows = [json.loads(line) for line in (folder / 'run' / 'metrics.jsonl').read_text().splitlines()]
    losses = [(row['iteration'], row['loss']) for row in rows if 'loss' in row]
    return digest(content['model']), content['iteration'], content['results'], losses


def _classified(folder: Path) -> Any:
    from safetensors.torch import load_file

    rows = [json.loads(line) for line in (folder / 'run' / 'metrics.jsonl').read_text().splitlines()]
    losses = [(row['epoch'], row['loss'], row.get('top1')) for row in rows]
    return digest(load_file(folder / 'run' / 'model.safetensors')), losses


def digest(tensors: dict[str, Any]) -> str:
    """SHA-256 of tensors, bit for bit."""
    import hashlib

    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def _det_steps(folder: Path) -> int:
    from detection.training.checkpoint import load_checkpoint

    path = folder / 'run' / 'checkpoint.pt'
    return load_checkpoint(path)['iteration'] if path.exists() else -1


def _cls_steps(folder: Path) -> int:
    from norton_timm.utils.files import load_plain

    path = folder / 'run' / 'checkpoint.pt'
    if not path.exists():
        return -1
    content = load_plain(path)
    return content['epoch'] * 1000 + content['step']


def scenarios(place: Path) -> list[Scenario]:
    """All tools, reading what `prepare` wrote."""
    cls = [
        'resnet20_cifar',
        '--weights',
        place / 'dense.safetensors',
        '--data',
        place / 'images.tar',
        '--recipe',
        place / 'norton.yaml',
        '--epochs',
        3,
        '--device',
        'cpu',
        '--seed',
        5,
        '--deterministic',
        '--set',
        'optim.batch_size=8',
        'optim.lr=0.02',
        'data.calibration=16',
        'optim.ema=0.9',
    ]
    compress = [
        'resnet20_cifar',
        '--checkpoint',
        place / 'dense.safetensors',
        '--num-classes',
        4,
        '--rank',
        1,
        '--rates',
        0.3,
        '--method',
        'norton',
    ]
    demo = ['--random-weights', '--backbone', 'resnet18', '--imgsz', 64, '--device', 'cpu', '--frames', 40]
    return [
        Scenario('training a detector', 'train_det.py', _train_det(place), _trained, _det_steps, True),
        Scenario(
            'training a classifier',
            'train_cls.py',
            lambda f: [*cls, '--output', f / 'run'],
            _classified,
            _cls_steps,
            True,
        ),
        Scenario(
            'compression',
            'compress.py',
            lambda f: [*compress, '--output', f / 'out.safetensors', '--report', f / 'report.json'],
            lambda f: json.loads((f / 'report.json').read_text())['after'],
        ),
        Scenario(
            'evaluation',
            'eval_det.py',
            lambda f: [
                place / 'trained.pt',
                '--data',
                place / 'sample',
                '--workers',
                0,
                '--device',
                'cpu',
                '--output',
                f / 'eval.json',
                '--detections',
                f / 'detections',
            ],
            lambda f: json.loads((f / 'eval.json').read_text()),
        ),
        Scenario(
            'demo',
            'demo_video.py',
            lambda f: [*demo, '--output', f / 'out.mp4', '--overwrite'],  # what a killed run left
            lambda f: json.loads((f / 'out.json').read_text())['frames'],
        ),
    ]


def check_files(folder: Path) -> list[str]:
    """What is wrong with files that claim to be complete: those under names that a user would open."""
    from detection.demo.video_writer import check_playable
    from norton_timm import load
    from norton_timm.utils.files import load_plain

    problems = []
    for path in sorted(p for p in folder.rglob('*') if p.is_file() and not p.name.startswith('.')):
        try:
            if path.suffix == '.pt':
                load_plain(path)
            elif path.suffix == '.safetensors':
                load(path)
            elif path.suffix in ('.json', '.yaml'):
                import yaml

                text = path.read_text()
                assert text, 'empty'
                json.loads(text) if path.suffix == '.json' else yaml.safe_load(text)
            elif path.suffix == '.mp4':
                frames = path.with_suffix('.json')
                if frames.exists():
                    check_playable(path, json.loads(frames.read_text())['frames'])
            elif path.suffix == '.jsonl':
                [json.loads(line) for line in path.read_text().splitlines()[:-1]]  # the last one may be cut
            elif path.suffix in ('.jpg', '.png'):
                from norton_timm.utils.images import read_rgb

                read_rgb(path, path)
        except (ValueError, OSError, AssertionError, KeyError) as error:
            problems.append(f'{path.name}: {error}')
    return problems
