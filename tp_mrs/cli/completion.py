"""Completion of commands, options and file names in a shell, by shtab."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from typing import Any

from tp_mrs.errors import InputError, check_choice

from .arguments import SHELLS, parser


def completion_script(shell: str) -> str:
    """What a shell reads to complete `tp-mrs`.

    Raises:
        InputError: another shell, or shtab is not installed.
    """
    check_choice("shell", shell, SHELLS)
    try:
        shtab: Any = importlib.import_module("shtab")
    except ImportError as error:
        raise InputError('shell: completion needs shtab; pip install "tp_mrs[cli]"') from error
    made = parser()
    files = {"FILE": shtab.FILE, "MODEL": shtab.FILE, "DIR": shtab.DIRECTORY}
    for action in _actions(made):
        if action.metavar in files:
            vars(action)["complete"] = files[str(action.metavar)]
    return str(shtab.complete(made, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
