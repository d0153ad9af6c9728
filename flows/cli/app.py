"""The command line: thin over the flows. Only this package prints."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress
from typing import Annotated, Any

import typer

from ...pipeline.io import disk_errors
from ...schemas import renames
from ...schemas.errors import ParaCaptionError
from ...schemas.secrets import shorten
from .. import stopping
from . import ask, benchmark, build, check, copy, corpus, evaluate, init, model, versions
from .examples import example
from .help import WIDE, Command, Group


class _Commands(Group):
    """The commands and options, which also answer to the names they had before."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, renames.translate_command_line(args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # which click would call "Aborted", with exit code 1
            if stopping.was_asked():
                stopping.end()
            raise


MODEL = "Train, use and measure a model"

app = typer.Typer(
    name="paracaption",
    cls=_Commands,
    context_settings=WIDE,
    help="Masks in, verified region captions out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Begin with `paracaption demo`, or write a configuration of your own with `paracaption init`.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        print(f"paracaption {metadata.version('paracaption')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Masks in, verified region captions out."""


for panel, commands in {
    "Build a corpus": (
        *(build.demo, init.init, check.config, check.audit, check.doctor, check.estimate),
        *(build.build, build.merge, build.deploy),
    ),
    "Read a corpus": (
        *(corpus.verify, corpus.inspect, corpus.show),
        *(corpus.explore, corpus.report, corpus.export, copy.copy),
    ),
    "Versions of a corpus": (
        versions.status,
        versions.versions,
        versions.diff,
        versions.undo,
        versions.remove,
    ),
    MODEL: (model.train, evaluate.evaluate, evaluate.profile),
}.items():
    for command in commands:
        app.command(cls=Command, rich_help_panel=panel, epilog=example(command.__name__))(command)
app.command(cls=model.ManyMasks, rich_help_panel=MODEL, epilog=example("caption"))(model.caption)
app.command(cls=model.ManyMasks, rich_help_panel=MODEL, epilog=example("ask"))(ask.ask)
app.add_typer(model.models, name="models", rich_help_panel=MODEL)
app.add_typer(benchmark.benchmarks, name="benchmark", rich_help_panel=MODEL)


def main() -> None:
    """Entry point: what a file, the disk or a person got wrong is one line and exit code 2.

    What is left is a fault of ours, and a traceback.
    """
    _show_old_names()
    _log_no_secrets()
    try:
        app()
    except ParaCaptionError as error:
        print(f"error: {shorten(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        from ...pipeline.io import packages

        name = (error.name or "").partition(".")[0]
        if not packages.is_required(name):
            raise
        print(f"error: {name} is not installed; {packages.how_to_install(name)}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, MemoryError) as error:
        told = disk_errors.to_line(error) if isinstance(error, OSError) else None
        print(f"error: {told or shorten(_of_machine(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def _of_machine(error: OSError | MemoryError) -> str:
    """A file, a disk or a memory that is not as it must be, in a line."""
    from ...pipeline.io.failures import describe

    if isinstance(error, MemoryError):
        return "not enough memory; use a machine with more, or lower the batch sizes or `concurrency`"
    named = getattr(error, "url", None) or error.filename
    where = "" if named is None else f"{os.fsdecode(named) if isinstance(named, bytes) else named}: "
    return f"{where}{describe(error)}; correct the path or its permissions, or run the same command again"


def _log_no_secrets() -> None:
    """Shorten every message that this process logs, whoever logs it."""
    make = logging.getLogRecordFactory()

    def made(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        with suppress(Exception):  # a message that cannot be made is logging's to report
            text = record.getMessage()
            if (shown := shorten(text)) != text:
                record.msg, record.args = shown, ()
        return record

    logging.setLogRecordFactory(made)


def _show_old_names() -> None:
    """Say each old name that was used in one line on stderr, instead of as Python shows a warning."""
    shown: set[str] = set()
    show_other = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, renames.RenamedWarning):
            show_other(message, category, *where)
        elif str(message) not in shown:
            shown.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show
    warnings.simplefilter("always", renames.RenamedWarning)
