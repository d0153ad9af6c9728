"""What other thresholds would keep: counted from stored scores, decided by the stages' own code.

The thresholds are those that the stages declare. A region that is kept now would be dropped if one of its
scores fails; that takes one pass over the scores. A region that is dropped now may be kept, and then the
stages after the one that dropped it decide too: filter stages are run on its caption. The thresholds of masks
are not here, because they decide which regions reach the captioner, and what it would say about others is not
known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError
from ...schemas.recipe import stages_in
from ...schemas.records import ImageRecord, Region
from ..stages.base import FilterStage, ModelStage, Stage, Threshold
from ..stages.options import places_of
from ..stages.recipes import entries_of, recipe_of
from ..stages.registry import THRESHOLDS, known_stage
from .catalog import Catalog
from .charts import BIN_COLUMNS, Tally
from .query import format_number

_SPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))
_MOST_READ = 20_000
"""Captions that are run through the filters at once, about 2 s; of more, this many are a sample."""
_EXAMPLES = 6


class Change(NamedTuple):
    """What another configuration does to a subset.

    Attributes:
        kept: regions now.
        lost, gained: regions that are kept now and not then, and the other way round.
        checked: captions that were run through the filters.
        candidates: captions that would have to be; if more, `gained` is an estimate from `checked` of them.
        moves: (lost, gained) by column and by the bins of `charts.BIN_COLUMNS`; estimated where `gained` is.
    """

    kept: int
    lost: int
    gained: int
    checked: int
    candidates: int
    moves: dict[str, Tally]

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
    """A region that changes sides; `side` is "lost" or "gained"."""

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
            raise ConfigError(f"{key[:40]!r}: not a threshold; choose from {', '.join(THRESHOLDS)}")
        if not math.isfinite(value):
            raise ConfigError(f"{key}: {value} is not a number")
        whole = THRESHOLDS[key].bounds[2] == 1
        first, _, rest = key.partition(".")
        place, name = (changed[first], rest) if rest else (changed, first)
        place[name] = round(value) if whole else value
    try:
        return BuildConfig.model_validate(changed)
    except ValueError as error:
        raise ConfigError(str(error)[:300]) from error


def changed_lines(config: BuildConfig, wanted: BuildConfig) -> str:
    """YAML of the thresholds that differ, to copy into the build's file; "" if none does."""
    top, inner = [], []
    for key, threshold in THRESHOLDS.items():
        value = threshold.value(wanted)
        if value is not None and value != threshold.value(config):
            name = key.partition(".")[2]
            (inner if name else top).append(f"{name or key}: {format_number(value)}")
    return "\n".join([*top, *(["text:"] if inner else []), *(f"  {line}" for line in inner)])


def why_not(config: BuildConfig, subset: str) -> str:
    """Why the stored scores of a subset do not say what other thresholds would keep; "" if they do.

    They do not where its stages are not known: it may have left the configuration since it was built, or have
    a stage of the user's own. Nor where two stages write one score, where a vote or a fallback decides, or
    where a caption was replaced after it was decided about.
    """
    try:
        recipe = recipe_of(config, subset)
    except ConfigError:
        return "it is no longer in the configuration, or its recipe has a stage of your own"
    deciding = [stage for stage in recipe if stage.thresholds]
    if inside := next((stage for stage in deciding if stage.within is not None), None):
        return f"`{inside.name}` is in a vote or a fallback, which decides by more than its threshold"
    writers: dict[str, str] = {}
    for stage in deciding:
        for score in stage.scores:
            if score in writers:
                return f"`{writers[score]}` and `{stage.name}` write the same score, so one of them is lost"
            writers[score] = stage.name
    first = ""
    for stage in recipe:
        if stage.thresholds and "caption" in stage.needs:
            first = first or stage.name
        if first and "caption" in stage.gives:
            return f"`{stage.name}` writes other captions than those that `{first}` has decided about"
    return ""


def set_by_recipe(config: BuildConfig, subset: str) -> list[str]:
    """The thresholds that a subset's recipe sets for itself: those of the configuration do not change it."""
    found = []
    for entry in stages_in(entries_of(config, subset)):
        if (stage := known_stage(entry.kind)) is not None:
            places = places_of(stage)
            found += [".".join(places[name]) for name in entry.options if name in places]
    return [key for key in THRESHOLDS if key in found]


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
    recipe = recipe_of(wanted, subset)
    now = {stage.name: stage.config for stage in recipe_of(config, subset)}
    failing = _failing(recipe, now)
    moves: dict[str, Tally] = {name: {} for name in BIN_COLUMNS}
    if not failing.sql or not kept:
        lost, examples = 0, []
    else:
        chosen = f"FROM LEDGERS WHERE kept AND ({failing.sql})"
        counted = ", ".join(f"histogram({column})" for column in BIN_COLUMNS.values())
        [(lost, *found)] = catalog.select(f"SELECT count(*), {counted} {chosen}", failing.args, subset)
        for name, bins in zip(BIN_COLUMNS, found, strict=True):
            moves[name] = {place: (number, 0) for place, number in (bins or {}).items()}
        rows = catalog.select(f"SELECT {_SHOWN} {chosen} {_ORDER} LIMIT {_EXAMPLES}", failing.args, subset)
        examples = [Example("lost", subset, *row) for row in rows]
    passing = _may_pass(recipe, now)
    if not passing.sql or not catalog.units(subset):
        return Change(kept, lost, 0, 0, 0, moves), examples
    chosen = f"FROM LEDGERS WHERE NOT kept AND caption IS NOT NULL AND ({passing.sql})"
    [(candidates,)] = catalog.select(f"SELECT count(*) {chosen}", passing.args, subset)
    limit = candidates if exact else _MOST_READ
    columns = ", ".join(BIN_COLUMNS.values())
    sql = f"SELECT {_SHOWN}, confidence, {columns} {chosen} {_ORDER} LIMIT {limit:d}"
    rows = catalog.select(sql, passing.args, subset)
    passed = [row for row in rows if _passes_filters(recipe, row[3], row[4])]
    times = candidates / max(1, len(rows))
    for column, name in enumerate(BIN_COLUMNS, 5):  # after the four of _SHOWN and the confidence
        for place, number in Counter(row[column] for row in passed).items():
            if place is not None:
                moves[name][place] = (moves[name].get(place, (0, 0))[0], round(number * times))
    gained = round(len(passed) * times)
    examples += [Example("gained", subset, *row[:4]) for row in passed[:_EXAMPLES]]
    return Change(kept, lost, gained, len(rows), candidates, moves), examples


def contradicts(catalog: Catalog, subset: str, config: BuildConfig) -> bool:
    """Whether units were built with other thresholds than the configuration has: then no count is right.

    Some region is kept that the configuration drops, or dropped by a model's threshold that it passes.
    """
    found = _Condition()
    terms = []
    for stage in recipe_of(config, subset):
        for threshold in stage.thresholds:
            now = threshold.value(stage.config)
            if now is not None:
                terms.append(f"kept AND {found.fails(threshold, now)}")
                if isinstance(stage, ModelStage):
                    terms.append(f"{found.dropped_by(stage, threshold)} AND {found.passes(threshold, now)}")
    sql = f"SELECT 1 FROM LEDGERS WHERE {' OR '.join(terms)} LIMIT 1"
    name = ("contradicts", sql, tuple(found.args.items()), subset)
    return bool(catalog.remember(name, lambda: catalog.select(sql, found.args, subset)))


_SHOWN = "key, region, coalesce(category, core_category, ''), caption"
_ORDER = "ORDER BY hash(key, region), key, region"


class _Condition:
    """A condition on a row of the ledger, as SQL, and its parameters."""

    def __init__(self) -> None:
        self.sql = ""
        self.args: dict[str, Any] = {}

    def fails(self, threshold: Threshold, value: float) -> str:
        """True of a score beyond the threshold; null without a score."""
        return f"{self._score(threshold)} {'<' if threshold.is_least else '>'} {self._bind(value)}"

    def passes(self, threshold: Threshold, value: float) -> str:
        """True of a score within the threshold; null without a score."""
        return f"{self._score(threshold)} {'>=' if threshold.is_least else '<='} {self._bind(value)}"

    def dropped_by(self, stage: Stage, threshold: Threshold) -> str:
        """True of a region that the stage dropped for the threshold's reason."""
        return f"drop_stage = {self._bind(stage.name)} AND drop_reason = {self._bind(threshold.reason.value)}"

    def _score(self, threshold: Threshold) -> str:
        if "$space" in threshold.score:
            self.args["space"] = _SPACE
        return threshold.score

    def _bind(self, value: Any) -> str:
        name = f"value_{len(self.args)}"
        self.args[name] = value
        return f"${name}"


def _failing(recipe: list[Stage], before: Mapping[str, BuildConfig]) -> _Condition:
    """True of kept regions that a changed threshold would drop."""
    found = _Condition()
    changed = [each for stage in recipe for each in _changed(stage, before)]
    found.sql = " OR ".join(f"coalesce({found.fails(*each)}, false)" for each in changed)
    return found


def _may_pass(recipe: list[Stage], before: Mapping[str, BuildConfig]) -> _Condition:
    """True of dropped regions that might be kept: their stage would let them pass, and models before it too.

    Whether the filters let them pass, the filters themselves say. A region that was dropped before a later
    model stage does not count: what that model would say is not known.
    """
    found = _Condition()
    terms = []
    for number, stage in enumerate(recipe):
        if any(isinstance(later, ModelStage) for later in recipe[number + 1 :]):
            continue
        for threshold, then in _changed(stage, before):
            now = threshold.value(before[stage.name])
            looser = now is None or (then < now if threshold.is_least else then > now)
            if looser:
                parts = [found.dropped_by(stage, threshold), found.passes(threshold, then)]
                if now is not None:
                    parts.append(found.fails(threshold, now))
                for earlier in recipe[:number]:
                    if isinstance(earlier, ModelStage):
                        changed = _changed(earlier, before)
                        parts += [f"NOT coalesce({found.fails(*each)}, false)" for each in changed]
                terms.append(f"({' AND '.join(parts)})")
    found.sql = " OR ".join(terms)
    return found


def _changed(stage: Stage, before: Mapping[str, BuildConfig]) -> list[tuple[Threshold, float]]:
    """The thresholds of a stage of the wanted recipe that differ, with their wanted values."""
    config, wanted = before[stage.name], stage.config
    values = [(each, each.value(config), each.value(wanted)) for each in stage.thresholds]
    return [(each, then) for each, now, then in values if then is not None and then != now]


def _passes_filters(recipe: list[Stage], caption: str, confidence: float | None) -> bool:
    """Whether the filter stages that look at captions keep one, of which its captioner is so sure."""
    scores = {} if confidence is None else {"confidence": confidence}
    region = Region(0, None, caption=caption, scores=scores)
    image = ImageRecord("", "", None, 0, 0, regions=[region])
    for stage in recipe:
        if isinstance(stage, FilterStage) and stage.thresholds:
            stage.run(image)
    return region.drop is None
