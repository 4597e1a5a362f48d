"""The three recipes of CONTRIBUTING.md do what they say, each in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tool_runner import ROOT

TEXT = (ROOT / 'CONTRIBUTING.md').read_text()


def blocks(title: str, language: str = 'python') -> list[str]:
    """The fenced blocks of a section."""
    section = TEXT.split(f'## {title}\n')[1].split('\n## ')[0]
    return re.findall(rf'```{language}\n(.*?)```', section, re.S)


def run_python(code: str, package: Path = ROOT) -> str:
    environment = {**os.environ, 'PYTHONPATH': str(package)}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment, cwd=package)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_recipe_is_one_screen() -> None:
    for title in ('Add an architecture', 'Add a criterion', 'Add a layer type'):
        assert len(TEXT.split(f'## {title}\n')[1].split('\n## ')[0].splitlines()) <= 42, title


def test_a_criterion() -> None:
    (recipe,) = blocks('Add a criterion')
    used = re.search(r'`(norton_timm\.CompressionSpec\(.*?\))` uses it', TEXT)
    out = run_python(f"""{recipe}
import norton_timm, timm
x = torch.randn(5, 4, 3, 3)
found = norton_timm.filter_distance(x, 'chebyshev')
wanted = (x.flatten(1)[:, None] - x.flatten(1)).abs().amax(2)
torch.testing.assert_close(found, wanted)
model, report = norton_timm.compress(timm.create_model('resnet20_cifar'), {used[1]})
print(report.spec['criterion'], report.after.macs < report.before.macs)
""")
    assert out == 'chebyshev True\n'


def test_a_layer_type() -> None:
    (recipe,) = blocks('Add a layer type')
    layer, handler = recipe.split('@register')
    out = run_python(f"""{layer}
import norton_timm
model = nn.Sequential(nn.Conv2d(3, 8, 3), Blur(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(100, 2))
spec, x = norton_timm.CompressionSpec(rank=0, rates={{'0': 0.5}}), torch.rand(1, 3, 7, 7)
print(norton_timm.compress(model, spec, x)[1].layers[0].kept)
@register{handler}
small, report = norton_timm.compress(model, spec, x)
print(report.layers[0].kept, len(small[1].kernel), tuple(small(x).shape))
""")
    assert out == '8\n4 4 (1, 2)\n'


def test_an_architecture(tmp_path: Path) -> None:
    (row,), (entrypoint,) = blocks('Add an architecture', 'yaml'), blocks('Add an architecture')
    shutil.copytree(ROOT / 'norton_timm', tmp_path / 'norton_timm', ignore=shutil.ignore_patterns('__pycache__'))
    tags = tmp_path / 'norton_timm' / 'models' / 'tags.yaml'
    tags.write_text(tags.read_text().replace('norton:\n', f'norton:\n{row}', 1))
    entrypoints = tmp_path / 'norton_timm' / 'models' / 'entrypoints.py'
    entrypoints.write_text(f'{entrypoints.read_text()}\n\n{entrypoint}')
    out = run_python("""import timm, norton_timm
dense, small = (norton_timm.count(timm.create_model(n)).macs for n in ('resnet26', 'norton_resnet26.r031'))
print(round(100 - 100 * small / dense), 'norton_resnet26.r031' in timm.list_models(include_tags=True))
""", tmp_path)  # fmt: skip
    assert out == '31 True\n'
