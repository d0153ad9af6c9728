"""An estimate in the terminal: as configured, balanced, what is written, and how sure it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....schemas.config import BuildConfig
from ...stages.recipes import used_backends
from .predict import Estimate, SubsetEstimate, estimate_build
from .rates import Rates
from .sizes import Size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def render_estimate(
    config: BuildConfig,
    rates: Rates,
    sizes: dict[str, Size],
    gpus: float | None,
    cpus: float | None,
    pilot: BuildConfig | None,
) -> RenderableType:
    """Two estimates, within the configured `concurrency` and with GPUs shared out for balance, and caveats.

    Args:
        config: gives the pools, `images_per_shard` and the models.
        rates: what a region costs.
        sizes: by subset, in the order of the build.
        gpus: of the cluster; None takes what the configured pools hold at most.
        cpus: cores of the cluster; None takes as many as the pools need.
        pilot: the configuration that the rates were measured with, if it is known.

    Raises:
        ConfigError: as `estimate_build`.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    configured = estimate_build(config, rates, sizes, gpus, cpus)
    balanced = estimate_build(config, rates, sizes, gpus, cpus, balanced=True)
    for title, shown in (("as configured", configured), ("balanced", balanced)):
        parts += [Text(_headline(title, shown), "bold"), _pool_table(shown)]
        parts += [Text(_summary(subset), "dim") for subset in shown.subsets]
        parts.append("")
    parts += [Text("concurrency for the balanced estimate", "bold"), Text(suggest_concurrency(balanced)), ""]
    parts += [Text("what is written", "bold"), _bytes_table(balanced)]
    if warnings := find_caveats(config, rates, sizes, pilot):
        parts += ["", Text("how sure this is", "bold"), *(Text(f"- {line}", "yellow") for line in warnings)]
    return Group(*parts)


def estimate_values(
    config: BuildConfig,
    rates: Rates,
    sizes: dict[str, Size],
    gpus: float | None,
    cpus: float | None,
    pilot: BuildConfig | None,
) -> dict[str, Any]:
    """What `render_estimate` shows, as values. Times are in seconds, sizes in bytes."""
    return {
        "configured": estimate_build(config, rates, sizes, gpus, cpus),
        "balanced": estimate_build(config, rates, sizes, gpus, cpus, balanced=True),
        "caveats": find_caveats(config, rates, sizes, pilot),
    }


def suggest_concurrency(estimate: Estimate) -> str:
    """`concurrency` of each model by subset, as lines for the configuration."""
    lines = []
    for subset in estimate.subsets:
        words = [
            f"{place.removeprefix(f'subsets.{subset.subset}.recipe.')} [{each.actors}, {each.actors}]"
            for each in subset.pools
            for place in dict.fromkeys(each.pool.places)
        ]
        lines.append(f"{subset.subset}: {', '.join(words)}")
    if len({line.partition(": ")[2] for line in lines}) > 1:
        lines.append(
            "`concurrency` is the same for all subsets of a configuration. To use these numbers, write a "
            "configuration for each subset, all with the same `out`, and build them one after the other."
        )
    return "\n".join(lines)


def find_caveats(
    config: BuildConfig, rates: Rates, sizes: dict[str, Size], pilot: BuildConfig | None
) -> list[str]:
    """What makes an estimate less sure than it looks. The arguments are those of `render_estimate`."""
    caveats = []
    for subset, size in sizes.items():
        measured = rates.subsets[subset]
        if measured.regions and size.regions > 1_000 * measured.regions:
            caveats.append(
                f"{subset}: the rates come from only {measured.regions:,} regions, the estimate is for "
                f"{size.regions:,}; run a larger pilot"
            )
        idle = [name for name, rate in measured.stages.items() if not rate.image_s and not rate.region_s]
        if idle:
            caveats.append(
                f"{subset}: {', '.join(idle)} had no work in the pilot, so that their cost is missing here"
            )
        density, planned = measured.regions / max(1, measured.images), size.regions / max(1, size.images)
        if measured.images and not 0.67 * density < planned < 1.5 * density:
            caveats.append(
                f"{subset}: the pilot has {density:.1f} regions an image, the estimate {planned:.1f}; "
                "costs per image and per region are told apart only roughly"
            )
    if pilot is not None:
        before = used_backends(pilot)
        for place, (_, now) in used_backends(config).items():
            if place not in before:
                caveats.append(f"{place}: the pilot's recipes do not ask this model")
                continue
            _, then = before[place]
            same = ("name", "num_gpus", "num_cpus")
            if any(getattr(then, key) != getattr(now, key) for key in same):
                caveats.append(
                    f"{place}: the pilot ran {then.name} (num_gpus {then.num_gpus:g}, num_cpus "
                    f"{then.num_cpus:g}), but the estimate is for {now.name} (num_gpus {now.num_gpus:g}, "
                    f"num_cpus {now.num_cpus:g})"
                )
            elif then.options != now.options:
                caveats.append(f"{place}: its options are not those of the pilot")
    return caveats


def _headline(title: str, shown: Estimate) -> str:
    gpus = max(subset.gpus for subset in shown.subsets)
    cpus = max(subset.cpus for subset in shown.subsets)
    held = sum(subset.held_gpu_s for subset in shown.subsets) / 3600
    busy = sum(subset.gpu_s for subset in shown.subsets) / 3600
    on_gpus = f"{gpus:g} GPUs, {held:,.1f} GPU-hours held, {busy:,.1f} in use; " if gpus else ""
    return f"{title}: {_duration(shown.wall_s)} on {on_gpus}Ray is asked for {cpus:g} CPUs"


def _summary(subset: SubsetEstimate) -> str:
    size = subset.size
    return (
        f"{subset.subset}: {size.images:,} images, {size.regions:,} regions, about {subset.kept:,} kept; "
        f"{_duration(subset.wall_s)}, of which {_duration(subset.startup_s)} start-up; bottleneck: "
        f"{subset.bottleneck.replace('_', ' ')}; {subset.cpu_s / 3600:,.1f} CPU-hours"
    )


def _pool_table(shown: Estimate) -> Table:
    table = _table(("subset", "actors of"), ("actors", "GPUs", "work of one", "time", "share of the wall"))
    for subset in shown.subsets:
        for number, each in enumerate(subset.pools):
            table.add_row(
                subset.subset if not number else "",
                each.pool.name.replace("_", " "),
                f"{each.actors:,}",
                f"{each.actors * each.pool.num_gpus:g}" if each.pool.num_gpus else "",
                _duration(each.work_s),
                _duration(each.seconds),
                f"{each.seconds / subset.wall_s:.0%}" if subset.wall_s else "",
            )
    return table


def _bytes_table(shown: Estimate) -> Table:
    table = _table(("subset",), ("shards", "their size", "ledgers", "evidence", "together"))
    for subset in shown.subsets:
        sizes = (subset.shard_bytes, subset.ledger_bytes, subset.evidence_bytes)
        table.add_row(subset.subset, f"{subset.units:,}", *map(_file_size, sizes), _file_size(sum(sizes)))
    return table


def _table(words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in (*words, *numbers):
        table.add_column(title, justify="right" if title in numbers else "left", no_wrap=True)
    return table


def _duration(seconds: float) -> str:
    """In the unit that a planner thinks in."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def _file_size(count: float) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"
