"""Files that version 0.1.0 wrote when all modules stood in one folder still load, bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import norton_timm
from detection.training import load_detector
from norton_timm.layers import CPDConv2d, LowRankLinear

DATA = Path(__file__).parent / 'data'
FACTS = json.loads((DATA / 'before_rooms.json').read_text())


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of all tensors."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        found.update(f'{name}{tensor.dtype}{tuple(tensor.shape)}'.encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def outputs(name: str) -> Tensor:
    return torch.tensor([float.fromhex(text) for text in FACTS[name]['outputs']])


@torch.no_grad()
def test_a_compressed_classifier() -> None:
    name = 'before_rooms.safetensors'
    model = norton_timm.load(DATA / name)
    assert digest(model.state_dict()) == FACTS[name]['state']
    kinds = {type(module) for module in model.modules()}
    assert {CPDConv2d, LowRankLinear} <= kinds
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    torch.testing.assert_close(model(images)[0], outputs(name), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_detectors_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = 'before_rooms_detector.pt'
    monkeypatch.chdir(tmp_path)  # the recipe that its configuration names is not needed any more
    model, _ = load_detector(DATA / name)
    assert digest(model.state_dict()) == FACTS[name]['state']
    assert any(isinstance(module, CPDConv2d) for module in model.modules())
    model.eval().roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 3
    image = torch.linspace(0, 1, 3 * 64 * 96).reshape(3, 64, 96)
    torch.testing.assert_close(model([image])[0]['scores'], outputs(name), rtol=1e-4, atol=1e-5)
