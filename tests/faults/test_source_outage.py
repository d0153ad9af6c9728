"""A source that fails is no verdict: what is away is held back, what is bad is dropped, all of it heals."""

import errno
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import reader, verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io import failures, files
from paracaption.pipeline.io.backends import LocalFiles
from paracaption.schemas.errors import ConfigError, ParaCaptionError, UnitsHeldBack
from paracaption.schemas.reasons import Reason
from tests import backends
from tests.building import build, calls, committed, config_of
from tests.file_server import serving
from tests.synthetic import write_coconut, write_sa1b

KINDS = ["coconut", "sa1b folder", "sa1b tar"]


def write_source(kind: str, root: Path, num_images: int = 8) -> dict:
    """A source of this kind, as `config_of` takes it."""
    if kind == "coconut":
        return {"coconut": write_coconut(root, num_images)}
    root.mkdir(parents=True)
    made = write_sa1b(root / "made", num_images)
    if kind == "sa1b tar":
        return {"sa1b": made}
    for path in made["paths"]:
        with tarfile.open(path) as tar:
            tar.extractall(root / "pairs", filter="data")
    return {"sa1b": {"paths": [str(root / "pairs")]}}


def config_for(tmp_path: Path, kind: str = "coconut", **changes):
    source = write_source(kind, tmp_path / "src")
    return config_of(tmp_path / "out", **source, images_per_shard=2, **changes)


def after(units: int, do: Callable[[], object]):
    """For `on_progress`: does something once, when that many units are committed."""
    done = []

    def look(progress) -> None:
        if progress.done == units and not done:
            done.append(do())

    return look


def manifests(out: Path) -> list:
    return [manifest for _, manifest in reader.Corpus(out).manifests()]


def counts(out: Path) -> list[tuple[int, int]]:
    return [(each.kept, each.regions_in) for each in manifests(out)]


def move_away(tmp_path: Path) -> None:
    os.rename(tmp_path / "src", tmp_path / "away")


def unmount(tmp_path: Path) -> None:
    """Where it was mounted, there is an empty folder now."""
    move_away(tmp_path)
    (tmp_path / "src").mkdir()
    for path in (tmp_path / "away").iterdir():
        if path.is_dir():
            (tmp_path / "src" / path.name).mkdir()


def come_back(tmp_path: Path) -> None:
    for folder in sorted((tmp_path / "src").rglob("*"), reverse=True) if (tmp_path / "src").exists() else []:
        folder.rmdir()
    if (tmp_path / "src").exists():
        (tmp_path / "src").rmdir()
    os.rename(tmp_path / "away", tmp_path / "src")


@pytest.mark.parametrize("gone", [move_away, unmount])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.soak(keep=3)
def test_a_source_that_goes_away_in_mid_build_is_not_committed_and_heals_by_itself(tmp_path, kind, gone):
    config = config_for(tmp_path, kind)
    with pytest.raises(
        UnitsHeldBack, match=r"3 units in a row are held back, last .*Run the same command"
    ) as told:
        build(config, on_progress=after(1, lambda: gone(tmp_path)))
    assert "\n" not in str(told.value)
    assert len(manifests(tmp_path / "out")) == 1
    assert not [path for path in (tmp_path / "out").rglob(".tmp-*")]
    come_back(tmp_path)
    build(config)
    whole = config.model_copy(update={"out": str(tmp_path / "whole")})
    build(whole)
    assert committed(tmp_path / "out") == committed(tmp_path / "whole")


@pytest.mark.soak
def test_other_units_go_on_and_the_build_ends_with_what_is_held_back(tmp_path):
    config = config_for(tmp_path)
    label = tmp_path / "src/labels/000000000002.png"

    class Bad(LocalFiles):
        def read(self, url, start=0, length=None):
            if url.endswith(("2.png", "3.png")):
                raise OSError(errno.EIO, "Input/output error", url)
            return super().read(url, start, length)

    files.register("file", Bad())
    try:
        with pytest.raises(
            UnitsHeldBack, match=r"1 unit is held back, last coconut-000001: 2 of 2 images .*2 not answered"
        ):
            driver.build(config, LocalEngine())
    finally:
        files.register("file", LocalFiles())
    assert label.exists() and [unit.name[-1] for unit in reader.Corpus(tmp_path / "out").units()] == [
        "0",
        "2",
        "3",
    ]
    assert reader.read_summary(tmp_path / "out").kept == 24
    summary = driver.build(config, LocalEngine())
    assert (summary["kept"], summary["regions"]) == (32, 32)
    assert verify.verify(tmp_path / "out").ok


def failing_file(monkeypatch, ending: str, error: Callable[[str], Exception]) -> None:
    """Every read of a file fails."""
    plain = LocalFiles.read

    def read(self, url, start=0, length=None):
        if url.endswith(ending) and "/out/" not in url:
            raise error(url)
        return plain(self, url, start, length)

    monkeypatch.setattr(LocalFiles, "read", read)


@pytest.mark.parametrize(
    ("number", "reason", "kind"),
    [
        (errno.EIO, Reason.SOURCE_UNAVAILABLE, "transient"),
        (errno.ESTALE, Reason.SOURCE_UNAVAILABLE, "transient"),
        (errno.EACCES, Reason.PHOTO_UNREADABLE, "refused"),
        (errno.ELOOP, Reason.PHOTO_UNREADABLE, "record"),
    ],
)
@pytest.mark.soak
def test_one_bad_sector_is_a_drop_that_keeps_its_regions_and_heals(
    tmp_path, monkeypatch, number, reason, kind
):
    config = config_for(tmp_path)
    with monkeypatch.context() as patch:
        failing_file(patch, "photos/000000000002.jpg", lambda url: OSError(number, os.strerror(number), url))
        summary = driver.build(config, LocalEngine())
    bad = manifests(tmp_path / "out")[1]
    assert (bad.kept, bad.regions_in, bad.dropped) == (4, 8, {f"source/{reason}": 4})
    assert (bad.images_dropped, bad.failed) == ({reason: 1}, {kind: 1})
    assert summary["subsets"]["coconut"]["counts"]["failed"] == {kind: 1}
    assert verify.verify(tmp_path / "out").ok
    asked = len(calls(tmp_path / "captioner.log"))
    build(config, retry_failed=True)
    assert counts(tmp_path / "out") == [(8, 8)] * 4
    assert len(calls(tmp_path / "captioner.log")) == asked + 4
    assert not any(each.failed for each in manifests(tmp_path / "out"))


def test_an_annotation_that_could_not_be_read_heals_too(tmp_path, monkeypatch):
    config = config_for(tmp_path, "sa1b folder")
    name = sorted((tmp_path / "src/pairs").glob("*.json"))[0].name
    with monkeypatch.context() as patch:
        failing_file(patch, name, lambda url: OSError(errno.EACCES, "Permission denied", url))
        build(config)
    first = manifests(tmp_path / "out")[0]
    assert (first.images_dropped, first.failed) == ({Reason.ANNOTATION_UNREADABLE: 1}, {"refused": 1})
    build(config, retry_failed=True)
    assert (
        all(kept == declared for kept, declared in counts(tmp_path / "out"))
        or not manifests(tmp_path / "out")[0].failed
    )


def test_a_share_of_failures_may_be_accepted(tmp_path, monkeypatch):
    config = config_for(tmp_path, failures={"max_failed_share": 1})
    failing_file(monkeypatch, ".jpg", lambda url: OSError(errno.EIO, "Input/output error", url))
    config = config.model_copy(update={"audit_images": 0})
    build(config)
    assert counts(tmp_path / "out") == [(0, 8)] * 4
    assert {str(reason) for each in manifests(tmp_path / "out") for reason in each.images_dropped} == {
        "source_unavailable"
    }


def test_a_unit_of_one_bad_image_is_finished_if_its_neighbors_can_be_read(tmp_path, monkeypatch):
    source = write_source("coconut", tmp_path / "src", 5)
    config = config_of(tmp_path / "out", **source, images_per_shard=2)
    failing_file(monkeypatch, "photos/000000000004.jpg", lambda url: OSError(errno.EIO, "bad sector", url))
    build(config)
    assert counts(tmp_path / "out") == [(8, 8), (8, 8), (0, 4)]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_source_that_refuses_everything_stops_the_build_at_once(tmp_path, monkeypatch, number):
    config = config_for(tmp_path)
    refuse = after(1, lambda: failing_file(monkeypatch, "g", lambda url: OSError(number, "refused", url)))
    with pytest.raises(ConfigError, match=r"refused every read: correct its permissions") as told:
        build(config, on_progress=refuse)
    assert "\n" not in str(told.value) and len(manifests(tmp_path / "out")) == 1


def test_a_photo_that_fails_while_it_is_written_is_no_verdict(tmp_path, monkeypatch):
    config = config_for(tmp_path)
    ask = backends.InstantJudge.ask

    def then_away(self, questions):
        if (tmp_path / "src").exists() and len(calls(tmp_path / "judge.log")) >= 8:
            move_away(tmp_path)
        return ask(self, questions)

    monkeypatch.setattr(backends.InstantJudge, "ask", then_away)
    with pytest.raises(UnitsHeldBack):
        build(config)
    assert counts(tmp_path / "out") == [(8, 8)]
    come_back(tmp_path)
    monkeypatch.undo()
    failures.RETRYING.set_budget(0)
    asked = calls(tmp_path / "captioner.log")
    build(config)
    assert counts(tmp_path / "out") == [(8, 8)] * 4
    assert (
        len(set(calls(tmp_path / "captioner.log")))
        == len(calls(tmp_path / "captioner.log"))
        == 32
        > len(asked)
    )


def test_bytes_that_differ_between_two_reads_are_no_broken_photo(tmp_path, monkeypatch):
    config = config_for(tmp_path)
    plain, seen = LocalFiles.read, set()

    def read(self, url, start=0, length=None):
        data = plain(self, url, start, length)
        is_header = url.endswith(".jpg") and length is not None
        if (is_header or url.endswith(".png")) and (url, start, length) not in seen:
            seen.add((url, start, length))
            return bytes(len(data))
        return data

    monkeypatch.setattr(LocalFiles, "read", read)
    build(config.model_copy(update={"audit_images": 0}))
    assert counts(tmp_path / "out") == [(8, 8)] * 4


def test_a_broken_label_map_is_a_drop_and_holds_nothing_back(tmp_path):
    config = config_for(tmp_path)
    for name in ("000000000002", "000000000003"):
        (tmp_path / f"src/labels/{name}.png").write_bytes(b"no png")
    build(config)
    assert counts(tmp_path / "out") == [(8, 8), (0, 8), (8, 8), (8, 8)]
    assert not any(each.failed for each in manifests(tmp_path / "out"))


# Units that are built again.


def looser(config):
    return config.model_copy(update={"text": config.text.model_copy(update={"min_words": 4})})


@pytest.mark.soak
def test_photos_that_are_away_come_from_the_committed_shard(tmp_path):
    config = config_for(tmp_path)
    build(config)
    for path in sorted((tmp_path / "src/photos").iterdir())[:4]:
        path.unlink()
    build(looser(config))
    assert counts(tmp_path / "out") == [(8, 8)] * 4
    assert verify.verify(tmp_path / "out").ok
    recipes = {each.recipe for each in manifests(tmp_path / "out")}
    assert len(recipes) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.soak(keep=1)
def test_a_redo_that_would_lose_what_is_committed_is_held_back(tmp_path, monkeypatch, kind):
    config = config_for(tmp_path, kind)
    build(config)
    before = committed(tmp_path / "out")
    ending = {"coconut": "labels/000000000002.png", "sa1b folder": ".json", "sa1b tar": ".tar"}[kind]
    with monkeypatch.context() as patch:
        failing_file(patch, ending, lambda url: OSError(errno.EIO, "Input/output error", url))
        with pytest.raises(ParaCaptionError, match=r"held back|can be read"):
            build(looser(config))
    after_it = committed(tmp_path / "out")
    assert after_it.keys() == before.keys()
    lost = [each for each in manifests(tmp_path / "out") if each.failed]
    assert lost == []
    build(looser(config))
    assert len({each.recipe for each in manifests(tmp_path / "out")}) == 1


@pytest.mark.soak
def test_a_retry_for_one_photo_while_others_are_away_loses_none(tmp_path):
    source = write_source("coconut", tmp_path / "src", 4)
    missing = tmp_path / "src/photos/000000000000.jpg"
    data = missing.read_bytes()
    missing.unlink()
    config = config_of(tmp_path / "out", **source, images_per_shard=4)
    build(config)
    assert counts(tmp_path / "out") == [(12, 16)]
    for path in (tmp_path / "src/photos").iterdir():
        path.unlink()
    missing.write_bytes(data)
    build(config, retry_failed=True)
    assert counts(tmp_path / "out") == [(16, 16)]
    assert verify.verify(tmp_path / "out").ok


def test_photos_that_went_away_between_two_runs_are_not_planned_away(tmp_path):
    config = config_for(tmp_path)
    with pytest.raises(UnitsHeldBack):
        build(config, on_progress=after(1, lambda: move_away(tmp_path)))
    come_back(tmp_path)
    for path in sorted((tmp_path / "src/photos").iterdir())[2:4]:
        os.rename(path, tmp_path / path.name)
    with pytest.raises(UnitsHeldBack, match=r"1 unit is held back, last coconut-000001: 2 of 2"):
        build(config)
    for name in ("000000000002.jpg", "000000000003.jpg"):
        os.rename(tmp_path / name, tmp_path / "src/photos" / name)
    build(config)
    assert counts(tmp_path / "out") == [(8, 8)] * 4


# Over HTTP.


@pytest.fixture
def server(tmp_path):
    write_coconut(tmp_path / "src" / "coconut", 8)
    with serving(tmp_path / "src") as found:
        yield found


@pytest.fixture
def remote(tmp_path, server):
    root = f"{server.url}/coconut"
    source = {
        "annotations": [f"{root}/panoptic.json"],
        "labels": f"{root}/labels",
        "photos": [f"{root}/photos"],
    }
    return config_of(tmp_path / "out", coconut=source, images_per_shard=2)


def with_patience(config, seconds: float, monkeypatch):
    monkeypatch.setattr(failures.RETRYING, "_sleep", lambda _: None)
    changed = config.failures.model_copy(update={"read_retry_s": seconds})
    return config.model_copy(update={"failures": changed})


@pytest.mark.parametrize("fault", [503, 500, 429, "reset", "short", "page"])
@pytest.mark.soak
def test_every_third_request_may_fail(tmp_path, server, remote, monkeypatch, fault):
    server.fault = lambda *_: fault if len(server.asked) % 3 == 0 else None
    build(with_patience(remote, 60, monkeypatch))
    assert counts(tmp_path / "out") == [(8, 8)] * 4


@pytest.mark.parametrize("fault", ["no length", "no ranges", "no head", "no listing"])
@pytest.mark.soak(keep=1)
def test_a_server_that_lacks_something_is_read_all_the_same(tmp_path, server, remote, fault):
    server.fault = lambda *_: fault
    build(remote)
    assert counts(tmp_path / "out") == [(8, 8)] * 4


@pytest.mark.parametrize("fault", [503, 404, "reset"])
@pytest.mark.soak
def test_a_server_that_goes_down_in_mid_build_holds_its_units_back(tmp_path, server, remote, fault):
    def down() -> None:
        server.fault = lambda *_: fault

    with pytest.raises(UnitsHeldBack, match="3 units in a row"):
        build(remote, on_progress=after(1, down))
    assert counts(tmp_path / "out") == [(8, 8)]
    server.fault = lambda *_: None
    build(remote)
    assert counts(tmp_path / "out") == [(8, 8)] * 4


def test_a_key_that_expires_in_mid_build_stops_it_at_once(tmp_path, server, remote):
    def expire() -> None:
        server.fault = lambda *_: 401

    with pytest.raises(ConfigError, match=r"HTTP 401 .*; check the address first") as told:
        build(remote, on_progress=after(1, expire))
    assert "\n" not in str(told.value) and counts(tmp_path / "out") == [(8, 8)]


@pytest.mark.soak
def test_one_photo_that_is_refused_is_its_own_fault(tmp_path, server, remote):
    server.fault = lambda _, path: 403 if path.endswith("photos/000000000002.jpg") else None
    build(remote)
    assert counts(tmp_path / "out") == [(8, 8), (4, 8), (8, 8), (8, 8)]
    assert manifests(tmp_path / "out")[1].failed == {"refused": 1}


@pytest.mark.soak
def test_one_photo_that_is_not_there_is_missing(tmp_path, server, remote):
    (tmp_path / "src/coconut/photos/000000000002.jpg").unlink()
    build(remote)
    second = manifests(tmp_path / "out")[1]
    assert (second.images_dropped, second.failed) == ({Reason.PHOTO_MISSING: 1}, {"record": 1})


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (503, r"panoptic\.json: HTTP 503 .*; run the same command again when the source answers"),
        ("reset", r"panoptic\.json: .*; run the same command again when the source answers"),
        (401, r"panoptic\.json: HTTP 401 .*; check the address first"),
        (403, r"panoptic\.json: HTTP 403 .*; check the address first"),
        (404, r"nothing found at .*panoptic\.json; correct the path"),
    ],
)
def test_planning_ends_in_one_line_that_names_the_file(tmp_path, server, remote, fault, told):
    server.fault = lambda *_: fault
    with pytest.raises(ParaCaptionError, match=told) as raised:
        build(remote)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "out").glob("*/manifests/*"))


@pytest.mark.soak
def test_planning_waits_for_what_passes(tmp_path, server, remote, monkeypatch):
    server.fault = lambda *_: 503 if len(server.asked) < 6 else None
    build(with_patience(remote, 60, monkeypatch))
    assert counts(tmp_path / "out") == [(8, 8)] * 4


@pytest.mark.soak
def test_tars_over_http_are_read_by_ranges_and_held_back(tmp_path):
    made = write_sa1b(tmp_path / "src", 6)
    with serving(tmp_path / "src") as server:
        paths = [f"{server.url}/{Path(path).name}" for path in made["paths"]]
        config = config_of(tmp_path / "out", sa1b={"paths": paths}, images_per_shard=2)

        def down() -> None:
            server.fault = lambda *_: 503

        with pytest.raises(UnitsHeldBack, match="2 units are held back"):
            build(config, on_progress=after(1, down))
        server.fault = lambda *_: None
        build(config)
    local = config_of(tmp_path / "local", sa1b=made, images_per_shard=2)
    build(local)
    assert counts(tmp_path / "out") == counts(tmp_path / "local")


def test_a_tar_whose_first_header_is_broken_is_one_line(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("sa_0.jpg")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.size": "abc"}
        tar.addfile(info)
    (tmp_path / "sa_0.tar").write_bytes(buffer.getvalue())
    with pytest.raises(ConfigError, match=r"sa_0\.tar: not a readable tar .*fetch it again"):
        build(config_of(tmp_path / "out", sa1b={"paths": [str(tmp_path / "sa_0.tar")]}))
