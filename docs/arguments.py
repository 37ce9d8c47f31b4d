"""What the API reference makes of our docstrings: arguments that share a description get a row each."""

from __future__ import annotations

import re
from typing import Any

import griffe

SHARED = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +.*)*)$", re.MULTILINE)


class SharedDescriptions(griffe.Extension):
    """`macs, params: the budget` becomes `macs: the budget` and `params: the budget`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each class, function and module once it is read."""
        if obj.docstring is not None:
            obj.docstring.value = SHARED.sub(_apart, obj.docstring.value)


def _apart(shared: re.Match[str]) -> str:
    return "\n".join(f"{shared['indent']}{name}: {shared['text']}" for name in shared["names"].split(", "))
