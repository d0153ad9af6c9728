"""Reviews are kept beside the corpus, and precision follows from those whose decision still stands."""

import errno
import fcntl
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.corpus import reader
from paracaption.pipeline.explorer import whatif
from paracaption.pipeline.explorer.catalog import Catalog
from paracaption.pipeline.explorer.reviews import Reviews, wilson
from paracaption.schemas.errors import ConfigError
from tests.pipeline.explorer import corpus


@pytest.fixture
def copy(out, tmp_path):
    return shutil.copytree(out, tmp_path / "copy", ignore=shutil.ignore_patterns("review"))


def review_some(out, numbers) -> None:
    reviews = Reviews(Catalog(out))
    for number in numbers:
        reviews.save("sa1b", f"sa_{number}", 0, True)


@pytest.mark.parametrize(
    ("right", "reviewed", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (8, 10, 0.4902, 0.9433), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_is_wilsons(right, reviewed, low, high):
    """The last one is an example of Newcombe's (1998)."""
    assert wilson(right, reviewed) == pytest.approx((low, high), abs=5e-5)


def test_a_review_is_a_row_of_a_parquet_beside_the_corpus(copy):
    reviews = Reviews(Catalog(copy))
    reviews.save("coconut", "000000000001", 0, True)
    reviews.save("coconut", "000000000001", 1, False)
    reviews.save("coconut", "000000000001", 0, False)
    rows = pq.read_table(copy / "review" / "marks.parquet").to_pylist()
    assert [(row["key"], row["region"], row["right"]) for row in rows] == [
        ("000000000001", 0, False),
        ("000000000001", 1, False),
    ]
    assert rows[1]["decision"].count("/") == 1
    reviews.save("coconut", "000000000001", 0, None)
    assert list(reviews.of_image("coconut", "000000000001")) == [1]
    with pytest.raises(ConfigError, match="no region 99"):
        reviews.save("coconut", "000000000001", 99, True)


def test_precision_is_by_decision_and_reviews_of_a_changed_decision_are_void(copy, tmp_path):
    catalog = Catalog(copy)
    reviews = Reviews(catalog)
    rows = [row for row in corpus.regions(copy, "sa1b") if row["drop_reason"] == "iou_low"]
    turning = [row for row in rows if row["iou"] >= 0.3]
    for number, row in enumerate(rows):
        reviews.save("sa1b", row["key"], row["region"], number % 4 != 0)
    [found], void = reviews.precision()
    right = sum(number % 4 != 0 for number in range(len(rows)))
    assert found[:4] == ("sa1b", "agree_with_segmenter/iou_low", right, len(rows)) and void == 0
    assert found.low < found.share < found.high
    config = reader.read_config(copy)
    again = corpus.rebuilt(copy, tmp_path / "again", whatif.change_config(config, {"min_iou": 0.3}))
    [found], void = Reviews(Catalog(again)).precision()
    assert void == len(turning) > 0 and found.reviewed == len(rows) - len(turning)


def test_review_walks_through_a_decision_in_random_order_without_what_is_reviewed(copy):
    reviews = Reviews(Catalog(copy))
    wanted = {(row["key"], row["region"]) for row in corpus.regions(copy, "sa1b") if row["kept"]}
    order = [reviews.next_unreviewed("sa1b", "kept", skip) for skip in range(len(wanted))]
    assert set(order) == wanted and order != sorted(wanted)
    assert reviews.next_unreviewed("sa1b", "kept", len(wanted)) is None
    key, region = order[0]
    reviews.save("sa1b", key, region, True)
    assert reviews.next_unreviewed("sa1b", "kept") == order[1]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_reviews_are_saved_where_there_are_no_file_locks(copy, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    reviews = Reviews(Catalog(copy))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda region: reviews.save("coconut", "000000000001", region, True), [0, 1]))
    assert sorted(reviews.of_image("coconut", "000000000001")) == [0, 1]


def test_two_explorers_and_many_threads_lose_no_review(copy):
    parts = [range(0, 6), range(6, 12)]
    with multiprocessing.get_context("spawn").Pool(1) as other:
        waiting = other.apply_async(review_some, (copy, parts[1]))
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda number: review_some(copy, [number]), parts[0]))
        waiting.get(60)
    assert len(Reviews(Catalog(copy)).read_all()) == 12


def test_two_people_review_the_same_region_and_both_are_kept_with_their_names(copy):
    reviews = Reviews(Catalog(copy))
    first = reviews.next_unreviewed("sa1b", "kept", reviewer="Ada")
    reviews.save("sa1b", *first, True, "Ada")
    assert reviews.next_unreviewed("sa1b", "kept", reviewer="Ada") != first
    assert reviews.next_unreviewed("sa1b", "kept", reviewer="Ben") == first
    reviews.save("sa1b", *first, False, "Ben")
    said = {each.reviewer: each.right for each in reviews.of_image("sa1b", first[0])[first[1]]}
    assert said == {"Ada": True, "Ben": False}
    [found], _ = reviews.precision()
    assert (found.right, found.reviewed, found.disputed) == (0, 1, 1)
    reviews.save("sa1b", *first, True, "Cyd")
    assert reviews.precision()[0][0].right == 1


def test_reviews_of_before_reviewers_had_names_are_read_and_count_for_everyone(copy):
    reviews = Reviews(Catalog(copy))
    first = reviews.next_unreviewed("sa1b", "kept")
    reviews.save("sa1b", *first, True)
    path = copy / "review" / "marks.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["reviewer"]), path)
    assert [each.reviewer for each in reviews.read_all()] == [""]
    assert reviews.next_unreviewed("sa1b", "kept", reviewer="Ada") != first


def test_two_browsers_are_two_reviewers_and_what_one_skips_does_not_come_back(copy):
    from starlette.testclient import TestClient

    from paracaption.pipeline.explorer.app import make_app
    from paracaption.pipeline.explorer.context import Explorer

    explorer = Explorer(copy)
    order = [explorer.reviews.next_unreviewed("sa1b", "kept", number) for number in range(4)]
    app = make_app(explorer)
    for right in ("right", "wrong"):
        client = TestClient(app, base_url="http://localhost")
        client.get("/review?subset=sa1b")
        key, region = order[2]
        data = {"subset": "sa1b", "key": key, "region": region, "right": right, "back": "kept", "skip": "2"}
        page = client.post("/marks", data=data).text
        assert f'name="key" value="{order[3][0]}"' in page and "2 skipped" in page
    saved = explorer.reviews.read_all()
    assert [each.right for each in saved].count(True) == 1 and len({each.reviewer for each in saved}) == 2
