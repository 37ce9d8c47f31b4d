"""The options on the page of the command line: `python -m docs.command_line` writes them anew."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout, suppress
from pathlib import Path
from unittest import mock

from benchmarks.tables import fill
from tp_mrs.cli.arguments import parser
from tp_mrs.cli.commands import COMMANDS

PAGE = Path(__file__).with_name("command-line.md")


def write(page: Path) -> None:
    """Put what `tp-mrs COMMAND --help` prints on the page, for each command."""
    for command in COMMANDS:
        fill(command, f"```text\n{help_of(command)}```", page)


def help_of(command: str) -> str:
    """What the command prints with `--help` on a terminal of 80 columns."""
    printed = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="80"), redirect_stdout(printed), suppress(SystemExit):
        parser().parse_args([command, "--help"])
    return printed.getvalue()


if __name__ == "__main__":
    write(PAGE)
