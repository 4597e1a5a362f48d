"""An extension of griffe, which reads the docstrings: roles such as :func:`name` become plain code in the pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r':\w+:`~?([^`]+)`')


class PlainRoles(griffe.Extension):
    """Replaces Sphinx roles, which Markdown does not know."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r'`\1`', obj.docstring.value)
