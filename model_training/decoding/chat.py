"""Answers to questions about whole images, about a region, or about nothing that is seen."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...pipeline.models.batching import Batches, refusing_out_of_memory
from ...schemas.answering import AnswerOptions
from ...schemas.errors import ConfigError
from ..model.layout import IMAGE
from .region_captioner import Photo, RegionCaptioner, check_count
from .region_forms import Boxes, to_masks, to_pixels
from .snapshots import Slot

if TYPE_CHECKING:
    from ..model.batch import Example
    from ..model.perceptiondlm import PerceptionDLM
    from ..model.processor import PerceptionDLMProcessor
    from .blocks import AnswerState, Asked

Turns = Sequence[tuple[str, str]]
"""Questions and answers that came before, in turn."""

_NEVER = ("<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>")
"""What PerceptionDLM's released code never answers, besides the mask token."""


@dataclass(frozen=True)
class Question:
    """A question, and what it is about.

    Attributes:
        text: the question. `<image>` stands for an image; where neither it nor a turn before it says where
            the images stand, they stand before the first question, each on a line of its own.
        images: those of the whole conversation, in the forms of `region_forms`.
        turns: the questions and answers before this one. An answer may be empty, as a model's may.
        region: a region of the only image that the question is about, in a form of `region_forms`; None for
            all of it. The model answers as it captions: its prompt is the question.
        boxes: what four numbers mean as a region.
        options: how this question is answered; None for the options of the call.
    """

    text: str
    images: Sequence[Photo] = ()
    turns: Turns = ()
    region: Any = None
    boxes: Boxes = "xyxy"
    options: AnswerOptions | None = None


class Answer(NamedTuple):
    """An answer, and what it cost.

    Attributes:
        text: without what ends it.
        tokens: the ids of its tokens up to its end.
        confidence: the geometric mean of the probabilities of its tokens, the one that ends it included; 0 to
            1.
        ended: what ended it: "end" (the model's end of text), "stop" (a stop string) or "length".
        forwards: forward passes of the language model.
        seconds: this answer's share of the time that its batch took.
        agreement: share of tokens equal to those without a cache, where `compare` asks for it.
    """

    text: str
    tokens: list[int]
    confidence: float
    ended: str
    forwards: int
    seconds: float
    agreement: float | None = None


class AnswerStep(NamedTuple):
    """An answer between two decoding steps.

    Attributes:
        forwards: forward passes of the language model so far.
        text: the answer as it reads now, without what is still masked.
        settled: the part of it before the first masked token, which stays as it is. What may be the beginning
            of a stop string, or of a letter of several tokens, is not in it until that is decided.
        slots: its tokens.
        done: whether this is the last step.
    """

    forwards: int
    text: str
    settled: str
    slots: list[Slot]
    done: bool


class Chat:
    """Answers questions with a PerceptionDLM, or with the Base that it was trained from.

        chat = Chat.load("out/run/model")
        chat.ask("What color is the car?", "street.jpg")

    How answers are decoded can be chosen in every call, with `AnswerOptions` or with fields of it:

        chat.ask("Describe the image.", "street.jpg", max_new_tokens=256, strategy="threshold")

    Attributes:
        model: the network, in eval mode and on its device.
        processor: lays out questions and images for this network, and turns its tokens into text.
    """

    def __init__(self, model: PerceptionDLM, processor: PerceptionDLMProcessor):
        self.model, self.processor = model, processor
        known = processor.tokenizer.get_vocab()
        self._unsaid = {known[name] for name in _NEVER if name in known} | {model.config.mask_token_id}

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", dtype: str = "auto") -> Chat:
        """Open a saved model; arguments and errors as of `RegionCaptioner.load`."""
        opened = RegionCaptioner.load(folder, device, dtype)
        return cls(opened.model, opened.processor)

    def about(self) -> dict[str, str]:
        """Folder, layout, device and type of the model, for records."""
        return {
            "folder": str(self.model.name_or_path),
            "layout": self.model.config.layout,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def ask(
        self,
        text: str,
        images: Photo | Sequence[Photo] = (),
        options: AnswerOptions | None = None,
        *,
        turns: Turns = (),
        region: Any = None,
        boxes: Boxes = "xyxy",
        **fields: Any,
    ) -> str:
        """Answer a question.

        Args:
            text: the question; see `Question`, as for all that follows.
            images: one image or several; none for a question about text.
            options: how the answer is decoded; by default as `AnswerOptions()` says.
            turns: the questions and answers before this one.
            region: the region that the question is about.
            boxes: what four numbers mean as a region.
            fields: single fields of `AnswerOptions` that differ from `options`, such as `max_new_tokens=64`.

        Raises:
            ConfigError: an image or the region cannot be read, a text is blank or holds a special token, the
                question shows more or fewer images than there are, or an option is out of range or does not
                suit the model.
        """
        question = Question(text, _listed(images), turns, region, boxes)
        return self.ask_all([question], options, **fields)[0].text

    def ask_all(
        self,
        questions: Iterable[Question],
        options: AnswerOptions | None = None,
        *,
        batch_size: int = 8,
        **fields: Any,
    ) -> list[Answer]:
        """Answer many questions, with the cost of each. Answers do not depend on what else is in a batch.

        Args:
            questions: they are read one after the other, and only the images of a few batches are in memory.
            options: how questions without options of their own are answered.
            batch_size: questions that are answered at once; halved when memory runs out. More are faster on a
                GPU.
            fields: single fields of `AnswerOptions` that differ from `options`.

        Returns:
            One answer for each question, in their order.

        Raises:
            ConfigError: as `ask`; the message says the number of the question.
            OutOfMemory: one question alone does not fit.
        """
        from .blocks import kind_of

        options = answer_options(options, fields)
        check_count("batch_size", batch_size or 0)
        found: dict[int, Answer] = {}
        batches = Batches(batch_size, "answers: questions")
        waiting: dict[tuple, list[tuple[int, Asked]]] = {}

        def answer(group: list[tuple[int, Asked]]) -> None:
            found.update(batches.run(group, lambda part: [*self._answer(part).items()]))

        for number, question in enumerate(questions):
            asked = self._lay_out(question, question.options or options, f"question {number}: ")
            group = waiting.setdefault(kind_of(self.model, asked), [])
            group.append((number, asked))
            if len(group) == batch_size:
                answer(group)
                group.clear()
        for group in waiting.values():
            answer(group)
        return [found[number] for number in range(len(found))]

    def ask_steps(
        self, question: Question, options: AnswerOptions | None = None, **fields: Any
    ) -> Iterator[AnswerStep]:
        """Answer a question, and show how the answer comes to be.

        Yields:
            The answer before the first step and after every one. The last is what `ask` returns.

        Raises:
            ConfigError: as `ask`, at once; or the question has options of its own, and there are others too.
            OutOfMemory: the question does not fit.
        """
        from .blocks import choose_cache

        if question.options is not None and (options is not None or fields):
            raise ConfigError(
                "the question has options of its own; leave out those of the call, or set them with "
                "`with_options(question, ...)`"
            )
        asked = self._lay_out(question, question.options or answer_options(options, fields), "")
        choose_cache(self.model, asked.options)
        return self._shown(asked)

    def _shown(self, asked: Asked) -> Iterator[AnswerStep]:
        for state in self._states(asked):
            tokens = state.tokens_BS[0].tolist()
            rows = zip(tokens, state.open_BS[0].tolist(), state.confidence_BS[0].tolist(), strict=True)
            slots = [
                Slot(None if masked else self.processor.tokenizer.decode([token]), token, confidence)
                for token, masked, confidence in rows
            ]
            said = tokens[: int(state.ends_B[0])]
            text, done = self._read(said), bool(state.done_B[0])
            open_K = np.flatnonzero(state.open_BS[0, : len(said)])
            settled = self._settled(said[: open_K[0]], asked.stops) if len(open_K) and not done else text
            yield AnswerStep(int(state.forwards_B[0]), text, settled, slots, done)

    def _states(self, asked: Asked) -> Iterator[AnswerState]:
        from .blocks import answer_steps

        advice = "shorten the question, lower `max_new_tokens`, or use a larger GPU"
        with refusing_out_of_memory("steps: one question", advice):
            yield from answer_steps(self.model, [asked])

    def _settled(self, tokens: list[int], stops: Sequence[tuple[int, ...]]) -> str:
        """The text of decided tokens, without an end that may still become a stop string or a letter."""
        held = max(
            (
                length
                for stop in stops
                for length in range(1, min(len(stop), len(tokens) + 1))
                if stop[:length] == tuple(tokens[-length:])
            ),
            default=0,
        )
        return self._read(tokens[: len(tokens) - held]).rstrip("\ufffd").rstrip()

    def _lay_out(self, question: Question, options: AnswerOptions, name: str) -> Asked:
        """A question as a sequence with masked slots for its answer."""
        from .blocks import Asked

        try:
            if question.region is None:
                example, first = self._of_images(question, options)
            else:
                example, first = self._of_region(question, options)
        except ConfigError as error:
            raise ConfigError(f"{name}{error}") from error
        most = self.model.config.text.max_position_embeddings
        length = example.prefix.shape[1] + example.captions.shape[1]
        if most and length > most:
            raise ConfigError(
                f"{name}{length:,} tokens, of which the model takes {most:,}; shorten the question, give "
                "fewer images, or lower max_new_tokens"
            )
        stops = tuple(tuple(self.processor.tokenize(stop)) for stop in options.stop)
        return Asked(example, first, options, self._never(options), stops)

    def _of_images(self, question: Question, options: AnswerOptions) -> tuple[Example, int]:
        from ..model import conversation, tiling

        pixels = [to_pixels(photo, f"image {number}") for number, photo in enumerate(question.images)]
        questions = _with_places([*(asked for asked, _ in question.turns), question.text], len(pixels))
        for text in questions:
            self.processor.check_instruction(text.replace(IMAGE, " "))
        said = [self.processor.check_text(answer, "an answer in `turns`") for _, answer in question.turns]
        name = options.template
        if name == "auto":
            name = "released" if self.model.config.layout == "reference" else "trained"
        views, grids = conversation.cut_photos(self.processor, pixels)
        counts = [tiling.num_views(grid) for grid in grids]
        tokenize = self.processor.tokenize
        template = conversation.TEMPLATES[name]
        prefix, *asked = conversation.lay_out(self.processor, questions, counts, template, tokenize)
        between: list[int] = []
        for answer, tokens in zip(said, asked, strict=True):
            between += [*answer, self._eot, *tokens]
        slots = [self.model.config.mask_token_id] * options.max_new_tokens
        example = conversation.make_example(self.processor, views, grids, prefix, [*between, *slots])
        return example, len(between)

    def _of_region(self, question: Question, options: AnswerOptions) -> tuple[Example, int]:
        if len(question.images) != 1 or question.turns:
            raise ConfigError(
                "a question about a region has one image and no turns before it, not "
                f"{len(question.images)} images and {len(question.turns)} turns; ask about the region alone"
            )
        if IMAGE in question.text:
            raise ConfigError(
                f"{IMAGE} in a question about a region, before which its image stands; leave it out"
            )
        self.processor.check_instruction(question.text)
        pixels = to_pixels(question.images[0], "image 0")
        masks = to_masks([question.region], pixels.shape[:2], question.boxes)
        example = self.processor.make_example(
            pixels, masks, options.max_new_tokens, instruction=question.text
        )
        return example, 1

    def _never(self, options: AnswerOptions) -> tuple[int, ...]:
        """The tokens that are never predicted, ascending."""
        from .buckets import special_tokens

        if options.suppress_special is False:
            return ()
        never = set(self._unsaid)
        if options.suppress_special or self.model.config.layout != "reference":
            never |= special_tokens(self.model.config)
        return tuple(sorted(never))

    def _answer(self, group: Sequence[tuple[int, Asked]]) -> dict[int, Answer]:
        """Answer one batch."""
        from .blocks import answer_batch, choose_cache

        asked = [each for _, each in group]
        start = time.perf_counter()
        state = answer_batch(self.model, asked)
        seconds = (time.perf_counter() - start) / len(group)
        compared = [
            row
            for row, each in enumerate(asked)
            if each.options.compare and choose_cache(self.model, each.options) == "approximate"
        ]
        exact = {}
        if compared:
            plain = [
                asked[row]._replace(options=asked[row].options.model_copy(update={"cache": "none"}))
                for row in compared
            ]
            found = answer_batch(self.model, plain)
            exact = {row: self._tokens(found, number) for number, row in enumerate(compared)}
        answers = {}
        for row, (number, _) in enumerate(group):
            answer = self._read_answer(state, row, asked[row].options.max_new_tokens, seconds)
            if row in exact:
                answer = answer._replace(agreement=_agreement(answer.tokens, exact[row]))
            answers[number] = answer
        return answers

    def _read_answer(self, state: AnswerState, row: int, length: int, seconds: float) -> Answer:
        tokens = self._tokens(state, row)
        said = len(tokens)
        stopped = int(state.ends_B[row]) < length
        ended = "stop" if said == int(state.ends_B[row]) and stopped else "end" if said < length else "length"
        sure = state.confidence_BS[row, : said + (ended == "end")]
        mean = np.exp(np.log(np.maximum(sure, np.finfo(np.float64).tiny)).mean()) if len(sure) else 1.0
        forwards = int(state.forwards_B[row])
        return Answer(self._read(tokens), tokens, float(mean), ended, forwards, seconds)

    def _tokens(self, state: AnswerState, row: int) -> list[int]:
        """The tokens of an answer up to its end."""
        tokens = state.tokens_BS[row, : int(state.ends_B[row])].tolist()
        return tokens[: tokens.index(self._eot)] if self._eot in tokens else tokens

    def _read(self, tokens: Sequence[int]) -> str:
        """The text of tokens up to the first end; special tokens are left out."""
        tokens = list(tokens)
        if self._eot in tokens:
            tokens = tokens[: tokens.index(self._eot)]
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    @property
    def _eot(self) -> int:
        assert self.model.config.eot_token_id is not None  # every saved model has it
        return self.model.config.eot_token_id


def answer_options(options: AnswerOptions | None, fields: dict[str, Any]) -> AnswerOptions:
    """Options with some fields set differently.

    Raises:
        ConfigError: a field is unknown or out of range.
    """
    if options is not None and not isinstance(options, AnswerOptions):
        raise ConfigError(
            f"options: a {type(options).__name__}; give `AnswerOptions(...)`, or its fields by their names"
        )
    options = options or AnswerOptions()
    return AnswerOptions.checked({**options.model_dump(exclude_unset=True), **fields}) if fields else options


def _listed(images: Photo | Sequence[Photo]) -> Sequence[Photo]:
    """One image or several, as a list."""
    return images if isinstance(images, list | tuple) else [images]  # pyright: ignore[reportReturnType]


def _with_places(questions: list[str], num_images: int) -> list[str]:
    """Questions that say where the images stand.

    Raises:
        ConfigError: they show more or fewer than there are.
    """
    places = sum(question.count(IMAGE) for question in questions)
    if not places:
        return [f"{IMAGE}\n" * num_images + questions[0], *questions[1:]]
    if places != num_images:
        raise ConfigError(
            f"{num_images} images, but {IMAGE} stands {places} times in the questions; write it once for "
            "each image, or not at all"
        )
    return questions


def _agreement(tokens: Sequence[int], exact: Sequence[int]) -> float:
    """The share of places at which two answers have the same token; of the longer one's."""
    most = max(len(tokens), len(exact))
    return sum(one == other for one, other in zip(tokens, exact, strict=False)) / most if most else 1.0


def with_options(question: Question, **fields: Any) -> Question:
    """A question with options of its own."""
    return dataclasses.replace(question, options=answer_options(question.options, fields))
