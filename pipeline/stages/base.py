"""What a stage is: it takes the records of a unit and decides; it never deletes a region.

A `FilterStage` decides from the records alone. A `ModelStage` asks a model for the evidence it lacks and
decides from evidence alone. What a stage is without a configuration (its name, title, reasons, scores,
thresholds, what it needs and gives) are class attributes, so that whoever shows a corpus finds them in the
registry. An instance is one entry of a recipe: it has an id and options of its own, and travels to the
workers as it is; the model itself is loaded there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import msgspec

from ...filters.verdict import Verdict
from ...schemas.config import Backend, BuildConfig
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.recipe import StageEntry
from ...schemas.records import Drop, ImageRecord, Region
from ...schemas.strict import Strict
from ..io.failures import kind_of
from ..io.location import Location
from ..models.registry import backend_identity, find_backend
from .evidence import Answered, Evidence, EvidenceStore, digest, fingerprint
from .options import take_options


class Threshold(NamedTuple):
    """A number of the configuration that decides on a score.

    Attributes:
        key: its place in the configuration, such as "text.min_words".
        score: the score that it bounds, as an SQL expression over the ledger's columns; `$space` stands for a
            string of all white space.
        is_least: True if lower scores are dropped, False if higher ones are.
        reason: the reason of these drops.
        bounds: lowest value, highest value and step of a slider.
        title: what people read.
    """

    key: str
    score: str
    is_least: bool
    reason: Reason
    bounds: tuple[float, float, float]
    title: str

    def value(self, config: BuildConfig) -> float | None:
        """The threshold in a configuration; None if it is not used."""
        first, _, rest = self.key.partition(".")
        value = getattr(config, first)
        return getattr(value, rest) if rest else value


class Stage(ABC):
    """One step of a recipe. A subclass is a `FilterStage` or a `ModelStage`.

    Args:
        config: of the build.
        entry: of the recipe; None is the stage under its own name, without options.
        read: for what it needs, the model stages before it whose answers that may be from.
        where: what stands before the id in messages about this entry, such as "subsets.mine.recipe".

    Attributes:
        name: of the class, its kind; of an instance, its id in the recipe. The id lies on disk: in drops,
            events, the funnel and the names of evidence folders.
        title: what people read of the kind; "" takes the name.
        does: what it does, in a sentence that begins with a verb, for the dataset card.
        needs: fields of a region that it looks at and that another stage or the source has to fill:
            "mask", "caption", "category" or "core_category".
        gives: fields of a region that it fills.
        sections: keys of the configuration that are its options, unless the entry has its own. Of a section
            without a backend, the keys of the section are the options.
        options_type: further options, of a stage of the user's own; None has none.
        version: of a stage of the user's own: raised when its code decides otherwise than before.
        reasons: the reasons for which it drops a region.
        scores: the scores that it writes; names of `schemas.records.SCORES`.
        thresholds: what it decides by. A filter stage names them only if it looks at nothing but captions:
            then the explorer can tell what other thresholds would keep.
        settings: what the decision (not the evidence) depends on; part of the recipe's digest.
        kind: what `stage` says in the entry.
        config: of the build, with the entry's options in the place of the build's.
        options: of the type `options_type`; None without one.
        given: the options that the entry has, checked and whole, by name.
        within: the composite stage that it is a member of; None for most.
    """

    name: str
    title: ClassVar[str] = ""
    does: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()
    sections: ClassVar[tuple[str, ...]] = ()
    options_type: ClassVar[type[Strict] | None] = None
    version: ClassVar[int] = 1
    reasons: ClassVar[tuple[Reason, ...]] = ()
    scores: ClassVar[tuple[str, ...]] = ()
    thresholds: ClassVar[tuple[Threshold, ...]] = ()

    def __init__(
        self,
        config: BuildConfig,
        entry: StageEntry | None = None,
        read: Mapping[str, Sequence[ModelStage]] = {},
        where: str = "recipe",
    ):
        entry = entry or StageEntry(type(self).name, type(self).name)
        self.name, self.kind = entry.id, entry.kind
        self.within: Stage | None = None
        taken = take_options(type(self), config, entry, where)
        self.config, self.options, self.given = taken.config, taken.own, taken.given

    @property
    def settings(self) -> Any:
        if ":" not in self.kind:
            return None
        return [self.version, self.options and self.options.model_dump(mode="json")]

    def identity(self) -> Any:
        """What tells it from other stages in digests: its name, or its kind and its id if that is another."""
        return self.name if self.name == self.kind else [self.kind, self.name]

    def takes(self, region: Region) -> bool:
        """Whether the stage looks at a live region at all; one that it does not take passes it by."""
        return True

    def asks(self, member: str, region: Region) -> bool:
        """Of a composite stage: whether a stage in it is asked about a region, by what was said before."""
        raise NotImplementedError(f"{self.name} has no members")

    @abstractmethod
    def digest(self) -> str:
        """Identifies everything that the stage decides from, apart from the records."""


class FilterStage(Stage):
    """A stage that decides without a model."""

    @abstractmethod
    def decide(self, image: ImageRecord) -> list[Verdict]:
        """A verdict for each live region of the image, in order."""

    def digest(self) -> str:
        return digest(self.identity(), self.settings)

    def run(self, image: ImageRecord) -> None:
        """Decide on the image's live regions."""
        live = image.live()
        if live:
            for region, verdict in zip(live, self.decide(image), strict=True):
                apply_verdict(region, self, verdict)


class ModelStage(Stage):
    """A stage that asks a model and decides from its answers, the evidence.

    Attributes:
        protocol: a key of `models.registry.BACKENDS`, such as "captioner". It is also the option that names a
            backend of its own.
        each: the method of a backend that batches by itself, which gives answers as they are ready; "" if the
            protocol has none.
        evidence: the struct of one answer.
        sees_photo: whether the model looks at the photo, so that its answers hold for that photo alone.
        makes_regions: whether it is asked about images that have no regions, and makes them.
        backend: which model, and the resources of its actors.
        place: of the backend in the configuration: a key such as "judge", or the entry's option.
    """

    protocol: ClassVar[str]
    each: ClassVar[str] = ""
    evidence: ClassVar[type[Any]]
    sees_photo: ClassVar[bool] = True
    makes_regions: ClassVar[bool] = False

    def __init__(
        self,
        config: BuildConfig,
        entry: StageEntry | None = None,
        read: Mapping[str, Sequence[ModelStage]] = {},
        where: str = "recipe",
    ):
        super().__init__(config, entry, read, where)
        self.backend: Backend = getattr(self.config, self.protocol)
        has_own = self.protocol in self.given
        self.place = f"{where}.{self.name}.{self.protocol}" if has_own else self.protocol
        self._read = list(dict.fromkeys(each for need in self.needs for each in read.get(need, ())))

    def places(self, image: ImageRecord) -> list[int]:
        """The ids under which the answers lie that an image needs: those of its live regions."""
        return [region.id for region in image.live()]

    def answers(self, images: list[ImageRecord], known: Evidence) -> UnitAnswers:
        """What is known and what is missing of a unit; the arguments are those of `UnitAnswers`."""
        return UnitAnswers(self, images, known)

    def check_backend(self) -> None:
        """Refuse a backend that cannot answer this stage's questions, though it has the protocol's method.

        Raises:
            ConfigError: it cannot, and the message names those that can; or it cannot be imported.
        """

    @abstractmethod
    def question(self, region: Region) -> tuple:
        """What is asked about a region; evidence of another question is stale."""

    @abstractmethod
    def ask(self, model: Any, images: list[ImageRecord]) -> list[list[Any]]:
        """Evidence for every live region of every image, in order; a `BadRecord` where a region has none.

        Raises:
            BadRecord: an image cannot be read.
            ValueError: the model answered another number of questions than it was asked.
        """

    def ask_each(self, model: Any, images: list[ImageRecord]) -> Iterator[tuple[int, list[Any]]]:
        """(place of the image, its evidence as `ask` gives it) as it is ready, of a backend with `each`."""
        raise NotImplementedError

    @cached_property
    def batches_itself(self) -> bool:
        """Whether the backend is asked about a whole unit at once, and keeps its engine full by itself."""
        return bool(self.each) and hasattr(find_backend(self.protocol, self.backend), self.each)

    @abstractmethod
    def decide(self, region: Region, evidence: Any) -> Verdict:
        """The verdict on a region's evidence; also writes what the region gains, such as its caption."""

    @classmethod
    @abstractmethod
    def matches(cls, evidence: Any, row: dict[str, Any]) -> bool:
        """Whether a row of the ledger can have been decided from this evidence, not from another model's."""

    @cached_property
    def evidence_digest(self) -> str:
        """Identifies everything that the evidence depends on; part of the folder's name.

        Raises:
            ConfigError: the backend cannot be imported, or it, its options or its checkpoint do not fit.
        """
        self.check_backend()
        read = [stage.evidence_digest for stage in self._read]
        return digest(self.identity(), backend_identity(self.protocol, self.backend), read)

    def digest(self) -> str:
        return digest(self.evidence_digest, self.settings)

    def store(self, folder: Location) -> EvidenceStore:
        """Where the evidence lies in a subset's folder."""
        return EvidenceStore(folder / "evidence" / f"{self.name}-{self.evidence_digest}", self.evidence)


def apply_verdict(region: Region, stage: Stage, verdict: Verdict) -> None:
    """Write a verdict onto a region: its scores always, and a drop if it is one.

    The verdict of a member of a composite is noted; the composite decides.
    """
    if verdict.scores:
        region.scores = {**region.scores, **verdict.scores}
    drop = None if verdict.reason is None else Drop(stage.name, verdict.reason, verdict.detail)
    if stage.within is not None:
        region.said = {**region.said, stage.name: drop}
    elif drop is not None:
        region.drop = drop


def failed_drop(stage: Stage, reason: Reason, detail: str) -> Drop:
    """The drop of a region that a stage could not decide on. That of a member is its composite's."""
    while stage.within is not None:
        detail = f"{stage.name}: {detail}"
        stage = stage.within
    return Drop(stage.name, reason, detail)


PHOTO_CHANGED = "the photo changed while the build was running"


class Failure(NamedTuple):
    """Why there is no evidence of a region or of an image; `kind` if the source could not be read."""

    reason: Reason
    detail: str
    kind: str = ""


class UnitAnswers:
    """One model stage on one unit: what is known, what is missing, and what became of it.

    Args:
        stage: the model stage.
        images: the unit's.
        known: stored evidence of the unit, which `add` extends; a row is missing if its question has changed,
            or if its photo is not the image's `photo_digest`, where both are known.

    Attributes:
        missing: the images with the live regions that lack evidence, and no other regions.
        num_missing, num_known: live regions that lack evidence, and those that have it from the start.
        image_failures: by image key; what is not in it when all have been asked about has evidence.
        region_failures: by image key and region id, where only some regions of an image have no evidence.
        changed: keys of the images whose photo became another one while the build was running.
    """

    def __init__(self, stage: ModelStage, images: list[ImageRecord], known: Evidence):
        self.stage = stage
        self.images = images
        self.known = known
        self._questions = {
            (image.key, region.id): fingerprint(*stage.question(region))
            for image in images
            for region in image.live()
        }
        self.missing = [
            msgspec.structs.replace(image, regions=regions)
            for image in images
            if (regions := [each for each in image.live() if self._find(image, each) is None])
        ]
        self.num_missing = sum(len(image.regions) for image in self.missing)
        self.num_known = len(self._questions) - self.num_missing
        self.image_failures: dict[str, Failure] = {}
        self.region_failures: dict[tuple[str, int], Failure] = {}
        self.changed: set[str] = set()
        self._by_key = {image.key: image for image in images}

    @property
    def num_asked(self) -> int:
        """Regions that the model was asked about, for its event."""
        return self.num_missing

    def add(self, image: ImageRecord, outcome: list[Any] | Failure) -> None:
        """Take what became of one of the `missing` images: an answer for each region, or one failure.

        The image's `photo_digest` is that of the photo that the model saw. It becomes that of the unit's
        image, unless an earlier stage saw another photo: then the image is in `changed`, and fails.
        """
        if isinstance(outcome, Failure):
            self.image_failures[image.key] = outcome
            return
        seen = image.photo_digest if self.stage.sees_photo else ""
        if seen and not self._note_photo(image.key, seen):
            self.image_failures[image.key] = Failure(Reason.PHOTO_UNREADABLE, PHOTO_CHANGED)
        for region, answer in zip(image.regions, outcome, strict=True):
            place = (image.key, region.id)
            if isinstance(answer, BadRecord):
                self.region_failures[place] = Failure(answer.reason, answer.detail, kind_of(answer))
            else:
                self._store(image, region, answer, seen)

    def _store(self, image: ImageRecord, region: Region, answer: Any, seen: str) -> None:
        place = (image.key, region.id)
        self.known[place] = Answered(self._questions[place], answer, seen)

    def _note_photo(self, key: str, seen: str) -> bool:
        """Whether the photo that was seen is the one that the unit's image has had so far, if it had one."""
        image = self._by_key[key]
        if image.photo_digest and image.photo_digest != seen:
            self.changed.add(key)
            return False
        image.photo_digest = seen
        return True

    def apply(self) -> None:
        """Decide on every live region: by its evidence, or by the failure to get any."""
        for image in self.images:
            for region in image.live():
                evidence = self._find(image, region)
                if evidence is not None:
                    apply_verdict(region, self.stage, self.stage.decide(region, evidence))
                else:
                    failure = self.region_failures.get((image.key, region.id))
                    failure = failure or self.image_failures[image.key]
                    region.drop = failed_drop(self.stage, failure.reason, failure.detail)
                    image.failed = failure.kind or image.failed

    def _find(self, image: ImageRecord, region: Region) -> Any:
        """The region's evidence if it answers today's question; else None."""
        row = self.known.get((image.key, region.id))
        if row is None or row.asked != self._questions[image.key, region.id]:
            return None
        is_same = not row.photo or not image.photo_digest or row.photo == image.photo_digest
        return row.answer if is_same or not self.stage.sees_photo else None


def photos_claimed(stage: ModelStage, images: list[ImageRecord], known: Evidence) -> dict[str, str]:
    """Of which photo, by image key, stored evidence speaks where nobody has read the image's photo yet.

    Whether it is still that photo is for the caller to find out, before a `UnitAnswers` is made of it.
    """
    if not stage.sees_photo:
        return {}
    rows = (
        (image.key, known.get((image.key, place)))
        for image in images
        if not image.photo_digest
        for place in stage.places(image)
    )
    return {key: row.photo for key, row in rows if row is not None and row.photo}
