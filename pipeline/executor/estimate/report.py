"""An estimate in the terminal: as configured, balanced, what is written, and how sure it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ....schemas.config import BuildConfig
from ...sources.registry import open_source
from ...stages.recipes import used_backends
from .advice import advise, duration, listed, short
from .predict import Estimate, StreamEstimate, estimate_build
from .rates import Rates
from .sizes import Size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


class Estimates(NamedTuple):
    """What is shown: the build within the configured `concurrency` and with balanced GPUs, and sentences."""

    configured: Estimate
    balanced: Estimate
    advice: list[str]
    caveats: list[str]


def make_estimates(
    config: BuildConfig,
    rates: Rates,
    sizes: dict[str, Size],
    gpus: float | None,
    cpus: float | None,
    pilot: BuildConfig | None,
) -> Estimates:
    """Two estimates, within the configured `concurrency` and with GPUs shared out for balance, and more.

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
    configured = estimate_build(config, rates, sizes, gpus, cpus)
    balanced = estimate_build(config, rates, sizes, gpus, cpus, balanced=True)
    is_apart = gpus is not None and len(configured.streams) > 1
    together = estimate_build(config, rates, sizes, None, cpus) if is_apart else None
    return Estimates(
        configured,
        balanced,
        advise(configured, balanced, together),
        find_caveats(config, rates, sizes, pilot),
    )


def render_estimate(shown: Estimates) -> RenderableType:
    """The estimates as tables for the terminal; they fit into 80 columns."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [*(Text(line, "dim") for line in _sizes(shown.configured)), ""]
    for title, each in (("as configured", shown.configured), ("balanced", shown.balanced)):
        parts.append(Text(_headline(title, each), "bold"))
        for stream in each.streams:
            parts += [Text(_summary(stream, each), "dim"), _pool_table(stream), ""]
        if each.gpus:
            parts += [_use_table(each), ""]
    parts += [Text("concurrency for the balanced estimate", "bold")]
    parts += [Text(suggest_concurrency(shown.balanced)), ""]
    if shown.advice:
        parts += [Text("advice", "bold"), *(Text(f"- {line}") for line in shown.advice), ""]
    parts += [Text("what is written", "bold"), _bytes_table(shown.balanced)]
    if shown.caveats:
        parts += [
            "",
            Text("how sure this is", "bold"),
            *(Text(f"- {line}", "yellow") for line in shown.caveats),
        ]
    return Group(*parts)


def suggest_concurrency(estimate: Estimate) -> str:
    """`concurrency` of each model, as lines for the configuration; by stream if they differ."""
    by_stream = [
        {place: each.actors for each in stream.pools for place in each.pool.places}
        for stream in estimate.streams
    ]
    every: dict[str, int] = {}
    for own in by_stream:
        if any(every.get(place, count) != count for place, count in own.items()):
            lines = [
                f"{listed(stream.subsets)}: {_concurrency(own)}"
                for stream, own in zip(estimate.streams, by_stream, strict=True)
            ]
            lines.append(
                "`concurrency` is the same for all subsets of a configuration. To use these numbers, write a "
                "configuration for each subset, all with the same `out`, and build them one after the other."
            )
            return "\n".join(lines)
        every |= own
    return _concurrency(every)


def _concurrency(actors: dict[str, int]) -> str:
    return ", ".join(f"{short(place)} [{count}, {count}]" for place, count in actors.items())


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
        if mask_stage := open_source(config, subset).mask_stage:
            caveats.append(
                f"{subset}: its source declares no regions; their number, {size.regions:,}, is that of "
                f"--images or follows from the pilot, where `{mask_stage}` made {measured.regions:,} for "
                f"{measured.images:,} images"
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
    cpus = max(stream.cpus for stream in shown.streams)
    held = shown.held_gpu_s / 3600
    busy = sum(subset.gpu_s for subset in shown.subsets) / 3600
    cores = f"Ray is asked for {cpus:g} CPU core{'' if cpus == 1 else 's'}"
    if not shown.gpus:
        return f"{title}: {duration(shown.wall_s)}; {cores}"
    gpus = f"{shown.gpus:g} GPU{'' if shown.gpus == 1 else 's'}"
    used = f"{held:,.1f} GPU-hours held, {busy:,.1f} in use"
    return f"{title}: {duration(shown.wall_s)} on {gpus}, {used}; {cores}"


def _sizes(shown: Estimate) -> list[str]:
    return [
        f"{each.subset}: {each.size.images:,} images, {each.size.regions:,} regions, about {each.kept:,} "
        f"kept; {each.cpu_s / 3600:,.1f} CPU-hours"
        for each in shown.subsets
    ]


def _summary(stream: StreamEstimate, shown: Estimate) -> str:
    side_by_side = len(stream.subsets) > 1
    line = (
        f"{listed(stream.subsets)}{' side by side' if side_by_side else ''}: {duration(stream.wall_s)}, of "
        f"which {duration(stream.startup_s)} start-up; bottleneck: {short(stream.bottleneck)}"
    )
    if side_by_side and len(shown.streams) == 1:
        line += f"; one after the other they would take {duration(shown.apart_s)}"
    return line


def _pool_table(stream: StreamEstimate) -> Table:
    table = _table(("actors of",), ("actors", "GPUs", "work of one", "time", "share of the wall"))
    for each in stream.pools:
        table.add_row(
            short(each.pool.title),
            f"{each.actors:,}",
            f"{each.actors * each.pool.num_gpus:g}" if each.pool.num_gpus else "",
            duration(each.work_s),
            duration(each.seconds),
            f"{each.seconds / stream.wall_s:.0%}" if stream.wall_s else "",
        )
    return table


def _use_table(shown: Estimate) -> Table:
    """The idle GPUs of each pool, over the whole build."""
    table = _table(("GPUs of",), ("GPUs", "GPU-hours busy", "idle", "idle share"))
    for use in shown.pools:
        if use.gpus:
            each = use.gpus / use.actors
            table.add_row(
                short(use.title),
                f"{use.gpus:g}",
                f"{use.busy_s * each / 3600:,.1f}",
                f"{use.idle_s * each / 3600:,.1f}",
                f"{use.idle_share:.0%}",
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
        is_number = title in numbers
        table.add_column(title, justify="right" if is_number else "left", no_wrap=is_number)
    return table


def _file_size(count: float) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"
