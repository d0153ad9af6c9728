"""The capacity plan in the terminal: as configured, balanced, and what is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....schemas.config import BuildConfig
from ....schemas.errors import ConfigError, IntegrityError
from ...corpus import work_list
from ...sources.registry import open_source
from . import predict as estimate
from .predict import Plan, Size, SubsetPlan
from .rates import Rates

if TYPE_CHECKING:
    from rich.console import RenderableType


def sizes_of(config: BuildConfig, rates: Rates, given: list[str], corpus: bool) -> dict[str, Size]:
    """How much is planned: what is given, else the sources' own images, else the paper's subsets.

    Args:
        config: names the subsets.
        rates: regions an image, where only images are known.
        given: "coconut=334000/3400000" or "coconut=334000".
        corpus: count the configured sources; masks from the pilot's masks an image.

    Raises:
        ConfigError: not of that form, or a subset that is not configured.
    """
    if given:
        return dict(_parsed(config, rates, text) for text in given)
    if not corpus:
        return {subset: estimate.PAPER[subset] for subset in config.subsets}
    return {subset: _dense(rates, subset, _count(config, subset)) for subset in config.subsets}


def render(
    config: BuildConfig,
    rates: Rates,
    sizes: dict[str, Size],
    gpus: float | None,
    cpus: float | None,
    pilot: BuildConfig | None,
) -> RenderableType:
    """The plan within the configured `concurrency`, and the one with GPUs shared out for balance.

    Raises:
        ConfigError: as `capacity.plan`.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    first = estimate.plan(config, rates, sizes, gpus, cpus)
    best = estimate.plan(config, rates, sizes, gpus, cpus, balanced=True)
    for title, shown in (("as configured", first), ("balanced", best)):
        parts += [Text(_headline(title, shown), "bold"), _stages(shown)]
        parts += [Text(_bottleneck(subset), "dim") for subset in shown.subsets]
        parts.append("")
    parts += [Text("concurrency for the balanced plan", "bold"), Text(suggestion(config, best)), ""]
    parts += [Text("what is written", "bold"), _bytes(best)]
    said = estimate.doubts(config, rates, sizes, pilot)
    if said:
        parts += ["", Text("how sure this is", "bold"), *(Text(f"- {line}", "yellow") for line in said)]
    return Group(*parts)


def suggestion(config: BuildConfig, best: Plan) -> str:
    """`concurrency` of each model by subset, as lines for the configuration."""
    stage_of = {"caption": "captioner", "verify_category": "judge", "extract_category": "judge"}
    stage_of["agree_with_segmenter"] = "segmenter"
    lines = []
    for subset in best.subsets:
        words = []
        for each in subset.pools:
            names = dict.fromkeys(stage_of[name] for name in each.pool.stages if name in stage_of)
            words += [f"{name} [{each.actors}, {each.actors}]" for name in names]
        lines.append(f"{subset.subset}: {', '.join(words)}")
    if len(best.subsets) > 1 and len({line.partition(": ")[2] for line in lines}) > 1:
        lines.append(
            "The subsets are built one after the other: a configuration for each, with the same `out`."
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """In the unit that a planner thinks in."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def _headline(title: str, shown: Plan) -> str:
    gpus = max(subset.gpus for subset in shown.subsets)
    cpus = max(subset.cpus for subset in shown.subsets)
    held = sum(subset.held_gpu_s for subset in shown.subsets) / 3600
    busy = sum(subset.gpu_s for subset in shown.subsets) / 3600
    on_gpus = f"{gpus:g} GPUs, {held:,.1f} GPU-hours held, {busy:,.1f} in use; " if gpus else ""
    return f"{title}: {duration(shown.wall_s)} on {on_gpus}{cpus:g} CPUs asked of Ray"


def _stages(shown: Plan) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("subset", no_wrap=True)
    table.add_column("actors of", no_wrap=True)
    for title in ("actors", "GPUs", "work of one", "time", "share of the wall"):
        table.add_column(title, justify="right", no_wrap=True)
    for subset in shown.subsets:
        for number, each in enumerate(subset.pools):
            table.add_row(
                subset.subset if not number else "",
                each.pool.name.replace("_", " "),
                f"{each.actors:,}",
                f"{each.actors * each.pool.num_gpus:g}" if each.pool.num_gpus else "",
                duration(each.work_s),
                duration(each.seconds),
                f"{each.seconds / subset.wall_s:.0%}" if subset.wall_s else "",
            )
    return table


def _bottleneck(subset: SubsetPlan) -> str:
    size = subset.size
    return (
        f"{subset.subset}: {size.images:,} images, {size.regions:,} regions, about {subset.kept:,} kept; "
        f"{duration(subset.wall_s)}, of which {duration(subset.startup_s)} start-up; bottleneck: "
        f"{subset.bottleneck.replace('_', ' ')}; {subset.cpu_s / 3600:,.1f} CPU-hours"
    )


def _bytes(shown: Plan) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("subset", no_wrap=True)
    for title in ("shards", "their size", "ledgers", "evidence", "together"):
        table.add_column(title, justify="right", no_wrap=True)
    for subset in shown.subsets:
        sizes = (subset.shard_bytes, subset.ledger_bytes, subset.evidence_bytes)
        table.add_row(subset.subset, f"{subset.units:,}", *map(_size, sizes), _size(sum(sizes)))
    return table


def _size(count: float) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def _parsed(config: BuildConfig, rates: Rates, text: str) -> tuple[str, Size]:
    subset, _, numbers = text.partition("=")
    images, _, regions = numbers.replace(",", "").replace("_", "").partition("/")
    if subset not in config.subsets:
        raise ConfigError(f"--images {text}: {subset!r} is not configured, only {', '.join(config.subsets)}")
    if not images.isdigit() or (regions and not regions.isdigit()):
        raise ConfigError(f"--images {text}: expected SUBSET=IMAGES or SUBSET=IMAGES/MASKS")
    return subset, Size(int(images), int(regions)) if regions else _dense(rates, subset, int(images))


def _dense(rates: Rates, subset: str, images: int) -> Size:
    """With as many regions an image as the pilot had."""
    measured = rates.subsets.get(subset)
    if measured is None or not measured.images:
        raise ConfigError(f"{subset}: regions an image are not known; give --images {subset}=IMAGES/MASKS")
    return Size(images, math.ceil(images * measured.regions / measured.images))


def _count(config: BuildConfig, subset: str) -> int:
    """Images of the plan that is there if it is of the whole source; else the source is listed."""
    try:
        there = work_list.load_plan(Path(config.out) / subset)
        if "limit" not in there.fingerprint:
            return there.num_images
    except IntegrityError:  # none yet
        pass
    return sum(1 for _ in open_source(config, subset).catalog())
