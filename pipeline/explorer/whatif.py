"""What another threshold would keep: counted from stored scores, decided by the filters' own code.

A region that passes now fails then if one of its scores does; that takes one pass over the scores. A region
that fails now may pass then, and whatever comes after the step that dropped it has to be asked too: the text
rules are run on its caption. The masks' thresholds are not here: which regions reach the captioner depends on
them, and what it would have said of others is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...filters import text
from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError
from ...schemas.reasons import Reason
from .catalog import Catalog
from .query import plain


class Threshold(NamedTuple):
    """A number of the configuration that decides on a score.

    Attributes:
        key: in the configuration, "text.min_words".
        score: the score that it bounds, as SQL has it.
        is_least: whether lower scores are dropped, or higher ones.
        bounds: lowest and highest value, and the step, of the slider.
        title: for people.
    """

    key: str
    score: str
    is_least: bool
    bounds: tuple[float, float, float]
    title: str

    def now(self, config: BuildConfig) -> float | None:
        """The configuration's value."""
        first, _, rest = self.key.partition(".")
        value = getattr(config, first)
        return getattr(value, rest) if rest else value

    def fails(self, name: str) -> str:
        """SQL that is true of a score beyond the parameter `name`."""
        return f"{self.score} {'<' if self.is_least else '>'} ${name}"


_SPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))
_CHARS = "length(trim(caption, $space))"

THRESHOLDS = {
    each.key: each
    for each in (
        Threshold(
            "min_iou", "nullif(iou, 'nan'::DOUBLE)", True, (0, 1, 0.01), "least IoU with the segmenter's mask"
        ),
        Threshold(
            "min_verdict_margin", "verdict_margin", True, (-30, 30, 0.1), "least margin of the judge's yes"
        ),
        Threshold("text.min_words", "num_words", True, (0, 60, 1), "fewest words"),
        Threshold("text.max_words", "num_words", False, (1, 400, 1), "most words"),
        Threshold("text.min_chars", _CHARS, True, (0, 300, 1), "fewest characters"),
        Threshold("text.max_chars", _CHARS, False, (1, 3000, 1), "most characters"),
        Threshold(
            "text.max_repeat_share", "repeat_share", False, (0, 1, 0.01), "largest share of repeated 4-grams"
        ),
    )
}
"""By key, in the order of the steps."""

_MODEL_STEPS = {
    "agree_with_segmenter": (Reason.IOU_LOW, "min_iou"),
    "verify_category": (Reason.CATEGORY_WRONG, "min_verdict_margin"),
}
"""Steps before the text rules that have a threshold: the reason of their drops, and its key."""

_TEXT_KEYS = [key for key in THRESHOLDS if key.startswith("text.")]
_TEXT_REASONS = [Reason.TEXT_TOO_SHORT.value, Reason.TEXT_TOO_LONG.value, Reason.TEXT_REPEATS.value]
_MOST_READ = 20_000
"""Captions that are run through the text rules at once, about 2 s; of more, this many are a sample."""
_EXAMPLES = 6


class Change(NamedTuple):
    """What another configuration does to a subset.

    Attributes:
        kept: regions now.
        lost, gained: regions that are kept now and not then, and the other way round.
        checked: captions that were run through the text rules.
        candidates: captions that would have to be; if more, `gained` is an estimate from `checked` of them.
    """

    kept: int
    lost: int
    gained: int
    checked: int
    candidates: int

    @property
    def then(self) -> int:
        """Regions kept then."""
        return self.kept - self.lost + self.gained

    @property
    def exact(self) -> bool:
        return self.checked == self.candidates

    @property
    def error(self) -> int:
        """Half of the 95% interval of an estimated `gained`; 0 if it is exact."""
        if self.exact:
            return 0
        share = self.gained / self.candidates
        return math.ceil(1.96 * self.candidates * math.sqrt(max(share * (1 - share), 1e-4) / self.checked))


class Example(NamedTuple):
    """A region that changes sides: `side` is "lost" or "gained", `score` the one that a threshold bounds."""

    side: str
    subset: str
    key: str
    region: int
    category: str
    caption: str


def change_config(config: BuildConfig, values: Mapping[str, float]) -> BuildConfig:
    """The configuration with some thresholds changed.

    Args:
        config: of the corpus.
        values: by key of `THRESHOLDS`; those that are as before change nothing.

    Raises:
        ConfigError: no such threshold, or no such value.
    """
    changed = config.model_dump()
    for key, value in values.items():
        if key not in THRESHOLDS:
            raise ConfigError(f"{key[:40]!r}: no threshold; there are {', '.join(THRESHOLDS)}")
        if not math.isfinite(value):
            raise ConfigError(f"{key}: {value} is no number")
        whole = THRESHOLDS[key].bounds[2] == 1
        first, _, rest = key.partition(".")
        place, name = (changed[first], rest) if rest else (changed, first)
        place[name] = round(value) if whole else value
    try:
        return BuildConfig.model_validate(changed)
    except ValueError as error:
        raise ConfigError(str(error)[:300]) from error


def lines(config: BuildConfig, wanted: BuildConfig) -> str:
    """YAML of the thresholds that differ, to copy into the build's file; "" if none does."""
    top, inner = [], []
    for key, threshold in THRESHOLDS.items():
        value = threshold.now(wanted)
        if value is not None and value != threshold.now(config):
            name = key.partition(".")[2]
            (inner if name else top).append(f"{name or key}: {plain(value)}")
    return "\n".join([*top, *(["text:"] if inner else []), *(f"  {line}" for line in inner)])


def compare(
    catalog: Catalog, subset: str, config: BuildConfig, wanted: BuildConfig, exact: bool = False
) -> tuple[Change, list[Example]]:
    """What a rebuild of a subset with other thresholds would keep and drop.

    Args:
        catalog: of the corpus.
        subset: one of its subsets.
        config: the committed units were built with.
        wanted: differs from it in `THRESHOLDS` only.
        exact: read every caption that has to be, however long it takes; else a sample if there are many.

    Returns:
        The counts, and some regions of either side, the same ones each time.
    """
    kept = catalog.counts(subset).kept
    failing, args = _fails(config, wanted)
    if not failing or not kept:
        lost, examples = 0, []
    else:
        chosen = f"FROM LEDGERS WHERE kept AND ({failing})"
        [(lost,)] = catalog.select(f"SELECT count(*) {chosen}", args, subset)
        rows = catalog.select(f"SELECT {_SHOWN} {chosen} {_ORDER} LIMIT {_EXAMPLES}", args, subset)
        examples = [Example("lost", subset, *row) for row in rows]
    passing, args = _may_pass(config, wanted)
    if not passing or not catalog.units(subset):
        return Change(kept, lost, 0, 0, 0), examples
    chosen = f"FROM LEDGERS WHERE NOT kept AND caption IS NOT NULL AND ({passing})"
    [(candidates,)] = catalog.select(f"SELECT count(*) {chosen}", args, subset)
    limit = candidates if exact else _MOST_READ
    rows = catalog.select(f"SELECT {_SHOWN} {chosen} {_ORDER} LIMIT {limit:d}", args, subset)
    passed = [row for row in rows if text.clean(row[3], wanted.text).keep]
    gained = round(len(passed) / max(1, len(rows)) * candidates)
    examples += [Example("gained", subset, *row) for row in passed[:_EXAMPLES]]
    return Change(kept, lost, gained, len(rows), candidates), examples


def contradicts(catalog: Catalog, subset: str, config: BuildConfig) -> bool:
    """Whether units were built with other thresholds than the configuration has: then no count is right.

    Some region is kept that the configuration drops, or dropped by a model's threshold that it passes.
    """
    args: dict[str, Any] = {}
    terms = []
    for key, threshold in THRESHOLDS.items():
        now = threshold.now(config)
        if now is not None:
            name = key.replace(".", "_")
            args[name] = now
            terms.append(f"kept AND {threshold.fails(name)}")
            for reason in (reason for reason, of in _MODEL_STEPS.values() if of == key):
                args[f"{name}_reason"] = reason.value
                terms.append(f"drop_reason = ${name}_reason AND {threshold.score} >= ${name}")
    where, args = _with_space(" OR ".join(terms), args)
    sql = f"SELECT 1 FROM LEDGERS WHERE {where} LIMIT 1"
    name = ("contradicts", sql, tuple(args.items()), subset)
    return bool(catalog.remember(name, lambda: catalog.select(sql, args, subset)))


_SHOWN = "key, region, coalesce(category, core_category, ''), caption"
_ORDER = "ORDER BY hash(key, region), key, region"


def _fails(config: BuildConfig, wanted: BuildConfig) -> tuple[str, dict[str, Any]]:
    """SQL that is true of kept regions that a changed threshold drops."""
    args: dict[str, Any] = {}
    terms = []
    for key, threshold in THRESHOLDS.items():
        now, then = threshold.now(config), threshold.now(wanted)
        if then is not None and then != now:
            name = key.replace(".", "_")
            terms.append(f"coalesce({threshold.fails(name)}, false)")
            args[name] = then
    return _with_space(" OR ".join(terms), args)


def _with_space(sql: str, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return sql, args | ({"space": _SPACE} if "$space" in sql else {})


def _may_pass(config: BuildConfig, wanted: BuildConfig) -> tuple[str, dict[str, Any]]:
    """SQL that is true of dropped regions which might be kept: their step lets them go, if the text rules do.

    Of the text rules' own drops those are meant that are beyond a threshold which moved away from them.
    Whether they are beyond another one, too, the rules themselves will say.
    """
    args: dict[str, Any] = {}
    terms = []
    for stage, (reason, key) in _MODEL_STEPS.items():
        threshold = THRESHOLDS[key]
        now, then = threshold.now(config), threshold.now(wanted)
        if then != now and then is not None:
            name = key.replace(".", "_")
            args |= {name: then, f"{name}_stage": stage, f"{name}_reason": reason.value}
            terms.append(
                f"drop_stage = ${name}_stage AND drop_reason = ${name}_reason "
                f"AND {threshold.score} >= ${name}"
            )
    moved = []
    for key in _TEXT_KEYS:
        threshold = THRESHOLDS[key]
        now, then = threshold.now(config), threshold.now(wanted)
        assert now is not None and then is not None, "the text rules have a number for each"
        if (then < now) if threshold.is_least else (then > now):
            name = key.replace(".", "_")
            args |= {f"{name}_now": now, f"{name}_then": then}
            moved.append(f"({threshold.fails(f'{name}_now')} AND NOT {threshold.fails(f'{name}_then')})")
    if moved:
        args["reasons"] = _TEXT_REASONS
        upstream = []
        for key in ("min_iou", "min_verdict_margin"):  # a step before them may now drop what they dropped
            threshold = THRESHOLDS[key]
            now, then = threshold.now(config), threshold.now(wanted)
            if then is not None and then != now:
                name = key.replace(".", "_")
                args[name] = then
                upstream.append(f"NOT coalesce({threshold.fails(name)}, false)")
        where = " AND ".join(["drop_stage = 'clean_text'", "list_contains($reasons, drop_reason)", *upstream])
        terms.append(f"{where} AND ({' OR '.join(moved)})")
    return _with_space(" OR ".join(f"({term})" for term in terms), args)
