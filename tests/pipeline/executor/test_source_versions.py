"""Tars and lists of a source in a bucket or on a web server that are replaced while a build reads them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import httpx
import pytest

from paracaption.pipeline.corpus import log, reader
from paracaption.pipeline.executor.engine import Outcome, Part
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import UnitsHeldBack
from tests.building import build, config_of
from tests.file_server import serving as serving_files
from tests.object_server import ObjectServer
from tests.synthetic import write_coconut, write_sa1b

s3fs = pytest.importorskip("s3fs")

CHANGED = "has changed since the work list was made; run the same command again, which lists it again"


@pytest.fixture
def bucket(faulty_s3):
    """A server of S3 for sources: clients that were made for another one are forgotten."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield faulty_s3
    s3fs.S3FileSystem.clear_instance_cache()


def put(server: ObjectServer, folder: Path, name: str = "") -> None:
    """Put the files of a folder, or one of them, under the same names into the bucket."""
    for path in sorted(folder.rglob(name or "*")):
        if path.is_file():
            url = f"{server.address}/corpus/{path.relative_to(folder)}"
            assert httpx.put(url, content=path.read_bytes()).is_success


class _Replacing(LocalEngine):
    """A local engine that calls a function after its first unit."""

    def __init__(self, replace: Callable[[], None]):
        super().__init__()
        self._replace = replace

    def drafts(self, parts: Sequence[Part], tick: Callable[[], None]) -> Generator[Outcome]:
        for number, each in enumerate(super().drafts(parts, tick)):
            yield each
            if number == 0:
                self._replace()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def build_while(config: BuildConfig, replace: Callable[[], None]) -> dict[str, str]:
    """Build, and replace files of the source after the first unit; the units that are held back."""
    with pytest.raises(UnitsHeldBack, match=CHANGED):
        build(config, _Replacing(replace))
    done = log.read_records(config.out)[-1]
    return done.held_back  # type: ignore[union-attr]


def captions(out: str) -> list[tuple[str, int, tuple[int, ...]]]:
    """What is committed: key, region and box of each kept region."""
    corpus = reader.open_corpus(out)
    return sorted(
        (sample.key, region.id, tuple(region.bbox))
        for sample, _ in corpus.samples()
        for region in sample.regions
    )


def with_other_regions(tar: Path, to: Path) -> None:
    """A tar with members of the same names, sizes and places, whose regions are numbered otherwise."""
    data = tar.read_bytes()
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.name.endswith(".json"):
                start = member.offset_data
                record = json.loads(data[start : start + member.size])
                first, second = record["annotations"][:2]
                first["segmentation"], second["segmentation"] = second["segmentation"], first["segmentation"]
                first["bbox"], second["bbox"] = second["bbox"], first["bbox"]
                first["area"], second["area"] = second["area"], first["area"]
                new = json.dumps(record).encode()
                data = data[:start] + new.ljust(member.size)[: member.size] + data[start + member.size :]
    assert len(data) == tar.stat().st_size
    to.write_bytes(data)


@pytest.mark.soak
def test_a_tar_in_a_bucket_that_is_replaced_holds_back_what_is_read_of_it(bucket, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    write_sa1b(old, 4)
    new.mkdir()
    with_other_regions(old / "sa_000000.tar", new / "sa_000000.tar")
    put(bucket, old)
    source = {"paths": ["s3://corpus/sa_000000.tar"]}
    config = config_of(tmp_path / "out", sa1b=source, images_per_shard=1)
    held = build_while(config, lambda: put(bucket, new))
    assert sorted(held) == ["sa1b/sa1b-000001", "sa1b/sa1b-000002", "sa1b/sa1b-000003"]
    build(config_of(tmp_path / "before", sa1b={"paths": [str(old / "sa_000000.tar")]}, images_per_shard=1))
    committed = captions(str(tmp_path / "out"))
    assert committed
    assert set(committed) <= set(captions(str(tmp_path / "before")))  # nothing of the new one
    assert {key for key, _, _ in committed} == {"sa_0"}


@pytest.mark.soak
def test_a_list_of_annotations_that_is_replaced_changes_nothing_before_the_next_build(bucket, tmp_path):
    old = tmp_path / "old"
    write_coconut(old, 3)
    put(bucket, old)
    source = {
        "annotations": ["s3://corpus/panoptic.json"],
        "photos": ["s3://corpus/photos"],
        "labels": "s3://corpus/labels",
    }
    config = config_of(tmp_path / "out", coconut=source, images_per_shard=1)

    def grow() -> None:
        write_coconut(old, 4)
        put(bucket, old)

    build(config, _Replacing(grow))  # its records are in the work list
    assert {key for key, _, _ in captions(str(tmp_path / "out"))} == {f"{i:012d}" for i in range(3)}
    build(config)
    assert {key for key, _, _ in captions(str(tmp_path / "out"))} == {f"{i:012d}" for i in range(4)}


@pytest.mark.soak
def test_a_tar_of_a_web_server_that_is_replaced_holds_back_what_is_read_of_it(tmp_path):
    served = tmp_path / "served"
    write_sa1b(served, 3)
    write_sa1b(tmp_path / "new", 6, first=7)  # the server tells sizes and one time for all
    with serving_files(served) as server:
        source = {"paths": [f"{server.url}/sa_000000.tar"]}
        config = config_of(tmp_path / "out", sa1b=source, images_per_shard=1)
        new = (tmp_path / "new/sa_000000.tar").read_bytes()
        held = build_while(config, lambda: _write(served / "sa_000000.tar", new))
    assert len(held) == 2
    assert {key for key, _, _ in captions(str(tmp_path / "out"))} == {"sa_0"}


@pytest.mark.soak
def test_a_file_that_cannot_be_asked_for_is_no_verdict(bucket, tmp_path):
    write_sa1b(tmp_path / "old", 2)
    put(bucket, tmp_path / "old")
    source = {"paths": ["s3://corpus/sa_000000.tar"]}
    config = config_of(tmp_path / "out", sa1b=source, images_per_shard=1)
    gates = list[int]()
    with pytest.raises(UnitsHeldBack, match="so it is not known whether it has changed"):
        build(config, _Replacing(lambda: gates.append(bucket.fail("503", "HEAD", "sa_0*", None))))
    bucket.release(gates[0])
    build(config)
    assert len(log.read_state(str(tmp_path / "out")).units) == 2


def test_a_build_whose_source_stays_asks_once_for_each_unit(bucket, tmp_path):
    write_sa1b(tmp_path / "old", 4)
    put(bucket, tmp_path / "old")
    config = config_of(tmp_path / "out", sa1b={"paths": ["s3://corpus/sa_000000.tar"]}, images_per_shard=1)
    build(config)
    asked = [each for each in bucket.requests() if each["operation"] == "HeadObject"]
    assert len(asked) <= 4 + 12  # once for a unit, and while it is planned
