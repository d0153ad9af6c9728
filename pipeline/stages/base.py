"""Stages: each takes the images of a unit and marks regions; none deletes one.

A filter stage decides from what it sees. A model stage asks a model for the evidence it lacks, records it,
and lets a filter decide from evidence alone. What a stage is depends on the configuration only, so it travels
to the workers as it is; the model is built there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from ...filters import agreement, category, masks, text
from ...filters.verdict import Verdict
from ...schemas.config import Backend, BuildConfig
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import Drop, ImageRecord, Region
from ..models.protocols import Answer, Candidate, Captioner, Judge, Question, Segmenter
from ..models.registry import backend_identity
from .evidence import Captioned, EvidenceStore, Judged, Resegmented, digest, fingerprint


@dataclass(frozen=True)
class FilterStage:
    """A decision without a model.

    Attributes:
        name: stage name in drops and in the funnel.
        settings: what the decision depends on, for the recipe's digest.
        decide: verdicts for the image's live regions, in order.
    """

    name: str
    settings: Any
    decide: Callable[[ImageRecord], list[Verdict]]

    def digest(self) -> str:
        """Identifies the decision."""
        return digest(self.name, self.settings)

    def run(self, image: ImageRecord) -> None:
        """Mark the image's live regions."""
        live = image.live()
        if live:
            for region, verdict in zip(live, self.decide(image), strict=True):
                mark(region, self.name, verdict)


@dataclass(frozen=True)
class ModelStage:
    """A decision on a model's evidence.

    Attributes:
        name: stage name.
        protocol: "captioner", "judge" or "segmenter".
        backend: which model, and the resources of its actors.
        evidence: the struct of one answer.
        settings: what the decision (not the evidence) depends on.
        after: digests of the model stages before this one, whose answers this one's questions contain.
        asks: what is asked about a region; a change makes stored evidence stale.
        ask: evidence for every live region of every image, or the `BadRecord` of a region that has none.
        decide: the verdict on a region's evidence; also writes what the region gains (caption, category).
    """

    name: str
    protocol: str
    backend: Backend
    evidence: type[Any]
    settings: Any
    after: tuple[str, ...]
    asks: Callable[[Region], tuple]
    ask: Callable[[Any, list[ImageRecord]], list[list[Any]]]
    decide: Callable[[Region, Any], Verdict]

    @cached_property
    def evidence_digest(self) -> str:
        """Identifies everything the stage's evidence depends on: the folder's name."""
        return digest(self.name, backend_identity(self.protocol, self.backend), self.after)

    def store(self, folder: Path) -> EvidenceStore:
        """Where the stage's evidence lies in a subset's folder."""
        return EvidenceStore(folder / "evidence" / f"{self.name}-{self.evidence_digest}", self.evidence)

    def digest(self) -> str:
        """Identifies evidence and decision."""
        return digest(self.evidence_digest, self.settings)

    def fingerprint(self, region: Region) -> str:
        """Identifies the question about a region."""
        return fingerprint(*self.asks(region))

    def mark(self, region: Region, evidence: Any) -> None:
        """Record the evidence on the region and drop it if the filter says so."""
        mark(region, self.name, self.decide(region, evidence))


Stage = FilterStage | ModelStage


def mark(region: Region, stage: str, verdict: Verdict) -> None:
    """Write a verdict onto a region: its scores always, a drop if it is one."""
    if verdict.scores:
        region.scores = {**region.scores, **verdict.scores}
    if verdict.reason is not None:
        region.drop = Drop(stage, verdict.reason, verdict.detail)


# The stages, in the order in which the recipes use them.


def usable_masks(config: BuildConfig) -> FilterStage:
    """Drops masks that are too small and masks of an object that another mask has already."""
    return FilterStage("usable_masks", config.masks.model_dump(), partial(_usable, config.masks))


def whole_objects(config: BuildConfig) -> FilterStage:
    """Drops masks that are completely occluded and masks of parts of a larger object."""
    return FilterStage("whole_objects", config.masks.model_dump(), partial(_whole, config.masks))


def caption(config: BuildConfig) -> ModelStage:
    """Describes each region."""
    return ModelStage(
        name="caption",
        protocol="captioner",
        backend=config.captioner,
        evidence=Captioned,
        settings=None,
        after=(),
        asks=_asks_caption,
        ask=_ask_captions,
        decide=_decide_caption,
    )


def verify_category(config: BuildConfig, captioned: ModelStage) -> ModelStage:
    """Asks whether the caption describes the annotated category."""
    return ModelStage(
        name="verify_category",
        protocol="judge",
        backend=config.judge,
        evidence=Judged,
        settings=config.min_verdict_margin,
        after=(captioned.evidence_digest,),
        asks=_asks_verdict,
        ask=partial(_ask_judge, "verify"),
        decide=partial(_decide_verdict, config.min_verdict_margin),
    )


def extract_category(config: BuildConfig, captioned: ModelStage) -> ModelStage:
    """Asks which category the caption describes."""
    return ModelStage(
        name="extract_category",
        protocol="judge",
        backend=config.judge,
        evidence=Judged,
        settings=None,
        after=(captioned.evidence_digest,),
        asks=_asks_category,
        ask=partial(_ask_judge, "extract"),
        decide=_decide_category,
    )


def agree_with_segmenter(config: BuildConfig, extracted: ModelStage) -> ModelStage:
    """Predicts the core category's masks anew and keeps a region that one of them overlaps enough."""
    return ModelStage(
        name="agree_with_segmenter",
        protocol="segmenter",
        backend=config.segmenter,
        evidence=Resegmented,
        settings=config.min_iou,
        after=(extracted.evidence_digest,),
        asks=_asks_mask,
        ask=partial(_ask_segmenter, config.limits.max_pixels),
        decide=partial(_decide_iou, config.min_iou),
    )


def clean_text(config: BuildConfig) -> FilterStage:
    """Length and anti-repetition rules."""
    return FilterStage("clean_text", config.text.model_dump(), partial(_clean, config.text))


def coconut(config: BuildConfig) -> list[Stage]:
    """COCONut: caption, verify against the category, clean."""
    captioned = caption(config)
    return [usable_masks(config), captioned, verify_category(config, captioned), clean_text(config)]


def sa1b(config: BuildConfig) -> list[Stage]:
    """SA-1B: whole objects only, caption, name the category, find it again, clean."""
    captioned = caption(config)
    extracted = extract_category(config, captioned)
    return [
        usable_masks(config),
        whole_objects(config),
        captioned,
        extracted,
        agree_with_segmenter(config, extracted),
        clean_text(config),
    ]


RECIPES: dict[str, Callable[[BuildConfig], list[Stage]]] = {"coconut": coconut, "sa1b": sa1b}

RECIPE_VERSION = 1
"""Raised when a filter's or a writer's code changes what is kept; units of another version are rebuilt."""


def recipe_digest(stages: list[Stage], config: BuildConfig) -> str:
    """Identifies everything that decides what a unit's shard holds, apart from the source."""
    return digest(RECIPE_VERSION, [stage.digest() for stage in stages], config.limits.model_dump())


# What each stage asks and how it decides.


def _usable(settings: Any, image: ImageRecord) -> list[Verdict]:
    return masks.usable(image.live(), (image.height, image.width), settings, _overlaps(image))


def _whole(settings: Any, image: ImageRecord) -> list[Verdict]:
    return masks.whole_objects(image.live(), (image.height, image.width), settings, _overlaps(image))


_measured: list[tuple[ImageRecord, masks.Overlaps]] = []


def _overlaps(image: ImageRecord) -> masks.Overlaps:
    """How the image's masks overlap, counted once for the stages that follow each other on one image."""
    if not _measured or _measured[0][0] is not image:
        _measured[:] = [(image, masks.measure(image.live()))]
    return _measured[0][1]


def _clean(settings: Any, image: ImageRecord) -> list[Verdict]:
    return [text.clean(region.caption or "", settings) for region in image.live()]


def _asks_caption(region: Region) -> tuple:
    assert region.rle is not None
    return (region.rle.counts, region.category)


def _ask_captions(model: Captioner, images: list[ImageRecord]) -> list[list[Captioned | BadRecord]]:
    return [[_captioned(words) for words in captions] for captions in model.caption(images)]


def _captioned(words: str | BadRecord | None) -> Captioned | BadRecord:
    if words is None or isinstance(words, str):
        return Captioned(words)
    if isinstance(words, BadRecord):
        return words
    raise TypeError(f"a caption is a string or None, not {type(words).__name__}")


def _decide_caption(region: Region, evidence: Captioned) -> Verdict:
    region.caption = evidence.caption
    return category.captioned(evidence.caption)


def _asks_verdict(region: Region) -> tuple:
    return ("verify", region.caption, region.category)


def _asks_category(region: Region) -> tuple:
    return ("extract", region.caption)


def _ask_judge(kind: str, model: Judge, images: list[ImageRecord]) -> list[list[Judged | BadRecord]]:
    questions = [
        Question(kind, region.caption or "", region.category if kind == "verify" else None)
        for image in images
        for region in image.live()
    ]
    answers = model.ask(questions)
    if len(answers) != len(questions):
        raise ValueError(f"asked {len(questions)} questions, answered {len(answers)}")
    rest = iter(answers)
    return [[_judged(kind, answer) for answer in islice(rest, len(image.live()))] for image in images]


def _judged(kind: str, answer: Answer | BadRecord) -> Judged | BadRecord:
    """An answer as evidence; one outside its schema is not kept, so that it can be asked again."""
    if isinstance(answer, BadRecord):
        return answer
    decide = category.judge_verdict if kind == "verify" else lambda text: category.core_category(text)[1]
    verdict = decide(answer.text)
    if verdict.reason is Reason.ANSWER_INVALID:
        return BadRecord(verdict.reason, verdict.detail)
    return Judged(answer.text, answer.margin)


def _decide_verdict(min_margin: float | None, region: Region, evidence: Judged) -> Verdict:
    return category.judge_verdict(evidence.answer, evidence.margin, min_margin)


def _decide_category(region: Region, evidence: Judged) -> Verdict:
    region.core_category, verdict = category.core_category(evidence.answer)
    return verdict


def _asks_mask(region: Region) -> tuple:
    assert region.rle is not None
    return (region.core_category, region.rle.counts)


def _ask_segmenter(max_pixels: int, model: Segmenter, images: list[ImageRecord]) -> list[list[Resegmented]]:
    import numpy as np

    from ..io.photos import read_pixels

    results = []
    for image in images:
        live = image.live()
        boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in (r.bbox for r in live)], np.float32)
        phrases = [region.core_category or "" for region in live]
        found = model.segment(read_pixels(image, max_pixels), phrases, boxes)
        results.append([_best(region, options) for region, options in zip(live, found, strict=True)])
    return results


def _best(region: Region, options: list[Candidate]) -> Resegmented:
    assert region.rle is not None
    best = agreement.best_candidate([(option.rle, option.score) for option in options], region.rle)
    if best is None:
        return Resegmented(0.0, 0.0, None, 0)
    index, iou = best
    return Resegmented(iou, options[index].score, options[index].rle.counts, len(options))


def _decide_iou(min_iou: float, region: Region, evidence: Resegmented) -> Verdict:
    return agreement.judge_iou(evidence.iou, evidence.score, evidence.num_candidates, min_iou)


def only(image: ImageRecord, regions: list[Region]) -> ImageRecord:
    """The same image with some of its live regions: those for which a model owes evidence."""
    return msgspec.structs.replace(image, regions=regions)
