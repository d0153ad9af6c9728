"""Runs a captioner on a benchmark: captions, a judge's answers, scores. Each step resumes where it stopped.

    OUT/LABEL/BENCHMARK/
        captions.jsonl       one line per image, after a line that identifies the captioner and the benchmark
        predictions.json     {key: caption}, as the published scripts write and read it
        answers.jsonl        one line per question: the judge's answer, and a digest of what it was asked
        details.json         for each region its caption, questions, answers and scores
        summary.json         the benchmark's numbers

An answer is used again as long as judge, prompt and pictures are the same, so scoring again costs nothing.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from ...pipeline.io import files
from ...pipeline.io.json_lines import LineWriter, read_lines
from ...schemas.config import Backend
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.evaluation import Bench, Judge
from . import annotations, captioners, judges, quality, scoring
from .annotations import BenchImage, Benchmark, BenchRegion
from .judges import JudgeRequest

log = logging.getLogger(__name__)

CAPTIONS, PREDICTIONS, ANSWERS = "captions.jsonl", "predictions.json", "answers.jsonl"
DETAILS, SUMMARY = "details.json", "summary.json"

_ASKED = "prompt and grouping"
"""Key of the first line of captions.jsonl; absent for other captioners, and in what early releases wrote."""

_QUESTIONS_AT_ONCE = 256
"""Questions that the judge gets at once. Progress is reported after each such batch."""

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, the number of things that are done, and the number of all."""


class Result(NamedTuple):
    """A captioner's result on a benchmark. The names are those of summary.json.

    Attributes:
        benchmark, kind: name of the benchmark, and which protocol it follows.
        regions: number of regions with a caption.
        without_caption: number of regions without one; no mean counts them.
        positive, negative, average: the benchmark's scores; None without a judge.
        recognised: share of regions whose recognition succeeded; None without a judge.
        questions: number of questions.
        unanswered: questions to which the judge gave no answer.
        no_choice: answers that name no choice.
        unverified: questions that nobody has reviewed.
        seconds: time of captioning the images.
        forwards, tokens_per_forward: forward passes of the language model, and tokens decoded by one; 0 if
            the captioner does not count them.
        quality: measures that need no judge.
        paper: what a paper reports, as in the configuration; None without.
        prompt, grouping: what a `perceptiondlm` was asked, and which regions it captioned together, as in
            the configuration; None for other captioners and for captions of early releases.
    """

    benchmark: str
    kind: str
    regions: int
    without_caption: int
    positive: float | None
    negative: float | None
    average: float | None
    recognised: float | None
    questions: int
    unanswered: int
    no_choice: int
    unverified: int
    seconds: float
    forwards: int
    tokens_per_forward: float
    quality: quality.Quality
    paper: dict[str, float] | None = None
    prompt: str | None = None
    grouping: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of summary.json."""
        return self._asdict() | {"quality": self.quality._asdict()}


def open_benchmark(bench: Bench) -> Benchmark:
    """The benchmark that a configuration names, or its first images if it says how many.

    Raises:
        ConfigError: see `annotations.read_benchmark`.
    """
    found = annotations.read_benchmark(bench.folder, bench.kind, bench.photos)
    return found._replace(images=found.images[: bench.images])


# Captions.


class _ImageLine(msgspec.Struct):
    """A line of captions.jsonl: the captions of one image."""

    image: str
    keys: list[str]
    captions: list[str | None]
    seconds: float
    forwards: int = 0
    tokens: int = 0
    problems: dict[str, str] = {}
    load_seconds: float = 0.0  # of the captioner, at the first image that it described


class _AnswerLine(msgspec.Struct):
    """What counts of a line of the judge's answers."""

    digest: str
    answer: str
    seconds: float = 0.0


_Line = TypeVar("_Line")


def caption_images(bench: Bench, backend: Backend, folder: Path, progress: Progress | None = None) -> int:
    """Caption the images that have no captions yet. The captioner is loaded only if there are any.

    Args:
        bench: the benchmark.
        backend: the captioner.
        folder: folder of the results; created if need be.
        progress: called after each image.

    Returns:
        Number of images that this call captioned.

    Raises:
        ConfigError: the folder has captions of another captioner or another benchmark; a photo is missing; or
            the captioner cannot be loaded.
    """
    benchmark = open_benchmark(bench)
    header = _header(bench, backend, benchmark)
    path = folder / CAPTIONS
    folder.mkdir(parents=True, exist_ok=True)
    if not read_lines(path):
        with LineWriter(path) as lines:
            lines.append(header)
    done = {line.image for line in _read_captions(path, header)}
    missing = [image for image in benchmark.images if image.name not in done]
    start = time.perf_counter()
    captioner = captioners.load_captioner(backend, bench) if missing else None
    load_s = time.perf_counter() - start
    if captioner is not None and captioner.needs_photos:
        absent = set(benchmark.missing_photos()) & {image.photo for image in missing}
        if absent and bench.on_missing_photo == "error":
            raise ConfigError(annotations.describe_missing(sorted(absent)))
        missing = [image for image in missing if image.photo not in absent]
    with LineWriter(path) as lines:
        answered = captioner.caption(missing) if captioner is not None else ()
        for number, (image, found) in enumerate(zip(missing, answered, strict=True)):
            keys = [region.key for region in image.regions]
            costs = (found.seconds, found.forwards, found.tokens)
            lines.append(_ImageLine(image.name, keys, found.texts, *costs, found.problems, load_s))
            load_s = 0.0
            if progress:
                progress("captions", number + 1, len(missing))
    files.write_json(folder / PREDICTIONS, _captions_by_key(folder))
    return len(missing)


def _header(bench: Bench, backend: Backend, benchmark: Benchmark) -> dict[str, Any]:
    """The first line of captions.jsonl: captioner and benchmark."""
    asked = captioners.how_asked(backend, bench)
    header = {"captioner": captioners.identity(backend), "benchmark": benchmark.digest}
    return header | ({_ASKED: asked} if asked else {})


def _read_captions(path: Path, header: dict[str, Any] | None = None) -> list[_ImageLine]:
    first, *rest = read_lines(path) or [b"{}"]
    found = _decoded(path, 1, first, dict[str, Any])
    if header is not None and _is_early(found, header):
        raise ConfigError(
            f"{path}: an earlier release asked {captioners.EARLY_ASKED['prompt']!r} with `grouping: even`; "
            "to continue, set `prompt` and `grouping` of the benchmark to these, or choose another `label`"
        )
    known = {_ASKED: captioners.EARLY_ASKED} if header and _ASKED in header else {}
    if header is not None and known | found != header:
        changed = [name for name in header if found.get(name) != header[name]]
        raise ConfigError(
            f"{path}: these captions were made with another {' and '.join(changed)}; choose another `label`, "
            f"or delete {path.parent}"
        )
    lines = [_decoded(path, number, line, _ImageLine) for number, line in enumerate(rest, start=2)]
    for number, line in enumerate(lines, start=2):
        if len(line.keys) != len(line.captions):
            raise ConfigError(
                f"{path}: line {number} has {len(line.keys)} keys, but {len(line.captions)} captions; "
                "remove the line, and the next run captions its image again"
            )
    return lines


def _lines_of(benchmark: Benchmark, lines: list[_ImageLine]) -> list[_ImageLine]:
    """Those of the benchmark's images; an earlier call may have captioned more of them."""
    names = {image.name for image in benchmark.images}
    return [line for line in lines if line.image in names]


def _decoded(path: Path, number: int, line: bytes, kind: type[_Line]) -> _Line:
    """A line of a file of results, as its kind.

    Raises:
        ConfigError: the line cannot be read; names file and line.
    """
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: line {number} is not what an evaluation writes ({error}); remove the line, or the file "
            "if it is the first, and the next run asks again for what it held"
        ) from error


def _is_early(found: dict[str, Any], header: dict[str, Any]) -> bool:
    """Whether captions are of a release that knew one prompt and one grouping, and others are asked for."""
    rest = {name: value for name, value in header.items() if name != _ASKED}
    return found == rest and header.get(_ASKED, captioners.EARLY_ASKED) != captioners.EARLY_ASKED


def _how_asked(path: Path) -> dict[str, str]:
    """The prompt and the grouping that captions were made with, as their file says."""
    first, *_ = read_lines(path) or [b"{}"]
    asked = _decoded(path, 1, first, dict[str, Any]).get(_ASKED, {})
    return (
        {name: str(asked[name]) for name in captioners.EARLY_ASKED if name in asked}
        if isinstance(asked, dict)
        else {}
    )


def _captions_by_key(folder: Path) -> dict[str, str]:
    if not (folder / CAPTIONS).exists():
        raise ConfigError(f"{folder / CAPTIONS}: no captions yet; caption before you judge")
    return {
        key: text
        for line in _read_captions(folder / CAPTIONS)
        for key, text in zip(line.keys, line.captions, strict=True)
        if text is not None
    }


# Answers.


class _Question(NamedTuple):
    """A question about a region: its number there, its prompt, and a digest of judge, prompt and pictures."""

    image: BenchImage
    region: BenchRegion
    number: int
    prompt: str
    digest: str


def judge_captions(bench: Bench, config: Judge, folder: Path, progress: Progress | None = None) -> int:
    """Have the judge answer the questions that have no answer yet. It is loaded only if there are any.

    Args:
        bench: the benchmark.
        config: the judge.
        folder: folder with the captions.
        progress: called after each batch of questions.

    Returns:
        Number of answers that the judge gave in this call.

    Raises:
        ConfigError: there are no captions yet, or the judge cannot be loaded.
        StageFailed: the judge's server is down.
    """
    path = folder / ANSWERS
    answers = _read_answers(path)
    questions = _questions(open_benchmark(bench), config, folder)
    missing = [question for question in questions if question.digest not in answers]
    if not missing:
        return 0
    judge = judges.load_judge(config)
    num_answers = 0
    try:
        with LineWriter(path) as lines:
            for start in range(0, len(missing), _QUESTIONS_AT_ONCE):
                batch = missing[start : start + _QUESTIONS_AT_ONCE]
                for position, answer, seconds in judges.clocked(judge, _requests(batch, judge.sees_images)):
                    num_answers += _write_answer(lines, batch[position], answer, seconds)
                if progress:
                    progress("answers", start + len(batch), len(missing))
    finally:
        judge.close()
    return num_answers


def _questions(benchmark: Benchmark, config: Judge | None, folder: Path) -> Iterator[_Question]:
    """All questions about the regions that have a caption, in the order of images and regions."""
    captions = _captions_by_key(folder)
    identity = judges.identity(config) if config else {}
    sees_images = bool(config and config.options.get("images"))
    for image in benchmark.images:
        for region in image.regions:
            caption = captions.get(region.key)
            if caption is None:
                continue
            for number, question in enumerate(region.questions):
                prompt = scoring.judge_prompt(benchmark.kind, caption, question)
                pictures = [image.name, region.mask.rle] if sees_images else []
                digest = hashlib.sha256(msgspec.json.encode([identity, prompt, pictures])).hexdigest()[:24]
                yield _Question(image, region, number, prompt, digest)


def _requests(questions: list[_Question], sees_images: bool) -> Iterator[JudgeRequest]:
    if not sees_images:
        yield from (JudgeRequest(question.prompt) for question in questions)
        return
    name, pixels, key, pictures = "", None, "", ()
    for question in questions:  # those of one image, and of one region, follow each other
        if question.image.name != name:
            name, pixels = question.image.name, question.image.pixels()
        if question.region.key != key:
            assert pixels is not None
            key, pictures = question.region.key, judges.crop_and_mask(pixels, question.region.dense())
        yield JudgeRequest(question.prompt, pictures)


def _write_answer(lines: LineWriter, question: _Question, answer: str | BadRecord, seconds: float) -> bool:
    """Write an answer. Where the judge gave none, nothing is written, and the next run asks again."""
    key, number = question.region.key, question.number
    if isinstance(answer, BadRecord):
        log.warning("%s, question %d: no answer: %s", key, number, answer.detail)
        return False
    record = {"digest": question.digest, "key": key, "question": number, "answer": answer}
    lines.append(record | {"seconds": seconds})
    return True


def _read_answers(path: Path) -> dict[str, str]:
    return {digest: record.answer for digest, record in _answer_lines(path).items()}


def _answer_lines(path: Path) -> dict[str, _AnswerLine]:
    lines = enumerate(read_lines(path), start=1)
    records = (_decoded(path, number, line, _AnswerLine) for number, line in lines)
    return {record.digest: record for record in records}


# Costs.


class Timed(NamedTuple):
    """Seconds of the captions of `regions` (without reading photos), loading, and a judge's `answers`."""

    regions: int
    captions_s: float
    load_s: float
    answers: int
    answers_s: float


def read_times(bench: Bench, backend: Backend, config: Judge | None, folder: Path) -> Timed | None:
    """What the results in a folder took, of this captioner and judge; None if there are no captions.

    Raises:
        ConfigError: the captions are of another captioner or another benchmark.
    """
    benchmark, path = open_benchmark(bench), folder / CAPTIONS
    if not read_lines(path):
        return None
    lines = _lines_of(benchmark, _read_captions(path, _header(bench, backend, benchmark)))
    known = _answer_lines(folder / ANSWERS) if config else {}
    asked = {question.digest for question in _questions(benchmark, config, folder)} if known else set()
    answers = [record.seconds for digest, record in known.items() if digest in asked and record.seconds]
    loads = [line.load_seconds for line in lines if line.load_seconds]
    return Timed(
        regions=sum(len(line.keys) for line in lines),
        captions_s=sum(line.seconds for line in lines),
        load_s=sum(loads) / max(1, len(loads)),
        answers=len(answers),
        answers_s=sum(answers),
    )


# Scores.


class _Scored(NamedTuple):
    """A region with its caption, the answers to its questions, the choices that they name, and its scores."""

    region: BenchRegion
    caption: str
    answers: list[str | None]
    chosen: list[int | None]
    scores: scoring.Scores


def score_answers(bench: Bench, config: Judge | None, folder: Path) -> Result:
    """Score the answers, and write details and summary.

    Args:
        bench: the benchmark.
        config: the judge whose answers are scored; None only measures the captions.
        folder: folder with captions and answers.

    Raises:
        ConfigError: there are no captions yet.
    """
    benchmark, captions = open_benchmark(bench), _captions_by_key(folder)
    known = _read_answers(folder / ANSWERS) if config else {}
    answers: dict[str, list[str | None]] = {}
    for question in _questions(benchmark, config, folder):
        answers.setdefault(question.region.key, []).append(known.get(question.digest))
    scored = [
        _score(region, captions[region.key], answers[region.key])
        for region in benchmark.regions()
        if region.key in captions
    ]
    lines = _lines_of(benchmark, _read_captions(folder / CAPTIONS))
    tokens, forwards = (sum(getattr(line, name) for line in lines) for name in ("tokens", "forwards"))
    pairs = [pair for each in scored for pair in zip(each.answers, each.chosen, strict=True)]
    judged = [each.scores for each in scored] if config else []
    averages = scoring.average_scores(judged) if judged else None
    result = Result(
        benchmark=bench.name,
        kind=bench.kind,
        regions=len(scored),
        without_caption=sum(1 for _ in benchmark.regions()) - len(scored),
        positive=averages and averages.positive,
        negative=averages and averages.negative,
        average=averages and averages.average,
        recognised=sum(bool(each.recognised) for each in judged) / len(judged) if judged else None,
        questions=len(pairs) if config else 0,
        unanswered=sum(answer is None for answer, _ in pairs) if config else 0,
        no_choice=sum(answer is not None and choice is None for answer, choice in pairs),
        unverified=benchmark.unverified,
        seconds=sum(line.seconds for line in lines),
        forwards=forwards,
        tokens_per_forward=tokens / max(1, forwards),
        quality=quality.measure_quality(list(_image_captions(benchmark, captions))),
        paper=bench.paper and bench.paper.model_dump(exclude_none=True),
        **_how_asked(folder / CAPTIONS),
    )
    files.write_json(folder / DETAILS, {each.region.key: _detail(each) for each in scored})
    files.write_json(folder / SUMMARY, result.to_json())
    return result


def _score(region: BenchRegion, caption: str, answers: list[str | None]) -> _Scored:
    choices = ([choice.text for choice in question.choices] for question in region.questions)
    pairs = zip(answers, choices, strict=True)
    chosen = [None if answer is None else scoring.parse_answer(answer, texts) for answer, texts in pairs]
    return _Scored(region, caption, answers, chosen, scoring.score_region(region.questions, chosen))


def _detail(scored: _Scored) -> dict[str, Any]:
    """What details.json says of a region."""
    region, scores = scored.region, scored.scores
    rows = zip(region.questions, scored.answers, scored.chosen, scores.worth, strict=True)
    return {
        "class_name": region.class_name,
        "caption": scored.caption,
        "recognised": scores.recognised,
        "positive": scores.positive,
        "negative": scores.negative,
        "score": scores.score,
        "questions": [
            {
                "type": question.type,
                "subtype": question.subtype,
                "question": question.text,
                "choices": question.choices,
                "answer": answer,
                "chosen": choice,
                "worth": worth,
            }
            for question, answer, choice, worth in rows
        ],
    }


def _image_captions(benchmark: Benchmark, captions: dict[str, str]) -> Iterator[quality.ImageCaptions]:
    for image in benchmark.images:
        captioned = [region for region in image.regions if region.key in captions]
        if captioned:
            texts = [captions[region.key] for region in captioned]
            yield quality.ImageCaptions(texts, [region.class_name for region in captioned])
