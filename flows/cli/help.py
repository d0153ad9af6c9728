"""The help of a command: plain text with every name in full, however narrow the terminal is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

from ...schemas.errors import ConfigError
from ...schemas.secrets import shorten

WIDE: dict[str, Any] = {"max_content_width": 100}
"""Settings of the whole command line: help takes the width of the terminal, up to this many letters."""


_URL_AS_PATH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
"""What `Path` makes of a URL: one slash is left."""


class Command(TyperCommand):
    """A command whose options are listed with their whole names; a long one has its help below it."""

    def invoke(self, ctx: Any) -> Any:
        for parameter in self.params:
            for path in _paths_in(ctx.params.get(parameter.name or "")):
                if found := _URL_AS_PATH.match(path):
                    name = parameter.opts[-1] if parameter.param_type_name == "option" else parameter.name
                    url = shorten(f"{found[1]}://{path[found.end() :]}")
                    what = "has to be a path of this machine, since only a corpus may lie in a bucket"
                    raise ConfigError(f"{name}: {url}: {what}")
        return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)


class Group(TyperGroup):
    """A group whose commands are listed by panel."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if not command.hidden:
                panel = getattr(command, "rich_help_panel", None)
                panel = panel if isinstance(panel, str) else "Commands"
                purpose = command.short_help or (command.help or "").partition("\n\n")[0]
                panels.setdefault(panel, []).append((name, " ".join(purpose.split())))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


def _paths_in(value: Any) -> Iterator[str]:
    """The paths of this machine among what a parameter was given."""
    for each in value if isinstance(value, list | tuple) else (value,):
        if isinstance(each, Path):
            yield str(each)
