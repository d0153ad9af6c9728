"""Which regions a page asks for: parsed from a URL, checked, and turned into SQL with parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from ...schemas.errors import ConfigError
from ...schemas.records import SCORES
from ..sources.registry import subset_title
from ..stages.registry import stage_title

MEASURES = {
    "area": "pixels of the mask",
    "predicted_iou": "the estimate of the mask's quality by whoever made it, 0..1",
    "stability_score": "the publisher's measure of the mask's stability, 0..1",
    **SCORES,
}
"""Columns of the ledger that can be filtered and sorted by, with their meanings."""

OUTCOMES = ("", "kept", "dropped")
CATEGORY = "coalesce(category, core_category)"
"""The annotation's category, or else the one that was taken from the caption, in SQL."""

_TEXTS = ("subset", "category", "text", "outcome", "stage", "reason", "sort")
_MAX_TEXT = 200
_MAX_TERMS = 10
_TERM = re.compile(r'"([^"]+)"|(\S+)')


@dataclass(frozen=True)
class Query:
    """A choice of regions and an order of their images.

    Attributes:
        subset, category, stage, reason: must be equal; "" for any. Stage and reason are those of the drop.
        text: terms that must all occur in the caption, in upper or lower case; "in quotes" for a phrase.
        outcome: "kept", "dropped" or "" for both.
        ranges: (measure, least, most); both bounds are inclusive, and None for no bound. A region that lacks
            the number is not chosen.
        sort: "" for the corpus's order; a measure for the lowest first, "-measure" for the highest first.
    """

    subset: str = ""
    category: str = ""
    text: str = ""
    outcome: str = ""
    stage: str = ""
    reason: str = ""
    ranges: tuple[tuple[str, float | None, float | None], ...] = ()
    sort: str = ""

    @classmethod
    def parse(cls, params: Mapping[str, str]) -> Query:
        """The query in a URL's parameters; other parameters are ignored.

        Raises:
            ConfigError: a parameter has a value that is not possible.
        """
        values = {name: params.get(name, "").strip()[:_MAX_TEXT] for name in _TEXTS}
        if values["outcome"] not in OUTCOMES:
            raise ConfigError(f"outcome: unknown outcome {values['outcome']!r}; choose kept or dropped")
        if values["sort"] and values["sort"].removeprefix("-") not in MEASURES:
            raise ConfigError(
                f"sort: unknown order {values['sort']!r}; choose one of {', '.join(MEASURES)}; "
                "put a - before it for descending order"
            )
        ranges = []
        for name in MEASURES:
            least, most = (_number(params, f"{name}.{end}") for end in ("min", "max"))
            if least is not None or most is not None:
                ranges.append((name, least, most))
        return cls(**values, ranges=tuple(ranges))

    def params(self) -> dict[str, str]:
        """The URL's parameters that give this query."""
        found = {name: getattr(self, name) for name in _TEXTS}
        for name, least, most in self.ranges:
            found |= {f"{name}.min": format_number(least), f"{name}.max": format_number(most)}
        return {name: value for name, value in found.items() if value}

    def url(self, **changes: str) -> str:
        """The parameters as a URL has them, with some changed or added."""
        return urlencode({name: value for name, value in {**self.params(), **changes}.items() if value})

    def without(self, name: str) -> Query:
        """The query without one of its fields, or without the range of one measure."""
        if name in MEASURES:
            return replace(self, ranges=tuple(each for each in self.ranges if each[0] != name))
        return replace(self, **{name: ""})

    def chips(self) -> list[tuple[str, str]]:
        """For people: (field, what it asks for) of every field that narrows the choice."""
        titles = {"subset": subset_title, "stage": stage_title, "reason": lambda name: name.replace("_", " ")}
        shown = [
            (name, f"{name}: {titles.get(name, str)(value)}")
            for name in _TEXTS[:-1]
            if (value := getattr(self, name))
        ]
        for name, least, most in self.ranges:
            low, high = format_number(least), format_number(most)
            bounds = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"
            shown.append((name, f"{name.replace('_', ' ')}: {bounds}"))
        return shown

    def where(self) -> tuple[str, dict[str, Any]]:
        """The condition on a row of the ledger in SQL, and its named parameters. The subset is left out."""
        terms, args = ["true"], {}
        if self.category:
            terms.append(f"lower({CATEGORY}) = lower($category)")
            args["category"] = self.category
        for number, term in enumerate(self.terms()):
            terms.append(f"contains(lower(caption), lower($text{number}))")
            args[f"text{number}"] = term
        if self.outcome == "kept":
            terms.append("kept")
        elif self.outcome == "dropped":
            terms.append("drop_reason IS NOT NULL")
        for name in ("stage", "reason"):
            if value := getattr(self, name):
                terms.append(f"drop_{name} = ${name}")
                args[name] = value
        for name, least, most in self.ranges:
            for sign, end, value in ((">=", "min", least), ("<=", "max", most)):
                if value is not None:
                    terms.append(f"{name} {sign} ${name}_{end}")
                    args[f"{name}_{end}"] = value
        return " AND ".join(terms), args

    def where_ranked(self) -> tuple[str, dict[str, Any]]:
        """`where`, and that the region has the measure of `sort`: without it, it has no place."""
        where, args = self.where()
        return (f"{where} AND {self.measure} IS NOT NULL" if self.measure else where), args

    @property
    def measure(self) -> str:
        """The measure that the images are sorted by; "" in the corpus's order."""
        return self.sort.removeprefix("-")

    def terms(self) -> list[str]:
        """The words and phrases of `text`."""
        return [phrase or word for phrase, word in _TERM.findall(self.text)][:_MAX_TERMS]


def format_number(value: float | None) -> str:
    """The shortest text that reads as the same number; "" for None."""
    if value is None:
        return ""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _number(params: Mapping[str, str], name: str) -> float | None:
    text = params.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{name}: {text[:40]!r} is not a number") from None
    if not math.isfinite(value):
        raise ConfigError(f"{name}: {text[:40]!r} is not a number")
    return value
