"""A stage of one's own, as a recipe names it."""

from paracaption.filters.verdict import Verdict
from paracaption.pipeline.stages.base import FilterStage
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import ImageRecord


class EvenRegions(FilterStage):
    """Keeps the regions with an even number."""

    name = "even_regions"
    reasons = (Reason.OWN_RULE,)

    def decide(self, image: ImageRecord) -> list[Verdict]:
        return [Verdict(Reason.OWN_RULE, "odd") if each.id % 2 else Verdict() for each in image.live()]
