"""Every stage, registered once. Who shows a corpus finds titles, reasons, scores and thresholds here."""

from __future__ import annotations

from .agreement import AgreeWithSegmenter
from .base import Stage, Threshold
from .caption import Caption
from .category import ExtractCategory, VerifyCategory
from .masks import UsableMasks, WholeObjects
from .text import CleanText

STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        UsableMasks,
        WholeObjects,
        Caption,
        VerifyCategory,
        ExtractCategory,
        AgreeWithSegmenter,
        CleanText,
    )
}
"""By name, in an order in which recipes may use them."""

THRESHOLDS: dict[str, Threshold] = {each.key: each for stage in STAGES.values() for each in stage.thresholds}
"""Every threshold that a stage decides by, by its key in the configuration."""


def stage_title(name: str) -> str:
    """A stage's name as people read it; that of the ends of a recipe, `source` and `write`, as it is."""
    return STAGES[name].title if name in STAGES else name.replace("_", " ")
