"""The command `copy`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import suggest
from .progress import counting_parts

if TYPE_CHECKING:
    from ...pipeline.corpus.copy import CopyReport


def copy(
    corpus: Annotated[
        str,
        typer.Argument(
            help="The corpus: the `out` of its configuration, a folder or a URL.", show_default=False
        ),
    ],
    to: Annotated[
        str,
        typer.Argument(help="Folder or URL of the copy, such as s3://bucket/corpus.", show_default=False),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be copied, and copy nothing.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Number of files that are copied at a time.")] = 8,
) -> None:
    """Copy a corpus to another folder or bucket, or bring an earlier copy up to date.

    Every file is verified on its way. The copy is not visible before all of it is there. A copy that was
    interrupted goes on when the same command is run again.
    """
    from ...pipeline.corpus.copy import copy as copy_corpus

    with counting_parts() as progress:
        report = copy_corpus(corpus, to, dry_run=dry_run, threads=threads, progress=progress)
    verb = "would copy" if dry_run else "copied"
    print(f"{verb} {report.files:,} files, {_size(report.bytes)}", end="")
    print(f"; {report.present:,} were there, {_size(report.present_bytes)}" if report.present else "")
    print(f"{to}: {_what_it_has(report)}")
    if report.lost:
        print(
            f"{report.lost:,} files of earlier versions are not kept in {corpus} any more, so the copy "
            "cannot go back to these versions",
            file=sys.stderr,
        )
    if dry_run:
        suggest(("copy", corpus, to))
    else:
        suggest(("verify", to))


def _what_it_has(report: CopyReport) -> str:
    """The records of a copy, and which of them are new."""
    records = f"records 1 to {report.number} of the commit log"
    if not report.before:
        return records
    return f"{records}; {f'1 to {report.before}' if report.before < report.number else 'all'} were there"


def _size(num_bytes: int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000  # type: ignore[assignment]
    return f"{num_bytes:,.1f} GB"
