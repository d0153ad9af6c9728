"""A unit on disk: its bytes, its commit, and what a crash between any two steps of it leaves."""

import errno
import hashlib
import os
import tarfile
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.corpus import log, reader, writer
from paracaption.pipeline.corpus.owner import own
from paracaption.pipeline.corpus.sweep import sweep
from paracaption.pipeline.io import files, photos, store
from paracaption.pipeline.io.backends import LocalFiles
from paracaption.schemas.errors import IntegrityError, StageFailed
from paracaption.schemas.manifest import encode
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Blob, Drop, ImageRecord, Region, Rle

UNIT = "coconut-000000"
DROP = Drop("verify_category", Reason.CATEGORY_WRONG, "margin -0.4")


class Crash(BaseException):
    """The process ends here: nobody cleans up."""


@pytest.fixture
def folder(tmp_path):
    writer.prepare(tmp_path / "coconut")
    return tmp_path / "coconut"


def image(root: Path, key: str, drop: Drop | None = None) -> ImageRecord:
    photo = root / f"{key}.photo"
    photo.write_bytes(key.encode() * 300)
    regions = [
        Region(
            id=i,
            rle=Rle((4, 6), "0h0"),
            bbox=(0, 0, 6, 4),
            area=24,
            caption="a cat on a mat",
            drop=drop if i else None,
        )
        for i in range(2)
    ]
    return ImageRecord(key, "coconut", Blob(str(photo)), 6, 4, "jpeg", f"{key}.jpg", regions)


def three(root: Path) -> list[ImageRecord]:
    return [image(root, "b"), image(root, "a", DROP), image(root, "c")]


def write(folder: Path, images: list[ImageRecord], recipe: str = "recipe"):
    return writer.write_unit(folder, UNIT, images, "plan", recipe)


def written(folder: Path, file) -> Path:
    """Where a file of a draft lies."""
    return folder.parent / file.temporary


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


WHOLE = {f"shards/{UNIT}.tar", f"ledger/{UNIT}.parquet", f"manifests/{UNIT}.json"}


def assert_consistent(folder: Path) -> None:
    """A shard exists if and only if its manifest does, which speaks of the bytes that are there."""
    assert names(folder) in (set(), WHOLE)
    if names(folder):
        record = reader.read_manifest(folder / f"manifests/{UNIT}.json")
        for entry in (record.shard, record.ledger):
            assert hashlib.sha256((folder / entry.path).read_bytes()).hexdigest() == entry.sha256


# Writing.


def test_two_writers_of_one_unit_write_the_same_bytes_under_different_names(folder, tmp_path):
    first, second = write(folder, three(tmp_path)), write(folder, three(tmp_path)[::-1])
    assert first.unit.shard.temporary != second.unit.shard.temporary
    assert written(folder, first.unit.shard).read_bytes() == written(folder, second.unit.shard).read_bytes()
    again = write(folder, three(tmp_path))
    assert written(folder, first.unit.ledger).read_bytes() == written(folder, again.unit.ledger).read_bytes()
    assert encode(first.manifest) == encode(again.manifest)


def test_tarfile_reads_what_was_written_without_times_or_owners(folder, tmp_path):
    draft = write(folder, three(tmp_path))
    with tarfile.open(written(folder, draft.unit.shard)) as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [f"{k}.{e}" for k in "abc" for e in ("jpg", "json")]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
            (0, 0, 0, "", "", 0o644)
        }
        assert tar.extractfile("b.jpg").read() == b"b" * 300
        sample = msgspec.json.decode(tar.extractfile("a.json").read())
    assert (sample["key"], [region["id"] for region in sample["regions"]]) == ("a", [0])
    size = os.path.getsize(written(folder, draft.unit.shard))
    assert (draft.manifest.shard.bytes, size % 10240) == (size, 0)


def test_the_ledgers_offsets_lead_to_the_members(folder, tmp_path):
    draft = write(folder, three(tmp_path))
    data = written(folder, draft.unit.shard).read_bytes()
    rows = [row for row in pq.read_table(written(folder, draft.unit.ledger)).to_pylist() if row["kept"]]
    assert len(rows) == 5
    for row in rows:
        photo, record = (
            data[row[f"{kind}_offset"] : row[f"{kind}_offset"] + row[f"{kind}_length"]]
            for kind in ("photo", "json")
        )
        assert photo == row["key"].encode() * 300
        assert msgspec.json.decode(record)["key"] == row["key"]


def test_a_photo_that_is_gone_at_the_end_is_a_drop_and_the_counts_balance(folder, tmp_path):
    images = three(tmp_path)
    os.remove(tmp_path / "a.photo")
    os.remove(tmp_path / "b.photo")
    (tmp_path / "b.photo").mkdir()
    record = write(folder, images).manifest
    assert record.dropped == {
        "verify_category/category_wrong": 1,
        "write/photo_missing": 1,
        "write/photo_unreadable": 2,
    }
    assert record.images_dropped == {Reason.PHOTO_MISSING: 1, Reason.PHOTO_UNREADABLE: 1}
    assert (record.regions_in, record.kept, record.images) == (6, 2, {"a": 0, "b": 0, "c": 2})
    assert str(tmp_path / "a.photo") in images[1].drop.detail


def test_a_file_system_of_its_own_kind_of_error_is_a_drop(folder, tmp_path, monkeypatch):
    def read(*_):
        raise RuntimeError("500 from the photo server")

    monkeypatch.setattr(LocalFiles, "read", read)
    record = write(folder, three(tmp_path)).manifest
    assert record.images_dropped == {Reason.SOURCE_UNAVAILABLE: 3} and record.failed == {"transient": 3}


def test_a_unit_without_a_kept_region_has_a_ledger_and_no_shard(folder, tmp_path):
    images = three(tmp_path)
    for each in images:
        each.reject(DROP)
    draft = write(folder, images)
    assert (draft.unit.shard, draft.manifest.shard, draft.manifest.kept) == (None, None, 0)
    writer.commit(folder, draft)
    assert names(folder) == WHOLE - {f"shards/{UNIT}.tar"}


def test_a_failed_write_leaves_no_temporary_file(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "table_bytes", fail)
    with pytest.raises(StageFailed, match="disk full"):
        write(folder, three(tmp_path))
    assert names(folder) == set()


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "disk full; free space and run the same command again"),
        (errno.EDQUOT, "disk full"),
        (
            errno.EROFS,
            r"cannot write \(Read-only file system\); fix the permissions or choose another `out`",
        ),
        (errno.EACCES, "cannot write"),
        (errno.EIO, "Input/output error; run the same command again, it resumes"),
    ],
)
def test_an_error_of_the_disk_says_what_to_do(number, told):
    with_name = OSError(number, os.strerror(number), "/out/x.tar")
    with pytest.raises(StageFailed, match=f"^/out/x.tar: {told}"):
        raise writer.write_failed(Path("/out"), with_name)
    with pytest.raises(StageFailed, match=r"^/out: "):
        raise writer.write_failed(Path("/out"), OSError(number, os.strerror(number)))


# Committing.


def test_a_commit_puts_three_files_in_place_and_leaves_nothing_else(folder, tmp_path):
    writer.commit(folder, write(folder, three(tmp_path)))
    assert names(folder) == WHOLE
    assert_consistent(folder)


def test_a_unit_that_loses_its_last_region_loses_its_shard(folder, tmp_path):
    writer.commit(folder, write(folder, three(tmp_path)))
    images = three(tmp_path)
    for each in images:
        each.reject(DROP)
    writer.commit(folder, write(folder, images))
    assert names(folder) == WHOLE - {f"shards/{UNIT}.tar"}


def test_a_unit_stays_committed_until_its_next_version_is_and_its_files_are_kept(folder, tmp_path):
    writer.commit(folder, write(folder, three(tmp_path)[:2], "before"))
    before = {name: (folder / name).read_bytes() for name in WHOLE}
    draft = write(folder, three(tmp_path))
    assert {name: (folder / name).read_bytes() for name in WHOLE} == before
    writer.commit(folder, draft)
    assert_consistent(folder)
    record = log.read_state(str(folder.parent)).units[f"coconut/{UNIT}"].since
    kept = folder.parent / ".replaced" / str(record) / "coconut"
    assert {name: (kept / name).read_bytes() for name in WHOLE} == before


class Crashing(store.FolderStore):
    """Ends the process before a call, or fails there; afterwards nothing reaches the disk."""

    def __init__(self, at: int, error: BaseException):
        self.at, self.error, self.calls = at, error, 0

    def _step(self) -> None:
        self.calls += 1
        if self.calls == self.at or (self.calls > self.at and isinstance(self.error, Crash)):
            raise self.error

    def create(self, path, data):
        self._step()
        return super().create(path, data)

    def move(self, path, target):
        self._step()
        return super().move(path, target)

    def keep(self, path, target):
        self._step()
        return super().keep(path, target)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(
    "error", [Crash(), OSError(errno.ENOSPC, "No space left on device")], ids=["crash", "full"]
)
@pytest.mark.parametrize("at", range(1, 10))
@pytest.mark.soak(keep=6)
def test_a_commit_that_ends_anywhere_is_all_or_nothing_and_can_be_done_again(
    folder, tmp_path, monkeypatch, at, error, replaced
):
    if replaced:
        writer.commit(folder, write(folder, three(tmp_path)[:2], "before"))
    draft = write(folder, three(tmp_path))
    monkeypatch.setattr("paracaption.pipeline.corpus.processes.is_dead", lambda _: True)
    monkeypatch.setattr(store, "_FOLDERS", Crashing(at, error))
    try:
        writer.commit(folder, draft)
    except (Crash, StageFailed):
        pass
    monkeypatch.setattr(store, "_FOLDERS", store.FolderStore())
    for unit in reader.list_units(str(folder)):  # wherever its files are now, they are whole
        manifest = reader.read_manifest(unit.manifest)
        for path, entry in ((unit.shard, manifest.shard), (unit.ledger, manifest.ledger)):
            assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == entry.sha256
    with own(str(folder.parent), "build", 60) as owner:
        sweep(owner)
    assert_consistent(folder)
    writer.commit(folder, write(folder, three(tmp_path)))
    assert_consistent(folder)
    assert reader.read_manifest(folder / f"manifests/{UNIT}.json").recipe == "recipe"


def test_a_sweep_removes_leftovers_and_nothing_that_is_committed(folder, tmp_path):
    writer.commit(folder, write(folder, three(tmp_path)))
    before = names(folder)
    write(folder, three(tmp_path))
    (folder / "shards" / "coconut-000007.tar").write_bytes(b"of no committed unit")
    (folder / "ledger" / "coconut-000007.parquet").write_bytes(b"of none, either")
    (folder / "shards" / "sa_000020.tar").write_bytes(b"somebody else's")
    (folder / "evidence" / "caption-0").mkdir(parents=True)
    (folder / "evidence" / "caption-0" / f"{files.TEMPORARY}x").write_bytes(b"half")
    (folder / "evidence" / "caption-0" / "coconut-000007.parquet").write_bytes(b"paid for")
    (folder.parent / f"{files.TEMPORARY}index.parquet-1").write_bytes(b"of a merge that was killed")
    with own(str(folder.parent), "build", 60) as owner:
        assert sweep(owner) == 7
    assert names(folder) == before | {"evidence/caption-0/coconut-000007.parquet", "shards/sa_000020.tar"}
    with own(str(folder.parent), "build", 60) as owner:
        assert sweep(owner) == 0


def test_a_discarded_draft_leaves_nothing_and_may_be_discarded_twice(folder, tmp_path):
    draft = write(folder, three(tmp_path))
    writer.discard(folder.parent, draft)
    writer.discard(folder.parent, draft)
    assert names(folder) == set()


def test_a_draft_whose_file_is_gone_is_not_committed(folder, tmp_path):
    draft = write(folder, three(tmp_path))
    written(folder, draft.unit.shard).unlink()
    with pytest.raises(StageFailed, match=r"shards/\.tmp-.*: is gone"):
        writer.commit(folder, draft)
    assert reader.list_units(str(folder)) == []


@pytest.mark.parametrize("garbage", [b"", b"{}", b"[]", b"\xff\xfe", b'{"unit": 3}', b'{"unit": "\xff"}'])
def test_a_manifest_that_is_none_names_itself_and_the_mend(tmp_path, garbage):
    path = tmp_path / "coconut-000000.json"
    path.write_bytes(garbage)
    with pytest.raises(IntegrityError, match=r"coconut-000000.json: not a manifest .*delete it and run"):
        reader.read_manifest(path)


def test_a_photo_that_is_not_the_one_that_was_captioned_holds_its_unit_back(folder, tmp_path):
    images = three(tmp_path)
    for each in images:
        each.photo_digest = photos.hash_photo(each.photo)
    assert write(folder, images).held == ""
    (tmp_path / "b.photo").write_bytes(b"another photo")
    held = write(folder, images).held
    assert held.startswith(str(tmp_path / "b.photo")) and "changed while the build was running" in held


def ledger_of(folder: Path, draft: writer.Draft) -> Path:
    """Where the ledger of a draft lies."""
    return folder.parent / draft.unit.ledger.temporary


def test_the_ledger_names_the_photo_of_each_sample_and_of_no_dropped_image(folder, tmp_path):
    images = three(tmp_path)
    for each in images:
        each.photo_digest = photos.hash_photo(each.photo)
    images[1].reject(DROP)
    table = pq.read_table(ledger_of(folder, write(folder, images)), columns=["key", "photo_digest"])
    expected = {each.key: each.photo_digest for each in (images[0], images[2])} | {"a": None}
    assert {row["key"]: row["photo_digest"] for row in table.to_pylist()} == expected


def test_a_ledger_of_evidence_that_names_no_photo_is_that_of_early_releases(folder, tmp_path):
    assert "photo_digest" not in pq.read_schema(ledger_of(folder, write(folder, three(tmp_path)))).names


def test_a_photo_that_comes_short_of_its_planned_length_is_not_written(folder, tmp_path):
    short = image(tmp_path, "a")
    short.photo = Blob(short.photo.url, 0, 301)
    draft = write(folder, [short])
    assert draft.manifest.kept == 0 and "300 of 301 bytes" in short.drop.detail
