"""A disk that is full, and one that takes no writes: a small tmpfs is mounted as the output folder."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import reader, work_list, writer
from paracaption.pipeline.corpus.events import EventLog, EventReader
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.ray_data import RayEngine
from paracaption.pipeline.io import files
from paracaption.pipeline.sources.registry import open_source
from paracaption.pipeline.stages.caption import Captioned
from paracaption.pipeline.stages.evidence import Answered, EvidenceStore
from paracaption.schemas.errors import StageFailed
from tests.building import build, calls, committed, config_of
from tests.synthetic import write_coconut

NUM_IMAGES = 24


def mount(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB; `resize` and `read_only` change it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    mounted = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def coconut(tmp_path_factory):
    return write_coconut(tmp_path_factory.mktemp("source") / "coconut", NUM_IMAGES, size=(192, 256))


@pytest.fixture(scope="module")
def undisturbed(coconut, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    build(config(out, coconut))
    return committed(out)


def config(out: Path, source: dict):
    return config_of(out, coconut=source, captioner={"log": str(out.parent / "captioner.log")})


def fill(disk: Path, free_bytes: int) -> Path:
    """Leave this much room."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - free_bytes)))
    return ballast


def resize(disk: Path, size: str) -> None:
    assert mount("-o", f"remount,size={size}", str(disk)).returncode == 0


def temporary_files(out: Path) -> list[Path]:
    return list(out.rglob(f"{files.TEMPORARY}*"))


def assert_valid(out: Path) -> int:
    """What is committed is whole; returns how many units that are."""
    manifests = sorted((out / "coconut" / "manifests").glob("*.json"))
    for path in manifests:
        record = reader.read_manifest(path)
        found = {name.partition("/")[2]: digest for name, digest in committed(out).items()}
        assert record.shard is not None
        assert found[record.shard.path] == record.shard.sha256
        assert found[record.ledger.path] == record.ledger.sha256
    assert len(list((out / "coconut" / "shards").glob("coconut-*.tar"))) == len(manifests)
    return len(manifests)


@pytest.mark.soak
def test_a_full_disk_stops_the_build_and_a_larger_one_ends_it_as_if_nothing_had_been(
    disk, coconut, undisturbed
):
    wanted = config(disk / "out", coconut)
    resize(disk, "400k")
    with pytest.raises(
        StageFailed, match=r"disk full; free space and run the same command again, it resumes"
    ):
        build(wanted)
    done = assert_valid(disk / "out")
    assert 0 < done < NUM_IMAGES // 4
    assert temporary_files(disk / "out") == []
    resize(disk, "64m")
    build(wanted)
    assert committed(disk / "out") == undisturbed


@pytest.mark.parametrize("free_kb", range(0, 160, 8))
@pytest.mark.soak(keep=1)
def test_a_disk_that_is_full_at_any_point_drops_no_record(disk, coconut, undisturbed, free_kb, monkeypatch):
    monkeypatch.setattr(driver, "check_disk", lambda *_: None)  # there was room when the build began
    wanted = config(disk / "out", coconut)
    (disk / "out").mkdir()
    writer.prepare(disk / "out" / "coconut")
    work_list.make_work_list(open_source(wanted, "coconut"), wanted, disk / "out" / "coconut")
    ballast = fill(disk, free_kb * 1024)
    with pytest.raises(StageFailed, match="disk full"):
        build(wanted)
    assert_valid(disk / "out")
    ballast.unlink()
    resize(disk, "64m")
    build(wanted)
    assert temporary_files(disk / "out") == []
    assert committed(disk / "out") == undisturbed


def test_evidence_that_does_not_fit_leaves_the_old_evidence(disk):
    store = EvidenceStore(disk / "caption-0", Captioned)
    store.save("unit", {("a", 0): Answered("x", Captioned("old"))})
    fill(disk, 0)
    rows = {(os.urandom(20).hex(), i): Answered("x", Captioned(os.urandom(40).hex())) for i in range(500)}
    with pytest.raises(OSError, match="No space left"):
        store.save("unit", rows)
    assert store.load("unit") == {("a", 0): Answered("x", Captioned("old"))}
    assert temporary_files(disk) == []


def test_events_are_lost_with_one_warning_and_come_back_whole(disk, caplog):
    events = EventLog(disk, "worker")
    events.emit("started", stage="caption")
    ballast = fill(disk, 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(200):
            events.emit("batch", detail="x" * 100)
    assert len([line for line in caplog.messages if "events are lost" in line]) == 1
    ballast.unlink()
    events.emit("unit", stage="caption")
    found = [event.what for event in EventReader(disk).new()]
    assert (found[0], found[-1]) == ("started", "unit")
    assert found.count("batch") < 200


def test_a_read_only_folder_is_one_clear_error(disk, coconut):
    wanted = config(disk / "out", coconut)
    assert mount("-o", "remount,ro", str(disk)).returncode == 0
    with pytest.raises(StageFailed, match=r"cannot write \(Read-only file system\); fix the permissions"):
        build(wanted)
    assert calls(disk.parent / "captioner.log") == []


def test_a_folder_that_turns_read_only_is_one_clear_error_and_resumes(disk, coconut, undisturbed):
    resize(disk, "64m")
    wanted = config(disk / "out", coconut)
    build(wanted)
    for name in ("coconut-000002", "coconut-000004"):
        (disk / "out" / "coconut" / "manifests" / f"{name}.json").unlink()
    assert mount("-o", "remount,ro", str(disk)).returncode == 0
    with pytest.raises(StageFailed, match=r"cannot write \(Read-only file system\)"):
        build(wanted)
    assert mount("-o", "remount,rw", str(disk)).returncode == 0
    build(wanted)
    assert committed(disk / "out") == undisturbed


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.soak
def test_a_full_disk_under_ray_is_the_same_clear_error(disk, coconut, undisturbed, ray_cluster):
    resize(disk, "400k")
    wanted = config(disk / "out", coconut)
    with pytest.raises(StageFailed, match="disk full"):
        build(wanted, RayEngine())
    assert_valid(disk / "out")
    resize(disk, "64m")
    build(wanted, RayEngine())
    assert committed(disk / "out") == undisturbed
