"""`paracaption estimate --evaluation`: what an evaluation takes, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ...pipeline.io.location import Location
from ...schemas.errors import ConfigError
from .arguments import print_json, suggest, written

if TYPE_CHECKING:
    from rich.table import Table

    from ...model_training.evaluation.costs import Cost
    from ...schemas.evaluation import EvaluateConfig

_Config = TypeVar("_Config")

TRIAL = "trial"
"""Label of a trial, unless --run names another."""

_BATCHES = 5
"""Batches of questions in the trial that is suggested: the first one is slower than the others."""


def estimate_evaluation(
    config: Path, run: Location | None, gpus: float | None, changes: list[str] | None, json: bool
) -> None:
    """Print the estimate of an evaluation.

    Raises:
        ConfigError: --run has no results, or those of another evaluation; --gpus is no whole number.
    """
    from ...model_training.evaluation.costs import estimate_costs, seconds_on
    from ...pipeline.config_file import load_config, load_evaluation

    if gpus is not None and (gpus < 1 or gpus != int(gpus)):
        raise ConfigError(f"--gpus {gpus:g}: an evaluation takes whole GPUs; give 1 or more")
    loaded = load_kind(config, changes, load_evaluation, load_config, "`build`; leave out --evaluation")
    folder = Path(str(run)) if run else Path(loaded.out) / TRIAL
    if run and not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; --run takes the folder of a trial's results, OUT/LABEL")
    costs, count = estimate_costs(loaded, folder), int(gpus or 1)
    tried = any(cost.each_s is not None for cost in costs)
    seconds = seconds_on(costs, count) if tried else None
    missing = [*_missing(loaded, costs, tried)]
    if json:
        rows = [cost._asdict() | {"seconds": cost.seconds} for cost in costs]
        print_json({"costs": rows, "gpus": count, "seconds": seconds, "missing": missing})
        return
    _show(costs, count, seconds, missing)
    if not tried:
        print(f"hours are not known: no trial in {folder}; make one, and run this command again")
        trial = Path(loaded.out) / (folder.name if run else f"{loaded.label}-{TRIAL}")
        suggest(*_next(config, loaded, trial, gpus, changes or []))


def load_kind(
    config: Path,
    changes: list[str] | None,
    load: Callable[[Path, list[str]], _Config],
    load_other: Callable[[Path, list[str]], object],
    advice: str,
) -> _Config:
    """Load a configuration, and give advice if it is one of the other kind.

    Raises:
        ConfigError: it is, or it has mistakes.
    """
    try:
        return load(config, changes or [])
    except ConfigError as error:
        try:
            load_other(config, changes or [])
        except ConfigError:
            raise error from error.__cause__
        raise ConfigError(f"{config}: this is a configuration of {advice}") from error


def _show(costs: list[Cost], gpus: int, seconds: float | None, missing: list[str]) -> None:
    from rich.console import Console

    from ...pipeline.executor.estimate.advice import duration

    Console().print(costs_table(costs, measured=seconds is not None))
    if seconds is not None:
        each = "" if gpus == 1 else ", if each runs some of the rows, the longest first"
        least = "at least " if missing else ""
        print(f"{least}{duration(seconds)} on {gpus} GPU{'' if gpus == 1 else 's'}{each}")
    else:
        print(_totals(costs))
    if missing:
        print("not in it:")
    for line in missing:
        print(f"- {line}")


def _missing(config: EvaluateConfig, costs: list[Cost], tried: bool) -> Iterator[str]:
    for cost in costs:
        if cost.missing and (tried or cost.count is None):
            yield f"{cost.name}, {cost.column}: {cost.missing}"
    for name in ("toy", "profile"):
        if getattr(config, name):
            yield f"`{name}`: its time is not estimated"
    judges = [config.judge, *(bench.judge for bench in config.benchmarks)]
    if any(judge and judge.name == "vllm" for judge in judges):
        yield "the judge `vllm`: the time to load it"


def costs_table(costs: list[Cost], measured: bool) -> Table:
    """Without a trial, how much there is to do; with one, what it takes. Both fit into 80 columns.

    Args:
        costs: the rows.
        measured: whether there is a trial.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    from ...pipeline.executor.estimate.advice import duration

    numbers = (
        ("all", "trial", "s each", "judged", "judge s", "once", "time")
        if measured
        else ("all", "judged", "passes, at most")
    )
    table = Table(box=SIMPLE, padding=0)
    table.add_column("benchmark", no_wrap=True)
    table.add_column("column", no_wrap=True)
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=True)
    for cost in costs:
        passes = "" if cost.column == "regions" else _number(cost.forwards)
        judged = "" if cost.judged == 0 else _number(cost.judged)
        shown = [_number(cost.count), judged, passes]
        if measured:
            once = "" if cost.startup_s is None else duration(cost.startup_s)
            time = "?" if cost.seconds is None else duration(cost.seconds)
            each, judge = (_number(value, ".2f", "") for value in (cost.each_s, cost.judge_s))
            shown = [_number(cost.count), f"{cost.measured:,}", each, judged, judge, once, time]
        table.add_row(cost.name, cost.column, *shown)
    return table


def _number(value: float | None, form: str = ",", unknown: str = "?") -> str:
    return unknown if value is None else format(value, form)


def _totals(costs: list[Cost]) -> str:
    """The sums of what can be counted, and of how many rows each is."""
    parts = []
    for title, field, some in (
        ("regions", "count", [cost for cost in costs if cost.column == "regions"]),
        ("questions", "count", [cost for cost in costs if cost.column != "regions"]),
        ("questions to a judge", "judged", costs),
        ("forward passes of one question at most", "forwards", [c for c in costs if c.column != "regions"]),
    ):
        known = [value for cost in some if (value := getattr(cost, field)) is not None]
        if some:
            unknown = len(some) - len(known)
            left = f" (not known of {unknown} of {len(some)} rows)" if unknown else ""
            parts.append(f"{sum(known):,} {title}{left}" if known else f"{title}: not known")
    return "together: " + ", ".join(parts)


def _next(
    config: Path, loaded: EvaluateConfig, trial: Path, gpus: float | None, changes: list[str]
) -> Iterator[tuple[object, ...]]:
    """The commands that make a trial, and that estimate the whole evaluation from it."""
    limits = [f"benchmarks.{number}.images=5" for number in range(len(loaded.benchmarks))]
    if loaded.harness:
        limits.insert(0, f"harness.limit={_BATCHES * loaded.harness.batch_size}")
    keys = {"label", *(limit.partition("=")[0] for limit in limits)}
    kept = written([change for change in changes if change.partition("=")[0] not in keys])
    yield "evaluate", config, *kept, *written([f"label={trial.name}", *limits])
    machine = () if gpus is None else ("--gpus", f"{gpus:g}")
    yield "estimate", config, "--evaluation", *kept, "--run", trial, *machine
