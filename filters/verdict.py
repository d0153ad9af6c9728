"""What a filter returns."""

from __future__ import annotations

from typing import NamedTuple

from ..schemas.reasons import Reason


class Verdict(NamedTuple):
    """Keep (`reason is None`) or drop, with the numbers that decided, which are kept either way.

    Attributes:
        reason: None to keep.
        detail: for people; deterministic.
        scores: names from `schemas.records.SCORES`.
    """

    reason: Reason | None = None
    detail: str = ""
    scores: dict[str, float] = {}

    @property
    def keep(self) -> bool:
        return self.reason is None
