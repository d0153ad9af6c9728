"""Runs tasks by lmms-eval in this process, without its command.

For tasks of your own, which take seconds this way: lmms-eval's command indexes all of its tasks first. Here
an error is raised, where the command prints it and exits with 0.

    python -m paracaption.model_training.evaluation.lmms_run --model DIR --tasks NAME --to FILE

`--include FOLDER` names the folder of the tasks.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...pipeline.io import files
from ...pipeline.io.packages import how_to_install_extra
from ...schemas.errors import ConfigError, ParaCaptionError


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    include: str | Path | None = None,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    text_model: bool = False,
    samples: bool = False,
    **model_args: Any,
) -> dict[str, Any]:
    """Ask a model the questions of some tasks.

    Args:
        model: folder of a saved model.
        tasks: names of tasks.
        include: folder of the tasks; None for lmms-eval's own.
        batch_size: number of questions that are answered at once.
        limit: number of questions of each task; None asks all.
        text_model: ask as lmms-eval asks its simple models (a text and images), not its chat models.
        samples: also return what was answered.
        model_args: device, dtype, and fields of `AnswerOptions`, which count more than those of the tasks.

    Returns:
        For each task (or group of tasks) its scores by name. With `samples`, these are `scores`, and
        `answers` has what was answered to each document of each task, in their order.

    Raises:
        ConfigError: lmms-eval is not installed, a task is unknown, or the model cannot answer it.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError(not_installed())
    from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from . import lmms

    manager = TaskManager(
        "WARNING",
        include_path=None if include is None else str(include),
        include_defaults=include is None,
        model_name=lmms.NAME,
    )
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        place = "lmms-eval" if include is None else include
        known = ", ".join(manager.all_tasks[:20])
        raise ConfigError(f"{place}: no task {unknown[0]!r}; some of its tasks are {known}")
    kind = lmms.TextModel if text_model else lmms.ChatModel
    asked = kind(pretrained=str(model), batch_size=batch_size, **model_args)
    found = simple_evaluate(asked, tasks=[*tasks], task_manager=manager, limit=limit, bootstrap_iters=0)
    scores = {task: scores_of(found["results"][task]) for task in found["results"]}
    if not samples:
        return scores
    answers = {
        task: [{"answer": each["filtered_resps"][0], "target": each["target"]} for each in listed]
        for task, listed in found["samples"].items()
    }
    return {"scores": scores, "answers": answers}


def not_installed() -> str:
    """What to say where lmms-eval is not installed."""
    return f"lmms-eval is not installed here; in an environment of its own, {how_to_install_extra('lmms')}"


def scores_of(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a task in lmms-eval's results, by name, without their standard errors.

    A name that several filters give is `NAME,FILTER` for all but the first.
    """
    scores: dict[str, float] = {}
    for key, value in result.items():
        name, _, rule = key.partition(",")
        if rule and not name.endswith(("_stderr", "_stderr_clt", "_clt")) and isinstance(value, int | float):
            scores[key if name in scores else name] = float(value)
    return scores


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="lmms_run", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a saved model")
    parser.add_argument("--tasks", required=True, help="names of tasks, with commas between them")
    parser.add_argument("--to", required=True, help="JSON file to write")
    parser.add_argument("--include", help="folder of the tasks; without it, lmms-eval's own")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--text-model", action="store_true", help="ask as lmms-eval asks its simple models")
    parser.add_argument("--samples", action="store_true", help="write what was answered, too")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="device, dtype, steps, ..."
    )
    given = parser.parse_args(arguments)
    if wrong := next((each for each in given.set if "=" not in each), None):
        parser.error(f"--set {wrong}: give KEY=VALUE")
    if given.include:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        pairs = dict(each.split("=", 1) for each in given.set)
        found = run_tasks(
            given.model,
            given.tasks.split(","),
            given.include,
            batch_size=given.batch_size,
            limit=given.limit,
            text_model=given.text_model,
            samples=given.samples,
            **pairs,
        )
    except ParaCaptionError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    files.write_json(Path(given.to), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
