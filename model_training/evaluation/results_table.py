"""The results of all captioners in a folder of evaluations, as one table next to the published numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...schemas.errors import ConfigError
from .run_benchmark import SUMMARY


class Row(NamedTuple):
    """A captioner on a benchmark. Shares are percent; None is what nobody measured or reports.

    Attributes:
        benchmark, label: names of the benchmark and of the captioner.
        average, paper: the score, and what the paper reports.
        positive, negative: the parts of the score.
        tokens_per_forward, paper_tokens_per_forward: tokens that a forward pass decodes.
        seconds, paper_seconds: time for all captions.
        regions: number of regions with a caption.
        without_caption: number of regions without one, which no score counts.
    """

    benchmark: str
    label: str
    average: float | None
    paper: float | None
    positive: float | None
    negative: float | None
    tokens_per_forward: float | None
    paper_tokens_per_forward: float | None
    seconds: float | None
    paper_seconds: float | None
    regions: int
    without_caption: int

    @property
    def difference(self) -> float | None:
        """Percentage points that the score is above the paper's."""
        return None if self.average is None or self.paper is None else self.average - self.paper


def read_rows(out: str | Path) -> list[Row]:
    """The rows of all benchmarks of all labels in the `out` of evaluations, by benchmark, the best first.

    Raises:
        ConfigError: there are no results, or a file of them is damaged.
    """
    found = [_row(path) for path in sorted(Path(out).glob(f"*/*/{SUMMARY}"))]
    if not found:
        raise ConfigError(f"{out}: no results here; name the `out` of an evaluation that has scores")
    return sorted(found, key=lambda row: (row.benchmark, -(row.average or 0), row.label))


def _row(path: Path) -> Row:
    try:
        summary = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        paper = summary.get("paper") or {}
        return Row(
            benchmark=summary["benchmark"],
            label=path.parent.parent.name,
            **{name: _percent(summary[name]) for name in ("average", "positive", "negative")},
            paper=paper.get("average"),
            tokens_per_forward=summary["tokens_per_forward"] if summary["forwards"] else None,
            paper_tokens_per_forward=paper.get("tokens_per_forward"),
            seconds=summary["seconds"] or None,
            paper_seconds=paper.get("seconds"),
            regions=summary["regions"],
            without_caption=summary["without_caption"],
        )
    except (msgspec.MsgspecError, UnicodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not what an evaluation writes ({error}); run the evaluation again"
        ) from error


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def cells(rows: list[Row]) -> Iterator[list[str]]:
    """The rows as text, for a table in the terminal or in Markdown; published numbers in brackets."""
    for row in rows:
        regions = f"{row.regions:,}" + (f" ({row.without_caption:,} without)" if row.without_caption else "")
        yield [
            row.benchmark,
            row.label,
            _number(row.average),
            _number(row.paper),
            _number(row.difference, "+.1f"),
            _number(row.positive),
            _number(row.negative),
            _beside(row.tokens_per_forward, row.paper_tokens_per_forward, ".1f"),
            _beside(row.seconds, row.paper_seconds, ",.0f"),
            regions,
        ]


HEADINGS = ("benchmark", "captioner", "average", "paper", "diff", "pos", "neg", "tok/fwd", "s", "regions")


def _number(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def _beside(ours: float | None, theirs: float | None, form: str) -> str:
    published = "" if theirs is None else f"({format(theirs, form)})"
    return f"{_number(ours, form)} {published}".strip()
