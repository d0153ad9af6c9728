"""A benchmark of one's own images: regions that are easily confused, questions that a language model drafts.

    TO/
        images/                                     the photos, as the corpus has them
        annotations.json qa.json class_names.json   as ParaDLC-Bench's; each question says "verified": false
        drafts.jsonl                                what the model drafted, a line a region: done is done
        review.html                                 questions to accept or reject; gives a reviewed qa.json

The model names aspects and values, and things that a caption of this region must not speak of; the choices
and their worth are put around them as ParaDLC-Bench has them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from ...pipeline.corpus import reader
from ...pipeline.io import files
from ...pipeline.io.json_lines import LineWriter, read_lines
from ...schemas.errors import BadRecord, StageFailed
from ...schemas.evaluation import Judge
from ...schemas.sample import Sample, SampleRegion
from . import annotations, judges, results_page, select_images
from .judges import Asked
from .run_benchmark import Progress

log = logging.getLogger(__name__)

DRAFTS, REVIEW = "drafts.jsonl", "review.html"
_WHICH = "Which of the following is applicable to the description?"
_MAX_TOKENS = 600
_AT_ONCE = 64


class Aspect(msgspec.Struct):
    """Something to see of a region: "color of the shirt", "black"."""

    aspect: str
    value: str


class Drafted(msgspec.Struct):
    """What a model drafted.

    Attributes:
        positive: what a caption should say.
        elsewhere: things beside the region, which a caption of it should not speak of.
        absent: parts that such a thing often has and this one has not.
    """

    positive: list[Aspect]
    elsewhere: list[str]
    absent: list[str]


class Draft(msgspec.Struct):
    """That, of which region, and a digest of the model and what it was asked."""

    key: str
    digest: str
    drafted: Drafted


class _Region(NamedTuple):
    """A chosen region, and what the model is asked of it."""

    key: str
    name: str
    prompt: str
    digest: str


class Made(NamedTuple):
    """What was made: images, regions, questions, and regions for which the model drafted none."""

    images: int
    regions: int
    questions: int
    without: int


def make(
    out: str | Path, to: Path, config: Judge, images: int = 100, progress: Progress | None = None
) -> Made:
    """Make a benchmark of a corpus.

    Args:
        out: a build's, merged.
        to: folder of the benchmark; what the same model drafted there on the same captions is taken as it is.
        config: the model that drafts.
        images: at most.
        progress: called as questions are drafted.

    Raises:
        ConfigError: no corpus, none of its images is fit, or the drafter's options are wrong.
        StageFailed: no region got a question.
    """
    samples = [_read(out, chosen) for chosen in select_images.choose(out, images)]
    regions = list(_regions((sample for sample, _ in samples), config))
    (to / "images").mkdir(parents=True, exist_ok=True)
    _draft(regions, config, to / DRAFTS, progress)
    drafts = _drafts(to / DRAFTS)
    questions = {
        region.key: found
        for region in regions
        if region.digest in drafts and (found := list(_questions(region.name, drafts[region.digest])))
    }
    if not questions:
        raise StageFailed(f"{to}: no region got a question; take a model that follows instructions")
    kept = [pair for pair in samples if any(_key(pair[0], region) in questions for region in pair[0].regions)]
    for sample, photo in kept:
        with files.write_atomic(to / "images" / _photo_name(sample)) as file:
            file.write(photo)
    files.write_json(to / annotations.ANNOTATIONS, [_annotated(sample, questions) for sample, _ in kept])
    files.write_json(to / annotations.QUESTIONS, questions)
    names = {region.key: region.name for region in regions if region.key in questions}
    files.write_json(to / annotations.CLASSES, names)
    _write_review(to)
    asked = sum(map(len, questions.values()))
    return Made(len(kept), len(questions), asked, len(regions) - len(questions))


def _read(out: str | Path, chosen: select_images.Chosen) -> tuple[Sample, bytes]:
    """The image with its chosen regions, and its photo's bytes."""
    sample, photo = reader.Corpus(out).read_sample(chosen.rows[0])
    taken = {row["region"] for row in chosen.rows}
    regions = [region for region in sample.regions if region.id in taken]
    return msgspec.structs.replace(sample, regions=regions), photo


def _image_id(sample: Sample) -> str:
    return f"{sample.subset}-{sample.key}"


def _photo_name(sample: Sample) -> str:
    return f"{_image_id(sample)}.{reader.PHOTO_SUFFIXES.get(sample.photo_format, 'jpg')}"


def _key(sample: Sample, region: SampleRegion) -> str:
    return f"{_image_id(sample)}_{region.id}"


def _name(region: SampleRegion) -> str:
    return region.category or region.core_category or "object"


def _regions(samples: Iterable[Sample], config: Judge) -> Iterator[_Region]:
    who, template = judges.identity(config), _prompt()
    for sample in samples:
        for region in sample.regions:
            others = [f"- {_name(other)}: {other.caption}" for other in sample.regions if other is not region]
            name = _name(region)
            prompt = template["prompt"].format(name=name, caption=region.caption, others="\n".join(others))
            asked = msgspec.json.encode([who, template["schema"], prompt])
            yield _Region(_key(sample, region), name, prompt, hashlib.sha256(asked).hexdigest()[:24])


# Drafts.


def _draft(regions: list[_Region], config: Judge, path: Path, progress: Progress | None) -> None:
    """Have the model draft for regions that have no draft yet."""
    done = _drafts(path)
    owed = [region for region in regions if region.digest not in done]
    if not owed:
        return
    schema = _prompt()["schema"]
    drafter = judges.load(config)
    try:
        with LineWriter(path) as lines:
            for start in range(0, len(owed), _AT_ONCE):
                some = owed[start : start + _AT_ONCE]
                asked = [Asked(region.prompt, (), schema, _MAX_TOKENS) for region in some]
                for place, answer in drafter.answer(asked):
                    draft = _read_draft(some[place], answer)
                    if isinstance(draft, Draft):
                        lines.append(draft)
                    else:
                        log.warning("%s: no draft: %s", some[place].key, draft)
                if progress:
                    progress("drafts", min(start + _AT_ONCE, len(owed)), len(owed))
    finally:
        drafter.close()


def _drafts(path: Path) -> dict[str, Drafted]:
    """By digest of what was asked."""
    drafts = (msgspec.json.decode(line, type=Draft) for line in read_lines(path))
    return {draft.digest: draft.drafted for draft in drafts}


def _prompt() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("draft_questions.yaml").read_text("utf-8"))


def _read_draft(region: _Region, answer: str | BadRecord) -> Draft | str:
    if isinstance(answer, BadRecord):
        return answer.detail
    try:
        return Draft(region.key, region.digest, msgspec.json.decode(answer, type=Drafted))
    except (msgspec.MsgspecError, UnicodeError) as error:
        return f"not as asked for ({error}): {answer[:60]!a}"


# Questions.


def _questions(name: str, draft: Drafted) -> Iterator[dict[str, Any]]:
    for aspect in draft.positive:
        what, value = aspect.aspect.strip(), aspect.value.strip()
        yield _question(
            "positive",
            (f"The {what} is mentioned in the description, and it is {value}.", 1),
            (f"The {name} is not mentioned.", 0),
            (f"The {what} is mentioned in the description, but it is not {value}.", -1),
            (f"The {what} is not mentioned, but the {name} is.", 0.5),
        )
    for thing in draft.elsewhere:
        yield _question(
            "negative",
            (f"The {thing.strip()} is mentioned in the description.", -1),
            (f"The {thing.strip()} is not mentioned in the description.", 1),
            subtype="salient negative",
        )
    for part in draft.absent:
        yield _question(
            "negative",
            (f"The {part.strip()} of the {name} is mentioned in the description.", -1),
            (f"The {part.strip()} of the {name} is not mentioned in the description.", 1),
            (f"The {name} is not mentioned in the description.", 0),
            subtype="negative part",
        )


def _question(kind: str, *choices: tuple[str, float], subtype: str = "") -> dict[str, Any]:
    named = {"subtype": subtype} if subtype else {}
    return {"question": _WHICH, "choices": choices, "type": kind, **named, "verified": False}


def _annotated(sample: Sample, questions: dict[str, Any]) -> dict[str, Any]:
    regions = [region for region in sample.regions if _key(sample, region) in questions]
    return {
        "file_name": _photo_name(sample),
        "height": sample.height,
        "width": sample.width,
        "image_id": _image_id(sample),
        "annotations": [
            {
                "index": region.id,
                "category_name": _name(region),
                "bbox": [
                    region.bbox[0],
                    region.bbox[1],
                    region.bbox[0] + region.bbox[2],
                    region.bbox[1] + region.bbox[3],
                ],
                "mask_rle": {"size": region.rle.size, "counts": region.rle.counts},
            }
            for region in regions
        ],
    }


def _write_review(to: Path) -> None:
    """The page is made of the benchmark's own files: what it shows is what will be asked."""
    raw = msgspec.json.decode((to / annotations.QUESTIONS).read_bytes())
    found = annotations.read(to, "paradlc")
    photos = (
        {
            "name": image.name,
            "picture": results_page.picture_of(image, {}),
            "regions": [(region.key, region.class_name, raw[region.key]) for region in image.regions],
        }
        for image in found.images
    )
    with files.write_atomic(to / REVIEW) as file:
        rendered = results_page.template(REVIEW).generate(photos=photos, total=sum(map(len, raw.values())))
        file.writelines(part.encode() for part in rendered)
