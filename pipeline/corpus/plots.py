"""The dataset card's pictures, drawn from the statistics alone: the same statistics give the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..io.figure import DECLARED, DROPPED, INK, KEPT, QUIET, draw_figure
from ..sources.registry import subset_title
from ..stages.registry import stage_title

if TYPE_CHECKING:
    from ...schemas.summary import CorpusSummary, FunnelStep, Histogram, SubsetSummary

NAMES = ("funnel.png", "caption_words.png", "regions_per_image.png", "mask_area.png")
"""The files that `draw_plots` draws."""

_SEVERAL = 60
"""Bins above which a histogram's are joined, so that bars stay wider than the gaps between them."""


def draw_plots(summary: CorpusSummary) -> dict[str, bytes]:
    """Draw every plot: funnel, caption lengths, regions per image, mask areas.

    Returns:
        PNG files by their names, which are those of `NAMES`. Equal statistics give equal bytes.
    """
    drawn = {
        "funnel": _draw_funnel,
        "caption_words": lambda s, axes: _draw_histogram(s.caption_words, None, axes, "words"),
        "regions_per_image": lambda s, axes: _draw_histogram(
            s.regions_per_image, s.regions_per_image_declared, axes, "regions"
        ),
        "mask_area": lambda s, axes: _draw_areas(s.area_px, s.area_px_declared, axes),
    }
    titles = {
        "funnel": "{}: regions left after each step",
        "caption_words": "{}: words per caption",
        "regions_per_image": "{}: regions per image",
        "mask_area": "{}: area of a mask in pixels",
    }
    return {
        f"{name}.png": _draw_panels(summary, draw, titles[name], tall=name == "funnel")
        for name, draw in drawn.items()
    }


def _draw_panels(
    summary: CorpusSummary, draw: Callable[[SubsetSummary, Any], None], title: str, tall: bool
) -> bytes:
    subsets = summary.subsets
    heights = [0.45 * len(s.counts.funnel) + 1.1 if tall else 2.7 for s in subsets.values()]
    panels = {title.format(subset_title(name)): partial(draw, subset) for name, subset in subsets.items()}
    return draw_figure(panels, heights)


def _draw_funnel(subset: SubsetSummary, axes: Any) -> None:
    steps = subset.counts.funnel
    total = max(1, subset.counts.regions)
    names = ["declared", *(step.stage for step in steps)]
    left = [subset.counts.regions, *(step.regions_in - step.dropped for step in steps)]
    dropped = [0, *(step.dropped for step in steps)]
    places = range(len(names))
    axes.barh(places, left, color=[DECLARED, *[KEPT] * len(steps)], height=0.62)
    axes.barh(places, dropped, left=left, color=DROPPED, height=0.62)
    axes.set_yticks(places, [stage_title(name) for name in names], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, total * 1.42)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["bottom", "left"]].set_visible(False)
    for place, kept, lost, step in zip(places, left, dropped, [None, *steps], strict=True):
        text = f"{kept:,}" if step is None else f"{kept:,}  ({kept / total:.0%})"
        axes.text(kept + lost + total * 0.012, place - (0.0 if not lost else 0.16), text, va="center")
        if lost and step is not None:
            axes.text(
                kept + lost + total * 0.012,
                place + 0.22,
                f"-{lost:,}  {_main_reasons(step)}",
                va="center",
                fontsize=7.5,
                color="#9A6700",
            )


def _main_reasons(step: FunnelStep) -> str:
    names = [reason.replace("_", " ") for reason in step.reasons]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _draw_histogram(kept: Histogram, declared: Histogram | None, axes: Any, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    shown = kept if declared is None or declared.total == 0 else declared
    if not shown.total:
        _nothing(axes)
        return
    last = shown.edges[-1]
    # The largest one in a thousand would squeeze all others into a corner.
    limit = max(shown.quantile(0.999), kept.quantile(0.999)) + 1
    width = max(1, -(-limit // _SEVERAL))
    if declared is not None:
        _bars(declared, width, limit, axes, DECLARED, f"declared (mean {declared.mean:.1f})")
    _bars(kept, width, limit, axes, KEPT, f"kept (mean {kept.mean:.1f})")
    axes.set_xlim(-0.5 if width == 1 else 0, limit + width)
    axes.set_xlabel(
        unit if last <= limit + width else f"{unit} (the largest 0.1% not shown, up to {last - 1:,})"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, "captions" if declared is None else "images")


def _bars(histogram: Histogram, width: int, limit: int, axes: Any, color: str, label: str) -> None:
    joined: dict[int, int] = {}
    for edge, count in zip(histogram.edges, histogram.counts, strict=False):
        if edge <= limit:
            joined[edge // width] = joined.get(edge // width, 0) + count
    shift = 0.0 if width == 1 else width / 2
    places = [place * width + shift for place in joined]
    axes.bar(places, list(joined.values()), width=width * 0.9, color=color, label=label)
    if color == DECLARED:  # its outline stays visible where the bars of what is kept are higher
        edges = [(place + (0.0 if width > 1 else -0.5)) * width for place in joined]
        axes.stairs(list(joined.values()), [*edges, edges[-1] + width], color=QUIET, linewidth=1, zorder=3)


def _draw_areas(kept: Histogram, declared: Histogram, axes: Any) -> None:
    if not declared.total:
        _nothing(axes)
        return
    for histogram, color, label in ((declared, DECLARED, "declared"), (kept, KEPT, "kept")):
        places = [edge.bit_length() - 1 for edge in histogram.edges[:-1]]
        text = f"{label} (mean {histogram.mean:,.0f} px)"
        axes.bar([place + 0.5 for place in places], histogram.counts, width=0.9, color=color, label=text)
    first, last = declared.edges[0].bit_length() - 1, declared.edges[-1].bit_length() - 1
    step = 1 if last - first <= 12 else 2
    axes.set_xticks(range(first, last + 1, step), [_pixels(1 << i) for i in range(first, last + 1, step)])
    axes.set_xlabel("pixels; each bar spans a factor of two")
    _finish(axes, "masks")


def _pixels(count: int) -> str:
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if count >= size:
            return f"{count // size}{unit}"
    return str(count)


def _finish(axes: Any, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_ylabel(unit)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", color="#EEEEEE")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, fontsize=8.5)


def _nothing(axes: Any) -> None:
    axes.text(0.5, 0.5, "no regions", ha="center", va="center", transform=axes.transAxes, color=QUIET)
    axes.set_xticks([])
    axes.set_yticks([])
