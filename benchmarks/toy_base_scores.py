"""Scores of a tiny Base on held-out questions: by `Chat`, by `paracaption ask`, and by lmms-eval."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from paracaption.flows.cli.ask import ask as ask_command
from paracaption.model_training.decoding.chat import Chat, Question
from paracaption.schemas.answering import AnswerOptions

from .toy import run_command

LENGTHS = {"thing": 5}
"""Tokens of an answer with its end, where they are not 2."""
BY_COMMAND = 20
"""Questions that are also asked by the command itself, in a process of its own for each image."""
TASKS = {2: "toy_base_word", 5: "toy_base_thing"}
"""lmms-eval's tasks, by the tokens of their answers."""
DESCRIBED, DESCRIBED_TOKENS = 60, 48
"""Scenes that are described to compare the cache `approximate` with none, and slots of a description."""

_UTILS = """
def images(doc):
    return [doc["image"].convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def results(doc, answers):
    return {"right": float(answers[0] == doc["answer"])}
"""


def ask(folder: Path, stage: int) -> None:
    """Ask the held-out questions of a stage's model in all ways, and write what it says."""
    held_out = json.loads((folder / "held-out.json").read_text())
    model = folder / f"base-{stage}/model"
    chat = Chat.load(model, "cpu", "float32")
    found = {"stage": stage, "chat": _by_chat(chat, folder, held_out)}
    found["longer"] = _by_chat(chat, folder, held_out, 8)
    done = folder / f"answers-{stage}.json"
    done.write_text(json.dumps(found, indent=1))
    print(f"by Chat: {_share_right(held_out, found['chat']):.1%}", flush=True)
    found["ask"] = _by_function(chat, model, folder, held_out)
    found["agreement"] = {each: _agreement(chat, folder, each) for each in (8, 16)}
    done.write_text(json.dumps(found, indent=1))
    print(f"by the function of `paracaption ask`: {_share_right(held_out, found['ask']):.1%}", flush=True)
    found["command"] = _by_command(model, folder, held_out)
    done.write_text(json.dumps(found, indent=1))
    write_tasks(folder, held_out)


def _photo(folder: Path, asked: dict[str, Any]) -> Path:
    return folder / "heldout" / f"{asked['scene']:06d}.png"


def _options(asked: dict[str, Any], length: int | None = None) -> AnswerOptions:
    return AnswerOptions(max_new_tokens=length or LENGTHS.get(asked["kind"], 2))


def _by_chat(
    chat: Chat, folder: Path, held_out: list[dict[str, Any]], length: int | None = None
) -> list[str]:
    """The answers in batches; `length` slots for each instead of as many as the right answer has tokens."""
    questions = [
        Question(each["question"], [_photo(folder, each)], options=_options(each, length))
        for each in held_out
    ]
    return [answer.text for answer in chat.ask_all(questions, batch_size=32)]


def _same_call(held_out: list[dict[str, Any]]) -> list[list[int]]:
    """Numbers of the questions that one command can ask: about one image, and with the same options."""
    calls: dict[tuple, list[int]] = {}
    for number, each in enumerate(held_out):
        calls.setdefault((each["scene"], LENGTHS.get(each["kind"], 2)), []).append(number)
    return sorted(calls.values(), key=len, reverse=True)


def _by_function(chat: Chat, model: Path, folder: Path, held_out: list[dict[str, Any]]) -> list[str]:
    """The answers by what `paracaption ask` calls, in this process, with a model that is loaded once."""
    said, lines = [""] * len(held_out), folder / "lines.jsonl"
    with mock.patch.object(Chat, "load", return_value=chat), mock.patch("builtins.print"):
        for numbers in _same_call(held_out):
            first = held_out[numbers[0]]
            texts = [held_out[number]["question"] for number in numbers]
            given = _options(first).model_dump()
            ask_command(model, texts, [_photo(folder, first)], json=str(lines), **given)
            _take(lines, numbers, said)
    return said


def _by_command(model: Path, folder: Path, held_out: list[dict[str, Any]]) -> dict[str, str]:
    """Some answers by the command itself: of the images with the most questions."""
    said, lines = [""] * len(held_out), folder / "lines.jsonl"
    asked: list[int] = []
    for numbers in _same_call(held_out):
        if len(asked) >= BY_COMMAND:
            break
        first = held_out[numbers[0]]
        texts = [held_out[number]["question"] for number in numbers]
        options = (
            "--max-new-tokens",
            str(_options(first).max_new_tokens),
            "--device",
            "cpu",
            "--dtype",
            "float32",
        )
        image = _photo(folder, first)
        run_command("ask", "--model", model, "--image", image, "--json", lines, *options, *texts)
        _take(lines, numbers, said)
        asked += numbers
    return {str(number): said[number] for number in asked}


def _take(lines: Path, numbers: list[int], said: list[str]) -> None:
    for number, line in zip(numbers, lines.read_text().splitlines(), strict=True):
        said[number] = json.loads(line)["answer"]


def _agreement(chat: Chat, folder: Path, every: int) -> dict[str, float]:
    """How the cache `approximate` answers long questions, against no cache."""
    options = AnswerOptions(
        max_new_tokens=DESCRIBED_TOKENS,
        block_length=16,
        cache="approximate",
        refresh_every=every,
        compare=True,
    )
    photos = [_photo(folder, {"scene": scene}) for scene in range(DESCRIBED)]
    asked = [Question("Describe the image.", [photo]) for photo in photos]
    found = [answer.agreement or 0.0 for answer in chat.ask_all(asked, options, batch_size=30)]
    return {"tokens": sum(found) / len(found), "same": sum(each == 1 for each in found) / len(found)}


def write_tasks(folder: Path, held_out: list[dict[str, Any]]) -> None:
    """Write the questions as tasks for lmms-eval."""
    import datasets
    import yaml

    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "utils.py").write_text(_UTILS)
    for length, name in TASKS.items():
        rows = [each for each in held_out if LENGTHS.get(each["kind"], 2) == length]
        columns: dict[str, list[Any]] = {
            key: [each[key] for each in rows] for key in ("kind", "question", "answer")
        }
        columns["image"] = [{"bytes": _photo(folder, each).read_bytes(), "path": None} for each in rows]
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        table.to_parquet(tasks / f"{name}.parquet")
        task = {
            "task": name,
            "dataset_path": "parquet",
            "dataset_kwargs": {"data_files": {"test": str(tasks / f"{name}.parquet")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {"max_new_tokens": length, "temperature": 0},
            "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
        }
        functions = {"doc_to_visual": "images", "doc_to_text": "text", "process_results": "results"}
        lines = [f"{key}: !function utils.{function}" for key, function in functions.items()]
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(task) + "\n".join(lines) + "\n")


def _share_right(held_out: list[dict[str, Any]], answers: list[str]) -> float:
    right = [each["answer"] == answer for each, answer in zip(held_out, answers, strict=True)]
    return sum(right) / len(right)


def report(folder: Path) -> str:
    """The table in Markdown, and what else was measured, of the last stage that was asked."""
    held_out = json.loads((folder / "held-out.json").read_text())
    found = json.loads(max(folder.glob("answers-*.json")).read_text())
    columns = {"right": found["chat"], "asked with 8 slots": found["longer"]}
    lines = [
        f"| question | asked | {' | '.join(columns)} | majority guess |",
        "| --- |" + " ---: |" * (2 + len(columns)),
    ]
    kinds = list(dict.fromkeys(each["kind"] for each in held_out))
    guessed = 0
    for kind in [*kinds, "all"]:
        here = [number for number, each in enumerate(held_out) if kind in (each["kind"], "all")]
        if kind != "all":
            guess = Counter(held_out[number]["answer"] for number in here).most_common(1)[0][1]
            guessed += guess
        else:
            guess = guessed
        rights = [
            sum(held_out[number]["answer"] == answers[number] for number in here) / len(here)
            for answers in columns.values()
        ]
        shares = " | ".join(f"{each:.1%}" for each in (*rights, guess / len(here)))
        lines.append(f"| {kind} | {len(here)} | {shares} |")
    same = sum(one == other for one, other in zip(found["chat"], found["ask"], strict=True))
    by_command = sum(found["chat"][int(number)] == answer for number, answer in found["command"].items())
    lines += ["", f"`paracaption ask`: {same} of {len(held_out)} answers are those of Chat."]
    lines += [f"The command itself: {by_command} of {len(found['command'])}."]
    for every, each in found["agreement"].items():
        lines += [
            f"`approximate`, computed again every {every} steps: {each['tokens']:.1%} of the tokens and "
            f"{each['same']:.1%} of the answers are those without a cache."
        ]
    harness = folder / "lmms.json"
    if harness.exists():
        scores = json.loads(harness.read_text())
        scores = scores.get("scores", scores)
        sizes = Counter(TASKS[LENGTHS.get(each["kind"], 2)] for each in held_out)
        share = sum(scores[task]["right"] * size for task, size in sizes.items()) / len(held_out)
        lines += [f"lmms-eval: {share:.1%} right."]
    return "\n".join(lines)
