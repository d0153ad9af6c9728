"""The numbers of the charts are those that the corpus's statistics have."""

import pytest

from paracaption.pipeline.corpus import reader
from paracaption.pipeline.explorer import charts, whatif
from tests.pipeline.explorer import corpus


@pytest.mark.parametrize("subset", ["coconut", "sa1b"])
def test_distributions_count_what_the_statistics_count(catalog, out, subset):
    summary = reader.read_summary(out).subsets[subset]
    shown = {each.name: each for each in charts.read_distributions(catalog, subset, reader.read_config(out))}
    for name, histogram in (("num_words", summary.caption_words), ("area", summary.area_px)):
        exact = list(zip(histogram.edges, histogram.counts, strict=False))
        for low, high, kept, *_ in shown[name].bins:
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
        for low, high, kept, dropped, *_ in shown[name].bins[:-1] if name in shown else []:
            assert kept + dropped == sum(low <= value < high for value in values), (name, low)


def test_active_thresholds_are_drawn_where_they_are(catalog, out):
    config = reader.read_config(out)
    shown = {each.name: each for each in charts.read_distributions(catalog, "sa1b", config)}
    [line] = charts.draw_chart(shown["iou"]).lines
    assert line.text == "min_iou = 0.5" and line.x == pytest.approx(0.5 * charts.WIDTH)
    bars = charts.draw_chart(shown["iou"]).bars
    assert max(bar.kept_height + bar.dropped_height for bar in bars) == pytest.approx(charts.HEIGHT)
    assert not any(bar.moved_height for bar in bars)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("iou", {"min_iou": 0.75}),
        ("iou", {"min_iou": 0.2}),
        ("iou", {"min_iou": 0.7, "text.min_words": 1, "text.min_chars": 0}),
        ("num_words", {"text.min_words": 9}),
        ("num_words", {"text.min_words": 2, "text.min_chars": 3}),
        ("repeat_share", {"text.max_repeat_share": 0.9}),
    ],
)
@pytest.mark.soak
def test_bars_show_how_many_of_their_regions_another_threshold_would_move(
    catalog, out, tmp_path, name, values
):
    """Counted from a corpus that is built again."""
    config = reader.read_config(out)
    wanted = whatif.change_config(config, values)
    again = corpus.rebuilt(out, tmp_path / "again", wanted)
    change, _ = whatif.compare(catalog, "sa1b", config, wanted)
    read = charts.read_distributions(catalog, "sa1b", config, wanted, change.moves)
    [shown] = [each for each in read if each.name == name]
    after = {(row["key"], row["region"]): row["kept"] for row in corpus.regions(again, "sa1b")}
    rows = [row for row in corpus.regions(out, "sa1b") if row[name] is not None]
    assert sum(each.lost + each.gained for each in shown.bins) > 0
    for each in shown.bins:
        last = each is shown.bins[-1]
        inside = [
            row for row in rows if each.low <= row[name] < each.high or (last and row[name] == each.high)
        ]
        stays = [after[row["key"], row["region"]] for row in inside]
        lost = sum(row["kept"] and not then for row, then in zip(inside, stays, strict=True))
        gained = sum(then and not row["kept"] for row, then in zip(inside, stays, strict=True))
        assert (each.lost, each.gained) == (lost, gained), each
    for bar, each in zip(charts.draw_chart(shown).bars, shown.bins, strict=True):
        scale = charts.HEIGHT / max(each.kept + each.dropped for each in shown.bins)
        assert bar.moved_height == pytest.approx(scale * (each.lost + each.gained))
        assert bar.kept_height == pytest.approx(scale * (each.kept - each.lost))
        assert bar.moved_y + bar.moved_height == pytest.approx(bar.kept_y)
        assert bar.dropped_y + bar.dropped_height == pytest.approx(bar.moved_y)


def test_no_bar_left_of_a_tried_threshold_is_painted_kept(catalog, out):
    config = reader.read_config(out)
    wanted = whatif.change_config(config, {"min_iou": 0.75})
    change, _ = whatif.compare(catalog, "sa1b", config, wanted)
    read = charts.read_distributions(catalog, "sa1b", config, wanted, change.moves)
    [shown] = [each for each in read if each.name == "iou"]
    drawn = charts.draw_chart(shown)
    left = [bar for bar in drawn.bars if bar.x + bar.width <= 0.75 * charts.WIDTH]
    assert any(bar.moved_height for bar in left) and not any(bar.kept_height for bar in left)
    assert "would change" in drawn.description and any("would be lost" in bar.tooltip for bar in left)


def test_thresholds_now_and_tried_are_both_drawn_and_say_which_they_are(catalog, out):
    config = reader.read_config(out)
    wanted = whatif.change_config(config, {"min_iou": 0.75, "text.max_words": 8})
    read = charts.read_distributions(catalog, "sa1b", config, wanted)
    shown = {each.name: charts.draw_chart(each).lines for each in read}
    assert [(mark.text, mark.x / charts.WIDTH) for mark in shown["iou"]] == [
        ("min_iou = 0.5 (now)", pytest.approx(0.5)),
        ("min_iou = 0.75 (tried)", pytest.approx(0.75)),
    ]
    words = {mark.text: mark for mark in shown["num_words"]}
    assert "text.max_words = 8 (tried)" in words and "text.min_words = 5 (tried)" not in words
    [now] = [mark for text, mark in words.items() if text.startswith("text.max_words") and "(now)" in text]
    assert now.outside and now.x == charts.WIDTH and now.text.endswith("→"), "beyond the longest caption"


@pytest.mark.parametrize("key", ["min_iou", "text.max_repeat_share"])
def test_labels_of_a_threshold_now_and_tried_find_their_places_wherever_the_lines_are(key):
    for now in range(0, charts.WIDTH + 1, 20):
        for tried in range(0, charts.WIDTH + 1, 20):
            texts = f"{key} = 0.45 (now)", f"{key} = 0.55 (tried)"
            marks = [charts.Mark(float(x), text) for x, text in zip((now, tried), texts, strict=True)]
            found = charts._in_rows(marks, 1_000)
            assert sorted(mark.text for mark in found) == sorted(texts)
            for mark in found:
                (other,) = (each for each in found if each.text != mark.text)
                width = charts._LETTER * len(mark.text) + 8
                low = mark.x if mark.on_right else mark.x - width
                on_line = mark.row <= other.row and low < other.x < low + width
                assert mark.row <= 3 and not (key == "min_iou" and on_line), (now, tried)


def test_a_curve_leaves_out_what_cannot_be_drawn():
    drawn = charts.draw_curve(
        "loss", {"a": ([1, 2, 3], [4.0, float("nan"), 1.0]), "b": ([1.0], [-1.0])}, log=True
    )
    assert drawn is not None and drawn.series[0][2].count(",") == 2 and drawn.series[1][2] == ""
    assert charts.draw_curve("loss", {"a": ([], [])}) is None
