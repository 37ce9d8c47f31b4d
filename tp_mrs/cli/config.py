"""Options of a command from a file and to a file, YAML or JSON, under the names that they have on the command line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tp_mrs._version import __version__
from tp_mrs.errors import InputError, check_choice
from tp_mrs.files import write_bytes

REPLACES = {
    "macs": ("params", "channels"),
    "params": ("macs", "channels"),
    "channels": ("macs", "params"),
    "model": ("model_kwargs",),
    "checkpoint": ("pretrained",),
    "pretrained": ("checkpoint",),
}
"""Option → others that make no sense beside it: given on the command line, it also takes their place."""


SHOWING = ("out", "quiet", "json", "dry-run", "device")
"""What does not make a run another one."""


def parse_with_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command line; what it leaves out comes from the file that `--config` names, if it does.

    Raises:
        InputError: the file cannot be read, is another command's, or has an unknown key or a value of the wrong kind.
    """
    given = parser.parse_args(argv)
    if getattr(given, "config", None) is not None:
        command = _commands(parser)[given.command]
        settings = read_config(given.config, given.command, command)
        replaced = {other for name, others in REPLACES.items() if getattr(given, name, None) for other in others}
        command.set_defaults(**{name: value for name, value in settings.items() if name not in replaced})
        given = parser.parse_args(argv)
    if "config" in given:
        del given.config
    return given


def read_config(path: str | Path, name: str, command: argparse.ArgumentParser) -> dict[str, Any]:
    """The options in a file for the command of that name; raises as `parse_with_config`."""
    content = _content(Path(path).expanduser())
    meant = content.pop("command", name)
    if meant != name:
        raise InputError(f"command: {path} is for tp-mrs {str(meant)[:40]}, not for tp-mrs {name}")
    options = {action.dest: action for action in command._actions if action.dest not in ("help", "config")}
    found: dict[str, Any] = {}
    for key, value in content.items():
        option = str(key).replace("-", "_")
        if option not in options:
            guess = difflib.get_close_matches(option, options, n=1)
            hint = f"did you mean {guess[0].replace('_', '-')!r}?" if guess else f"see tp-mrs {name} --help"
            raise InputError(f"config: {path} has {key!r}, which is no option of tp-mrs {name}; {hint}")
        if option in found:
            raise InputError(f"config: {path} has {option.replace('_', '-')!r} twice; leave one out")
        found[option] = None if value is None else _checked(options[option], f"{key} (in {path})", value)
    return {option: value for option, value in found.items() if value is not None}


def write_config(path: str | Path, arguments: argparse.Namespace) -> Path:
    """Write all arguments of a command, so that `tp-mrs COMMAND --config path` gives the same again."""
    content = _settings(arguments)
    command = content.pop("command")
    head = f"# tp-mrs {__version__}; to repeat it: tp-mrs {command} --config {Path(path).name}\n"
    text: str = _yaml().safe_dump({"command": command, **content}, sort_keys=False, allow_unicode=True)
    return write_bytes(path, (head + text).encode())


def check_same_run(folder: str | Path, arguments: argparse.Namespace) -> None:
    """Raise `InputError` if the folder has the results of a run with other settings, which these would replace."""
    path = Path(folder).expanduser() / "run.yaml"
    if not path.is_file():
        return
    there, here = _content(path), _settings(arguments)
    if there.get("command") != here["command"]:
        what = f"tp-mrs {there.get('command')}"
    else:
        other = next((name for name in here if name not in SHOWING and there.get(name) != here[name]), None)
        if other is None:
            return
        what = f"a run with {other} {there.get(other)} (here {here[other]})"
    raise InputError(f"out: {folder} has the results of {what}; choose another folder, or remove it")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a command under the names of its options."""
    return {name.replace("_", "-"): value for name, value in vars(arguments).items()}


def _commands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    return next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _yaml() -> Any:
    try:
        return importlib.import_module("yaml")
    except ImportError as error:
        raise InputError("config: YAML needs pyyaml; install tp_mrs[cli]") from error


def _content(path: Path) -> dict[Any, Any]:
    """A file as a dictionary; an empty one has no keys."""
    read, kind = (json.loads, "JSON") if path.suffix == ".json" else (_yaml().safe_load, "YAML")
    errors = ValueError if kind == "JSON" else (ValueError, _yaml().YAMLError)
    try:
        content = read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config: cannot read {path} ({error.strerror})") from error
    except errors as error:
        raise InputError(f"config: {path} is not valid {kind} ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict | None):
        raise InputError(f"config: expected {path} to hold options, such as epochs: 6, got {type(content).__name__}")
    return dict(content or {})


def _checked(option: argparse.Action, key: str, value: Any) -> Any:
    """The value as the command line would have given it; raises `InputError` naming `key` if it couldn't have."""
    if isinstance(option, argparse.BooleanOptionalAction):
        return _of(key, value, bool, "true or false")
    if option.nargs == "*":
        return _of(key, value, dict, "arguments of the model, such as {channels: [32, 64]}")
    if option.nargs == "+":
        return [_scalar(option, key, each) for each in _of(key, value, list, "a list, such as [fgsm, pgd-20]")]
    return _scalar(option, key, value)


def _scalar(option: argparse.Action, key: str, value: Any) -> Any:
    if option.type is int:
        return _of(key, value, int, "a whole number")
    if option.type is float:
        try:
            return float(_of(key, value, (int, float, str), "a number"))  # YAML takes 1e-3 for text
        except ValueError as error:
            raise InputError(f"{key}: expected a number, got {value!r}") from error
    text = str(_of(key, value, (str, int, float), "text"))
    if option.choices is not None:
        check_choice(key, text, option.choices)
    return text


def _of(key: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> Any:
    """The value if it is of that kind, and no truth value in place of a number."""
    if isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{key}: expected {expected}, got {value!r}")
