"""Distributions and curves as geometry, which the templates draw as SVG."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import NamedTuple

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError
from ..io import figure
from ..stages.recipes import recipe_of
from ..stages.registry import THRESHOLDS
from .catalog import Catalog
from .query import format_number

WIDTH, HEIGHT = 420, 150
"""Size of a chart's area in SVG units; its labels are outside."""

_BINS = 40


class Bin(NamedTuple):
    """How many regions (or images) have `low <= value < high`; the last bin includes `high`.

    `lost` are those of `kept`, and `gained` those of `dropped`, that other thresholds would move to the other
    side.
    """

    low: float
    high: float
    kept: int
    dropped: int
    lost: int = 0
    gained: int = 0


class Line(NamedTuple):
    """A threshold; `name` is "" if only the configuration's are shown, else "now" or "tried"."""

    key: str
    value: float
    name: str = ""


class Distribution(NamedTuple):
    """The distribution of a number over the regions of a subset that have it.

    Attributes:
        name: column of the ledger, or "regions_per_image".
        title: what people read, with the unit.
        bins: in order, without gaps.
        lines: the thresholds that decide on the number.
        octaves: whether each bin spans a factor of two.
    """

    name: str
    title: str
    bins: list[Bin]
    lines: list[Line]
    octaves: bool = False

    @property
    def total(self) -> int:
        return sum(each.kept + each.dropped for each in self.bins)


_SHOWN = {
    "num_words": ("words in a caption", ("text.min_words", "text.max_words")),
    "regions_per_image": ("regions of an image", ()),
    "area": ("mask area in pixels", ("masks.min_area_px",)),
    "iou": ("IoU with the segmenter's mask", ("min_iou",)),
    "verdict_margin": ("margin of the judge's verdict", ("min_verdict_margin",)),
    "repeat_share": ("share of repeated 4-grams", ("text.max_repeat_share",)),
}


def read_distributions(
    catalog: Catalog,
    subset: str,
    config: BuildConfig,
    tried: BuildConfig | None = None,
    moves: Mapping[str, Tally] | None = None,
) -> list[Distribution]:
    """The distributions of the numbers that a subset has, with the thresholds of `config`.

    Args:
        catalog: of the corpus.
        subset: one of its subsets.
        config: the present configuration.
        tried: another one, whose thresholds are shown next to the present ones.
        moves: (lost, gained) regions with `tried`, by column and by the bins of `BIN_COLUMNS`.
    """
    found = catalog.remember(("distributions", subset), lambda: _bins(catalog, subset))
    now = _deciding(config, subset)
    return [
        Distribution(
            name,
            title,
            _moved(found[name], name, (moves or {}).get(name, {})),
            _lines(now, keys) if tried is None else _both_lines(now, _deciding(tried, subset), keys),
            name == "area",
        )
        for name, (title, keys) in _SHOWN.items()
        if found.get(name)
    ]


def _deciding(config: BuildConfig, subset: str) -> Callable[[str], BuildConfig]:
    """The configuration that decides about a key for a subset: stages may have options of their own."""
    own: dict[str, BuildConfig] = {}
    with suppress(ConfigError):  # a recipe that only whoever built the corpus has
        own = {key: stage.config for stage in recipe_of(config, subset) for key in stage.sections}
    return lambda key: own.get(key.partition(".")[0], config)


def _lines(deciding: Callable[[str], BuildConfig], keys: Sequence[str], name: str = "") -> list[Line]:
    values = {
        key: deciding(key).masks.min_area_px
        if key == "masks.min_area_px"
        else THRESHOLDS[key].value(deciding(key))
        for key in keys
    }
    return [Line(key, value, name) for key, value in values.items() if value is not None]


def _both_lines(
    config: Callable[[str], BuildConfig], tried: Callable[[str], BuildConfig], keys: Sequence[str]
) -> list[Line]:
    """The present thresholds, and those that are tried where they differ."""
    now = _lines(config, keys, "now")
    same = {line[:2] for line in now}
    return now + [line for line in _lines(tried, keys, "tried") if line[:2] not in same]


def _moved(bins: list[Bin], name: str, moves: Tally) -> list[Bin]:
    """The bins with the regions that would change, which were counted in narrow bins."""
    lows = [each.low for each in bins]
    sides = [[0, 0] for _ in bins]
    for place, (lost, gained) in moves.items():
        low = 2.0**place if name == "area" else place * _FINE[name][1]
        side = sides[max(0, bisect_right(lows, low) - 1)]
        side[0] += lost
        side[1] += gained
    return [
        each._replace(lost=min(lost, each.kept), gained=min(gained, each.dropped))
        for each, (lost, gained) in zip(bins, sides, strict=True)
    ]


_FINE = {
    "num_words": ("num_words", 1.0),
    "area": ("log2(greatest(area, 1))", 1.0),
    "iou": ("iou * 40", 0.025),
    "repeat_share": ("repeat_share * 40", 0.025),
    "verdict_margin": ("4 * greatest(-1000, least(1000, verdict_margin))", 0.25),
}
"""Column -> the number of a narrow bin in SQL, and its width. Narrow bins are joined until they are few."""

_SHARES = ("iou", "repeat_share")

Tally = dict[int, tuple[int, int]]
"""(kept, dropped) by bin, or (lost, gained)."""

BIN_COLUMNS = {
    name: f"CASE WHEN isfinite({name}::DOUBLE) THEN floor({place})::INT END"
    for name, (place, _) in _FINE.items()
}
"""Column -> the number of a narrow bin as SQL, null where there is no number."""


def _bins(catalog: Catalog, subset: str) -> dict[str, list[Bin]]:
    """The bins of each number: one pass for the scores, and one for the images."""
    counted = ", ".join(f"histogram({column})" for column in BIN_COLUMNS.values())
    rows = catalog.select(f"SELECT kept, {counted} FROM LEDGERS GROUP BY kept", subset=subset)
    found: dict[str, list[Bin]] = {}
    for number, (name, (_, width)) in enumerate(_FINE.items(), 1):
        kept, dropped = (
            {place: n for row in rows if row[0] is side for place, n in (row[number] or {}).items()}
            for side in (True, False)
        )
        tally = {place: (kept.get(place, 0), dropped.get(place, 0)) for place in {*kept, *dropped}}
        if name in _SHARES and tally:
            ones = tally.pop(40, (0, 0))  # 1 itself is in the last bin
            last = tally.get(39, (0, 0))
            tally |= {0: tally.get(0, (0, 0)), 39: (last[0] + ones[0], last[1] + ones[1])}
        found[name] = _joined(tally, width) if name != "area" else _filled(tally, lambda i: 2.0**i)
    sql = """
        SELECT declared, count(*) FILTER (kept > 0), count(*) FILTER (kept = 0) FROM (
            SELECT count(region) AS declared, count(*) FILTER (kept) AS kept FROM LEDGERS GROUP BY key
        ) GROUP BY declared"""
    per_image = {declared: (kept, lost) for declared, kept, lost in catalog.select(sql, subset=subset)}
    found["regions_per_image"] = _joined(per_image, 1.0)
    return found


def _joined(tally: Tally, width: float) -> list[Bin]:
    """At most `_BINS` bins, which begin at 0 if no value is below."""
    if not tally:
        return []
    low = min(0, *tally)
    times = -(-(max(tally) + 1 - low) // _BINS)
    wide: Tally = {0: (0, 0)}
    for place, (kept, dropped) in tally.items():
        before = wide.get((place - low) // times, (0, 0))
        wide[(place - low) // times] = (before[0] + kept, before[1] + dropped)
    return _filled(wide, lambda i: (low + i * times) * width)


def _filled(tally: Tally, edge: Callable[[int], float]) -> list[Bin]:
    """Bins from the first to the last, with the empty ones between."""
    places = range(min(tally), max(tally) + 1) if tally else ()
    return [Bin(edge(i), edge(i + 1), *tally.get(i, (0, 0))) for i in places]


# Geometry.


class Bar(NamedTuple):
    """The rectangles of a bin, from below: those that stay kept, that change sides, that stay dropped."""

    x: float
    width: float
    kept_y: float
    kept_height: float
    moved_y: float
    moved_height: float
    dropped_y: float
    dropped_height: float
    tooltip: str


class Tick(NamedTuple):
    """A label at a place on the x axis."""

    x: float
    text: str


class Mark(NamedTuple):
    """A threshold in a chart.

    Attributes:
        x: its place.
        text: its label.
        name: as in `Line`.
        outside: it is beyond the values that occur: the label stands at that edge, without a line.
        row: of its label above the bars, from 0; labels in a row do not overlap.
        flipped: the label stands on the other side of the line than usual.
    """

    x: float
    text: str
    name: str = ""
    outside: bool = False
    row: int = 0
    flipped: bool = False

    @property
    def on_right(self) -> bool:
        """Whether the label stands right of the line, and not left."""
        return (self.x < WIDTH / 2) != self.flipped

    @property
    def y(self) -> int:
        """Of the label's baseline."""
        return -9 - _ROW * self.row


class Chart(NamedTuple):
    """A drawn distribution.

    Attributes:
        title: what people read.
        description: for those who cannot see it.
        bars, ticks, lines: its parts; a line is a threshold.
        most: the count that is as high as the area.
    """

    title: str
    description: str
    bars: list[Bar]
    ticks: list[Tick]
    lines: list[Mark]
    most: int

    @property
    def top(self) -> int:
        """Room above the area, for the labels."""
        return 20 + _ROW * max((mark.row for mark in self.lines), default=0)


def draw_chart(distribution: Distribution) -> Chart:
    """Bars, ticks, and the lines of the thresholds that are within the picture."""
    bins = distribution.bins
    most = max(each.kept + each.dropped for each in bins)
    noun = "images" if distribution.name == "regions_per_image" else "regions"
    width = WIDTH / len(bins)
    bars = [
        _bar(each, number * width, width, HEIGHT / most, _span(each, distribution.octaves), noun)
        for number, each in enumerate(bins)
    ]
    every = max(1, round(len(bins) / 5))
    edges = [*(each.low for each in bins), bins[-1].high]
    ticks = [Tick(i * width, _short(edges[i])) for i in range(0, len(edges), every)]
    lines = _in_rows([mark for line in distribution.lines if (mark := _mark(distribution, line))], most)
    total = distribution.total
    kept, moving = sum(each.kept for each in bins), sum(each.lost + each.gained for each in bins)
    ends = f"from {_short(edges[0])} to {_short(edges[-1])}"
    description = f"{distribution.title}: {total:,} {noun}, {kept:,} of them kept, {ends}"
    if moving:
        description += f"; {moving:,} would change"
    return Chart(distribution.title, description, bars, ticks, lines, most)


def _bar(each: Bin, x: float, width: float, scale: float, span: str, noun: str) -> Bar:
    moving = each.lost + each.gained
    kept, moved, dropped = (
        scale * count for count in (each.kept - each.lost, moving, each.dropped - each.gained)
    )
    tooltip = f"{span}: {each.kept:,} {noun} kept, {each.dropped:,} dropped"
    if moving:
        tooltip += f"; {each.lost:,} would be lost, {each.gained:,} gained"
    return Bar(
        x,
        max(1.0, width - 1),
        kept_y=HEIGHT - kept,
        kept_height=kept,
        moved_y=HEIGHT - kept - moved,
        moved_height=moved,
        dropped_y=HEIGHT - kept - moved - dropped,
        dropped_height=dropped,
        tooltip=tooltip,
    )


def _span(each: Bin, octaves: bool) -> str:
    """The values of a bin in words."""
    if each.high - each.low == 1 and each.low >= 0 and not octaves:
        return format_number(each.low)
    return f"{_short(each.low)} to {_short(each.high)}"


def _mark(distribution: Distribution, line: Line) -> Mark | None:
    """A threshold's line; if it is not within the picture, a label that says on which side, or nothing."""
    bins = distribution.bins
    text = f"{line.key} = {format_number(line.value)}" + (f" ({line.name})" if line.name else "")
    if bins[0].low <= line.value <= bins[-1].high:
        return Mark(_place(bins, line.value, distribution.octaves) * WIDTH, text, line.name)
    if not line.name:
        return None
    if line.value < bins[0].low:
        return Mark(0.0, f"\N{LEFTWARDS ARROW} {text}", line.name, True)
    return Mark(float(WIDTH), f"{text} \N{RIGHTWARDS ARROW}", line.name, True)


_ROW, _LETTER = 14, 6.2
"""Height of a row of labels, and width of a letter in them on average, in SVG units."""


def _in_rows(marks: list[Mark], most: int) -> list[Mark]:
    """The marks with their labels in rows: no label lies on another, on a line, or on the number `most`.

    Two lines whose labels stand toward each other may be too close for that in any row; then labels change
    sides, as few as possible. If there is no such arrangement at all, labels lie on lines.
    """
    for flipped in sorted(product((False, True), repeat=len(marks)), key=sum):
        turned = [mark._replace(flipped=flip) for mark, flip in zip(marks, flipped, strict=True)]
        if found := _try_rows(turned, most):
            return found
    return _try_rows(marks, most, whole=False)


def _try_rows(marks: list[Mark], most: int, whole: bool = True) -> list[Mark]:
    """The marks in rows; none if that is not possible, or with labels on lines if it need not be `whole`."""
    placed: list[tuple[Mark, float, float]] = []
    # A line reaches from its label down, so those go up whose labels lie over the others' lines.
    for mark in sorted(marks, key=lambda mark: (not mark.on_right, -mark.x if mark.on_right else mark.x)):
        width = _LETTER * len(mark.text) + 8
        low = mark.x if mark.on_right else mark.x - width
        if mark.flipped and not 0 <= low <= WIDTH - width:
            return []
        first = int(low + width > WIDTH - _LETTER * len(f"{most:,}"))
        rows = range(first, first + len(marks) + 1)  # a higher one has no label that is not below it
        free = (
            row for row in rows if not any(_collide(mark, low, low + width, row, *other) for other in placed)
        )
        row = next(free, None)
        if row is None and whole:
            return []
        placed.append((mark._replace(row=rows[-1] if row is None else row), low, low + width))
    return [mark for mark, _, _ in sorted(placed)]


def _collide(
    mark: Mark, low: float, high: float, row: int, other: Mark, other_low: float, other_high: float
) -> bool:
    labels = row == other.row and low < other_high and other_low < high
    on_line = not other.outside and row <= other.row and low < other.x < high
    below_line = not mark.outside and other.row <= row and other_low < mark.x < other_high
    return labels or on_line or below_line


def _place(bins: list[Bin], value: float, octaves: bool) -> float:
    low, high = bins[0].low, bins[-1].high
    if octaves:
        return math.log2(max(value, 1) / low) / math.log2(high / low)
    return (value - low) / (high - low)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


class Curve(NamedTuple):
    """Lines over the steps of a run.

    Attributes:
        title: what people read, with the unit.
        series: (name, color, SVG points) of each line.
        low, high: the ends of the value axis.
        first, last: the ends of the step axis.
        description: for those who cannot see it.
    """

    title: str
    series: list[tuple[str, str, str]]
    low: str
    high: str
    first: str
    last: str
    description: str


def draw_curve(
    title: str, series: dict[str, tuple[list[float], list[float]]], log: bool = False
) -> Curve | None:
    """Draw some series over steps; None if they hold no number.

    Args:
        title: with the unit.
        series: (steps, values) by name; the names are shown in the legend.
        log: whether the axis is logarithmic; values that are not above 0 are then left out.
    """
    clean = {
        name: [
            (step, value)
            for step, value in zip(*pair, strict=True)
            if math.isfinite(value) and (value > 0 or not log)
        ]
        for name, pair in series.items()
    }
    points = [point for pairs in clean.values() for point in pairs]
    if not points:
        return None
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    scaled = math.log if log else float
    spread = (scaled(high) - scaled(low)) or 1.0
    drawn = []
    for number, (name, pairs) in enumerate(clean.items()):
        across = (WIDTH * (step - first) / ((last - first) or 1) for step, _ in pairs)
        down = (HEIGHT * (1 - (scaled(value) - scaled(low)) / spread) for _, value in pairs)
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
        drawn.append((name, CURVES[number % len(CURVES)], places))
    ends = ", ".join(f"{name} {pairs[-1][1]:.4g}" for name, pairs in clean.items() if pairs)
    description = f"{title}, steps {first:,.0f} to {last:,.0f}; last: {ends}"
    return Curve(title, drawn, _short(low), _short(high), f"{first:,.0f}", f"{last:,.0f}", description)


CURVES = (figure.KEPT, "#D55E00", "#009E73", "#CC79A7", "#555555", "#56B4E9")
"""Colors of curves, which color-blind people can tell apart too."""
