"""Runs a command in this process as the console script would: its exit code, and what it printed."""

from __future__ import annotations

import io
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest import mock

from paracaption.flows.cli import app as cli


class Answer(NamedTuple):
    """How a command ended.

    Attributes:
        code: the exit code; -1 where Python would show a traceback, which `err` has then.
        out: what it printed.
        err: what it printed on stderr.
    """

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of stderr that are no warnings."""
        return [line for line in self.err.splitlines() if not line.startswith("warning: ")]


def run(*args: object) -> Answer:
    """Run `paracaption ARGS`."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    command = ["paracaption", *map(str, args)]
    with mock.patch("sys.argv", command), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except Exception:  # noqa: BLE001 - that is what is looked for
            code = -1
            traceback.print_exc(file=err)
    return Answer(code, out.getvalue(), err.getvalue())
