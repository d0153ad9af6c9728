"""Damaged and older ledgers are a page that says so, never an error of the server."""

import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.context import Explorer
from paracaption.schemas.records import SCORES

PAGES = ("/browse", "/image/coconut/000000000000", "/", "/?distributions=1", "/whatif", "/review")
PAGES += ("/browse?sort=-iou", "/thumb/coconut/000000000000?r=1", "/total?text=a")


def statuses(out, pages=PAGES):
    client = TestClient(make_app(Explorer(out)), base_url="http://localhost")
    answers = {page: client.get(page) for page in pages}
    for page, answer in answers.items():
        if answer.status_code == 409:
            assert "This cannot be shown" in answer.text, page
            assert re.search("`paracaption (verify|build)", answer.text), answer.text[-500:]
    return {page: answer.status_code for page, answer in answers.items()}


@pytest.fixture
def copy(out, tmp_path):
    return shutil.copytree(out, tmp_path / "out")


def flip(path, places, copy, pages):
    data = path.read_bytes()
    found = set()
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        found |= set(statuses(copy, pages).values())
    path.write_bytes(data)
    return found


@pytest.mark.soak
def test_a_changed_byte_of_a_ledger_is_a_page_that_says_so(copy):
    path = copy / "coconut/ledger/coconut-000000.parquet"
    size = path.stat().st_size
    places = [*range(0, size, size // 6), size - 6, size - 300]
    assert flip(path, places, copy, PAGES[:2]) == {200, 409}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "places"),
    [("coconut/ledger/coconut-000000.parquet", 200), ("index.parquet", 200), ("config.yaml", 50)],
)
def test_any_changed_byte_is_a_page_that_says_so(copy, name, places):
    path = copy / name
    size = path.stat().st_size
    assert flip(path, range(0, size, size // places), copy, PAGES) <= {200, 404, 409}


def test_a_damaged_configuration_is_a_page_that_says_so(copy):
    (copy / "config.yaml").write_bytes(b"\x90" + (copy / "config.yaml").read_bytes())
    found = statuses(copy)
    assert found["/whatif"] == 409 and found["/thumb/coconut/000000000000?r=1"] == 200
    assert set(found.values()) <= {200, 409}


def test_ledgers_without_any_of_the_scores_are_shown(copy):
    for path in copy.glob("*/ledger/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.drop_columns([name for name in SCORES if name in table.column_names]), path)
    assert set(statuses(copy).values()) == {200}


def test_ledgers_of_another_kind_are_a_page_that_says_so(copy):
    for path in copy.glob("coconut/ledger/*.parquet"):
        table = pq.read_table(path)
        place = table.schema.get_field_index("rle_counts")
        numbers = pa.array([1 << 40] * table.num_rows)
        table = table.set_column(place, "rle_counts", numbers)
        pq.write_table(table.drop_columns(["image_width"]), path)
    found = statuses(copy)
    assert found["/image/coconut/000000000000"] == 409 and set(found.values()) <= {200, 409}


@pytest.mark.parametrize("size", [2**31 - 1, 50_000, 0, -5])
@pytest.mark.soak(keep=2)
def test_the_masks_of_a_ledger_are_drawn_only_if_they_have_no_more_pixels_than_a_photo(copy, size):
    import resource

    path = copy / "coconut/ledger/coconut-000000.parquet"
    table = pq.read_table(path)
    for name in ("image_width", "image_height"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array([size] * table.num_rows, pa.int32()))
    pq.write_table(table, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = statuses(copy, PAGES[:2])
    assert set(found.values()) <= {200, 409}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_a_ledger_that_is_gone_or_empty_is_a_page_that_says_so(copy):
    path = copy / "coconut/ledger/coconut-000001.parquet"
    path.write_bytes(b"")
    assert statuses(copy, ["/browse"]) == {"/browse": 409}
    path.unlink()
    assert statuses(copy, ["/browse"]) == {"/browse": 409}
