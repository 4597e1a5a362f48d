"""A surface: a way in for input that nobody vouches for, with what generates it and what is done with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True)
class Surface:
    """One surface.

    Attributes:
        name: in the report.
        inputs: what Hypothesis draws from.
        use: takes an input and the only folder that it may write to; raises what the toolkit raises.
        prepare: called once in a process before the first input, for slow imports and seed files.
        count: inputs of a full run.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    use: Callable[[Any, Path], object]
    count: int
    prepare: Callable[[], object] = lambda: None


def first_of(*readers: Any, path: Path) -> None:
    """Give a file to several readers; the first one's refusal is passed on where all of them refuse."""
    refused = []
    for read in readers:
        try:
            read(path)
        except ValueError as error:
            refused.append(error)
    if len(refused) == len(readers):
        raise refused[0]


def mutations(*seeds: bytes, most: int = 8) -> st.SearchStrategy[bytes]:
    """Seeds, whole or damaged: bytes flipped, set, cut out, doubled, inserted; the end cut off."""
    edit = st.tuples(
        st.sampled_from(['flip', 'set', 'cut', 'double', 'insert', 'end', 'zero']),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.integers(1, 64),
    )
    # damage in the header, where the structure is, more often than in the bulk
    place = st.sampled_from([1.0, 0.3, 0.05])
    return st.builds(_damage, st.sampled_from(seeds), st.lists(st.tuples(edit, place), max_size=most))


def _damage(seed: bytes, edits: list[tuple[tuple[str, float, int, int], float]]) -> bytes:
    data = bytearray(seed)
    for (kind, share, value, length), part in edits:
        if not data:
            break
        at = int(share * part * len(data))
        if kind == 'flip':
            data[at] ^= 1 << (value % 8)
        elif kind == 'set':
            data[at] = value
        elif kind == 'cut':
            del data[at : at + length]
        elif kind == 'double':
            data[at:at] = data[at : at + length]
        elif kind == 'insert':
            data[at:at] = bytes([value]) * length
        elif kind == 'zero':
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            del data[at:]
    return bytes(data)


NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 1e308, -1e308, 1e-308]),
    st.sampled_from([float('nan'), float('inf'), float('-inf'), 0.5, -0.0]),
    st.integers(),
    st.floats(),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=12),
    st.sampled_from(
        ['', '/', '..', '../../etc/passwd', '/dev/zero', 'a' * 5000, '\0', '\ud800', '!!python/name:os', '1e5']
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=4)
    ),
    max_leaves=8,
)


def swapped(tree: Any, edits: list[tuple[int, str, Any]]) -> Any:
    """A copy of nested plain values with some nodes replaced, removed, or added to.

    Args:
        tree: dicts, lists and scalars.
        edits: (number of the node in order, modulo their count; what is done: set, drop, add; the value).
    """
    tree = _copy(tree)
    for number, kind, value in edits:
        places = list(_places(tree))
        if not places:
            return value
        holder, key = places[number % len(places)]
        if kind == 'set':
            holder[key] = value
        elif kind == 'drop':
            del holder[key]
        elif isinstance(holder, dict):
            holder[f'{key}x'] = value
        else:
            holder.append(value)
    return tree


def edits_of(values: st.SearchStrategy[Any] = VALUES, most: int = 4) -> st.SearchStrategy[list[tuple[int, str, Any]]]:
    """What `swapped` takes."""
    edit = st.tuples(st.integers(0, 10_000), st.sampled_from(['set', 'set', 'set', 'drop', 'add']), values)
    return st.lists(edit, min_size=1, max_size=most)


def _places(tree: Any):
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from _places(tree[key])


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, (list, tuple)) else tree
