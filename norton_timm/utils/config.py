"""Safe YAML and typed settings.

YAML from untrusted files is read with limits on its size and depth, and holds plain values only. The values are then
checked against a dataclass of settings, and all problems are reported together.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from torch import Tensor

MOST_CHARACTERS = 1_000_000
MOST_VALUES = 100_000  # with aliases written out: ten short lines of them can stand for 10^10 values
MOST_LEVELS = 50
_T = TypeVar('_T')
_DEEPEST = 8  # dots in a key
_LARGEST = 2**53  # whole numbers up to here are exact in every language


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `3e-1` is a number, `010` is ten, `1:30` is text, and a key stands once (YAML 1.2)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping; a key that stands twice is an error."""
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((value for tag, value in keys if keys.count((tag, value)) > 1), None)
        if twice is not None:
            raise ValueError(f'the key {twice[:60]} stands twice')
        return super().construct_mapping(node, deep)


_NUMBERS = {
    'int': r'[-+]?[0-9]+',
    'float': r'[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)',
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.rpartition(':')[2] not in _NUMBERS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f'tag:yaml.org,2002:{_kind}', re.compile(f'^({_pattern})$'), list('-+0123456789.'))
_Loader.add_constructor('tag:yaml.org,2002:int', lambda loader, node: int(node.value))


def read_plain(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: the text is no YAML, has more than one document, has tags of values that are not plain, is too large
            or too deep, or contains itself.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f'not valid YAML: more than {MOST_CHARACTERS:,} characters')
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _check_size(root, {}, 0)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(f'not valid YAML: deeper than {MOST_LEVELS} levels') from None
    # the constructors of dates, numbers and binaries raise Python's own errors
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(f'not valid YAML: {" ".join(str(error).split())[:200]}') from None


def read_plain_file(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        OSError: it cannot be read.
        ValueError: as in `read_plain`, or the file is not UTF-8.
    """
    try:
        with path.open(encoding='utf-8') as file:
            return read_plain(file.read(MOST_CHARACTERS + 1))  # a device file has no end
    except UnicodeDecodeError:
        raise ValueError('not valid YAML: no text in UTF-8') from None


def _check_size(node: yaml.Node, known: dict[int, int], level: int) -> int:
    """The number of values that a node expands to; raises ValueError for too many, or a node inside itself."""
    if level > MOST_LEVELS:
        raise ValueError(f'deeper than {MOST_LEVELS} levels, or a value that holds itself')
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [n for child in children for n in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_check_size(child, known, level + 1) for child in flat)
        if known[id(node)] > MOST_VALUES:
            raise ValueError(f'more than {MOST_VALUES:,} values once its aliases are written out')
    return known[id(node)]


class ConfigError(ValueError):
    """All problems of a configuration, on one line, separated by semicolons."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__('; '.join(problems))


class Settings:
    """Base of the dataclass that holds a run's settings."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain types, for YAML and checkpoints."""
        return plain(dataclasses.asdict(typing.cast(Any, self)))

    def to_yaml(self) -> str:
        """The settings as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def checked(kind: type[_T], tree: dict[str, Any], problems: Sequence[str], check: Callable[[_T], list[str]]) -> _T:
    """Settings from nested plain types.

    Args:
        kind: dataclass of the settings.
        tree: nested keys and values.
        problems: problems that were found earlier; they are reported too.
        check: returns what is wrong with the settings; every value has the right type by then.

    Raises:
        ConfigError: with all problems found.
    """
    found = list(problems)
    settings = settings_from(kind, tree, '', found)
    found += check(settings)
    if found:
        raise ConfigError(found)
    return settings


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping, merged over the file that its key `base` names."""
    path = path.resolve()
    if path in seen:
        raise ConfigError([f'{path.name} is its own base'])
    if not path.is_file():
        raise FileNotFoundError(f'no configuration file {path}')
    try:
        tree = read_plain_file(path) or {}
    except ValueError as error:
        raise ConfigError([f'{path.name} is {error}']) from None
    if not isinstance(tree, dict):
        raise ConfigError([f'{path.name} holds a {type(tree).__name__}, expected a mapping of keys'])
    base = tree.pop('base', None)
    if base is None:
        return tree
    merged = read_yaml(path.parent / str(base), (*seen, path))
    merge(merged, tree)
    return merged


def read_tree(
    path: str | Path | None, overrides: Sequence[str], values: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[str]]:
    """The keys of a run and the problems found: a YAML file with its bases, then `values`, then `overrides`.

    Args:
        path: YAML file; None starts from nothing.
        overrides: `key=value` texts such as `optim.lr=0.01`, the value as in YAML; they win over `values`.
        values: values by dotted key; None means not given.

    Raises:
        ConfigError: a file that is no YAML mapping.
        FileNotFoundError: the file or a base is missing.
    """
    problems: list[str] = []
    tree = read_yaml(Path(path)) if path is not None else {}
    for key, given in (values or {}).items():
        if given is not None:
            merge(tree, nested(key.split('.'), given))
    for text in overrides:
        key, equals, value = text.partition('=')
        if not equals or not key.strip() or key.count('.') > _DEEPEST:
            problems.append(f'override {brief(text)} is not of the form key=value')
            continue
        try:
            merge(tree, nested(key.strip().split('.'), parse(value)))
        except ValueError as error:
            problems.append(f'override {brief(text)}: the value is {error}')
    return tree, problems


def merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    """Write a tree of keys over another, in place."""
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def nested(keys: list[str], value: Any) -> dict[str, Any]:
    """A tree with one value at the end of a path of keys."""
    return {keys[0]: value if len(keys) == 1 else nested(keys[1:], value)}


def parse(text: str) -> Any:
    """A value as YAML reads it."""
    return read_plain(text)


def brief(value: Any) -> str:
    """A value for a message, cut where it is long."""
    value = list(value) if isinstance(value, tuple) else value
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**60 else f'about 2^{value.bit_length()}'
    return text if len(text) <= 80 else f'{text[:76]} ...'


def as_whole(value: Any) -> int | None:
    """The value as a whole number if it is one, of Python, NumPy or torch; None for all else, truth values included."""
    if isinstance(value, (bool, str)) or str(getattr(value, 'dtype', '')).removeprefix('torch.') == 'bool':
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_number(value: Any) -> float | None:
    """The value as a number if it is one, of Python, NumPy or torch; None for all else, truth values included."""
    whole = as_whole(value)
    if whole is not None:
        return whole
    single = isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()
    return float(value) if single or (isinstance(value, numbers.Real) and not isinstance(value, bool)) else None


def outside(values: Mapping[str, float | None], low: float, high: float, above: bool = False) -> list[str]:
    """One problem for each value that is not from `low` to `high`; with `above`, `low` itself is a problem too.

    A value of None was not given and is no problem.
    """
    told = f'more than {low:g}' if above else f'{low:g} or more'
    problems = []
    for key, value in values.items():
        if value is not None and not (value > low if above else value >= low):
            problems.append(f'{key} is {value}, expected {told}')
        elif value is not None and value > high:
            problems.append(f'{key} is {value}, expected at most {high:,}')
    return problems


def plain(value: Any) -> Any:
    """Tuples as lists, for YAML and for files that are read without unpickling."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def settings_from(cls: type, tree: Any, where: str, problems: list[str]) -> Any:
    """A dataclass filled from a tree; a value that does not fit is added to `problems` and keeps its default."""
    hints = typing.get_type_hints(cls)
    if not isinstance(tree, dict):
        problems.append(f'{where.rstrip(".") or "configuration"} is {brief(tree)}, expected keys: {", ".join(hints)}')
        return cls()
    values = {}
    for key, value in tree.items():
        if key not in hints:
            near = get_close_matches(str(key)[:60], list(hints), n=1, cutoff=0.5)
            hint = f'did you mean {where}{near[0]}?' if near else f'expected one of {", ".join(hints)}'
            problems.append(f'unknown key {where}{str(key)[:60]}: {hint}')
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = settings_from(typing.cast(type, hints[key]), value, f'{where}{key}.', problems)
        else:
            try:
                values[key] = _convert(value, hints[key])
            except TypeError as error:
                problems.append(f'{where}{key} is {brief(value)}, expected {error}')
    return cls(**values)


def _convert(value: Any, hint: Any) -> Any:
    """The value as the annotated type; raises TypeError, which names the expected type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if value is None:
            return None
        return _convert(value, options[0])
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        kind = typing.get_args(hint)[0]
        try:
            return tuple(_convert(item, kind) for item in items)
        except TypeError:
            raise TypeError(f'a list of {kind.__name__}') from None
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise TypeError('a mapping of keys')
        return dict(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if hint in (int, float) and isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST:
        raise TypeError('a number of at most 2^53')
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise TypeError('a finite number')
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(
            {'int': 'a whole number', 'float': 'a number', 'str': 'text', 'bool': 'true or false'}[hint.__name__]
        )
    return value
