"""What a corpus looks like in the terminal: the funnel of each subset, and samples of what was kept and
dropped.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ...schemas.summary import SubsetCounts
from ..io.location import Location
from ..sources.registry import subset_title
from ..stages.registry import stage_title
from . import merge, reader, utilization
from .reader import Corpus

if TYPE_CHECKING:
    from rich.console import RenderableType

_COLUMNS = ["key", "region", "kept", "drop_stage", "drop_reason", "drop_detail", "category", "core_category"]
_COLUMNS += ["caption", "file_name"]
_UNITS = 32
_BAR = 12
_MAX_TEXT = 300


class ShownRegion(NamedTuple):
    """A region to show.

    Attributes:
        key: of its image.
        region: its id; -1 for an image without any region.
        category: the annotated one, or else the one that the judge named; "" for none.
        caption: "" for none.
        detail: of its drop; "" if it was kept.
    """

    key: str
    region: int
    category: str
    caption: str
    detail: str


def inspect(corpus: str | Location, num_kept: int = 5, num_dropped: int = 2) -> RenderableType:
    """The funnel, and samples of kept captions and of each reason, of every subset; for rich to print.

    Counts come from the manifests, so they are right while a build runs. The samples are the same each time:
    those with the smallest hashes of key and region, from units spread evenly over the subset.

    Args:
        corpus: path of the folder that a build wrote.
        num_kept: kept captions shown of each subset.
        num_dropped: regions shown of each reason.

    Raises:
        ConfigError: the folder is no corpus.
        IntegrityError: a manifest or ledger cannot be read.
    """
    from rich.console import Group

    parts: list[Any] = []
    opened = reader.open_corpus(corpus)
    for subset in opened.subsets:
        counts = merge.count_subset(opened, subset)
        parts += _head(subset, counts)
        parts.append(_funnel(counts))
        busy = utilization.read_utilization(corpus, subset)
        if busy:
            parts += ["", utilization_table(busy)]
        kept, dropped = sample_regions(opened, subset, num_kept, num_dropped)
        if kept:
            parts += ["", _samples("kept", kept)]
        order = [f"{step.stage}/{reason}" for step in counts.funnel for reason in step.reasons]
        ranked = sorted(dropped, key=lambda name: order.index(name) if name in order else len(order))
        parts += [_samples(f"dropped: {name}", dropped[name]) for name in ranked]
        parts.append("")
    return Group(*parts)


def inspect_values(corpus: str | Location, num_kept: int = 5, num_dropped: int = 2) -> dict[str, Any]:
    """What `inspect` shows, as values: by subset its counts, and samples of kept and of dropped regions."""
    opened = reader.open_corpus(corpus)
    found = {}
    for subset in opened.subsets:
        kept, dropped = sample_regions(opened, subset, num_kept, num_dropped)
        found[subset] = {"counts": merge.count_subset(opened, subset), "kept": kept, "dropped": dropped}
    return found


def sample_regions(
    corpus: Corpus, subset: str, num_kept: int, num_dropped: int
) -> tuple[list[ShownRegion], dict[str, list[ShownRegion]]]:
    """Some kept regions, and some dropped ones by "stage/reason"; the same ones for the same corpus."""
    units = corpus.units(subset)
    spread = [units[i * len(units) // _UNITS] for i in range(_UNITS)] if len(units) > _UNITS else units
    groups: dict[str, list[tuple[int, ShownRegion]]] = {}
    for unit in spread:
        for name, rank, sample in _rows(unit.ledger):
            wanted = num_dropped if name else num_kept
            group = groups.setdefault(name, [])
            if len(group) < wanted:
                heapq.heappush(group, (-rank, sample))
            elif wanted and -group[0][0] > rank:
                heapq.heapreplace(group, (-rank, sample))
    ranked = {
        name: [s for _, s in sorted(group, key=lambda e: (-e[0], e[1]))] for name, group in groups.items()
    }
    return ranked.pop("", []), ranked


def _rows(path: str) -> Iterator[tuple[str, int, ShownRegion]]:
    table = reader.read_ledger(path, _COLUMNS)
    columns = [table[name].to_pylist() for name in _COLUMNS]
    for key, region, kept, stage, reason, detail, category, core, caption, _ in zip(*columns, strict=True):
        if not kept and reason is None:
            continue  # an image that declares no region
        name = "" if kept else f"{stage}/{reason}"
        number = -1 if region is None else region
        rank = int.from_bytes(hashlib.blake2b(f"{key}/{number}".encode(), digest_size=8).digest())
        yield name, rank, ShownRegion(key, number, category or core or "", caption or "", detail or "")


def _head(subset: str, counts: SubsetCounts) -> list[Any]:
    from rich.text import Text

    summed_up = (
        f"{counts.units:,} units, {counts.images:,} images ({counts.images_captioned:,} with captions), "
        f"{counts.regions:,} regions declared, {counts.kept:,} kept"
    )
    parts = [Text.assemble((subset_title(subset), "bold"), "  ", summed_up)]
    if counts.images_dropped:
        dropped = ", ".join(
            f"{_words(reason)} {number:,}" for reason, number in counts.images_dropped.items()
        )
        parts.append(Text(f"images dropped as a whole: {dropped}", "dim"))
    if counts.images_held_out:
        held = f"{counts.images_held_out:,} images with captions, {counts.kept_held_out:,} regions"
        parts.append(Text(f"held out of training: {held}", "dim"))
    if len(counts.recipes) > 1:
        parts.append(
            Text(
                "units of more than one configuration: `paracaption build CONFIG` rebuilds the older ones",
                "bold red",
            )
        )
    return parts


def _funnel(counts: SubsetCounts) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("step", no_wrap=True)
    table.add_column("left", justify="right", no_wrap=True)
    table.add_column("of all", justify="right", no_wrap=True)
    table.add_column("", width=_BAR, no_wrap=True)
    table.add_column("dropped", justify="right", no_wrap=True)
    table.add_column("why")
    total = max(1, counts.regions)
    for step in counts.funnel:
        left = step.regions_in - step.dropped
        kept, lost = round(_BAR * left / total), round(_BAR * step.regions_in / total)
        bar = Text.assemble(("█" * kept, "blue"), ("░" * (lost - kept), "yellow"))
        why = "\n".join(f"{_words(reason)} {number:,}" for reason, number in step.reasons.items())
        dropped = f"{step.dropped:,}" if step.dropped else ""
        table.add_row(stage_title(step.stage), f"{left:,}", f"{left / total:.0%}", bar, dropped, Text(why))
    return table


def utilization_table(stages: dict[str, utilization.StageUtilization]) -> Any:
    """A line per model stage: its actors, how fast they were, and how much of their time they had work."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("model stage", no_wrap=True)
    gpu = any(stage.gpu is not None for stage in stages.values())
    reports = any(stage.report for stage in stages.values())
    titles = ["actors", "start-up s", "regions", "regions/s each", "busy"]
    for title in [*titles, "GPU in calls"] if gpu else titles:  # without GPUs, the table fits 80 characters
        table.add_column(title, justify="right")
    if reports:
        table.add_column("backend")
    for name, stage in stages.items():
        speed = "" if stage.regions_per_s is None else f"{stage.regions_per_s:,.1f}"
        cells = [f"{stage.actors:,}", f"{stage.startup_s:,.1f}", f"{stage.asked:,}", speed]
        shares = (stage.busy_share, stage.gpu) if gpu else (stage.busy_share,)
        cells += ["" if share is None else f"{share:.0%}" for share in shares]
        if reports:
            cells.append(", ".join(f"{_words(key)} {value:.4g}" for key, value in stage.report.items()))
        table.add_row(stage_title(name), *cells)
    return table


def _samples(title: str, shown: list[ShownRegion]) -> Any:
    """Captions come from models, keys and categories from strangers: as text, never as markup."""
    from rich.text import Text

    lines = Text(title, "bold" if title == "kept" else "yellow")
    for sample in shown:
        where = sample.key if sample.region == -1 else f"{sample.key} #{sample.region}"
        lines.append(f"\n  {_plain(where)}", "dim")
        if sample.category:
            lines.append(f"  {_plain(sample.category)}", "cyan")
        if sample.caption:
            lines.append(f"  {_plain(sample.caption)}", "not bold default")
        if sample.detail:
            lines.append(f"  ({_plain(sample.detail)})", "italic dim")
    return lines


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(text: str) -> str:
    """One shortened line, without control characters: they could move the cursor or recolor the terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _MAX_TEXT else line[: _MAX_TEXT - 4] + " ..."
