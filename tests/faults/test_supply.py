"""Dependencies are bounded and pinned for tests; importing the packages opens no connection and starts no process."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from tool_runner import ROOT

LISTEN = """
import sys
heard, network = [], ('socket.connect', 'socket.getaddrinfo', 'socket.bind', 'urllib.Request', 'os.system')
sys.addaudithook(lambda event, arguments: heard.append((event, str(arguments))) if event in network else None)
import {module}
print(heard)
"""


@pytest.mark.parametrize('module', ['norton_timm', 'detection.training', 'detection.demo'])
def test_an_import_opens_no_connection(module: str) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ('NO_ALBUMENTATIONS_UPDATE', 'HF_HUB_OFFLINE')}
    done = subprocess.run(
        [sys.executable, '-c', LISTEN.format(module=module)], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'


def requirements() -> list[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    groups = [setup['options']['install_requires'], *setup['options.extras_require'].values()]
    return [Requirement(line) for group in groups for line in group.splitlines() if line.strip()]


def test_every_dependency_is_bounded_on_both_sides() -> None:
    open_ended = {
        r.name
        for r in requirements()
        if not r.name.startswith('types-') and not {'<', '>='} <= {s.operator for s in r.specifier}
    }
    assert not open_ended


def test_the_pinned_versions_are_within_the_bounds() -> None:
    lines = (ROOT / 'constraints.txt').read_text().splitlines()
    pins = {p.name.lower(): p for p in map(Requirement, (line for line in lines if not line.startswith('#')))}
    bounds = {r.name.lower(): r for r in requirements()}
    needed = {name for name in bounds if name in pins}
    assert len(needed) > 25 and 'torch' in needed and 'timm' in needed
    for name in needed:
        version = next(iter(pins[name].specifier)).version
        assert bounds[name].specifier.contains(version), (name, version)
