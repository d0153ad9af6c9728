"""The table of `evaluate` with the paper's benchmarks of whole images: ours, the paper's, the difference."""

from __future__ import annotations

from typing import Any

from ...schemas.errors import StageFailed


def show_rows(found: dict[str, Any]) -> None:
    """Print the table, in 80 columns, and below it why there is no score, or where a judge said nothing."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from ...model_training.evaluation.harness import reasons

    rows = found.get("harness")
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row["columns"]))
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("benchmark", no_wrap=True)
    table.add_column("paper", justify="right")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("diff", justify="right")
    for row in rows:
        cells = [text for name in names for text in _cells(row["columns"].get(name), row["paper"])]
        paper = "" if row["paper"] is None else f"{row['paper']:.1f}"
        table.add_row(row["name"], paper, *cells)
    Console().print(table)
    for line in reasons(rows):
        print(line)
    for row in rows:
        if row["note"]:
            print(f"{row['name']}: {row['note']}")


def _cells(outcome: dict[str, Any] | None, paper: float | None) -> tuple[str, str]:
    """What stands in a column, and the difference to the paper."""
    if outcome is None:
        return "", ""
    if outcome["status"] != "scored":
        return outcome["status"], ""
    difference = "" if paper is None else f"{outcome['score'] - paper:+.1f}"
    return f"{outcome['score']:.1f}", difference


def check_rows(found: dict[str, Any]) -> None:
    """Fail if a run has failed. A data set or a judge that cannot be had is no failure.

    Raises:
        StageFailed: names the runs.
    """
    from ...model_training.evaluation.harness import failures

    if failed := failures(found.get("harness") or ()):
        raise StageFailed(
            f"{len(failed)} runs of lmms-eval failed: {', '.join(failed)}; the lines above say why, and the "
            "same command runs them again"
        )
