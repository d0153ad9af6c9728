"""One captioner on one benchmark: captions, answers, marks. Each step goes on where it was interrupted.

    OUT/LABEL/BENCHMARK/
        captions.jsonl       a line an image, behind a line that says whose captions they are
        predictions.json     {key: caption}, as the original's scripts write and read it
        answers.jsonl        a line a question: what the judge said, and a digest of what it was asked
        details.json         a region: caption, questions, answers, what each is worth
        summary.json         the benchmark's numbers

An answer counts as long as the judge, the prompt and the pictures are the same: to score again costs nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...pipeline.io import files
from ...pipeline.io.json_lines import LineWriter, read_lines
from ...schemas.config import Backend
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.evaluation import Bench, Judge
from . import annotations, captioners, judges, protocol, quality
from .annotations import BenchImage, Benchmark, BenchRegion
from .judges import Asked

log = logging.getLogger(__name__)

CAPTIONS, PREDICTIONS, ANSWERS = "captions.jsonl", "predictions.json", "answers.jsonl"
DETAILS, SUMMARY = "details.json", "summary.json"
_AT_ONCE = 256
"""Questions between two writes to the disk; as many can be lost when the process is killed."""


Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


class Result(NamedTuple):
    """A captioner's result on a benchmark.

    Attributes:
        benchmark, kind: which.
        regions: with a caption, of so many.
        without_caption: regions with none; they are in no mean.
        positive, negative, average: the benchmark's numbers; None if it was not judged.
        recognised: share of regions.
        questions, unanswered, no_choice: asked; without an answer; with one that names no choice.
        unverified: questions that nobody has looked at.
        seconds: of captioning, all images.
        forwards, tokens_per_forward: of the language model; 0 where nobody counts them.
        quality: what the captions are worth without a judge.
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


def open_benchmark(bench: Bench) -> Benchmark:
    """The benchmark that a configuration names, or its first images.

    Raises:
        ConfigError: as `annotations.read`.
    """
    found = annotations.read(bench.folder, bench.kind, bench.photos)
    return found._replace(images=found.images[: bench.images])


# Captions.


class _Line(msgspec.Struct):
    """An image's captions, as they are kept."""

    image: str
    keys: list[str]
    captions: list[str | None]
    seconds: float
    forwards: int = 0
    tokens: int = 0
    problems: dict[str, str] = {}


def caption(bench: Bench, backend: Backend, folder: Path, progress: Progress | None = None) -> int:
    """Caption what has no captions yet. The captioner is loaded only if there is something to do.

    Returns:
        Images captioned by this call.

    Raises:
        ConfigError: the captions there are another captioner's, or as the captioner has it.
    """
    benchmark = open_benchmark(bench)
    whose = {"captioner": captioners.identity(backend), "benchmark": benchmark.digest}
    path = folder / CAPTIONS
    folder.mkdir(parents=True, exist_ok=True)
    if not read_lines(path):
        with LineWriter(path) as lines:
            lines.append(whose)
    done = {line.image for line in _captions(path, whose)}
    owed = [image for image in benchmark.images if image.name not in done]
    captioner = captioners.load(backend) if owed else None
    if captioner is not None and captioner.needs_photos:
        absent = set(benchmark.missing_photos()) & {image.photo for image in owed}
        if absent and bench.on_missing_photo == "error":
            raise ConfigError(
                f"{min(absent)}: no such photo, nor {len(absent) - 1:,} others; put them there, name their "
                "folder in `photos`, or leave them out with on_missing_photo: skip"
            )
        owed = [image for image in owed if image.photo not in absent]
    with LineWriter(path) as lines:
        for number, image in enumerate(owed):
            assert captioner is not None
            found = captioner.caption(image)
            lines.append(_line(image, found))
            if progress:
                progress("captions", number + 1, len(owed))
    files.write_json(folder / PREDICTIONS, _by_key(folder))
    return len(owed)


def _line(image: BenchImage, found: captioners.Captions) -> _Line:
    keys = [region.key for region in image.regions]
    return _Line(image.name, keys, found.texts, found.seconds, found.forwards, found.tokens, found.problems)


def _captions(path: Path, whose: dict[str, Any] | None = None) -> list[_Line]:
    first, *rest = read_lines(path) or [b"{}"]
    found = msgspec.json.decode(first)
    if whose is not None and found != whose:
        changed = [name for name in whose if found.get(name) != whose[name]]
        raise ConfigError(
            f"{path}: of another {' and '.join(changed)}; take another label, or remove {path.parent}"
        )
    return [msgspec.json.decode(line, type=_Line) for line in rest]


# Answers.


class _Owed(NamedTuple):
    """A question: of which region, its number there, and a digest of the judge and all that it is shown."""

    image: BenchImage
    region: BenchRegion
    number: int
    prompt: str
    digest: str


def judge(bench: Bench, config: Judge, folder: Path, progress: Progress | None = None) -> int:
    """Have what has no answer yet answered. The judge is loaded only if there is something to ask.

    Returns:
        Answers given in this call.

    Raises:
        ConfigError: no captions yet, or as the judge has it.
        StageFailed: the judge's server is down.
    """
    path = folder / ANSWERS
    known = _answers(path)
    owed = [each for each in _questions(open_benchmark(bench), config, folder) if each.digest not in known]
    if not owed:
        return 0
    speaker = judges.load(config)
    given = 0
    try:
        with LineWriter(path) as lines:
            for start in range(0, len(owed), _AT_ONCE):
                some = owed[start : start + _AT_ONCE]
                for place, answer in speaker.answer(_pictured(some, speaker.sees_images)):
                    given += _keep(lines, some[place], answer)
                if progress:
                    progress("answers", min(start + _AT_ONCE, len(owed)), len(owed))
    finally:
        speaker.close()
    return given


def _questions(benchmark: Benchmark, config: Judge | None, folder: Path) -> Iterator[_Owed]:
    """Every question about every region that has a caption."""
    captions = _by_key(folder)
    who = judges.identity(config) if config else {}
    seen = bool(config and config.options.get("images"))
    for image in benchmark.images:
        for region in image.regions:
            caption = captions.get(region.key)
            if caption is None:
                continue
            for number, question in enumerate(region.questions):
                prompt = protocol.prompt(benchmark.kind, caption, question)
                shown = [image.name, region.mask.rle] if seen else []
                digest = hashlib.sha256(msgspec.json.encode([who, prompt, shown])).hexdigest()[:24]
                yield _Owed(image, region, number, prompt, digest)


def _pictured(owed: list[_Owed], sees_images: bool) -> list[Asked]:
    if not sees_images:
        return [Asked(each.prompt) for each in owed]
    found: list[Asked] = []
    name, pixels, key, pictures = "", None, "", ()
    for each in owed:  # in the order of images and regions
        if each.image.name != name:
            name, pixels = each.image.name, each.image.pixels()
        if each.region.key != key:
            assert pixels is not None
            key, pictures = each.region.key, judges.focal(pixels, each.region.dense())
        found.append(Asked(each.prompt, pictures))
    return found


def _keep(lines: LineWriter, owed: _Owed, answer: str | BadRecord) -> bool:
    """Write an answer; one that is none is asked for again by the next run."""
    if isinstance(answer, BadRecord):
        log.warning("%s, question %d: no answer: %s", owed.region.key, owed.number, answer.detail)
        return False
    record = {"digest": owed.digest, "key": owed.region.key, "question": owed.number, "answer": answer}
    lines.append(record)
    return True


def _answers(path: Path) -> dict[str, str]:
    records = map(msgspec.json.decode, read_lines(path))
    return {record["digest"]: record["answer"] for record in records}


# Marks.


def score(bench: Bench, config: Judge | None, folder: Path) -> Result:
    """Mark what has been answered, and write details and summary.

    Args:
        bench: the benchmark.
        config: whose answers; None: only the captions are looked at.
        folder: of the captions and answers.

    Raises:
        ConfigError: no captions yet.
    """
    benchmark, captions, kept = open_benchmark(bench), _by_key(folder), _captions(folder / CAPTIONS)
    answers = _answers(folder / ANSWERS) if config else {}
    said: dict[str, list[str | None]] = {}
    for owed in _questions(benchmark, config, folder):
        said.setdefault(owed.region.key, []).append(answers.get(owed.digest))
    details, marks, chosen = {}, [], []
    for region in benchmark.regions():
        if region.key not in captions:
            continue
        texts = said[region.key]
        picked = [
            None if text is None else protocol.parse(text, [choice.text for choice in question.choices])
            for text, question in zip(texts, region.questions, strict=True)
        ]
        marked = protocol.mark(region.questions, picked)
        marks.append(marked)
        chosen += [index for index, text in zip(picked, texts, strict=True) if text is not None]
        details[region.key] = _detail(region, captions[region.key], texts, picked, marked)
    every = [text for texts in said.values() for text in texts]
    averages = protocol.average(marks) if config and marks else None
    tokens, forwards = (sum(getattr(line, name) for line in kept) for name in ("tokens", "forwards"))
    result = Result(
        benchmark=bench.name,
        kind=bench.kind,
        regions=len(details),
        without_caption=sum(1 for _ in benchmark.regions()) - len(details),
        positive=averages and averages.positive,
        negative=averages and averages.negative,
        average=averages and averages.average,
        recognised=sum(bool(each.recognised) for each in marks) / len(marks) if config and marks else None,
        questions=len(every) if config else 0,
        unanswered=every.count(None) if config else 0,
        no_choice=chosen.count(None),
        unverified=benchmark.unverified,
        seconds=sum(line.seconds for line in kept),
        forwards=forwards,
        tokens_per_forward=tokens / max(1, forwards),
        quality=quality.measure(list(_described(benchmark, captions))),
    )
    files.write_json(folder / DETAILS, details)
    files.write_json(folder / SUMMARY, to_plain(result))
    return result


def _detail(
    region: BenchRegion,
    caption: str,
    texts: list[str | None],
    picked: list[int | None],
    marked: protocol.Marks,
) -> dict[str, Any]:
    rows = zip(region.questions, texts, picked, marked.worth, strict=True)
    return {
        "class_name": region.class_name,
        "caption": caption,
        "recognised": marked.recognised,
        "positive": marked.positive,
        "negative": marked.negative,
        "score": marked.score,
        "questions": [
            {
                "type": question.type,
                "subtype": question.subtype,
                "question": question.text,
                "choices": question.choices,
                "answer": text,
                "chosen": index,
                "worth": worth,
            }
            for question, text, index, worth in rows
        ],
    }


def _described(benchmark: Benchmark, captions: dict[str, str]) -> Iterator[quality.Described]:
    for image in benchmark.images:
        own = [region for region in image.regions if region.key in captions]
        if own:
            texts = [captions[region.key] for region in own]
            yield quality.Described(texts, [region.class_name for region in own])


def to_plain(result: Result) -> dict[str, Any]:
    """As JSON has it."""
    return result._asdict() | {"quality": result.quality._asdict()}


# Files.


def _by_key(folder: Path) -> dict[str, str]:
    if not (folder / CAPTIONS).exists():
        raise ConfigError(f"{folder / CAPTIONS}: no captions yet; caption before you judge")
    return {
        key: text
        for line in _captions(folder / CAPTIONS)
        for key, text in zip(line.keys, line.captions, strict=True)
        if text is not None
    }
