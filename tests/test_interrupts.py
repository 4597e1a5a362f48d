"""Signals that arrive while a file is read act behind it, and those of the seconds of imports end a tool at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tool_runner import ROOT, TOOLS, run_process

import norton_timm
from norton_timm.checkpoints import file as checkpoint
from norton_timm.models import dense
from norton_timm.utils import files as pickles
from norton_timm.utils.processes import undisturbed

PRESSED = """
import os, signal, sys

class Pressed:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ['PRESSED_AT']:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Pressed())
"""  # Ctrl-C at the import of a module


pytestmark = pytest.mark.usefixtures('heeds_ctrl_c')


@pytest.mark.parametrize('fails', [False, True])
def test_a_block_is_left_before_a_signal_acts(fails: bool) -> None:
    before, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), undisturbed():
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        if fails:
            raise ValueError('damaged')
    assert reached == [1] and signal.getsignal(signal.SIGINT) is before
    with undisturbed():
        pass


def test_a_signal_does_not_make_a_file_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault harness's find: torch made a ValueError of Ctrl-C, and a whole file was refused with exit code 2."""
    model = timm.create_model('resnet20_cifar')
    norton_timm.save(model, tmp_path / 'saved.safetensors')
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    torch.save(model.state_dict(), tmp_path / 'weights.pt')

    def during(read):
        def wrapped(*args, **kwargs):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ValueError('could not determine the shape') from None
            return read(*args, **kwargs)

        return wrapped

    for module, name, load in (
        (checkpoint, 'safe_open', lambda: norton_timm.load(tmp_path / 'saved.safetensors')),
        (dense, 'load_file', lambda: dense.load_weights(model, tmp_path / 'weights.safetensors')),
        (torch, 'load', lambda: pickles.load_plain(tmp_path / 'weights.pt')),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, during(getattr(module, name)))
            with pytest.raises(KeyboardInterrupt):
                load()
        load()


NEEDED = {  # arguments without which a tool ends before its imports
    'benchmark.py': ['forms'], 'compress.py': ['resnet18', '--output', 'x.safetensors'], 'eval_cls.py': ['resnet18'],
    'eval_det.py': ['x.pt'], 'export.py': ['--model', 'resnet18', '--pretrained', '--images', '.', '--output', 'x'],
    'import_checkpoint.py': ['x.pt', '--output', 'x.pt'], 'train_cls.py': ['resnet18', '--output', 'x'],
    'train_det.py': ['--task', 'box'], 'reproduce.py': ['--study', 'rank', '--dense', 'x.pt'],
    'visualize.py': ['resnet18', 'x', '--image', 'x.png', '--output', 'x.png'],
}  # fmt: skip


@pytest.mark.parametrize(('name', 'module'), [
    *((path.name, 'torch') for path in sorted(TOOLS.glob('[a-z]*.py')) if path.name != 'results_table.py'),
    ('train_cls.py', 'timm'), ('demo_video.py', 'cv2'),
])  # fmt: skip
def test_ctrl_c_ends_a_tool_at_once_while_it_imports(name: str, module: str, tmp_path: Path) -> None:
    (tmp_path / 'sitecustomize.py').write_text(PRESSED)
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = run_process(name, *NEEDED.get(name, []), cwd=tmp_path, env={'PYTHONPATH': path, 'PRESSED_AT': module})
    assert (done.code, done.out, done.err) == (130, '', 'error: interrupted\n')
    assert [file.name for file in tmp_path.iterdir() if file.name not in ('sitecustomize.py', '__pycache__')] == []
