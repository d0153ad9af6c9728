"""The explorer shows of a corpus in a bucket what it shows of the same one in a folder."""

import contextlib
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from paracaption.pipeline.corpus import removal
from paracaption.pipeline.explorer import bucket_tables, reviews
from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.bucket_tables import CorpusFiles
from paracaption.pipeline.explorer.catalog import Catalog
from paracaption.pipeline.explorer.context import Explorer
from paracaption.pipeline.explorer.pages.image import REVIEWER
from paracaption.pipeline.explorer.query import Query
from paracaption.pipeline.io import bucket_versions
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests.pipeline.buckets.corpora import count, write

PAGES = [
    "/",
    "/?distributions",
    "/distributions/coconut",
    "/browse",
    "/browse?kept=kept&sort=-area",
    "/browse?decision=masks/too_small",
    "/browse?q=person&sort=num_words",
    "/total?sort=-area",
    "/image/coconut/000000000001",
    "/image/sa1b/sa_1",
    "/image/sa1b/nobody",
    "/photo/coconut/000000000002",
    "/thumb/coconut/000000000003?r=0,1",
    "/whatif",
    "/whatif?masks.min_area_px=2000",
    "/review?decision=kept",
    "/nowhere",
]


_SPEED = re.compile(r'^<tr><th scope="row">.*%</td>(<td class="num">[^<]*</td>){3}</tr>$', re.MULTILINE)
"""A row of the table of model stages."""


@pytest.fixture(scope="module")
def clients(pair):
    return [
        TestClient(make_app(Explorer(place)), base_url="http://localhost", cookies={REVIEWER: "ann"})
        for place in (pair.folder, pair.bucket)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_the_same(pair, clients, page):
    first, second = (client.get(page) for client in clients)
    assert (
        first.status_code == second.status_code == (404 if page.rpartition("/")[2].startswith("no") else 200)
    )
    if "html" not in first.headers["content-type"]:
        assert first.content == second.content
        return
    assert _steady(first.text, str(pair.folder)) == _steady(second.text, pair.bucket)


def _steady(text: str, out: str) -> str:
    return _SPEED.sub("", text.replace(out, "CORPUS"))


def test_turning_pages_asks_for_each_ledger_once(pair):
    catalog = Catalog(pair.bucket)
    first = catalog.page(Query.parse({}))
    with count(pair.server) as asked:
        again = catalog.page(Query.parse({"sort": "-area"}))
        found = list(catalog.matching(again.images, Query.parse({}), 4))
    assert len(first.images) == len(again.images) == len(found) == 11
    assert not [key for key in asked if "/ledger/" in key], asked


@pytest.mark.soak
def test_what_is_committed_later_is_shown(pair):
    changed = pair.copy("later")
    catalog = Catalog(changed.bucket)
    assert catalog.counts("coconut").images_dropped == {}
    removal.remove(changed.bucket, ["coconut/000000000002"])
    assert catalog.counts("coconut").images_dropped == {"removed": 1}
    with pytest.raises(ConfigError, match="no such image"):
        catalog.find_unit("coconut", "000000000099")


@pytest.mark.soak
def test_duckdb_reads_the_ledgers_of_the_corpus_and_nothing_else(pair, tmp_path):
    changed = pair.copy("guarded")
    catalog = Catalog(changed.bucket)
    secret = tmp_path / "secret.parquet"
    secret.write_bytes((pair.folder / "index.parquet").read_bytes())
    store_of(changed.bucket).put(f"{changed.bucket}/secret.parquet", secret.read_bytes())
    name = f"{bucket_tables.SCHEME}://secret.parquet"
    for path in (str(secret), name, f"{changed.bucket}/secret.parquet", f"{name[:-14]}*/ledger/*.parquet"):
        with pytest.raises(IntegrityError, match=r"disabled by configuration|No files found"):
            catalog.select(f"SELECT count(*) FROM read_parquet('{path}')")
    with pytest.raises(IntegrityError, match=r"is only read|cannot be|Cannot"):
        catalog.select(f"COPY (SELECT key FROM LEDGERS) TO '{bucket_tables.SCHEME}://new.csv'")
    assert catalog.select("SELECT count(*) FROM LEDGERS") == [(44,)]


@pytest.mark.soak
def test_a_ledger_that_is_gone_or_damaged_is_named(pair):
    changed = pair.copy("damaged")
    catalog = Catalog(changed.bucket)
    gone, damaged = (catalog.units()[number].ledger for number in (0, 1))
    store_of(gone).delete(gone)
    store_of(damaged).put(damaged, b"x" * 500)
    for number, said in ((0, f"no such object: '{gone}'"), (1, damaged.rpartition("/")[2])):
        with pytest.raises(IntegrityError, match=f"{re.escape(said)}.*paracaption verify"):
            catalog.select("SELECT sum(area) FROM LEDGERS", units=catalog.units()[number : number + 1])


@pytest.mark.soak
def test_two_reviewers_at_the_same_time_lose_nothing(pair, monkeypatch):
    changed = pair.copy("reviewed")
    monkeypatch.setattr(reviews, "_WRITING", contextlib.nullcontext())  # as in two processes
    own = {name: reviews.Reviews(Catalog(changed.bucket)) for name in ("ann", "bob", "cat")}
    failed = []

    def review(name: str) -> None:
        try:
            for region in range(4):
                own[name].save("coconut", "000000000001", region, region % 2 == 0, name)
        except (OSError, ValueError) as error:
            failed.append(error)

    threads = [threading.Thread(target=review, args=(name,)) for name in own]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed
    said = own["ann"].of_image("coconut", "000000000001")
    assert {region: {each.reviewer for each in found} for region, found in said.items()} == {
        region: set(own) for region in range(4)
    }
    own["bob"].save("coconut", "000000000001", 0, None, "bob")
    assert {each.reviewer for each in own["cat"].of_image("coconut", "000000000001")[0]} == {"ann", "cat"}
    precision, void = own["ann"].precision()
    assert sum(each.reviewed for each in precision) == 4 and void == 0
    left = [key for key in pair.server.objects("corpus", "reviewed/review/")]
    assert left == ["reviewed/review/marks.parquet"]


@pytest.mark.soak
def test_a_corpus_of_an_early_release_is_explored_where_it_was_uploaded(pair):
    for path in pair.folder.rglob("*"):
        name = path.relative_to(pair.folder).as_posix()
        if path.is_file() and not name.startswith(("log/", "beat/", ".replaced/", "events/")):
            write(pair.server, f"uploaded/{name}", path.read_bytes())
    catalog, same = Catalog("s3://corpus/uploaded"), Catalog(pair.folder)
    assert catalog.subsets() == same.subsets()
    assert [catalog.counts(name) for name in catalog.subsets()] == [same.counts(n) for n in same.subsets()]


def test_ledgers_that_threads_ask_for_at_the_same_time_may_all_be_read(monkeypatch):
    allowed, before = CorpusFiles("s3://corpus/out"), sys.getswitchinterval()
    names = [f"s3://corpus/out/{number}.parquet" for number in range(4000)]
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: allowed.allow([name]), names))
    finally:
        sys.setswitchinterval(before)
    assert all(allowed.exists(f"corpus://{number}.parquet") for number in range(len(names)))


@pytest.mark.soak(keep=1)
def test_an_old_version_is_not_put_over_a_new_one(bucket_out):
    url = f"{bucket_out}/review/marks.parquet"
    assert bucket_versions.read_version(url) == (b"", None)
    assert bucket_versions.put_version(url, b"first", None)
    assert not bucket_versions.put_version(url, b"late", None)
    data, version = bucket_versions.read_version(url)
    assert data == b"first" and bucket_versions.put_version(url, b"second", version)
    assert not bucket_versions.put_version(url, b"late", version)
    store_of(url).delete(url)
    assert not bucket_versions.put_version(url, b"late", version)
    assert bucket_versions.read_version(url) == (b"", None)
