"""The rooms: what each may import, that no arrow runs back, and that a public name means one thing.

All imports are read from the source, those inside functions too.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import norton_timm

ROOT = Path(__file__).resolve().parents[1]

# room -> the rooms of its own package that it may import
CORE = {
    'utils': '',
    'tensors': '',
    'layers': 'utils tensors',
    'graph': 'utils layers',
    'profiling': 'utils layers',
    'compression': 'utils tensors layers graph profiling',
    'search': 'utils tensors layers graph profiling compression',
    'checkpoints': 'utils layers graph',
    'models': 'utils layers profiling compression checkpoints',
    'inference': 'utils layers graph profiling',
    'training': 'utils tensors layers graph profiling compression search checkpoints models inference',
    'studies': 'utils tensors layers graph profiling compression search checkpoints models inference training',
}
DETECTION = {
    'visual': '',
    'data': '',
    'rcnn': '',
    'evaluation': 'data visual',
    'training': 'visual data rcnn evaluation',
    'demo': 'training visual rcnn data',
    'studies': 'training rcnn',
}
TABLE = {f'norton_timm.{room}': {f'norton_timm.{r}' for r in may.split()} for room, may in CORE.items()}
TABLE |= {f'detection.{room}': {f'detection.{r}' for r in may.split()} for room, may in DETECTION.items()}
# modules that belong to no room; every room of their package may import them
LOBBY = {'norton_timm', 'detection', 'detection.tasks'}

# public names that two modules define, and why
TWICE = {
    'log': "each module's own logger",
    'default_cfgs': "timm reads it from each family's module",
    'DataConfig': 'a section of the two run configurations, which users see as the key `data`',
    'OptimConfig': 'a section of the two run configurations, which users see as the key `optim`',
}


def sources() -> dict[str, ast.Module]:
    """Parsed modules by dotted name."""
    paths = [path for package in ('norton_timm', 'detection') for path in sorted((ROOT / package).rglob('*.py'))]
    names = ['.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__') for path in paths]
    return {name: ast.parse(path.read_text(encoding='utf-8')) for name, path in zip(names, paths)}


SOURCES = sources()


def room_of(module: str) -> str:
    """The room of a module; the module itself where it stands in none."""
    room = '.'.join(module.split('.')[:2])
    return room if room in TABLE else module


def imports_of(module: str) -> Iterator[tuple[str, str]]:
    """(module, name) of everything of ours that a module imports; the name is '' for `import module`."""
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            yield from ((a.name, '') for a in node.names if a.name.split('.')[0] in ('norton_timm', 'detection'))
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f'{module} imports relatively'
            if node.module.split('.')[0] in ('norton_timm', 'detection'):
                yield from ((node.module, a.name) for a in node.names)


def exports_of(room: str) -> set[str]:
    """`__all__` of a room."""
    for node in SOURCES[room].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__':
            return set(ast.literal_eval(node.value))
    raise AssertionError(f'{room} has no __all__')


def test_every_module_stands_in_a_room() -> None:
    assert {room_of(module) for module in SOURCES} == set(TABLE) | LOBBY


@pytest.mark.parametrize('module', [m for m in SOURCES if m != 'norton_timm'])
def test_rooms_import_what_the_table_says_and_only_what_is_handed_on(module: str) -> None:
    room = room_of(module)
    for source, name in imports_of(module):
        other = room_of(source)
        if other == room:
            continue
        if other in LOBBY:
            assert module == 'detection' or other.split('.')[0] == module.split('.')[0] or name == '', (source, name)
            continue
        if module != 'detection' and other.split('.')[0] == module.split('.')[0]:
            assert other in TABLE[room], f'{room} may not import {other}'
        assert not module.startswith('norton_timm') or source.startswith('norton_timm'), f'the core imports {source}'
        assert source == other and name, f'import {name} of {source} from {other}'
        assert name in exports_of(other), f'{other} does not hand {name} on'
        assert not name.startswith('_'), f'{name} of {source} is private'


def test_no_circles() -> None:
    arrows: dict[str, set[str]] = defaultdict(set)
    for module in SOURCES:
        if module in TABLE or module in ('norton_timm', 'detection'):  # a room's list of what it hands on
            continue
        for source, name in imports_of(module):
            target = f'{source}.{name}' if f'{source}.{name}' in SOURCES else source
            if target not in LOBBY:
                arrows[module].add(target)
    for room in TABLE:
        arrows[room] = {source for source, _ in imports_of(room) if source != room}
    TopologicalSorter(arrows).prepare()  # raises CycleError


def test_a_room_tells_what_it_is_for_and_nothing_else() -> None:
    for room in TABLE:
        kinds = {type(node).__name__ for node in SOURCES[room].body[1:]}
        assert ast.get_docstring(SOURCES[room]) and kinds <= {'ImportFrom', 'Assign'}, room


def test_the_core_knows_no_detectors() -> None:
    for module, tree in SOURCES.items():
        if module.startswith('norton_timm'):
            for node in ast.walk(tree):
                names = [node.module or ''] if isinstance(node, ast.ImportFrom) else []
                names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                assert not any(name.startswith(('torchvision.models.detection', 'detection')) for name in names), module


def public_names(tree: ast.Module) -> set[str]:
    """What a module defines at its top, private names aside."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return {name for name in found if not name.startswith('_')}


def test_a_public_name_is_defined_once_or_for_a_reason() -> None:
    homes = defaultdict(list)
    for module, tree in SOURCES.items():
        for name in public_names(tree):
            homes[name].append(module)
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert {n: m for n, m in twice.items() if n not in TWICE} == {}
    assert set(TWICE) == set(twice), 'a reason without a name that needs it'


def test_no_function_of_the_contract_hides_a_module() -> None:
    assert not {m.rpartition('.')[2] for m in SOURCES if m.count('.') == 1} & (set(norton_timm.__all__) - {'models'})


def test_every_name_of_the_contract_is_there() -> None:
    for name in norton_timm.__all__:
        assert getattr(norton_timm, name) is not None
    with pytest.raises(AttributeError, match='no attribute'):
        norton_timm.nothing  # noqa: B018
    assert set(norton_timm.__all__) < set(dir(norton_timm))
