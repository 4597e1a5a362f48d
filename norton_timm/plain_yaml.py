"""YAML of plain values from files that nobody vouches for: small, shallow, and no larger read than written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST_CHARACTERS = 1_000_000
MOST_VALUES = 100_000  # with aliases written out: ten short lines of them can stand for 10^10 values
MOST_LEVELS = 50


def read_plain(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: no YAML, more than one document, tags of other than plain values, or a document that is too large,
            too deep, or holds itself.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f'not valid YAML: more than {MOST_CHARACTERS:,} characters')
    try:
        loader = yaml.SafeLoader(text)
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
    # constructors of dates, numbers and binaries raise what Python's own do
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(f'not valid YAML: {" ".join(str(error).split())[:200]}') from None


def read_plain_file(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        OSError: it cannot be read.
        ValueError: as `read_plain`, or no UTF-8.
    """
    try:
        with path.open(encoding='utf-8') as file:
            return read_plain(file.read(MOST_CHARACTERS + 1))  # a device file has no end
    except UnicodeDecodeError:
        raise ValueError('not valid YAML: no text in UTF-8') from None


def _check_size(node: yaml.Node, known: dict[int, int], level: int) -> int:
    """How many values a node stands for; raises ValueError for too many, or a node inside itself."""
    if level > MOST_LEVELS:
        raise ValueError(f'deeper than {MOST_LEVELS} levels, or a value that holds itself')
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [n for child in children for n in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_check_size(child, known, level + 1) for child in flat)
        if known[id(node)] > MOST_VALUES:
            raise ValueError(f'more than {MOST_VALUES:,} values once its aliases are written out')
    return known[id(node)]
