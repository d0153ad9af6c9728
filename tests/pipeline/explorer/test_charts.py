"""The numbers of the charts are those that the corpus's statistics have."""

import pytest

from paracaption.pipeline.corpus import reader
from paracaption.pipeline.explorer import charts
from tests.pipeline.explorer import corpus


@pytest.mark.parametrize("subset", ["coconut", "sa1b"])
def test_distributions_count_what_the_statistics_count(catalog, out, subset):
    summary = reader.read_summary(out).subsets[subset]
    shown = {each.name: each for each in charts.read_distributions(catalog, subset, reader.read_config(out))}
    for name, histogram in (("num_words", summary.caption_words), ("area", summary.area_px)):
        exact = list(zip(histogram.edges, histogram.counts, strict=False))
        for low, high, kept, _ in shown[name].bins:
            assert kept == sum(count for edge, count in exact if low <= edge < high), (name, low)
        assert sum(each.kept for each in shown[name].bins) == summary.counts.kept
    declared = {each.low: each.kept + each.dropped for each in shown["regions_per_image"].bins}
    histogram = summary.regions_per_image_declared
    for edge, count in zip(histogram.edges, histogram.counts, strict=False):
        assert declared.get(float(edge), 0) == count or edge == 0
    rows = corpus.regions(out, subset)
    for name in ("iou", "verdict_margin", "repeat_share"):
        values = [row[name] for row in rows if row[name] is not None]
        assert (shown[name].total if name in shown else 0) == len(values)
        for low, high, kept, dropped in shown[name].bins[:-1] if name in shown else []:
            assert kept + dropped == sum(low <= value < high for value in values), (name, low)


def test_active_thresholds_are_drawn_where_they_are(catalog, out):
    config = reader.read_config(out)
    shown = {each.name: each for each in charts.read_distributions(catalog, "sa1b", config)}
    [line] = charts.draw_chart(shown["iou"]).lines
    assert line.text == "min_iou 0.5" and line.x == pytest.approx(0.5 * charts.WIDTH)
    bars = charts.draw_chart(shown["iou"]).bars
    assert max(bar.kept_height + bar.dropped_height for bar in bars) == pytest.approx(charts.HEIGHT)


def test_a_curve_leaves_out_what_cannot_be_drawn():
    drawn = charts.draw_curve(
        "loss", {"a": ([1, 2, 3], [4.0, float("nan"), 1.0]), "b": ([1.0], [-1.0])}, log=True
    )
    assert drawn is not None and drawn.series[0][2].count(",") == 2 and drawn.series[1][2] == ""
    assert charts.draw_curve("loss", {"a": ([], [])}) is None
