"""Asks a judge whether the answers of a task contain the right ones, as PerceptionDLM's released code does.

It reads the answers that lmms-eval has written (`--log_samples`). What the judge has said is kept, so that a
run that was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...pipeline.io.json_lines import LineWriter, read_lines
from ...schemas.errors import BadRecord, StageFailed
from ...schemas.evaluation import Judge
from ...schemas.reasons import Reason
from . import judges

ANSWERS = "judged.jsonl"
_AT_ONCE = 256
_MAX_TOKENS = 1000

_PROMPT = """Decide whether a prediction gives a right answer.

Right answers, of which any one counts: {right}
Prediction: {answer}

The prediction is correct if one of the right answers stands in it. Case, spaces and punctuation do not \
count, nor does whatever else it says. It is incorrect if none of them does, or if it clearly means \
something else.
Reply with one word: CORRECT or INCORRECT."""


class _Asked(NamedTuple):
    prompt: str
    digest: str


class Contained(NamedTuple):
    """What a judge says of a task's answers.

    Attributes:
        percent: of the answers, those that contain the right one.
        unreadable: number of answers of which the judge says neither, in any try. They count as wrong.
    """

    percent: float
    unreadable: int


def share_contained(config: Judge, folder: Path, results: Path) -> Contained:
    """How many answers contain the right one.

    Args:
        config: the judge.
        folder: gets `judged.jsonl`.
        results: folder with the answers that lmms-eval has written.

    Raises:
        StageFailed: the judge's server is down, or gave no answer to some questions; the next call asks them
            again. Or no reply of the judge can be read.
    """
    asked = list(_questions(config, results))
    if not asked:
        raise StageFailed(f"{results}: no answers to judge; delete {folder}, and the task runs again")
    path = folder / ANSWERS
    known = _answers(path)
    missing = list({each.digest: each for each in asked if each.digest not in known}.values())
    if missing:
        _ask(config, missing, path)
        known = _answers(path)
    if left := sum(each.digest not in known for each in asked):
        raise StageFailed(f"{left} of {len(asked)} answers are not judged; run the command again")
    said = [is_correct(known[each.digest]) for each in asked]
    if set(said) == {None}:
        raise StageFailed(
            f"the judge says neither CORRECT nor INCORRECT, as in {path}; choose another one, or let it "
            "think less with judge.options.extra_body: {chat_template_kwargs: {enable_thinking: false}}"
        )
    return Contained(100 * said.count(True) / len(said), said.count(None))


def is_correct(answer: str) -> bool | None:
    """Whether a judge says CORRECT, whatever it has thought before; None if it says neither word.

    A judge that was cut off while it thought has not answered.
    """
    said = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL).strip().strip(".*\"'").upper()
    return {"CORRECT": True, "INCORRECT": False}.get(said)


def _check(answer: str) -> None:
    if is_correct(answer) is None:
        raise BadRecord(Reason.ANSWER_INVALID, f"neither CORRECT nor INCORRECT, but ...{answer[-60:]!a}")


def _questions(config: Judge, results: Path) -> Iterator[_Asked]:
    identity = judges.identity(config)
    for path in sorted(results.rglob("*_samples_*.jsonl")):
        for line in read_lines(path):
            sample = json.loads(line)
            prompt = _PROMPT.format(right=_listed(sample["target"]), answer=sample["filtered_resps"][0])
            digest = hashlib.sha256(json.dumps([identity, prompt]).encode()).hexdigest()[:24]
            yield _Asked(prompt, digest)


def _listed(target: Any) -> str:
    return str([*target] if isinstance(target, list | tuple) else target)


def _ask(config: Judge, missing: Sequence[_Asked], path: Path) -> None:
    judge = judges.load_judge(config)
    try:
        with LineWriter(path) as lines:
            for start in range(0, len(missing), _AT_ONCE):
                batch = missing[start : start + _AT_ONCE]
                requests = [
                    judges.JudgeRequest(each.prompt, max_tokens=_MAX_TOKENS, check=_check) for each in batch
                ]
                for position, answer, seconds in judges.clocked(judge, requests):
                    if isinstance(answer, BadRecord):
                        if answer.reason is not Reason.ANSWER_INVALID:
                            continue
                        answer = answer.detail  # the judge would say it again, and it is no CORRECT
                    lines.append({"digest": batch[position].digest, "answer": answer, "seconds": seconds})
    finally:
        judge.close()


def seconds_of_answers(config: Judge, folder: Path, results: Path) -> list[float]:
    """What each answer took that this judge gave in an earlier call of `share_contained`."""
    asked = {each.digest for each in _questions(config, results)}
    return [each.get("seconds", 0.0) for digest, each in _read(folder / ANSWERS).items() if digest in asked]


def _answers(path: Path) -> dict[str, str]:
    return {digest: record["answer"] for digest, record in _read(path).items()}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    return {record["digest"]: record for record in map(json.loads, read_lines(path))}
