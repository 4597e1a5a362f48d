"""Shared fixtures: where real data are, seeds, and thread limits."""

from __future__ import annotations

import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def data_dir() -> Path:
    """Directory with the real test data; the test skips where there is none."""
    path = Path(os.environ.get('NORTON_TEST_DATA', ROOT.parent / 'shared' / 'data'))
    if not path.is_dir():
        pytest.skip(f'no test data in {path}: set NORTON_TEST_DATA')
    return path


@pytest.fixture(scope='session')
def tiny_coco(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 + 50 real COCO-2017 images in the standard folder layout."""
    archive = data_dir / 'tiny_coco.tar'
    if not archive.is_file():
        pytest.skip(f'{archive} is missing: tests on real COCO images need it')
    root = tmp_path_factory.mktemp('tiny_coco')
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter='data')
    found = sorted(root.rglob('annotations'))
    assert found, 'the archive holds no annotations folder'
    return found[0].parent
