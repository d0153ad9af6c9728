"""A plugin for lmms-eval: its requests as questions for `Chat`, and `Chat`'s answers as its results.

lmms-eval finds `manifest` by the entry point group `lmms_eval.models`, and from it the classes `ChatModel`
(messages with images in their places) and `TextModel` (`--force_simple`: a text, and images). Both are made
when they are first asked for: lmms-eval is an extra of its own, and not installed with the rest.

    lmms-eval --model paracaption --model_args pretrained=DIR,block_length=32 --tasks mmstar --batch_size 8
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ...schemas.errors import ConfigError
from ...schemas.harness import Asking, Settings
from .lmms_requests import answer_options, cut_answer, finish_question, question_of_messages, question_of_text

if TYPE_CHECKING:
    from ..decoding.chat import Answer, Chat, Question

NAME = "paracaption"
BATCH_SIZE = 8
_CLASSES = {"ChatModel": False, "TextModel": True}
"""Whether lmms-eval's requests are those of its simple models."""


def manifest() -> Any:
    """What lmms-eval registers; see its `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    chat, text = (f"{__name__}.{name}" for name in _CLASSES)
    return ModelManifest(NAME, chat_class_path=chat, simple_class_path=text)


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

    made = type(name, (_Answers, lmms), {"is_simple": _CLASSES[name], "__module__": __name__})
    globals()[name] = made
    return made


class _Answers:
    """A model of lmms-eval that answers with `Chat`.

    Args:
        pretrained: folder of a saved model.
        settings: JSON file with `schemas.harness.Settings`, instead of `pretrained`, `device` and `dtype`.
        batch_size: number of questions that are answered at once; "auto" takes 8.
        device: as `Chat.load`. With several processes, "auto" and "cuda" take the GPU of the process.
        dtype: as `Chat.load`.
        max_batch_size: most questions at once; for a `batch_size` of "auto".
        options: fields of `AnswerOptions`, which count more than those of a task.

    Raises:
        ConfigError: the model cannot be loaded, or an option is unknown.
    """

    is_simple = False
    task_dict: dict[str, Any]
    cache_hook: Any

    def __init__(
        self,
        pretrained: str | None = None,
        settings: str | None = None,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_size: int | None = None,
        **options: Any,
    ):
        from ..decoding.chat import Chat

        super().__init__()
        if (pretrained is None) == (settings is None):
            raise ConfigError(
                "model_args: give pretrained=DIR, the folder of a saved model, or settings=FILE"
            )
        if settings is not None:
            given = read_settings(settings)
        else:
            given = Settings.checked({"model": pretrained, "device": device, "dtype": dtype}, "model_args")
        self.asking: Asking = given.asking
        if options:
            changed = {**given.asking.model_dump(), "options": {**given.asking.options, **options}}
            self.asking = Asking.checked(changed, "model_args")
        self.batch_size = to_batch_size(batch_size, max_batch_size)
        self.chat: Chat | None = Chat.load(given.model, process_device(given.device), given.dtype)
        self.device = self.chat.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer all requests of a task, in their order."""
        from lmms_eval.api.instance import GenerationResult, TokenCounts  # pyright: ignore[reportMissingImports]
        from lmms_eval.models.model_utils.gen_metrics import (  # pyright: ignore[reportMissingImports]
            log_metrics,
        )

        assert self.chat
        waited = time.time() - psutil.Process().create_time()
        start = time.perf_counter()
        answers = self.chat.ask_all(self._questions(requests), batch_size=self.batch_size)
        seconds = time.perf_counter() - start
        results = []
        for request, answer in zip(requests, answers, strict=True):
            text = cut_answer(answer.text, self._kwargs(request), self.asking)
            self.cache_hook.add_partial("generate_until", (request.args[0], self._kwargs(request)), text)
            results.append(GenerationResult(text, TokenCounts(output_tokens=len(answer.tokens))))
        log_metrics(**_cost(answers, seconds, waited))
        return results

    def _questions(self, requests: Sequence[Any]) -> Iterator[Question]:
        from tqdm import tqdm

        hidden = getattr(self, "_rank", 0) != 0
        for request in tqdm(requests, desc="questions", disable=hidden, mininterval=5):
            yield self._question(request)

    def _question(self, request: Any) -> Question:
        context, second, third, number, task, split = request.args
        kwargs, how = (second, third) if self.is_simple else (third, second)
        where = f"{task}, document {number}"
        options = answer_options(kwargs, self.asking, task)
        doc = self.task_dict[task][split][number]
        if self.is_simple:
            question = question_of_text(context, how(doc) or [], where)
        else:
            question = question_of_messages(how(doc), where)
        return finish_question(question, doc, self.asking, options, where)

    def _kwargs(self, request: Any) -> dict[str, Any]:
        return request.args[1 if self.is_simple else 2]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: a task of several rounds makes each question from the answer before it."""
        raise ConfigError(f"{_tasks(requests)}: tasks of several rounds cannot be asked; leave the task out")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: a diffusion model has no likelihood of an answer to give."""
        raise ConfigError(
            f"{_tasks(requests)}: it compares likelihoods, which a diffusion model does not give; choose a "
            "task with `output_type: generate_until`"
        )

    def clean(self) -> None:
        """Free the model's memory, which a judge in this process may need."""
        self.chat = None
        super().clean()  # pyright: ignore[reportAttributeAccessIssue] - of lmms-eval's class


def read_settings(path: str | Path) -> Settings:
    """What `settings=FILE` names.

    Raises:
        ConfigError: there is no such file, or it does not hold `Settings`.
    """
    try:
        values = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"settings={path}: {error}; name a JSON file as `schemas.harness.Settings`"
        ) from error
    return Settings.checked(values if isinstance(values, dict) else {"model": values}, str(path))


def to_batch_size(given: int | str, most: int | None = None) -> int:
    """lmms-eval's batch size, which is a text: "4", "auto" or "auto:N".

    Raises:
        ConfigError: it is not one of these.
    """
    text = str(given)
    if text.partition(":")[0] == "auto":
        return min(BATCH_SIZE, most or BATCH_SIZE)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"batch_size: {text!r}; give a whole number from 1 on, or auto")
    return int(text)


def process_device(device: str) -> str:
    """The device of this process: with several of them on a machine, each has its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or device not in ("auto", "cuda"):
        return device
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"


def _cost(answers: Sequence[Answer], seconds: float, waited: float) -> dict[str, Any]:
    """What lmms-eval writes as `throughput`; `waited` is the time from the process's start to a question."""
    tokens = sum(len(answer.tokens) for answer in answers)
    forwards = sum(answer.forwards for answer in answers)
    return {
        "total_gen_tokens": tokens,
        "total_elapsed_time": seconds,
        "avg_speed": tokens / seconds if seconds else 0.0,
        "additional_metrics": {"forwards": forwards, "questions": len(answers), "startup_seconds": waited},
    }


def _tasks(requests: Sequence[Any]) -> str:
    return ", ".join(sorted({str(request.task_name) for request in requests})) or "this task"
