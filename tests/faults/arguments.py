"""The surface of the command lines: every tool called in this process with arguments that make no sense."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tool_runner import TOOLS, run_tool

OPTIONS = {
    'train_det.py': [
        '--task',
        '--data',
        '--config',
        '--backbone',
        '--weights',
        '--output',
        '--resume',
        '--check-data',
        '--iterations',
        '--epochs',
        '--device',
        '--seed',
        '--deterministic',
        '--workers',
        '--set',
    ],
    'eval_det.py': [
        '--data',
        '--split',
        '--output',
        '--detections',
        '--report',
        '--flip',
        '--batch-size',
        '--workers',
        '--device',
    ],
    'train_cls.py': [
        '--output',
        '--config',
        '--data',
        '--weights',
        '--pretrained',
        '--recipe',
        '--epochs',
        '--seed',
        '--device',
        '--set',
    ],
    'eval_cls.py': ['--data', '--weights', '--batch-size', '--workers', '--device', '--amp', '--output'],
    'compress.py': [
        '--output',
        '--spec',
        '--method',
        '--rates',
        '--criterion',
        '--strategy',
        '--rank',
        '--shots',
        '--round-to',
        '--seed',
        '--macs',
        '--params',
        '--latency-ms',
        '--memory-mb',
        '--checkpoint',
        '--num-classes',
        '--input-size',
        '--calibration',
        '--mean',
        '--report',
    ],
    'demo_video.py': [
        '--input',
        '--output',
        '--overwrite',
        '--headless',
        '--weights',
        '--task',
        '--backbone',
        '--compare',
        '--score',
        '--imgsz',
        '--device',
        '--half',
        '--warmup',
        '--frames',
        '--codec',
        '--json',
    ],
    'export.py': [
        '--weights',
        '--model',
        '--pretrained',
        '--images',
        '--count',
        '--size',
        '--output',
        '--int8',
        '--json',
    ],
    'import_checkpoint.py': ['--output', '--architecture'],
    'model_zoo.py': ['--x'],
    'benchmark.py': [
        'kernels',
        'classification',
        'detection',
        '--only',
        '--ranks',
        '--seconds',
        '--runtimes',
        '--batches',
        '--output',
        '--threads',
    ],
    'cluster_filters.py': ['--levels', '--datasets', '--starts', '--inertia', '--seed', '--output'],
    'reproduce.py': ['--output', '--data'],
}
VALUES = st.one_of(
    st.sampled_from(
        [
            '',
            '-',
            '--',
            '0',
            '-1',
            '1',
            '1e9',
            'nan',
            'inf',
            '99999999999999999999',
            'box',
            'mask',
            'auto',
            'cpu',
            'cuda:99',
            'meta',
            'resnet5',
            'none.yaml',
            'nowhere/out.safetensors',
            '/dev/null',
            '.',
            '..',
            'a.json',
            'x' * 300,
            'é',
            'a\nb',
            '../../x.pt',
            'hf-hub:a/b',
            'optim.lr=x',
            'optim.lr',
            '=',
            'model.rcnn.x=1',
            '[0.1]*2',
            '[',
            'norton_resnet50.r999',
            'file:///etc/passwd',
            '%s',
            '{}',
            '*',
            '~',
        ]
    ),
    st.text(st.characters(blacklist_categories=['Cs'], blacklist_characters='\0'), max_size=8),
    st.integers().map(str),
)


@st.composite
def _lines(draw: Any) -> tuple[str, list[str]]:
    tool = draw(st.sampled_from(sorted(OPTIONS)))
    arguments: list[str] = []
    for name in draw(st.lists(st.sampled_from(OPTIONS[tool]), max_size=4)):
        arguments.append(name)
        arguments += draw(st.lists(VALUES, max_size=2))
    # whatever the rest means, one thing is missing: no line may begin to work for minutes
    missing = {
        'train_det.py': ['--data', 'no/folder'],
        'eval_det.py': ['no.pt'],
        'train_cls.py': ['--weights', 'no.file'],
        'eval_cls.py': ['--weights', 'no.file'],
        'compress.py': ['--checkpoint', 'no.file'],
        'demo_video.py': ['--weights', 'no.file'],
        'export.py': ['--images', 'no/folder'],
        'import_checkpoint.py': ['no.file'],
        'model_zoo.py': ['--unknown'],
        'benchmark.py': ['--output', 'no/folder/a.json'],
        'cluster_filters.py': ['--output', 'no/folder/a.json'],
        'reproduce.py': ['--unknown'],
    }[tool]
    return tool, [*arguments, *missing]


def use(line: tuple[str, list[str]], folder: Path) -> None:
    """Call a tool; anything but success, or one line and code 1 or 2, is raised as it came."""
    name, arguments = line
    code, _, err = run_tool(name, *arguments)
    if code == 0:
        return
    lines = [text for text in err.splitlines() if text.strip()]
    if code not in (1, 2) or not lines or not lines[-1].startswith('error:') or 'Traceback' in err:
        raise AssertionError(f'code {code}, {len(lines)} lines: {err[-300:]}')
    raise ValueError(lines[-1])


def _import() -> None:
    sys.path.insert(0, str(TOOLS))


def surface() -> Any:
    from .surface import Surface

    return Surface('tool arguments', _lines(), use, 2500, _import)


SURFACES = [surface()]
