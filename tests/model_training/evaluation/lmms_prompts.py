"""Writes what lmms-eval knows of the paper's 16 tasks, and both columns' prompts for a made document of each.

Run in lmms-eval's environment: python tests/model_training/evaluation/lmms_prompts.py TO.json
No data set is read. The documents have the fields that lmms-eval's own functions read.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paracaption.model_training.evaluation.lmms_requests import answer_options, write_prompt
from paracaption.pipeline.config_file import load_evaluation
from paracaption.schemas.harness import HarnessColumn

ROOT = Path(__file__).resolve().parents[3]

FOLDERS = (
    *("mmstar", "seedbench", "mmbench", "mmmu", "mathvista", "mathverse", "ai2d", "chartqa", "docvqa"),
    *("infovqa", "mmvp", "blink", "realworldqa", "cv_bench", "hallusion_bench", "vstar_bench"),
)
"""Of lmms-eval's tasks."""

_PLAIN = {"question": "What is it?", "answer": "A", "hint": "nan", "image": None}
_LISTED = {"choices": ["a cat", "a dog"], "options": ["a cat", "a dog"]}
_PROMPT = "What is it? Select from the following choices.\n(A) a cat\n(B) a dog"
DOCUMENTS: dict[str, dict[str, Any]] = {
    "MMStar": {"question": "What is it?\nOptions: A: a cat, B: a dog"},
    "SeedBench": {f"choice_{letter}": f"a {letter}" for letter in "abcd"},
    "MMBench": {
        **{"A": "a cat", "B": "a dog", "C": "nan", "D": "nan", "E": "nan", "hint": "Look.", "index": 1},
        **{"category": "", "L2-category": "", "source": "", "split": "dev"},
    },
    "MMMU": {
        "question_type": "multiple-choice",
        "options": "['a cat', 'a dog']",
        "question": "What is <image 1>?",
    },
    "MathVista": {
        "query": "Hint: a number.\nQuestion: How many?",
        "question_type": "free_form",
        "answer_type": "integer",
        "choices": None,
        "unit": "",
        "precision": 0,
    },
    "MathVerse": {
        "query_wo": "Give the letter.",
        "query_cot": "",
        "question_type": "multi-choice",
        "problem_version": "Vision Only",
    },
    "AI2D": _LISTED,
    "MMVP": {"Question": "What is it?", "Options": "(a) a cat (b) a dog"},
    "BLINK": {**_LISTED, "prompt": _PROMPT},
    "RealWorldQA": {
        "question": "What is it?\nA. a cat\nB. a dog\nPlease answer directly with only the letter of the "
        "correct option and nothing else."
    },
    "CV-Bench-2D": {**_LISTED, "prompt": _PROMPT},
    "V*": {"text": "What is it? (A) a cat (B) a dog"},
}
"""By benchmark, beside the fields of all."""


def main(to: str) -> None:
    """Write a record for each benchmark and column."""
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    [tasks] = find_spec("lmms_eval.tasks").submodule_search_locations
    folders = [str(Path(tasks) / name) for name in FOLDERS]  # all 338 would take a minute
    manager = TaskManager("ERROR", include_path=folders, include_defaults=False, model_name="paracaption")
    harness = load_evaluation(ROOT / "configs/evaluate/base.yaml").harness
    assert harness
    found = {
        task.name: {
            name: _record(manager, column, {**_PLAIN, **DOCUMENTS.get(task.name, {})})
            for name, column in task.columns.items()
        }
        for task in harness.tasks
    }
    Path(to).write_text(json.dumps(found, indent=1))


def _record(manager: Any, column: HarnessColumn, doc: dict[str, Any]) -> dict[str, Any]:
    """Kind and numbers of a task, its prompt for a document, and how the answer is decoded."""
    about = manager.task_index[column.task]
    task = manager._get_config(column.task)
    if about["type"] == "group":
        first = task["task"][0]
        members = manager.task_index[first]["task"] if manager._name_is_tag(first) else task["task"]
        numbers = [each["metric"] for each in task["aggregate_metric_list"]]
        task = manager._get_config(members[0])
    else:
        members, numbers = [column.task], [each["metric"] for each in task["metric_list"]]
    specific = task.get("lmms_eval_specific_kwargs") or {}
    args = [specific["default"]] if "default" in specific else []
    text = task["doc_to_text"](doc, *args)
    if column.asking.prompt is not None:
        text = write_prompt(column.asking.prompt, text, doc, column.task)
    options = answer_options(task.get("generation_kwargs"), column.asking, column.task)
    return {
        "type": about["type"],
        "members": len(members),
        "output": task["output_type"] if "output_type" in task else "generate_until",
        "numbers": numbers,
        "prompt": text,
        "decoding": options.model_dump(exclude_unset=True),
    }


if __name__ == "__main__":
    main(sys.argv[1])
