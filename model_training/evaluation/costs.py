"""What an evaluation takes, from a trial of it: `paracaption estimate --evaluation`.

A trial is the same evaluation of fewer questions or images, under a label of its own. What a question took
there is multiplied by the number of all questions; what is done once, such as loading the model, is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...schemas.answering import AnswerOptions
from ...schemas.errors import ConfigError
from ...schemas.evaluation import Bench, EvaluateConfig
from ...schemas.harness import ColumnName, HarnessColumn, HarnessTask, Settings
from . import captioners, contained, harness, run_benchmark

REGIONS = "regions"
"""Stands where a benchmark of whole images has the name of its column."""


class Cost(NamedTuple):
    """What a benchmark takes in one column.

    Attributes:
        name: of the benchmark.
        column: of the table; `REGIONS` for a benchmark of regions.
        count: questions that the model answers, or regions that it captions; None if not known.
        judged: questions that a judge answers; None if not known.
        forwards: forward passes of one question, summed over all of them, at most; None if not known.
        measured: how many of `count` the trial has.
        each_s: seconds for one of `count`; None without a trial.
        judge_s: seconds of the judge for a question; None without a trial or without a judge.
        startup_s: what is done once: loading the model, and for lmms-eval listing its tasks, reading data and
            writing results.
        missing: what is not known, and why; empty if `seconds` has everything.
    """

    name: str
    column: str
    count: int | None = None
    judged: int | None = None
    forwards: int | None = None
    measured: int = 0
    each_s: float | None = None
    judge_s: float | None = None
    startup_s: float | None = None
    missing: str = ""

    @property
    def seconds(self) -> float | None:
        """Seconds of what is known, on one GPU; None without a trial or a count."""
        if self.count is None or self.each_s is None:
            return None
        return self.count * self.each_s + (self.judged or 0) * (self.judge_s or 0.0) + (self.startup_s or 0.0)


def estimate_costs(config: EvaluateConfig, trial: Path) -> list[Cost]:
    """What each benchmark takes in each column.

    Args:
        config: the evaluation.
        trial: folder of the trial's results, `OUT/LABEL`. Without one, only what can be counted is known.

    Raises:
        ConfigError: a result of the trial is of another model, of other settings or of another benchmark.
    """
    tried = config.model_copy(update={"out": str(trial.parent), "label": trial.name})
    costs = [_of_regions(config, bench, trial / bench.name) for bench in config.benchmarks]
    if config.harness:
        costs += [
            _of_questions(tried, task, name)
            for task in config.harness.chosen()
            for name in config.harness.columns
            if name in task.columns
        ]
    return costs


def seconds_on(costs: Iterable[Cost], gpus: int) -> float:
    """Seconds until the last of some GPUs is done: each in turn takes the longest of what is left."""
    ends = [0.0] * gpus
    for seconds in sorted((cost.seconds or 0.0 for cost in costs), reverse=True):
        ends[ends.index(min(ends))] += seconds
    return max(ends)


def _of_regions(config: EvaluateConfig, bench: Bench, folder: Path) -> Cost:
    try:
        benchmark = run_benchmark.open_benchmark(bench)
    except ConfigError as error:
        return Cost(bench.name, REGIONS, missing=f"number of regions: {error}")
    judge = config.judge_of(bench)
    regions = [*benchmark.regions()]
    judged = sum(len(region.questions) for region in regions) if judge else 0
    cost = Cost(bench.name, REGIONS, len(regions), judged)
    backend = config.backend(bench)
    times = run_benchmark.read_times(bench, backend, judge, folder) if folder.is_dir() else None
    if times is None or not times.regions:
        return cost._replace(missing=f"no captions in {folder}")
    missing = []
    if backend.name == captioners.PREDICTIONS:
        missing.append("captions: they come from another program, whose time nobody has noted here")
    elif not times.captions_s:
        missing.append(f"captions: {folder} has no seconds of them")
    if judge and not times.answers:
        missing.append(f"judge: no answers with their seconds in {folder}; run the trial to its end")
    return cost._replace(
        measured=times.regions,
        each_s=times.captions_s / times.regions,
        judge_s=times.answers_s / times.answers if times.answers else None,
        startup_s=times.load_s,
        missing="; ".join(missing),
    )


def _of_questions(tried: EvaluateConfig, task: HarnessTask, name: ColumnName) -> Cost:
    column, folder = task.columns[name], harness.folder_of(tried, task, name)
    result = harness.read_result(folder / harness.RESULT)
    if result:
        _check_trial(tried, column, folder, result)
    count = result.get("available") or task.questions
    steps = most_forwards(column)
    cost = Cost(
        name=task.name,
        column=name,
        count=count,
        judged=count if column.judge != "none" else 0,
        forwards=steps and count and steps * count,
    )
    if count is None:
        return cost._replace(missing="number of questions: set `questions` of the task, or run a trial")
    asked, answering, startup = (result.get(key) for key in ("questions", "answering_s", "startup_s"))
    if not asked or answering is None or startup is None:
        return cost._replace(missing=f"no result with seconds in {folder}")
    rest = max(0.0, result["seconds"] - answering - startup)
    judge_s, missing = None, ""
    if column.judge == "lmms-eval":
        judge_s, rest = rest / asked, 0.0
    elif column.judge == "contains":
        answers = _judged(tried, folder)
        judge_s = sum(answers) / len(answers) if answers else None
        missing = "" if answers else f"judge: no answers with their seconds in {folder}"
    return cost._replace(
        measured=asked,
        each_s=answering / asked,
        judge_s=judge_s,
        startup_s=startup + rest,
        missing=missing,
    )


def most_forwards(column: HarnessColumn) -> int | None:
    """Forward passes of an answer, at most; None where only lmms-eval's task says how long it may be."""
    options = AnswerOptions.checked(column.asking.options)
    if "max_new_tokens" in column.asking.options:
        return options.num_blocks * options.block_steps
    most = column.asking.most_new_tokens
    return most and max(most, options.max_new_tokens)  # a step for each token


def _judged(tried: EvaluateConfig, folder: Path) -> Sequence[float]:
    if tried.judge is None:
        return ()
    answers = contained.seconds_of_answers(tried.judge, folder, folder / harness.RESULTS)
    return [seconds for seconds in answers if seconds]


def _check_trial(tried: EvaluateConfig, column: HarnessColumn, folder: Path, result: dict[str, Any]) -> None:
    """Refuse a result of other settings: its seconds say nothing.

    Raises:
        ConfigError: names what differs.
    """
    assert tried.harness
    path = folder / harness.settings_name(str(result.get("digest")))
    then = Settings.checked(harness.read_result(path) or {"model": ""}, str(path)).model_dump()
    now = harness.settings_of(tried, column).model_dump()
    then |= {name: result.get(name) for name in ("task", "batch_size")}
    now |= {"task": column.task, "batch_size": tried.harness.batch_size}
    if changed := [name for name in now if name != "model" and then[name] != now[name]]:
        raise ConfigError(
            f"{folder}: the trial ran with another {' and '.join(changed)}; run it again with this "
            "configuration, or give the folder of another trial with --run"
        )
