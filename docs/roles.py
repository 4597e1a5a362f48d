"""An extension of griffe, which reads the docstrings: roles such as :func:`name`, and examples, become code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r':\w+:`~?([^`]+)`')


class PlainRoles(griffe.Extension):
    """Replaces Sphinx roles, which Markdown does not know, and gives examples the title that griffe reads as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(r'`\1`', obj.docstring.value)
            obj.docstring.value = re.sub(r'^Example:$', 'Examples:', text, flags=re.MULTILINE)
