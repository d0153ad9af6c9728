"""Odd answers of a model: a drop of their record, never a build that stops or pays again."""

from __future__ import annotations

import http.server
import json
import tarfile
import threading
from contextlib import contextmanager

import msgspec
import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.records import ImageRecord
from tests import odd_answers
from tests.building import build, calls, config_of, drops
from tests.synthetic import write_coconut, write_sa1b


def config_with(out, source, protocol: str, odd: list[str], **changes):
    """One odd backend of three, on SA-1B's recipe, which asks all three; it is asked image by image."""
    config = config_of(out, sa1b=source, **changes)
    backend = getattr(config, protocol)
    name = f"tests.odd_answers:Odd{protocol.capitalize()}"
    update = {"name": name, "options": {**backend.options, "odd": odd}, "batch_images": 1}
    return config.model_copy(update={protocol: backend.model_copy(update=update)})


def rows_of(out) -> list[dict]:
    return pq.read_table(sorted((out / "sa1b" / "ledger").glob("*.parquet"))).to_pylist()


FAIR = {*odd_answers.HARMLESS, *odd_answers.FAIR_LISTS, "margin of numpy", "margin nan", "margin infinite"}
FAIR |= {"size of numpy", "counts as bytes", "five thousand"}
"""What is taken as it is meant."""

OTHERWISE = {
    "captioner": {
        "half an emoji": "text_junk", "nul": "text_junk", "control": "text_junk",
        "refused": "photo_unreadable", "nothing": "caption_none", "empty": "caption_none",
    },
    "judge": {
        "half an emoji": "answer_invalid", "nul": "answer_invalid", "empty": "category_none",
        "refusal": "answer_invalid", "refused": "photo_unreadable",
    },
    "segmenter": {
        "none": "segmenter_none", "without a pixel": "segmenter_none", "refused": "photo_unreadable",
    },
}  # fmt: skip
"""The reason of a drop where it is no model error."""


@pytest.mark.parametrize("protocol", list(odd_answers.ODD))
@pytest.mark.soak(keep=2)
def test_each_odd_answer_costs_at_most_its_image_and_is_paid_for_once(tmp_path, protocol):
    names = list(odd_answers.ODD[protocol])
    source = write_sa1b(tmp_path / "sa1b", len(names), num_masks=2, size=(48, 64))
    out = tmp_path / "out"
    config = config_with(out, source, protocol, names, images_per_shard=1000)
    build(config)
    reasons: dict[int, set] = {}
    rows = rows_of(out)
    assert len(rows) == 2 * len(names)
    for row in rows:
        found = reasons.setdefault(int(row["key"].removeprefix("sa_")), set())
        found |= set() if row["kept"] else {row["drop_reason"]}
    wrong = {}
    for place, name in enumerate(names):
        wanted = set() if name in FAIR else {OTHERWISE[protocol].get(name, "model_error")}
        if reasons[place] != wanted:
            wrong[name] = reasons[place]
    assert not wrong
    logs = [tmp_path / f"{each}.log" for each in ("captioner", "judge", "segmenter")]
    asked = [calls(log) for log in logs]
    build(config)
    assert [calls(log) for log in logs] == asked


@pytest.mark.parametrize("protocol", list(odd_answers.ODD))
def test_a_backend_whose_every_answer_is_odd_fails_in_one_line_or_drops_all(tmp_path, protocol):
    source = write_sa1b(tmp_path / "sa1b", 2, num_masks=2, size=(48, 64))
    config = config_with(tmp_path / "out", source, protocol, ["no list"])
    build(config)
    assert {row["drop_reason"] for row in rows_of(tmp_path / "out")} == {"model_error"}


@contextmanager
def server_that_says(content: str):
    """An OpenAI-compatible server with one answer, and the requests it has had."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            choice = f'{{"message": {{"content": "{content}"}}, "finish_reason": "stop"}}'
            body = f'{{"choices": [{choice}]}}'.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def test_half_an_emoji_of_a_server_is_junk_of_its_region_and_asked_for_once(tmp_path):
    source = write_coconut(tmp_path / "source", 2, num_masks=2)
    with server_that_says("A smiling \\ud83d face on a round red ball.") as (url, asked):
        config = config_of(tmp_path / "out", coconut=source)
        openai = config.captioner.model_copy(
            update={"name": "openai", "options": {"model": "m", "base_url": url}}
        )
        config = config.model_copy(update={"captioner": openai})
        build(config)
        assert {reason for _, reason, _ in drops(tmp_path / "out", "coconut").values()} == {"text_junk"}
        assert len(asked) == 4
        build(config)
        assert len(asked) == 4


@pytest.fixture
def pairs(tmp_path):
    """SA-1B of two images in a folder; returns what changes the first one's record."""
    with tarfile.open(write_sa1b(tmp_path / "tars", 2, num_masks=3)["paths"][0]) as tar:
        tar.extractall(tmp_path / "pairs", filter="data")
    first = tmp_path / "pairs" / "sa_0.json"

    def change(how):
        record = json.loads(first.read_text())
        how(record)
        first.write_text(json.dumps(record))
        return tmp_path / "pairs"

    return change


@pytest.mark.parametrize("number", [2**31, 2**63, 2**64, -(2**63) - 1, 10**400])
@pytest.mark.soak(keep=3)
def test_an_id_that_no_column_holds_is_null_beside_one_that_is_missing(tmp_path, pairs, number):
    def change(record):
        record["annotations"][0]["id"] = number
        del record["annotations"][1]["id"]

    config = config_of(tmp_path / "out", sa1b={"paths": [str(pairs(change))]})
    source = open_source(config, "sa1b")
    read = [source.read(entry, config.limits) for entry in source.catalog()]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(read), type=list[ImageRecord]) == read
    build(config)
    ids = {(row["key"], row["region"]): row["source_id"] for row in rows_of(tmp_path / "out")}
    assert len(ids) == 6
    assert ids["sa_0", 0] == (number if number == 2**31 else None) and ids["sa_0", 1] is None


@pytest.mark.parametrize("number", [2**31, 2**63, 2**64, 10**400])
@pytest.mark.parametrize("photo", ["there", "missing", "broken"])
@pytest.mark.soak(keep=2)
def test_a_size_that_no_column_holds_is_one_images_drop(tmp_path, pairs, number, photo):
    folder = pairs(lambda record: record["image"].update(width=number))
    if photo == "missing":
        (folder / "sa_0.jpg").unlink()
    if photo == "broken":
        (folder / "sa_0.jpg").write_bytes(b"no photo")
    out = tmp_path / "out"
    build(config_of(out, sa1b={"paths": [str(folder)]}))
    rows = rows_of(out)
    assert {row["key"] for row in rows if row["kept"]} == {"sa_1"}
    wanted = {"there": "size_mismatch", "missing": "photo_missing", "broken": "photo_unreadable"}[photo]
    assert {row["drop_reason"] for row in rows if row["key"] == "sa_0"} == {wanted}


def test_an_exception_that_is_none_of_pythons_kinds_is_the_backends_and_no_builds_end(tmp_path, monkeypatch):
    class Odd(BaseException):  # as pytest's, trio's and asyncio's
        def __str__(self):
            raise Odd

    def caption(self, images):
        raise Odd

    monkeypatch.setattr("tests.backends.InstantCaptioner.caption", caption)
    config = config_of(tmp_path / "out", coconut=write_coconut(tmp_path / "source", 2))
    build(config)
    found = set(drops(tmp_path / "out", "coconut").values())
    assert {reason for _, reason, _ in found} == {"model_error"}
    assert all("the backend tried to end the process (Odd" in detail for _, _, detail in found)
