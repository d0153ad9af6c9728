"""Environment variables in paths: `${DATA}/photos`, and `~/photos`, which is `${HOME}/photos`.

A path keeps its variables wherever it is stored and shown: in the configuration, the work list and messages.
So a corpus does not publish their values, and goes on where they have others. The value is put in when a file
is opened, and only for the variables that a configuration of this process names: a stranger's corpus that
says `${AWS_SECRET_ACCESS_KEY}` gets nothing. Workers get the values of the process that started them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

_NAME = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_taken: dict[str, str] = {}


def take(path: str) -> str:
    """A path of a configuration, whose variables this process may put in from now on; `~/` is `${HOME}/`.

    Raises:
        ValueError: a variable is not set, or is empty.
    """
    if path == "~" or path.startswith("~/"):
        path = "${HOME}" + path[1:]
    for name in names(path):
        if "*" in path[: path.rindex("${")]:
            raise ValueError("a variable after a `*` cannot be put in; write that part of the path out")
        value = os.environ.get(name) or (os.path.expanduser("~") if name == "HOME" else "")
        if not value:
            raise ValueError(f"the environment variable {name} is not set; export it, or write the path out")
        _taken[name] = value
    return path


def expand(path: str) -> str:
    """The path with the values of the variables that were taken. Others stay as they are written."""
    return _NAME.sub(lambda found: _taken.get(found[1], found[0]), path) if "${" in path else path


def take_folders(path: str) -> None:
    """Put in those variables of a path from a corpus that hold an absolute path of this machine.

    For a reader who has allowed the corpus to name any place here: other values are not for its maker.
    """
    for name in names(path):
        if os.environ.get(name, "").startswith("/"):
            _taken.setdefault(name, os.environ[name])


def names(path: str) -> list[str]:
    """The environment variables that a path names."""
    return _NAME.findall(path)


def take_all(values: Any) -> Any:
    """The same values, as YAML gives them, after `take` of every text that may be a path.

    A text with a variable that is not set stays as it is: it may be no path, but a prompt.
    """

    def try_to_take(text: str) -> str:
        try:
            return take(text)
        except ValueError:
            return text

    return _each(values, try_to_take)


def expand_all(values: Any) -> Any:
    """The same values, with the variables in every text expanded."""
    return _each(values, expand)


def _each(values: Any, change: Callable[[str], str]) -> Any:
    if isinstance(values, str):
        return change(values)
    if isinstance(values, dict):
        return {name: _each(value, change) for name, value in values.items()}
    return [_each(value, change) for value in values] if isinstance(values, list) else values


def fold(url: str, pattern: str) -> str:
    """A URL that an expanded pattern named, with the variables of the pattern again."""
    head = pattern[: pattern.rindex("}") + 1]
    expanded = expand(head)
    return head + url[len(expanded) :] if url.startswith(expanded) else url


def taken() -> dict[str, str]:
    """The variables that this process may put in, for the workers that it starts."""
    return dict(_taken)


def install(values: Mapping[str, str]) -> None:
    """Put in these variables, which another process has taken."""
    _taken.update(values)
