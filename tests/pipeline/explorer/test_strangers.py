"""A stranger's corpus leads no reader out of its folder: forty and more hostile ones are read in each way."""

import io
import os
import shutil
import socket
from contextlib import suppress

import pytest
from PIL import Image
from starlette.testclient import TestClient

from paracaption.pipeline.corpus import contact_sheet, export, inspect, merge, plots, verify
from paracaption.pipeline.corpus.status import Watcher
from paracaption.pipeline.explorer import report
from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.context import Explorer
from paracaption.pipeline.io import confined
from paracaption.schemas.errors import IntegrityError, ParaCaptionError
from tests.pipeline.explorer import strangers
from tests.pipeline.explorer.strangers import COLOR, CORPORA, DROPPED, KEPT

PAGES = ["/", "/browse", "/whatif", "/review", "/browse?outcome=dropped", "/browse?sort=iou"]
PAGES += [f"/{kind}/coconut/{key}" for kind in ("image", "photo", "thumb") for key in (KEPT, DROPPED)]


@pytest.fixture
def nobody():
    """A server that nobody may ask."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        strangers.listen_at(listening.getsockname()[1])
        yield listening


def look(out, flags=None):
    """Every page; the colors in the middle of the pictures among them."""
    colors = []
    try:
        client = TestClient(make_app(Explorer(out, **(flags or {}))), base_url="http://localhost")
    except ParaCaptionError:
        return colors
    for page in PAGES:
        answer = client.get(page)
        assert answer.status_code in (200, 404, 409), (page, answer.status_code)
        if answer.headers["content-type"] == "image/jpeg":
            picture = Image.open(io.BytesIO(answer.content)).convert("RGB")
            colors.append(picture.getpixel((picture.width // 2, picture.height // 2)))
    review = {"subset": "coconut", "key": KEPT, "region": "1", "right": "right"}
    assert client.post("/marks", data=review).status_code < 500
    return colors


def is_private(color):
    return all(abs(a - b) < 12 for a, b in zip(color, COLOR, strict=True))


def really(event, path):
    """Where a path leads; renaming and deleting take a link itself."""
    if event in ("os.rename", "os.remove"):
        return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return os.path.realpath(path)


def read_in_every_way(out, to):
    colors = look(out)
    with suppress(ParaCaptionError):
        report.write_report(out)
    for kind in export.FORMATS:
        with suppress(ParaCaptionError):
            export.export(out, kind, to / kind)
    with suppress(ParaCaptionError):
        inspect.inspect(out)
    with suppress(ParaCaptionError):
        contact_sheet.draw_contact_sheet(out, to / "sheet.png", 4)
    with suppress(ParaCaptionError):
        contact_sheet.draw_corpus_image(out, f"coconut/{KEPT}", to / "image.png")
    with suppress(ParaCaptionError):
        merge.merge(out)
    with suppress(ParaCaptionError):
        verify.verify(out)
    with suppress(ParaCaptionError):
        Watcher(str(out)).read()
    return colors


def test_there_are_forty_hostile_corpora():
    assert len(CORPORA) >= 40 and set(QUICK) <= set(CORPORA)


QUICK = ["ledger_names_shard_by_dots", "work_list_names_photo_by_an_absolute_path"]
QUICK += ["work_list_names_photo_by_a_url", "manifest_names_shard_elsewhere", "sample_with_a_path_as_key"]
QUICK += ["link_as_coconut_shards", "link_as_coconut_evidence", "link_as_plots", "pipe_as_ledger"]


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.soak) for each in CORPORA]
)
@pytest.mark.soak(keep=1)
def test_nothing_is_opened_that_is_not_the_corpus_s(
    out, tmp_path, tmp_path_factory, nobody, name, monkeypatch
):
    monkeypatch.setattr(plots, "draw_plots", lambda _: dict.fromkeys(plots.NAMES, b""))  # takes seconds
    work, outside, to = (tmp_path / each for each in ("out", "outside", "to"))
    shutil.copytree(out, work)
    to.mkdir()
    strangers.lay_out(outside, work)
    CORPORA[name](work, outside)
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    with strangers.watched(outside) as seen:
        colors = read_in_every_way(work, to)
    assert not [color for color in colors if is_private(color)]
    ours = [os.path.realpath(each) for each in (work, to)]
    base = os.path.realpath(tmp_path_factory.getbasetemp())
    reals = {(event, really(event, path)) for event, path in seen if event != "socket.connect"}
    assert not [
        each for each in reals if confined.is_below(each[1], base) and not confined.is_below(each[1], *ours)
    ]
    assert not [each for each in seen if each[0] in ("inotify", "socket.connect") or "/dev/zero" in each[1]]
    with pytest.raises(BlockingIOError):
        nobody.accept()
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "outside", "to"]


def test_the_watch_sees_what_python_and_what_a_library_opens(tmp_path, out):
    import duckdb

    strangers.lay_out(tmp_path / "outside", out)
    path = tmp_path / "outside" / "ledger.parquet"
    with strangers.watched(tmp_path / "outside") as seen:
        duckdb.connect().execute(f"SELECT count(*) FROM '{path}'").fetchall()
    assert "inotify" in dict(seen)
    with strangers.watched(tmp_path / "outside") as seen:
        path.read_bytes()
    assert ("open", str(path)) in seen


@pytest.mark.soak
def test_photos_outside_of_the_corpus_are_shown_only_with_the_flag(out, tmp_path):
    work, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(out, work)
    strangers.lay_out(outside, work)
    CORPORA["work_list_names_photo_by_an_absolute_path"](work, outside)
    assert not any(map(is_private, look(work)))
    assert any(map(is_private, look(work, {"outside": True})))
    answer = TestClient(make_app(Explorer(work)), base_url="http://localhost").get(
        f"/photo/coconut/{DROPPED}"
    )
    assert "--photos-outside" in answer.text


@pytest.mark.soak
def test_urls_are_fetched_only_with_their_flag(out, tmp_path, nobody, monkeypatch):
    from paracaption.pipeline.io import http_files

    asked = []
    work, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(out, work)
    strangers.lay_out(outside, work)
    CORPORA["work_list_names_photo_by_a_url"](work, outside)
    photo = (outside / "private.png").read_bytes()
    monkeypatch.setattr(http_files.HttpFiles, "read", lambda _, url, *__: asked.append(url) or photo)
    look(work, {"outside": True})
    assert not asked
    assert any(map(is_private, look(work, {"urls": True}))) and asked


def test_a_link_of_ones_own_is_followed_if_the_environment_says_so(out, tmp_path, monkeypatch):
    work, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(out, work)
    (work / "coconut/shards").rename(elsewhere)
    (work / "coconut/shards").symlink_to(elsewhere)
    with pytest.raises(IntegrityError, match=f"{confined.FOLLOW_LINKS}=1"):
        export.export(work, "coco", tmp_path / "refused")
    monkeypatch.setenv(confined.FOLLOW_LINKS, "1")
    assert export.export(work, "coco", tmp_path / "exported")


def test_a_snapshot_in_hugging_face_s_cache_is_read_though_all_its_files_are_links(out, tmp_path):
    snapshot, blobs = tmp_path / "datasets--me--corpus/snapshots/abc", tmp_path / "datasets--me--corpus/blobs"
    shutil.copytree(out, snapshot)
    blobs.mkdir()
    for number, path in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert export.export(snapshot, "coco", tmp_path / "exported")
    assert len(look(snapshot)) > 0


_SEEN = ("manifest_", "shard_", "pipe_", "link_as_coconut")
SEEN_BY_VERIFY = [name for name in CORPORA if name.startswith(_SEEN)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["link_as_coconut_shards", "manifest_names_shard_elsewhere", "pipe_as_ledger"]
)
@pytest.mark.soak
def test_the_processes_of_verify_are_confined_as_it_is(out, tmp_path, name):
    work, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(out, work)
    strangers.lay_out(outside, work)
    CORPORA[name](work, outside)
    with strangers.watched(outside) as seen:
        report = verify.verify(work, workers=2)
    assert not report.ok
    assert not [each for each in seen if each[0] == "inotify"]


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.soak) for each in SEEN_BY_VERIFY]
)
@pytest.mark.soak(keep=1)
def test_verify_says_what_leads_out_of_a_corpus_and_does_not_follow_it(out, tmp_path, name):
    work, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(out, work)
    strangers.lay_out(outside, work)
    CORPORA[name](work, outside)
    try:
        found = [str(each) for each in verify.verify(work).problems]
    except ParaCaptionError as error:
        found = [str(error)]
    assert found and not any("\n" in each or "Traceback" in each for each in found)
