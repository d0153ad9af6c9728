"""What the command line shows while something runs. It goes to stderr, so that stdout has only results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from ...model_training.evaluation.profile import Row
    from ...pipeline.executor.progress import Progress


@contextmanager
def counting(title: str) -> Iterator[Callable[[int], None]]:
    """Show a count and its rate on a terminal. Shows nothing if stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description} {task.completed:,}"), TimeElapsedColumn())
    rate = TextColumn("{task.fields[rate]}")
    console = Console(stderr=True)
    start = time.monotonic()
    with Progress(*columns, rate, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, rate="")

        def show(done: int) -> None:
            bar.update(task, completed=done, rate=f"{done / (time.monotonic() - start + 1e-9):,.0f}/s")

        yield show


@contextmanager
def counting_parts() -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar for each kind of work on a terminal. Shows nothing if stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


def count(noun: str, number: int) -> str:
    """A number of things, such as "1 photo" and "2,000 photos"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show_row(row: Row) -> None:
    """Print a measurement of `profile` when it is made."""
    print(
        f"{row.study:<12} {row.mode:<10} regions {row.regions}  length {row.length}  steps {row.steps}  "
        f"forwards {row.forwards:.1f}  tokens/forward {row.tokens_per_forward:.1f}  {row.seconds:.4f} s",
        file=sys.stderr,
    )


class TrainingView:
    """Prints a line every `every` steps, and one for each step that was skipped."""

    def __init__(self, every: int):
        self.every = every
        self.start: tuple[int, float] | None = None

    def show(self, record: dict[str, Any]) -> None:
        """Take the record of a step."""
        step, steps = record["step"], record["steps"]
        self.start = self.start or (step - 1, time.monotonic() - float(record["seconds"]))
        if "why" in record:
            names = f"; {', '.join(record['samples'])}" if record["samples"] else ""
            print(f"step {step:,} skipped: {record['why']}{names}", file=sys.stderr)
        if step % self.every and step != steps:
            return
        rate = (time.monotonic() - self.start[1]) / (step - self.start[0])
        print(
            f"step {step:,} of {steps:,}  loss {float(record['loss']):.3f}  "
            f"norm {float(record['norm']):.2f}  "
            f"{record['tokens_per_s']:,.0f} tokens/s  {record['regions_per_s']:,.1f} regions/s  "
            f"MFU {record['mfu']:.0%}  data wait {record['data_wait']:.0%}  {record['memory_gb']:.1f} GB  "
            f"skipped {record['skipped']:,}  {duration(rate * (steps - step))} left",
            file=sys.stderr,
        )


class BuildView:
    """A live table of the subsets that are being built: a row for each stage, with drops by reason and speed.

    Above it is a line for each subset, also of those that have ended.

    Args:
        live: draw the table. Otherwise print a line now and then, which leaves the terminal to a debugger.
    """

    def __init__(self, live: bool = True):
        self.wanted = live
        self.subsets: dict[str, Progress] = {}
        self.printed: dict[str, tuple[int, float]] = {}

    def __enter__(self) -> BuildView:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True)
        self.drawn = self.wanted and self.console.is_terminal
        self.live = Live(console=self.console, refresh_per_second=2, transient=True)
        if self.drawn:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show(self, progress: Progress) -> None:
        """Draw the table, or print a line at most every 30 seconds for each subset if there is no table."""
        self.subsets[progress.subset] = progress
        if self.drawn:
            self.live.update(draw_build([*self.subsets.values()]))
            return
        done, printed_s = self.printed.get(progress.subset, (-1, 0.0))
        is_due = progress.done == progress.pending or time.monotonic() - printed_s > _EVERY_S
        if done != progress.done and is_due:
            self.printed[progress.subset] = (progress.done, time.monotonic())
            self.console.print(_title(progress))


_EVERY_S = 30.0
"""How often a line is printed where no table is drawn."""


def draw_build(subsets: list[Progress]) -> Table:
    """The table of a build.

    Args:
        subsets: in the order in which they began; the stages of those that have not ended are shown.
    """
    from rich import box
    from rich.table import Table

    running = [each for each in subsets if not each.ended] or subsets[-1:]
    several = len(running) > 1  # the paper's two fit on a screen of 80 columns and 24 lines
    table = Table(
        title="\n".join(map(_title, subsets)),
        title_justify="left",
        box=box.SIMPLE_HEAD if several else box.HEAVY_HEAD,
        show_edge=not several,
        pad_edge=not several,
    )
    for column in ("stage", "units", "regions", "asked", "regions/s", "busy", "dropped"):
        is_text = column in ("stage", "dropped")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=several and not is_text)
    for progress in running:
        if several:
            table.add_row(f"[bold]{progress.subset}")
        _add_stages(table, progress, several)
    return table


def _add_stages(table: Table, progress: Progress, in_one_line: bool) -> None:
    from rich.text import Text

    for name, stage in progress.stages.items():
        reasons = [
            f"{key.partition('/')[2]} {count:,}"
            for key, count in progress.dropped.most_common()
            if key.partition("/")[0] == name
        ]
        rate = f"{stage.regions / progress.seconds:,.1f}" if progress.seconds else ""
        cells = (f"{stage.units:,}", f"{stage.regions:,}", f"{stage.asked:,}" if stage.asked else "")
        used = progress.utilization.get(name)
        share = None if used is None else used.busy_share
        told = Text(", ".join(reasons), no_wrap=in_one_line, overflow="ellipsis")
        table.add_row(name, *cells, rate, "" if share is None else f"{share:.0%}", told)


def _title(progress: Progress) -> str:
    left = "" if not progress.seconds_left else f", about {duration(progress.seconds_left)} left"
    return (
        f"{progress.subset}: {progress.done:,} of {progress.pending:,} units, {progress.regions:,} regions, "
        f"{progress.kept:,} kept, {duration(progress.seconds)}{left}"
    )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
