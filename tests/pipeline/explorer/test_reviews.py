"""Marks are kept beside the corpus, and precision follows from those whose decision still stands."""

import multiprocessing
import shutil
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.corpus import merge
from paracaption.pipeline.explorer import whatif
from paracaption.pipeline.explorer.catalog import Catalog
from paracaption.pipeline.explorer.reviews import Marks, wilson
from paracaption.schemas.errors import ConfigError
from tests.pipeline.explorer import corpus


@pytest.fixture
def copy(out, tmp_path):
    return shutil.copytree(out, tmp_path / "copy", ignore=shutil.ignore_patterns("review"))


def mark_some(out, numbers) -> None:
    marks = Marks(Catalog(out))
    for number in numbers:
        marks.set("sa1b", f"sa_{number}", 0, True)


@pytest.mark.parametrize(
    ("right", "marked", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (8, 10, 0.4902, 0.9433), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_is_wilsons(right, marked, low, high):
    """The last one is an example of Newcombe's (1998)."""
    assert wilson(right, marked) == pytest.approx((low, high), abs=5e-5)


def test_a_mark_is_a_row_of_a_parquet_beside_the_corpus(copy):
    marks = Marks(Catalog(copy))
    marks.set("coconut", "000000000001", 0, True)
    marks.set("coconut", "000000000001", 1, False)
    marks.set("coconut", "000000000001", 0, False)
    rows = pq.read_table(copy / "review" / "marks.parquet").to_pylist()
    assert [(row["key"], row["region"], row["right"]) for row in rows] == [
        ("000000000001", 0, False),
        ("000000000001", 1, False),
    ]
    assert rows[1]["decision"].count("/") == 1
    marks.set("coconut", "000000000001", 0, None)
    assert list(marks.of("coconut", "000000000001")) == [1]
    with pytest.raises(ConfigError, match="no region 99"):
        marks.set("coconut", "000000000001", 99, True)


def test_precision_is_by_decision_and_marks_of_a_changed_decision_are_void(copy, tmp_path):
    catalog = Catalog(copy)
    marks = Marks(catalog)
    rows = [row for row in corpus.regions(copy, "sa1b") if row["drop_reason"] == "iou_low"]
    turning = [row for row in rows if row["iou"] >= 0.3]
    for number, row in enumerate(rows):
        marks.set("sa1b", row["key"], row["region"], number % 4 != 0)
    [found], void = marks.precision()
    right = sum(number % 4 != 0 for number in range(len(rows)))
    assert found[:4] == ("sa1b", "agree_with_segmenter/iou_low", right, len(rows)) and void == 0
    assert found.low < found.share < found.high
    config = merge.read_config(copy)
    again = corpus.rebuilt(copy, tmp_path / "again", whatif.change_config(config, {"min_iou": 0.3}))
    [found], void = Marks(Catalog(again)).precision()
    assert void == len(turning) > 0 and found.marked == len(rows) - len(turning)


def test_review_walks_through_a_decision_in_random_order_without_what_is_marked(copy):
    marks = Marks(Catalog(copy))
    wanted = {(row["key"], row["region"]) for row in corpus.regions(copy, "sa1b") if row["kept"]}
    order = [marks.next_unmarked("sa1b", "kept", skip) for skip in range(len(wanted))]
    assert set(order) == wanted and order != sorted(wanted)
    assert marks.next_unmarked("sa1b", "kept", len(wanted)) is None
    key, region = order[0]
    marks.set("sa1b", key, region, True)
    assert marks.next_unmarked("sa1b", "kept") == order[1]


def test_two_explorers_and_many_threads_lose_no_mark(copy):
    parts = [range(0, 6), range(6, 12)]
    with multiprocessing.get_context("spawn").Pool(1) as other:
        waiting = other.apply_async(mark_some, (copy, parts[1]))
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda number: mark_some(copy, [number]), parts[0]))
        waiting.get(60)
    assert len(Marks(Catalog(copy)).read()) == 12
