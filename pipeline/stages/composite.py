"""Composite stages: `vote` and `fallback` ask other stages, their members, and decide from their verdicts.

In a stream, a composite is a stage after its members: each member is a stage of its own, with its own model,
evidence and events. A member's verdict drops nothing: it is noted on the region (`Region.said`). The
composite then gives the region one drop, or keeps it. So a unit can pass from worker to worker between any
two of these stages.

A member is a stage or a sequence of stages. A sequence keeps a region if all of its stages do; one after a
stage that does not is not asked. A stage that cannot decide (its model failed) is no verdict: the region is
dropped with that failure, as everywhere else.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...filters.verdict import Verdict
from ...schemas.config import BuildConfig
from ...schemas.reasons import Reason
from ...schemas.recipe import CompositeEntry, StageEntry
from ...schemas.records import ImageRecord, Region
from .base import FilterStage, Stage


class Composite(FilterStage):
    """A stage that decides from the verdicts of its members; see the top of this file.

    Args:
        config: of the build.
        entry: of the recipe.
        members: its members, each a sequence of stages.
    """

    def __init__(self, config: BuildConfig, entry: CompositeEntry, members: Sequence[Sequence[Stage]]):
        super().__init__(config, StageEntry(entry.kind, entry.id))
        self.members = [[stage.name for stage in member] for member in members]
        self.at_least = entry.at_least
        for member in members:
            for stage in member:
                stage.within = self

    @property
    def settings(self) -> Any:
        return [self.members, self.at_least]

    def decide(self, image: ImageRecord) -> list[Verdict]:
        return [self._decide(region) for region in image.live()]

    def _decide(self, region: Region) -> Verdict:
        verdict = self.judge(region)
        names = {name for member in self.members for name in member}
        region.said = {name: drop for name, drop in region.said.items() if name not in names}
        return verdict

    @abstractmethod
    def judge(self, region: Region) -> Verdict:
        """The verdict on a region whose members have spoken."""

    def asks(self, member: str, region: Region) -> bool:
        number, step = next(
            (number, names.index(member)) for number, names in enumerate(self.members) if member in names
        )
        return (
            all(self._keeps(name, region) for name in self.members[number][:step])
            and self.comes_to(number, region)
            and (self.within is None or self.within.asks(self.name, region))
        )

    def comes_to(self, member: int, region: Region) -> bool:
        """Whether a member is asked about a region at all, by what the members before it said."""
        return True

    def is_against(self, member: int, region: Region) -> bool:
        """Whether a member has given its verdict against a region."""
        return any(region.said.get(name) is not None for name in self.members[member])

    def _keeps(self, stage: str, region: Region) -> bool:
        return stage in region.said and region.said[stage] is None

    def told(self, region: Region) -> str:
        """What the members said, for people: "a kept it; b: category_wrong (the judge says no)"."""
        parts = []
        for member in self.members:
            for name in member:
                drop = region.said.get(name)
                if drop is not None:
                    parts.append(f"{name}: {drop.reason.value} ({drop.detail})")
            if not any(region.said.get(name) is not None for name in member) and member[-1] in region.said:
                parts.append(f"{member[-1]} kept it")
        return "; ".join(parts)


class Vote(Composite):
    """Keeps a region if at least `at_least` members keep it. All members are asked."""

    name, title = "vote", "vote"
    does = "keeps a region if enough of its members keep it"
    reasons = (Reason.VOTED_OUT,)

    def judge(self, region: Region) -> Verdict:
        kept = sum(not self.is_against(number, region) for number in range(len(self.members)))
        if kept >= self.at_least:
            return Verdict()
        said = f"{kept} of {len(self.members)} kept it, {self.at_least} needed: {self.told(region)}"
        return Verdict(Reason.VOTED_OUT, said)


class Fallback(Composite):
    """Keeps a region if a member keeps it. A member is asked where all before it are against the region."""

    name, title = "fallback", "fallback"
    does = "asks its members one after the other until one keeps the region"

    def comes_to(self, member: int, region: Region) -> bool:
        return all(self.is_against(number, region) for number in range(member))

    def judge(self, region: Region) -> Verdict:
        if not all(self.is_against(number, region) for number in range(len(self.members))):
            return Verdict()
        last = next(drop for name in self.members[-1] if (drop := region.said.get(name)) is not None)
        return Verdict(last.reason, self.told(region))


COMPOSITES: dict[str, type[Composite]] = {"vote": Vote, "fallback": Fallback}


@contextmanager
def only_asked(stage: Stage | str, images: Iterable[ImageRecord]) -> Iterator[None]:
    """Within the block, the live regions of these images are those that a stage is asked about.

    For most stages that is all of them: a stage may pass some by (`Stage.takes`), and a composite does not
    ask each member about each region.
    """
    if isinstance(stage, str) or (stage.within is None and type(stage).takes is Stage.takes):
        yield
        return
    composite = stage.within
    live = [(image, region) for image in images for region in image.live()]
    hidden = [
        (image, region)
        for image, region in live
        if not (stage.takes(region) and (composite is None or composite.asks(stage.name, region)))
    ]
    for _, region in hidden:
        region.aside = True
    try:
        yield
    finally:
        for image, region in hidden:
            region.aside = False
            if image.drop is not None and region.drop is None:  # the image as a whole failed meanwhile
                region.drop = image.drop
