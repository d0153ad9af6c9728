"""The commands on the commit log: `versions`, `diff`, `status`, `undo`, `remove`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...schemas.errors import ConfigError
from .arguments import Corpus, suggest
from .progress import duration

if TYPE_CHECKING:
    from collections import Counter

    from ...pipeline.corpus.history import RegionChange, SubsetDiff
    from ...pipeline.corpus.status import OwnerStatus, RunStatus, Status, SubsetStatus
    from ...pipeline.corpus.undo import Rebuild
    from ...pipeline.io.location import Location

_WATCH_S = 2.0
_SHOWN = 5
"""Units and configuration keys that are listed before the rest is counted."""


def versions(
    corpus: Corpus,
    all: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Print every record. Without this option, the commits of a run are added up, and the "
            "records are left out that say that a process took over the corpus (claim), removed temporary "
            "files (sweep), ended a run normally (done) or summed up the log (checkpoint).",
        ),
    ] = False,
    config: Annotated[
        int | None,
        typer.Option(min=1, help="Print the configuration at the record with this number, and nothing else."),
    ] = None,
) -> None:
    """Print what was committed when: the records of the commit log, oldest first."""
    from ...pipeline.corpus import history
    from ...pipeline.corpus.versions import describe

    out = _path(corpus)
    if config is not None:
        print(history.config_at(out, config), end="")
        return
    records = history.read_log(out)
    width = len(str(len(records)))
    for entry in describe(records, all):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.time_s))
        _print_entry(f"{entry.number:>{width}}  {when}  {entry.kind:<7} ", entry.text)
    suggest(f"paracaption diff {shlex.quote(str(corpus))} BEFORE AFTER    # two of these numbers")


def diff(
    corpus: Corpus,
    before: Annotated[
        int,
        typer.Argument(
            min=0,
            help="Number of a record, as `versions` prints it; 0 is the empty corpus.",
            show_default=False,
        ),
    ],
    after: Annotated[
        int, typer.Argument(min=0, help="Number of the record to compare it with.", show_default=False)
    ],
    limit: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Print up to N examples of lost regions, and N of gained ones."
        ),
    ] = 20,
) -> None:
    """Compare two versions: regions lost and gained, by reason, with examples."""
    from ...pipeline.corpus import history

    out = _path(corpus)
    found = history.diff(out, before, after, limit)
    if not found.subsets:
        print(f"no unit is committed in {before} or in {after}")
    for name, subset in found.subsets.items():
        for line in _subset_lines(name, subset, before, after):
            print(line)
    if found.held_out[0] != found.held_out[1]:
        print("held out of training: {:g} -> {:g} of the images".format(*found.held_out))
    for kind, examples, total in (
        (f"lost: kept in {before} and not in {after}", found.lost, _total(found.subsets, "lost")),
        (f"gained: kept in {after} and not in {before}", found.gained, _total(found.subsets, "gained")),
    ):
        if examples:
            print(f"\n{kind} ({len(examples):,} of {total:,})")
        for each in examples:
            _print_example(each)
    if gone := history.describe_gone(out, found):
        print(f"warning: {gone}", file=sys.stderr)
        raise typer.Exit(1)


def status(
    corpus: Corpus,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the status again every two seconds, until Ctrl-C.")
    ] = False,
) -> None:
    """Show which units are committed or held back, which process writes, how fast, and the time left.

    A unit is held back if too many of its images could not be read; the next build tries it again. This
    command changes nothing, and you can run it while a build runs.
    """
    from ...pipeline.corpus.status import Watcher

    watcher = Watcher(_path(corpus))
    if not watch:
        for line in _status_lines(watcher.read()):
            print(line)
        return
    with suppress(KeyboardInterrupt):
        _watch(watcher.read)


def undo(
    corpus: Corpus,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Take back the last rebuild: restore the former files of its units, and the former configuration.

    This is possible while the replaced files are kept (failures.keep_replaced_days). Units that the rebuild
    added stay. To redo the rebuild, run `undo` again.
    """
    from ...pipeline.corpus import undo as undoing

    out = _path(corpus, ours=True)
    rebuild = undoing.find_rebuild(out)
    undoing.find_former_files(out, rebuild)
    if not yes and not sys.stdin.isatty():
        raise ConfigError("undo: there is no terminal to ask in; give --yes")
    for line in _undo_lines(rebuild):
        print(line)
    if not yes:
        typer.confirm("Undo it?", abort=True)
    summary = undoing.undo(out, rebuild)
    print(
        f"undone; {summary['kept']:,} regions are kept now. To take the undo back, run `paracaption undo "
        "CORPUS` again"
    )
    if rebuild.changes:
        print("Your own YAML file is not changed: put these keys back there before you build again")
    suggest(("inspect", corpus), ("versions", corpus))


def remove(
    corpus: Corpus,
    keys: Annotated[
        Path,
        typer.Option(
            help="Text file with the key of an image in each line, as KEY or SUBSET/KEY.", show_default=False
        ),
    ],
    delete_replaced: Annotated[
        bool,
        typer.Option(
            "--delete-replaced",
            help="Also delete now what this removal and earlier builds have replaced. Without this option, a "
            "later build deletes it after failures.keep_replaced_days.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Take images out of a corpus: photos, captions, and the answers of the models.

    No later build brings them back, and `undo` does not either. All other images stay as they are, and no
    model is asked. If the command is interrupted, run it again.
    """
    from ...pipeline.corpus import removal

    out = _path(corpus, ours=True)
    wanted = removal.read_keys(keys)
    found = removal.find_images(out, wanted)
    if not yes and not sys.stdin.isatty():
        raise ConfigError("remove: there is no terminal to ask in; give --yes")
    for subset, each in found.items():
        line = f"{subset}: {_number(len(each.keys), 'image')} in {_number(len(each.units), 'unit')}"
        print(line + (f", {len(each.keys) - each.new:,} removed before" if each.new < len(each.keys) else ""))
    if not yes:
        typer.confirm("Remove them? This cannot be undone.", abort=True)
    done = removal.remove(out, wanted, delete_replaced)
    rewritten = f"{_number(done['units'], 'unit')} written again"
    print(f"{_number(done['images'], 'image')} removed, {rewritten}")
    if not delete_replaced:
        print(
            "The files that were replaced are kept for failures.keep_replaced_days, and then a build deletes "
            "them; to delete them now, run this command again with --delete-replaced"
        )
    suggest(("verify", corpus), ("versions", corpus))


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s'[: number != 1]}"


def _path(corpus: Location, ours: bool = False) -> str:
    """Where a corpus lies, out of which nothing leads unless it is `ours` to change."""
    from ...pipeline.io import confined, files

    out = files.local(str(corpus)).rstrip("/") or "/"
    if not ours:
        confined.confine(out)
    return out


# How it is printed.


def _print_entry(head: str, text: str) -> None:
    """A line in a pipe; in a terminal, long text goes on below its own column."""
    for line in _wrapped(head, text, _columns()):
        print(line)


def _columns() -> int | None:
    """Width of the terminal; None in a pipe, where a line may have any length."""
    if not sys.stdout.isatty():
        return None
    from rich.console import Console

    return Console().width


def _wrapped(head: str, text: str, width: int | None) -> list[str]:
    import textwrap

    if width is None or width < 2 * len(head):
        return [f"{head}{text}"]
    indent = " " * len(head)
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=indent) or [head]


def _total(subsets: dict[str, SubsetDiff], kind: str) -> int:
    return sum(getattr(each, kind).total() for each in subsets.values())


def _subset_lines(name: str, found: SubsetDiff, before: int, after: int) -> Iterator[str]:
    old, new = found.kept
    yield f"{name}: regions kept {old:,} -> {new:,} ({new - old:+,})"
    units = [f"{found.changed:,} changed", f"{found.unchanged:,} unchanged"]
    if found.added:
        units.append(f"{found.added:,} only in {after} ({found.added_kept:,} kept)")
    if found.removed:
        units.append(f"{found.removed:,} only in {before} ({found.removed_kept:,} kept)")
    yield f"  units    {', '.join(units)}"
    for kind, reasons in (("lost", found.lost), ("gained", found.gained)):
        yield from _reason_lines(kind, reasons)
    if found.recaptioned:
        yield f"  kept in both with another caption {found.recaptioned:>8,}"


def _reason_lines(kind: str, reasons: Counter[str]) -> Iterator[str]:
    is_lost = kind == "lost"
    when, absent = ("now dropped as ", "no longer there") if is_lost else ("was dropped as ", "was not there")
    for number, (reason, count) in enumerate(sorted(reasons.items(), key=lambda each: (-each[1], each[0]))):
        what = absent if reason == "not there" else f"{when}{reason}"
        yield f"  {kind if number == 0 else '':<8} {count:>8,}  {what}"


def _print_example(found: RegionChange) -> None:
    head = f"  {found.key} #{found.region}  "
    tail = f"  {found.reason}" + (f": {found.detail}" if found.detail else "")
    width = _columns()
    caption = " ".join(found.caption.split())
    if width is not None:
        room = max(20, width - len(head) - len(f"  {found.reason}"))
        caption = caption if len(caption) <= room else f"{caption[: room - 1]}…"
        tail = tail[: max(len(f"  {found.reason}"), width - len(head) - len(caption))]
    print(f"{head}{caption}{tail}")


def _status_lines(found: Status) -> Iterator[str]:
    for each in found.subsets:
        yield from _committed_lines(each)
    if found.owner is not None:
        yield _owner_line(found.owner)
    else:
        yield "no commit log yet; the next build writes one"
    if found.run is not None:
        yield from _run_lines(found.run)
    for name, why in list(found.held_back.items())[:_SHOWN]:
        yield f"held back: {name}: {why}"
    if len(found.held_back) > _SHOWN:
        yield (
            f"held back: {len(found.held_back) - _SHOWN:,} more units; `paracaption versions CORPUS` shows "
            "in which runs units were held back"
        )


def _committed_lines(found: SubsetStatus) -> Iterator[str]:
    units = f"{found.units:,} of {_counted(found.planned_units, 'unit')}"
    images = f"{found.images:,} of {_counted(found.planned_images, 'image')}"
    share = f", {found.units / found.planned_units:.0%}" if found.planned_units else ""
    yield f"{found.subset}: {units}{share}, {images}"
    yield f"  regions: {found.kept:,} kept of {found.regions:,}"
    if found.older:
        are = "is" if found.older == 1 else "are"
        yield f"  {_number(found.older, 'unit')} {are} of an older configuration"
    if found.gone:
        names = ", ".join(found.gone_examples) + (", ..." if found.gone > len(found.gone_examples) else "")
        are, stay = ("is", "stays") if found.gone == 1 else ("are", "stay")
        what = f"{_number(found.gone, 'image')} {are} gone from the source ({names})"
        yield f"  {what} and {stay} in the corpus"
    if found.missing:
        names = ", ".join(found.missing[:_SHOWN]) + (", ..." if len(found.missing) > _SHOWN else "")
        what = f"FILES MISSING in {_number(len(found.missing), 'unit')}"
        yield f"  {what}, which the next build makes again: {names}"


def _known(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _counted(number: int | None, noun: str) -> str:
    return f"? {noun}s" if number is None else _number(number, noun)


def _owner_line(found: OwnerStatus) -> str:
    claim = found.claim
    last = "" if found.beat_age_s is None else f", last sign of life {_ago(found.beat_age_s)} ago"
    return f"writer: {claim.command}, {claim.pid}@{claim.host}: {found.state}{last}"


def _ago(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    days = seconds / 86_400
    return f"{days:,.0f} days" if days >= 2 else duration(seconds)


def _run_lines(found: RunStatus) -> Iterator[str]:
    done = f"{_number(found.units, 'unit')}, {_number(found.regions, 'region')}"
    yield f"last {found.command} that committed anything: {done}"
    if found.units_per_min is not None and found.regions_per_min is not None:
        left = "" if found.left_s is None else f"; about {duration(found.left_s)} left"
        yield f"  rate: {found.units_per_min:,.1f} units/min, {found.regions_per_min:,.0f} regions/min{left}"


def _watch(read: Callable[[], Status]) -> None:
    """Draw the status again and again in a terminal; in a pipe, print it whenever it has changed."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(Text("\n".join(_status_lines(read()))), refresh=True)
                time.sleep(_WATCH_S)
    shown = ""
    while True:
        found = read()
        line = _status_line(found)
        if line != shown:
            print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
            shown = line
        time.sleep(_WATCH_S)


def _status_line(found: Status) -> str:
    parts = [
        f"{each.subset} {each.units:,}/{_known(each.planned_units)} units, {each.kept:,} kept"
        for each in found.subsets
    ]
    if found.run is not None and found.run.units_per_min is not None:
        parts.append(f"{found.run.units_per_min:,.1f} units/min")
    if found.run is not None and found.run.left_s is not None:
        parts.append(f"about {duration(found.run.left_s)} left")
    if found.held_back:
        parts.append(f"{len(found.held_back):,} units held back")
    return "; ".join([*parts, found.owner.state if found.owner else "no commit log yet"])


def _undo_lines(found: Rebuild) -> Iterator[str]:
    records = (
        f"record {found.first}" if found.first == found.last else f"records {found.first} to {found.last}"
    )
    if found.is_begun:
        yield f"The undo of {records} was interrupted; this command finishes it (configuration and index)."
    else:
        now, then = found.kept
        yield f"Undoing {records} gives {len(found.units):,} units the files that they had before."
        yield f"  regions kept in them: {now:,} -> {then:,}"
    if found.added:
        yield f"  {found.added:,} units that were added since then are kept"
    for change in found.changes[:_SHOWN]:
        yield f"  configuration: {change}"
    if len(found.changes) > _SHOWN:
        yield f"  configuration: {len(found.changes) - _SHOWN:,} more keys"
    if found.before.config is None:
        yield "  configuration: not changed, because the log has no earlier one"
