"""Runs the benchmarks of the section `harness` by lmms-eval's command, one task after the other.

    OUT/LABEL/harness/COLUMN/TASK/
        settings-DIGEST.json   what our plugin reads: model, prompt, decoding
        log.txt                what lmms-eval printed
        results/               what lmms-eval wrote: results and answers
        judged.jsonl           what the judge says, where it is asked whether an answer contains the right one
        result.json            the score; a run with the same digest is not repeated

lmms-eval runs in a process of its own, so that a data set that cannot be had ends no other task. Its command
exits with 0 when the evaluation failed: only a results file counts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...pipeline.io import files, weights
from ...schemas.errors import ConfigError, ParaCaptionError, one_line
from ...schemas.evaluation import EvaluateConfig
from ...schemas.harness import ColumnName, HarnessColumn, HarnessTask, Settings
from . import captioners, contained, lmms
from .lmms_run import not_installed, scores_of

FOLDER, LOG, RESULTS, RESULT = "harness", "log.txt", "results", "result.json"

_NO_DATA = (
    ("GatedRepoError|gated dataset|gated repo", "it is gated: accept its terms on its page and set HF_TOKEN"),
    ("OfflineModeIsEnabled|HF_HUB_OFFLINE|in offline mode", "it is not in the cache, and downloads are off"),
    (
        "LocalEntryNotFoundError|ConnectionError|MaxRetryError|ConnectError|Couldn't reach",
        "the hub is not reached",
    ),
    ("DatasetNotFoundError|RepositoryNotFoundError|DataFilesNotFoundError", "the hub does not have it"),
)
"""What lmms-eval prints when a data set cannot be had, and why that is."""

_ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception|NotFound|Interrupt)\b.*|.*Error during evaluation: .*)$")


class Outcome(NamedTuple):
    """A task in one column of the table.

    Attributes:
        status: "scored", "no data", "no judge" or "failed".
        score: in percent; None without one.
        questions: number of questions that were asked.
        seconds: time that lmms-eval's command took.
        reason: why there is no score.
        log: file with what lmms-eval printed; empty if it did not run.
        unreadable: questions that count as wrong since the judge's reply cannot be read.
    """

    status: str
    score: float | None = None
    questions: int = 0
    seconds: float = 0.0
    reason: str = ""
    log: str = ""
    unreadable: int = 0


class NoData(ParaCaptionError):
    """The data set of a task cannot be had here and now."""


class RunFailed(ParaCaptionError):
    """lmms-eval has run and left no score."""


def run_harness(config: EvaluateConfig, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Run every task in every column that has no result yet.

    Args:
        config: with the section `harness`.
        progress: called with "benchmarks", the number of runs that are done, and of all.

    Returns:
        For each row its name, the paper's number, and in `columns` an `Outcome` by the name of the column.

    Raises:
        ConfigError: lmms-eval is not installed.
    """
    harness = config.harness
    assert harness
    check_installed()
    cells: list[tuple[HarnessTask, ColumnName]] = [
        (task, name) for task in harness.chosen() for name in harness.columns if name in task.columns
    ]
    rows = {task.name: _row(task) for task in harness.chosen()}
    for number, (task, name) in enumerate(cells):
        progress("benchmarks", number, len(cells))
        rows[task.name]["columns"][name] = _outcome(config, task, name)._asdict()
    progress("benchmarks", len(cells), len(cells))
    return list(rows.values())


def check_installed() -> str:
    """The version of lmms-eval.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError(not_installed())
    return importlib.metadata.version("lmms-eval")


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The runs that failed, as `NAME (COLUMN)`; rows without data or judge are none."""
    return [
        f"{row['name']} ({name})"
        for row in rows
        for name, outcome in row["columns"].items()
        if outcome["status"] == "failed"
    ]


def reasons(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each run without a score: why, and where its log is; and where a judge said nothing."""
    for row in rows:
        for name, outcome in row["columns"].items():
            if outcome["status"] != "scored":
                log = f" ({outcome['log']})" if outcome["log"] else ""
                yield f"{row['name']}, {name}: {outcome['status']}: {outcome['reason']}{log}"
            elif unreadable := outcome["unreadable"]:
                yield (
                    f"{row['name']}, {name}: {unreadable} of {outcome['questions']} questions count as "
                    f"wrong, since the judge's reply says neither CORRECT nor INCORRECT ({contained.ANSWERS})"
                )


def _row(task: HarnessTask) -> dict[str, Any]:
    return {"name": task.name, "paper": task.paper, "note": task.note, "columns": {}}


def _outcome(config: EvaluateConfig, task: HarnessTask, name: ColumnName) -> Outcome:
    column = task.columns[name]
    if missing := _missing_judge(config, column):
        return Outcome("no judge", reason=missing)
    folder = folder_of(config, task, name)
    log = str(folder / LOG)
    try:
        return _run(config, task, name, folder)
    except NoData as error:
        return Outcome("no data", reason=str(error), log=log)
    except ParaCaptionError as error:
        return Outcome("failed", reason=one_line(error), log=log)


def folder_of(config: EvaluateConfig, task: HarnessTask, name: ColumnName) -> Path:
    """Where a task's files in a column lie."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", task.name)
    return Path(config.out) / config.label / FOLDER / name / plain


def _missing_judge(config: EvaluateConfig, column: HarnessColumn) -> str:
    if column.judge == "contains" and config.judge is None:
        return "set `judge` in the configuration, such as Qwen3-8B behind a server"
    if column.judge == "lmms-eval" and not (
        os.environ.get("OPENAI_API_KEY") or os.environ.get("AZURE_API_KEY")
    ):
        return "lmms-eval asks a model: set OPENAI_API_KEY, and OPENAI_API_URL for a server of your own"
    return ""


def _run(config: EvaluateConfig, task: HarnessTask, name: ColumnName, folder: Path) -> Outcome:
    assert config.harness
    column = task.columns[name]
    settings = settings_of(config, column)
    digest = _digest(config, task, column, settings)
    result = read_result(folder / RESULT)
    if result.get("digest") != digest:
        folder.mkdir(parents=True, exist_ok=True)
        settings_file = folder / settings_name(digest)
        files.write_json(settings_file, settings.model_dump(mode="json"))
        start = time.monotonic()
        _command(config, task, name, folder, settings_file.name)
        result = {**_read_results(folder, column), "seconds": round(time.monotonic() - start, 1)}
        result |= {"task": column.task, "batch_size": config.harness.batch_size}
        files.write_json(folder / RESULT, {"digest": digest, **result})
    score, unreadable = result["score"], 0
    if column.judge == "contains":
        assert config.judge
        score, unreadable = contained.share_contained(config.judge, folder, folder / RESULTS)
    if score is None or not math.isfinite(score):
        raise RunFailed(
            f"{column.task}: no number {column.metric!r} in its results, which have "
            f"{', '.join(result['metrics'])}"
        )
    costs = result["questions"], result["seconds"]
    return Outcome("scored", score, *costs, log=str(folder / LOG), unreadable=unreadable)


def settings_name(digest: str) -> str:
    """Name of the file with the settings of a run."""
    return f"settings-{digest[:12]}.json"


def settings_of(config: EvaluateConfig, column: HarnessColumn) -> Settings:
    """What our plugin reads.

    Raises:
        ConfigError: the configuration's model is not there, or an option is wrong.
    """
    given = captioners.model_options(config.backend())
    identity = weights.identity(given.model)
    model = str(Path(given.model).resolve())
    return Settings(
        model=model, device=given.device, dtype=given.dtype, weights=identity, asking=column.asking
    )


def _digest(config: EvaluateConfig, task: HarnessTask, column: HarnessColumn, settings: Settings) -> str:
    """A digest of all that a result depends on; how many questions are asked at once is not among it."""
    assert config.harness
    asked = settings.model_dump(mode="json") | {"model": "", "device": ""}
    tasks = [] if task.include is None else [_digest_of_folder(Path(task.include))]
    known = [asked, column.task, column.metric, column.percent, config.harness.limit, tasks]
    known.append(importlib.metadata.version("lmms-eval"))
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _digest_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_result(path: Path) -> dict[str, Any]:
    """The result.json of a run; empty if there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); delete it, and the task runs again") from error
    return found if isinstance(found, dict) else {}


def _command(
    config: EvaluateConfig, task: HarnessTask, name: ColumnName, folder: Path, settings: str
) -> None:
    """Run lmms-eval's command in the task's folder, in which it leaves its results.

    Paths in its arguments are relative: commas and `=` in one would be read as the next argument.
    """
    harness = config.harness
    assert harness
    for old in (folder / RESULTS, folder / contained.ANSWERS):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        lmms.NAME,
        "--model_args",
        f"settings={settings}",
    ]
    command += ["--tasks", task.columns[name].task, "--batch_size", str(harness.batch_size)]
    command += ["--output_path", RESULTS, "--log_samples"]
    if task.include is not None:
        command += ["--include_path", task.include]
    if harness.limit is not None:
        command += ["--limit", str(harness.limit)]
    if name == "released":
        command.append("--force_simple")  # the released code puts all images first, and then the text
    with open(folder / LOG, "wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:  # this process is being stopped
                process.kill()
                process.wait()
    if not _results_files(folder):
        raise _why_failed((folder / LOG).read_text(errors="replace"), task.columns[name].task, code)


def _results_files(folder: Path) -> list[Path]:
    return sorted((folder / RESULTS).rglob("*_results.json"))


def _why_failed(log: str, task: str, code: int) -> ParaCaptionError:
    """The error that lmms-eval has printed, as one of ours."""
    lines = [line.strip() for line in log.splitlines()]
    errors = [line for line in lines if _ERROR.match(line)]
    for pattern, reason in _NO_DATA:
        if any(re.search(pattern, line) for line in errors):
            return NoData(f"the data of {task}: {reason}")
    causes = [line for line in errors if "RetryError" not in line] or errors  # which hides the error it wraps
    told = (causes or lines or ["it printed nothing"])[-1]
    told = told.partition("Error during evaluation: ")[2] or told
    told = told.removesuffix(". Please set `--verbosity=DEBUG` to get more information.")
    return RunFailed(f"lmms-eval left no results (exit code {code}): {told[:300]}")


def _read_results(folder: Path, column: HarnessColumn) -> dict[str, Any]:
    """Score, names of all numbers, and what was asked and how long, of the newest results file.

    `available` is the number of questions without `limit`. `startup_s` is the time to the first question, and
    `answering_s` that of all answers; both are None where our plugin did not answer.
    """
    path = _results_files(folder)[-1]
    try:
        found = json.loads(path.read_bytes())
        named = found["results"][column.task]
        samples = found["n-samples"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunFailed(f"{path}: no results of {column.task} ({error!r}); run the command again") from error
    scores = scores_of(named)
    score = scores.get(column.metric)
    if score is not None and not column.percent:
        score *= 100
    counts = {
        known: sum(int(each[theirs]) for each in samples.values())
        for known, theirs in (("questions", "effective"), ("available", "original"))
    }
    costs = found.get("throughput") or {}
    seconds = {"startup_s": costs.get("avg_startup_seconds"), "answering_s": costs.get("total_elapsed_time")}
    return {"score": score, "metrics": sorted(scores), **counts, **seconds}
