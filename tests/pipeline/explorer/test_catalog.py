"""Pages of a corpus hold what a plain reading of its ledgers holds, in order, each image once."""

import shutil

import pytest

from paracaption.pipeline.explorer.catalog import Catalog
from paracaption.pipeline.explorer.query import MEASURES, Query, format_number
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests.pipeline.explorer import corpus

QUERIES = {
    "everything": {},
    "a subset": {"subset": "sa1b"},
    "kept": {"outcome": "kept"},
    "dropped": {"outcome": "dropped"},
    "a reason": {"reason": "iou_low"},
    "a step": {"stage": "clean_text", "subset": "coconut"},
    "a word": {"text": "CHAIR"},
    "words": {"text": "red wooden"},
    "a phrase": {"text": '"red chair"'},
    "quotes and signs": {"text": "\"& 'x' % _"},
    "an attack": {"text": "<script>"},
    "a category": {"category": corpus.CATEGORY.upper()},
    "a range": {"iou.min": "0.3", "iou.max": "0.6"},
    "two ranges": {"num_words.max": "9", "area.min": "700"},
    "nothing": {"text": "nowhere to be found"},
}


def matches(row: dict, given: dict) -> bool:
    """The query in plain Python."""
    words = {
        "red wooden": ["red", "wooden"],
        '"red chair"': ["red chair"],
        "\"& 'x' % _": ['"&', "'x'", "%", "_"],
    }
    terms = words.get(given.get("text", ""), [given["text"]] if "text" in given else [])
    ranges = {name: float(value) for name, value in given.items() if "." in name}
    return all(
        [
            given.get("subset", row["subset"]) == row["subset"],
            given.get("outcome") != "kept" or row["kept"],
            given.get("outcome") != "dropped" or row["drop_reason"] is not None,
            given.get("reason", row["drop_reason"]) == row["drop_reason"],
            given.get("stage", row["drop_stage"]) == row["drop_stage"],
            all(term.lower() in (row["caption"] or "").lower() for term in terms),
            "category" not in given
            or (row["category"] or row["core_category"] or "").lower() == given["category"].lower(),
            *(
                row[name[:-4]] is not None
                and (row[name[:-4]] >= value if name.endswith("min") else row[name[:-4]] <= value)
                for name, value in ranges.items()
            ),
        ]
    )


def expected(out, given: dict) -> dict[tuple[str, str], list[dict]]:
    """Matching rows by image, in the corpus's order."""
    found: dict[tuple[str, str], list[dict]] = {}
    for subset in ("coconut", "sa1b"):
        for row in corpus.regions(out, subset):
            if matches(row, given):
                found.setdefault((subset, row["key"]), []).append(row)
    return found


def walk(catalog: Catalog, query: Query, limit: int = 7) -> list:
    """All pages forward; each page is also found backward from the next one."""
    pages = [catalog.page(query, limit=limit)]
    while pages[-1].after:
        edge = pages[-1].images[-1]
        place = catalog.find_place(edge.cursor)
        assert place is not None and place[:5] == (*edge[:4], 0)
        pages.append(catalog.page(query, after=place, limit=limit))
        back = catalog.page(query, before=catalog.find_place(pages[-1].images[0].cursor), limit=limit)
        assert back.images == pages[-2].images and back.before == (len(pages) > 2)
    return [place for page in pages for place in page.images]


@pytest.mark.parametrize("given", QUERIES.values(), ids=QUERIES)
@pytest.mark.soak(keep=5)
def test_pages_hold_what_the_ledgers_hold(catalog, out, given):
    query = Query.parse(given)
    wanted = expected(out, given)
    places = walk(catalog, query)
    assert [(place.subset, place.key) for place in places] == list(wanted)
    assert [place.num_regions for place in places] == [len(rows) for rows in wanted.values()]
    assert catalog.total(query) == (sum(len(rows) for rows in wanted.values()), len(wanted))
    shown = list(catalog.matching(places, query, 3))
    assert [[row["region"] for row in rows] for rows in shown] == [
        [row["region"] for row in rows[:3]] for rows in wanted.values()
    ]


@pytest.mark.parametrize("sort", ["iou", "-iou", "-num_words", "area", "verdict_margin"])
@pytest.mark.parametrize("ahead", [20, 0], ids=["kept ahead", "asked anew"])
@pytest.mark.soak(keep=2)
def test_an_order_by_a_score_goes_by_each_images_best_matching_region(catalog, out, monkeypatch, sort, ahead):
    from paracaption.pipeline.explorer import catalog as module

    monkeypatch.setattr(module, "_PAGES_AHEAD", ahead)
    query = Query.parse({"sort": sort, "outcome": "kept"})
    catalog._kept.clear()
    name, best = sort.removeprefix("-"), max if sort.startswith("-") else min
    ranks = {
        image: best(row[name] for row in rows if row[name] is not None)
        for image, rows in expected(out, {"outcome": "kept"}).items()
        if any(row[name] is not None for row in rows)
    }
    places = walk(catalog, query)
    assert [place.rank for place in places] == sorted(ranks.values(), reverse=best is max)
    assert {(place.subset, place.key): place.rank for place in places} == ranks


def test_an_image_is_found_by_its_key_with_all_its_rows(catalog, out):
    rows = catalog.image("sa1b", "sa_7")
    assert [row["region"] for row in rows] == list(range(9)) and rows[0]["rle_counts"]
    for subset, key in (("sa1b", "sa_700"), ("coconut", "sa_7"), ("../coconut", "sa_7"), ("sa1b", "../../x")):
        with pytest.raises(ConfigError, match="no such image"):
            catalog.image(subset, key)


def test_units_that_are_committed_later_are_seen_and_others_are_not(out, tmp_path):
    again = tmp_path / "out"
    shutil.copytree(out, again)
    shutil.rmtree(again / "log", ignore_errors=True)  # as in a corpus of an early release, manifests count
    manifest = again / "coconut/manifests/coconut-000001.json"
    data = manifest.read_bytes()
    manifest.unlink()
    catalog = Catalog(again)
    assert catalog.total(Query(subset="coconut"))[1] == 19 and catalog.counts("coconut").images == 19
    manifest.write_bytes(data)
    assert catalog.total(Query(subset="coconut"))[1] == 24 and catalog.counts("coconut").images == 24


def test_a_damaged_ledger_is_an_error_that_says_so(out, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/coconut/ledger/coconut-000000.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(IntegrityError, match="verify"):
        Catalog(tmp_path / "out").total(Query())


def test_ledgers_of_before_a_score_existed_are_read_with_the_others(out, tmp_path):
    import pyarrow.parquet as pq

    shutil.copytree(out, tmp_path / "out")
    for name in ("coconut-000000", "sa1b-000002"):
        path = tmp_path / f"out/{name.partition('-')[0]}/ledger/{name}.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["repeat_share"]), path)
    catalog = Catalog(tmp_path / "out")
    assert catalog.total(Query())[1] == 36
    assert 0 < catalog.total(Query.parse({"repeat_share.min": "0"}))[1] < 36
    key = pq.read_table(tmp_path / "out/coconut/ledger/coconut-000000.parquet")["key"][0].as_py()
    assert {row["repeat_share"] for row in catalog.image("coconut", key)} == {None}


def test_the_database_reads_nothing_outside_of_the_corpus(catalog, tmp_path):
    (tmp_path / "secret.csv").write_text("a\n1\n")
    import duckdb

    for sql in (
        f"SELECT * FROM read_csv('{tmp_path}/secret.csv')",
        "SET enable_external_access=true",
        "INSTALL httpfs",
    ):
        with pytest.raises(duckdb.Error):
            catalog._db.cursor().execute(sql)


@pytest.mark.parametrize(
    "given", [{"outcome": "x"}, {"sort": "key"}, {"iou.min": "nan"}, {"area.max": "1e999"}]
)
def test_what_is_no_query_is_refused(given):
    with pytest.raises(ConfigError):
        Query.parse(given)


@pytest.mark.parametrize(
    "cursor", ["x", "coconut-000000:0:k", "coconut-999999:0:k:0.0", "../x:0:k:0", "a:b:c:d"]
)
def test_what_is_no_place_is_refused(catalog, cursor):
    with pytest.raises(ConfigError):
        catalog.find_place(cursor)


def test_a_query_survives_its_own_address():
    from urllib.parse import parse_qsl

    given = {"text": 'a "b & c" +%', "subset": "sa1b", "iou.min": "0.1", "iou.max": "0.30000000000000004"}
    query = Query.parse({**given, "sort": "-area"})
    assert Query.parse(dict(parse_qsl(query.url()))) == query
    assert dict(parse_qsl(query.without("iou").url(after="1"))).keys() == {"text", "subset", "sort", "after"}
    assert format_number(3.0) == "3" and float(format_number(0.1 + 0.2)) == 0.1 + 0.2
    assert all(name.isidentifier() for name in MEASURES), "they become a part of SQL"


@pytest.mark.parametrize("sort", ["iou", "-iou"])
def test_the_region_that_gives_an_image_its_rank_is_the_first_on_its_card(catalog, sort):
    query = Query.parse({"subset": "sa1b", "sort": sort, "iou.min": "0.1"})
    places = catalog.page(query).images
    moved = 0
    for place, rows in zip(places, catalog.matching(places, query, 3), strict=True):
        assert rows[0]["measure"] == place.rank and len(rows) == min(3, place.num_regions)
        moved += rows[0]["region"] != min(row["region"] for row in rows)
    assert moved


def test_an_image_has_its_place_in_a_result_or_none(catalog):
    query = Query.parse({"outcome": "dropped", "sort": "-iou"})
    for place in catalog.page(query).images[:3]:
        assert catalog.place_of(query, place.subset, place.key) == place
    assert catalog.place_of(Query(text="nowhere to be found"), "sa1b", "sa_3") is None
