"""Signals that arrive while a file is read act behind it, and do not make it look damaged."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import norton_timm
from norton_timm.checkpoints import file as checkpoint
from norton_timm.models import dense
from norton_timm.utils import files as pickles
from norton_timm.utils.processes import undisturbed


@pytest.fixture(autouse=True)
def _heeds_ctrl_c() -> Iterator[None]:
    """A shell starts background jobs, such as this test run may be one, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
