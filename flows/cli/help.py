"""The help of a command: plain text with every name in full, however narrow the terminal is."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

WIDE: dict[str, Any] = {"max_content_width": 100}
"""Settings of the whole command line: help takes the width of the terminal, up to this many letters."""


class Command(TyperCommand):
    """A command whose options are listed with their whole names; a long one has its help below it."""

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
