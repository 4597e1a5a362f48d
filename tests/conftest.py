"""Shared fixtures: seeds, the tools, and where real data are."""

from __future__ import annotations

import os
import random
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tool_runner import ROOT, Done, run_tool


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_release_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the real server for a release: nothing listens at this port."""
    monkeypatch.setenv('NORTON_TIMM_RELEASES', 'http://127.0.0.1:9')


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs a script of tools/ in this process, in an empty folder: `tool('compress.py', 'resnet18')`."""
    monkeypatch.chdir(tmp_path)
    return run_tool


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A shell starts background jobs, such as this test run may be one, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--tested-models', metavar='FILE', help='write the table of tested models to a Markdown file')


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Write what the sweeps recorded of each model, if asked to; only models whose every test passed."""
    path = config.getoption('--tested-models')
    if not path:
        return
    rows: dict[str, dict[str, str]] = {}
    failed: set[str] = set()
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            for key, values in getattr(report, 'user_properties', ()):
                if key == 'tested model':
                    rows.setdefault(values['model'], {}).update(values)
                    failed |= {values['model']} if outcome == 'failed' else set()
    columns = ['model', 'parameters', 'decomposed', 'groups that can be pruned', 'error of exact pruning',
               'operations without a rule']  # fmt: skip
    lines = [
        '# Tested models',
        '',
        'Written by the tests themselves (`pytest tests/test_groups.py tests/test_compress.py -m "slow or not slow" '
        '--tested-models docs/tested_models.md`). Every model here was compressed (rank 1, rate 0.3, random weights), '
        'run, differentiated, given another head, and found to tell the truth in `feature_info`, `num_features` and '
        '`head_hidden_size`. *Error of exact pruning*: relative difference of the outputs after channels with outgoing '
        'weights of zero were removed. Channels that enter an operation without a rule are kept.',
        '',
        '| ' + ' | '.join(columns) + ' |',
        '|' + '---|' * len(columns),
    ]
    lines += ['| ' + ' | '.join(rows[name].get(c, '') for c in columns) + ' |' for name in sorted(rows.keys() - failed)]
    Path(path).write_text('\n'.join(lines) + '\n')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the tests that `thorough.txt` lists into the thorough tier."""
    lines = (ROOT / 'tests' / 'thorough.txt').read_text(encoding='utf-8').splitlines()
    rows = [line.split(maxsplit=1) for line in lines if line and not line.startswith('#')]  # seconds, name
    listed = {name for _, name in rows}
    used = set()
    for item in items:
        names = {item.nodeid, item.nodeid.partition('[')[0], item.nodeid.partition('::')[0]}
        found = listed & names
        used |= found
        if found and not item.get_closest_marker('slow'):
            item.add_marker(pytest.mark.thorough)
    everything = not config.args or [str(a) for a in config.args] in (['tests'], [str(ROOT / 'tests')])
    if everything and listed - used:
        raise pytest.UsageError(f'tests/thorough.txt lists what is no test: {", ".join(sorted(listed - used))}')
