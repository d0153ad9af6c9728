"""Reviews are kept beside the corpus, and precision follows from those whose decision still stands."""

import errno
import fcntl
import html
import multiprocessing
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.corpus import reader
from paracaption.pipeline.explorer import whatif
from paracaption.pipeline.explorer.catalog import Catalog
from paracaption.pipeline.explorer.reviews import Review, Reviews, _encode, wilson
from paracaption.schemas.errors import ConfigError
from tests.pipeline.explorer import corpus


@pytest.fixture
def copy(out, tmp_path):
    return shutil.copytree(out, tmp_path / "copy", ignore=shutil.ignore_patterns("review"))


def review_some(out, numbers) -> None:
    reviews = Reviews(Catalog(out))
    for number in numbers:
        reviews.save("sa1b", f"sa_{number}", 0, True)


def next_of(reviews: Reviews, reviewer: str = "") -> tuple[str, int]:
    """The region of sa1b's kept ones that a reviewer is shown next."""
    found = reviews.next_unreviewed("sa1b", "kept", reviewer=reviewer)
    assert found is not None
    return found


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


@pytest.mark.soak
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
    reviews.save("sa1b", *next_of(reviews), True)
    assert next_of(reviews) == order[1]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_reviews_are_saved_where_there_are_no_file_locks(copy, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    reviews = Reviews(Catalog(copy))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda region: reviews.save("coconut", "000000000001", region, True), [0, 1]))
    assert sorted(reviews.of_image("coconut", "000000000001")) == [0, 1]


@pytest.mark.soak
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
    first = next_of(reviews, "Ada")
    reviews.save("sa1b", *first, True, "Ada")
    assert next_of(reviews, "Ada") != first
    assert next_of(reviews, "Ben") == first
    reviews.save("sa1b", *first, False, "Ben")
    said = {each.reviewer: each.right for each in reviews.of_image("sa1b", first[0])[first[1]]}
    assert said == {"Ada": True, "Ben": False}
    [found], _ = reviews.precision()
    assert (found.right, found.reviewed, found.disputed) == (0, 1, 1)
    reviews.save("sa1b", *first, True, "Cyd")
    assert reviews.precision()[0][0].right == 1


def test_reviews_of_before_reviewers_had_names_are_read_and_count_for_everyone(copy):
    reviews = Reviews(Catalog(copy))
    first = next_of(reviews)
    reviews.save("sa1b", *first, True)
    path = copy / "review" / "marks.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["reviewer"]), path)
    assert [each.reviewer for each in reviews.read_all()] == [""]
    assert next_of(reviews, "Ada") != first


def client_of(copy, name: str = ""):
    from starlette.testclient import TestClient

    from paracaption.pipeline.explorer.app import make_app
    from paracaption.pipeline.explorer.context import Explorer

    client = TestClient(make_app(Explorer(copy)), base_url="http://localhost")
    if name:
        client.post("/reviewer", data={"name": name})
    return client


def order_of(copy, reviewer: str = "", number: int = 4) -> list[tuple[str, int]]:
    """The first regions that the Review page shows of sa1b's kept ones."""
    reviews = Reviews(Catalog(copy))
    found = [reviews.next_unreviewed("sa1b", "kept", skip, reviewer) for skip in range(number)]
    return [each for each in found if each is not None]


def is_shown(page: str, place: tuple[str, int]) -> bool:
    form = page.partition('class="reviews"')[2].partition("</form>")[0]
    return f'name="key" value="{place[0]}"' in form and f'name="region" value="{place[1]}"' in form


def taken_back(page: str) -> dict[str, str]:
    """What the button sends that takes the last review back."""
    form = page.partition('class="actions undo"')[2].partition("</form>")[0]
    return dict(re.findall(r'name="(\w+)" value="([^"]*)"', form))


def test_the_last_review_can_be_taken_back_and_its_region_is_shown_again(copy):
    client, reviews = client_of(copy, "Ada"), Reviews(Catalog(copy))
    first, second, third, _ = order_of(copy)
    assert not taken_back(client.get("/review?subset=sa1b").text), "nothing to take back"
    page = ""
    for key, region in (first, second):
        data = {"subset": "sa1b", "key": key, "region": region, "right": "wrong", "back": "kept"}
        page = client.post("/marks", data=data).text
    assert is_shown(page, third)
    for place in (second, first):
        assert (taken_back(page)["key"], taken_back(page)["region"]) == (place[0], str(place[1]))
        page = client.post("/marks", data=taken_back(page)).text
        assert is_shown(page, place) and 'aria-pressed="true"' not in page
        assert place not in [each[1:3] for each in reviews.read_all()]
    assert reviews.read_all() == [] and not taken_back(page)
    page = client.get(html.unescape(page.split('rel="next" href="')[1].partition('"')[0])).text
    assert is_shown(page, second), "skipping goes on after the region that came back"


def test_a_review_that_is_taken_back_is_ones_own_and_what_was_skipped_stays_skipped(copy):
    reviews = Reviews(Catalog(copy))
    first, _, third, fourth = order_of(copy)
    reviews.save("sa1b", *first, True, "Ben")
    client = client_of(copy, "Ada")
    assert not taken_back(client.get("/review?subset=sa1b").text)
    data = {
        "subset": "sa1b",
        "key": third[0],
        "region": third[1],
        "right": "right",
        "back": "kept",
        "skip": "2",
    }
    page = client.post("/marks", data=data).text
    assert is_shown(page, fourth)
    page = client.post("/marks", data=taken_back(page)).text
    assert is_shown(page, third) and "2 skipped" in page
    assert [each.reviewer for each in reviews.read_all()] == ["Ben"]


def test_a_review_made_on_the_image_page_can_be_taken_back_too_and_leads_to_its_decision(copy):
    client = client_of(copy, "Ada")
    row = next(row for row in corpus.regions(copy, "coconut") if row["drop_reason"] == "text_too_short")
    data = {"subset": "coconut", "key": row["key"], "region": row["region"], "right": "wrong"}
    assert client.post("/marks", data=data).status_code == 204
    page = client.post("/marks", data=taken_back(client.get("/review?subset=sa1b&skip=3").text)).text
    assert is_shown(page, (row["key"], row["region"])) and "skipped;" not in page
    assert 'value="clean_text/text_too_short" selected' in page


def test_a_region_that_is_asked_for_is_shown_with_its_review_and_can_be_reviewed_anew(copy):
    client = client_of(copy, "Ada")
    key, region = order_of(copy)[0]
    data = {"subset": "sa1b", "key": key, "region": region, "right": "wrong", "back": "kept"}
    page = client.post("/marks", data=data).text
    assert not is_shown(page, (key, region))
    page = client.get(f"/review?subset=sa1b&decision=kept&key={key}&region={region}").text
    assert is_shown(page, (key, region)) and 'value="wrong" aria-pressed="true"' in page
    client.post("/marks", data=data | {"right": "right"})
    assert [each.right for each in Reviews(Catalog(copy)).read_all()] == [True]
    assert client.get(f"/review?subset=sa1b&key={key}&region=999").status_code == 404
    assert client.get("/review?subset=sa1b&key=nowhere&region=0").status_code == 404


def test_what_a_rebuild_has_removed_cannot_be_taken_back(copy):
    reviews = Reviews(Catalog(copy))
    there = order_of(copy)[0]
    reviews.save("sa1b", *there, True, "Ada")
    gone = Review("sa1b", "gone", 0, "kept", True, 9e9, "Ada")
    Path(str(reviews.path)).write_bytes(_encode([gone, *reviews.read_all()]))
    last = reviews.last_of("Ada")
    assert last is not None and last[1:3] == there and reviews.last_of("Ben") is None


def test_two_browsers_are_two_reviewers_and_what_one_skips_does_not_come_back(copy):
    order = order_of(copy)
    for right in ("right", "wrong"):
        client = client_of(copy)
        client.get("/review?subset=sa1b")
        key, region = order[2]
        data = {"subset": "sa1b", "key": key, "region": region, "right": right, "back": "kept", "skip": "2"}
        page = client.post("/marks", data=data).text
        assert f'name="key" value="{order[3][0]}"' in page and "2 skipped" in page
    saved = Reviews(Catalog(copy)).read_all()
    assert [each.right for each in saved].count(True) == 1 and len({each.reviewer for each in saved}) == 2
