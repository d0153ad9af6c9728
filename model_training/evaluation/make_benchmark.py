"""Makes a benchmark of your own images: regions that are easily confused, questions drafted by a model.

    TO/
        images/                                     the photos, as the corpus has them
        annotations.json qa.json class_names.json   ParaDLC-Bench's files; each question has "verified": false
        drafts.jsonl                                the model's drafts, one line per region; resumed from
        qa.drafted.json                             qa.json as drafted: a reviewed one differs
        review.html                                 page to accept or reject questions, and save qa.json

The model names aspects of a region with their values, and things that a caption of the region must not
mention. Questions with choices and scores are made of them as in ParaDLC-Bench.
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
from ...pipeline.io.orientation import make_upright
from ...schemas.errors import BadRecord, ConfigError, StageFailed
from ...schemas.evaluation import Judge
from ...schemas.sample import Sample, SampleRegion
from . import annotations, judges, results_page, select_images
from .judges import JudgeRequest
from .run_benchmark import Progress

log = logging.getLogger(__name__)

DRAFTS, DRAFTED, REVIEW = "drafts.jsonl", "qa.drafted.json", "review.html"
_WHICH = "Which of the following is applicable to the description?"
_MAX_TOKENS = 600
_REGIONS_AT_ONCE = 64


class Aspect(msgspec.Struct):
    """Something that can be seen of a region, such as "color of the shirt" with the value "black"."""

    aspect: str
    value: str


class DraftContent(msgspec.Struct):
    """What a model drafts for a region.

    Attributes:
        positive: what a caption should say.
        elsewhere: things next to the region, which its caption should not mention.
        absent: parts that such a thing often has and this one does not.
    """

    positive: list[Aspect]
    elsewhere: list[str]
    absent: list[str]


class Draft(msgspec.Struct):
    """A line of drafts.jsonl: region, digest of the model and its prompt, and what the model drafted."""

    key: str
    digest: str
    drafted: DraftContent


class _Region(NamedTuple):
    """A chosen region, its prompt, and a digest of the model and the prompt."""

    key: str
    name: str
    prompt: str
    digest: str


class Made(NamedTuple):
    """Numbers of a new benchmark.

    Attributes:
        images, regions, questions: how many it has.
        without: regions that were left out, since the model drafted no question for them.
    """

    images: int
    regions: int
    questions: int
    without: int


def make_benchmark(
    corpus: str | Path, to: Path, config: Judge, num_images: int = 100, progress: Progress | None = None
) -> Made:
    """Make a benchmark of a corpus.

    Args:
        corpus: a merged corpus.
        to: folder of the benchmark. Drafts of the same model for the same captions that lie there are used.
        config: the model that drafts questions.
        num_images: number of images, at most.
        progress: called as questions are drafted.

    Raises:
        ConfigError: there is no corpus, none of its images is suitable, or the model's options are wrong; or
            the folder has a reviewed qa.json.
        StageFailed: no region got a question.
    """
    _refuse_reviewed(to)
    samples = [_read_sample(corpus, chosen) for chosen in select_images.choose_images(corpus, num_images)]
    regions = list(_regions((sample for sample, _ in samples), config))
    (to / "images").mkdir(parents=True, exist_ok=True)
    _write_drafts(regions, config, to / DRAFTS, progress)
    drafts = _read_drafts(to / DRAFTS)
    questions = {
        region.key: found
        for region in regions
        if region.digest in drafts and (found := list(_questions(region.name, drafts[region.digest])))
    }
    if not questions:
        raise StageFailed(f"{to}: no region got a question; choose a model that follows instructions")
    kept = [pair for pair in samples if any(_key(pair[0], region) in questions for region in pair[0].regions)]
    for sample, photo in kept:
        with files.write_atomic(to / "images" / _photo_name(sample)) as file:
            file.write(make_upright(photo)[0])
    files.write_json(to / annotations.ANNOTATIONS, [_annotated(sample, questions) for sample, _ in kept])
    for name in (annotations.QUESTIONS, DRAFTED):
        files.write_json(to / name, questions)
    names = {region.key: region.name for region in regions if region.key in questions}
    files.write_json(to / annotations.CLASSES, names)
    _write_review(to)
    num_questions = sum(map(len, questions.values()))
    return Made(len(kept), len(questions), num_questions, len(regions) - len(questions))


def _refuse_reviewed(to: Path) -> None:
    """Refuse to write over questions that are not as they were drafted."""
    path = to / annotations.QUESTIONS
    if not path.exists():
        return
    if (to / DRAFTED).exists():
        reviewed = path.read_bytes() != (to / DRAFTED).read_bytes()
    else:  # of an early release, which kept no copy; an accepted question has no `verified`
        reviewed = path.read_bytes().count(b'"question"') != path.read_bytes().count(b'"verified"')
    if reviewed:
        raise ConfigError(
            f"{path}: has reviewed questions, which new drafts would replace; choose another --to, or move "
            "this file away"
        )


def _read_sample(corpus: str | Path, image: select_images.ChosenImage) -> tuple[Sample, bytes]:
    """The image with its chosen regions, and its photo's bytes."""
    sample, photo = reader.Corpus(corpus, confined=True).read_sample(image.rows[0])
    chosen = {row["region"] for row in image.rows}
    regions = [region for region in sample.regions if region.id in chosen]
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
    identity, template = judges.identity(config), _read_template()
    for sample in samples:
        for region in sample.regions:
            others = [f"- {_name(other)}: {other.caption}" for other in sample.regions if other is not region]
            name = _name(region)
            prompt = template["prompt"].format(name=name, caption=region.caption, others="\n".join(others))
            request = msgspec.json.encode([identity, template["schema"], prompt])
            yield _Region(_key(sample, region), name, prompt, hashlib.sha256(request).hexdigest()[:24])


# Drafts.


def _write_drafts(regions: list[_Region], config: Judge, path: Path, progress: Progress | None) -> None:
    """Have the model draft for the regions that have no draft yet."""
    done = _read_drafts(path)
    missing = [region for region in regions if region.digest not in done]
    if not missing:
        return
    schema = _read_template()["schema"]
    model = judges.load_judge(config)
    try:
        with LineWriter(path) as lines:
            for start in range(0, len(missing), _REGIONS_AT_ONCE):
                batch = missing[start : start + _REGIONS_AT_ONCE]
                requests = [JudgeRequest(region.prompt, (), schema, _MAX_TOKENS) for region in batch]
                for position, answer in model.answer(requests):
                    draft = _parse_draft(batch[position], answer)
                    if isinstance(draft, Draft):
                        lines.append(draft)
                    else:
                        log.warning("%s: no draft: %s", batch[position].key, draft)
                if progress:
                    progress("drafts", start + len(batch), len(missing))
    finally:
        model.close()


def _read_drafts(path: Path) -> dict[str, DraftContent]:
    """Drafts by their digest."""
    drafts = (msgspec.json.decode(line, type=Draft) for line in read_lines(path))
    return {draft.digest: draft.drafted for draft in drafts}


def _read_template() -> dict[str, Any]:
    """The prompt and the JSON schema of its answer."""
    return yaml.safe_load(Path(__file__).with_name("draft_questions.yaml").read_text("utf-8"))


def _parse_draft(region: _Region, answer: str | BadRecord) -> Draft | str:
    """The draft in an answer, or the reason why there is none."""
    if isinstance(answer, BadRecord):
        return answer.detail
    try:
        return Draft(region.key, region.digest, msgspec.json.decode(answer, type=DraftContent))
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        return f"not in the form that was asked for ({error}): {answer[:60]!a}"


# Questions.


def _questions(name: str, draft: DraftContent) -> Iterator[dict[str, Any]]:
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
                "bbox": _corners(region),
                "mask_rle": {"size": region.rle.size, "counts": region.rle.counts},
            }
            for region in regions
        ],
    }


def _corners(region: SampleRegion) -> list[int]:
    """x1, y1, x2, y2, as ParaDLC-Bench has a box."""
    x, y, width, height = region.bbox
    return [x, y, x + width, y + height]


def _review_key(key: str, question: dict[str, Any]) -> str:
    """Under what the page keeps a review: no other question gets it, whatever is drafted in its place."""
    return hashlib.sha256(msgspec.json.encode([key, question], order="sorted")).hexdigest()[:24]


def _write_review(to: Path) -> None:
    """Write the page from the benchmark's own files, so that it shows what will be asked."""
    raw = msgspec.json.decode((to / annotations.QUESTIONS).read_bytes())
    found = annotations.read_benchmark(to, "paradlc")
    photos = (
        {
            "name": image.name,
            "picture": results_page.draw_regions(image),
            "regions": [
                (
                    region.key,
                    region.class_name,
                    [(each, _review_key(region.key, each)) for each in raw[region.key]],
                )
                for region in image.regions
            ],
        }
        for image in found.images
    )
    with files.write_atomic(to / REVIEW) as file:
        rendered = results_page.load_template(REVIEW).generate(
            photos=photos, total=sum(map(len, raw.values()))
        )
        file.writelines(part.encode() for part in rendered)
