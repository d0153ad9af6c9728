"""What a check before a run has found: one line for each, and a run that is refused on a FAIL."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from ...schemas.errors import ConfigError, one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

OK, WARN, FAIL = "ok", "warn", "FAIL"


class Finding(msgspec.Struct, frozen=True):
    """One line of the report.

    Attributes:
        subject: what was checked.
        state: `OK`, `WARN` or `FAIL`.
        found: what was found.
        fix: what to do about it; "" if there is nothing to do.
    """

    subject: str
    state: str
    found: str
    fix: str = ""


def try_check(subject: str, fix: str, check: Callable[..., str], *args: Any) -> Finding:
    """Run a check that returns what it found; whatever it raises becomes a FAIL.

    Args:
        subject: what is checked.
        fix: what to do if the error itself does not say.
        check: returns the text of an `OK` finding.
        *args: for `check`.
    """
    try:
        return Finding(subject, OK, check(*args))
    except Exception as error:  # noqa: BLE001 - a backend or a file system may raise anything
        return failed(subject, error, fix)


def failed(subject: str, error: Exception, fix: str) -> Finding:
    """The FAIL of an error. Errors of ours say what to do after a semicolon; `fix` is for the others."""
    found, _, own_fix = one_line(error).removeprefix(f"{subject}: ").partition("; ")
    return Finding(subject, FAIL, found, own_fix or fix)


def refuse_failures(findings: Iterable[Finding]) -> None:
    """Stop at what cannot work.

    Raises:
        ConfigError: has a line for each FAIL: what was checked, what is wrong, what to do.
    """
    lines = [f"{each.subject}: {each.found}; {each.fix}" for each in findings if each.state == FAIL]
    if lines:
        raise ConfigError("\n".join(lines))


def render_findings(findings: list[Finding]) -> RenderableType:
    """The report as a table and a count of each state."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    style = {OK: "green", WARN: "yellow", FAIL: "bold red"}
    for each in findings:
        found = Text(each.found)
        if each.fix:
            found.append(f"\n-> {each.fix}", "dim" if each.state == OK else "italic")
        table.add_row(Text(each.state, style[each.state]), Text(each.subject), found)
    counts = {state: sum(each.state == state for each in findings) for state in (OK, WARN, FAIL)}
    return Group(table, "", ", ".join(f"{count} {state}" for state, count in counts.items()))
