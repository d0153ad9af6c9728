"""Each promise of a corpus is broken once, and `verify` must name the file and the record."""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.corpus import merge, reader, verify, work_list_summary
from paracaption.pipeline.corpus.ledger import table_bytes
from paracaption.schemas import manifest as manifests
from paracaption.schemas.errors import ConfigError
from tests import committed

UNIT = "coconut-000000"


@pytest.fixture
def out(tmp_path) -> Path:
    """A corpus without a log, as early releases wrote it: what is wrong must be found in the files."""
    return committed.unlogged(committed.merged(tmp_path / "out"))


def found(out: Path, **options) -> list[str]:
    return [str(problem) for problem in verify.verify(out, **options).problems]


def named(out: Path, *parts: str, **options) -> None:
    """Some problem has all parts in its text."""
    problems = found(out, **options)
    assert any(all(part in problem for part in parts) for problem in problems), "\n".join(problems)


def edit_manifest(out: Path, unit: str = UNIT, **changes) -> None:
    path = out / unit.rpartition("-")[0] / "manifests" / f"{unit}.json"
    record = json.loads(path.read_text())
    record.update(changes)
    path.write_text(json.dumps(record))


def manifest_of(out: Path, unit: str = UNIT) -> manifests.Manifest:
    return reader.read_manifest(out / unit.rpartition("-")[0] / "manifests" / f"{unit}.json")


def sign(out: Path, name: str, unit: str = UNIT) -> None:
    """Make the manifest agree with the file, so that only what is in it can be wrong."""
    entry = getattr(manifest_of(out, unit), name)
    data = (out / unit.rpartition("-")[0] / entry.path).read_bytes()
    entry = {"path": entry.path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(out, unit, **{name: entry})


def edit_ledger(out: Path, where, **changes) -> None:
    """Change the rows that `where` picks; checksums are made right again."""
    path = out / "coconut" / "ledger" / f"{UNIT}.parquet"
    table = pq.read_table(path)
    rows = [row | changes if where(row) else row for row in table.to_pylist()]
    path.write_bytes(table_bytes(pa.Table.from_pylist(rows, schema=table.schema)))
    sign(out, "ledger")


def edit_shard(out: Path, old: bytes, new: bytes, count: int = 1) -> None:
    path = out / "coconut" / "shards" / f"{UNIT}.tar"
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, count))
    sign(out, "shard")


def first_kept(row: dict) -> bool:
    return (row["key"], row["region"]) == ("000000000000", 1)


@pytest.mark.parametrize("options", [{}, {"deep": False}, {"workers": 2}])
@pytest.mark.soak(keep=2)
def test_a_whole_corpus_has_no_problem(out, options):
    report = verify.verify(out, **options)
    assert report.ok and not report.notes, report.text()
    assert (report.units, report.regions) == (4, 48)
    assert report.text() == "4 units, 48 regions checked: complete and undamaged"


def test_a_folder_that_is_no_corpus_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no corpus here"):
        verify.verify(tmp_path)


def test_a_folder_that_was_copied_behind_a_url_is_checked_there(out):
    memory = fsspec.filesystem("memory")
    memory.put(str(out), "/verified", recursive=True)
    assert not verify.verify("memory://verified").problems
    with memory.open("/verified/coconut/shards/coconut-000000.tar", "r+b") as shard:
        shard.seek(2000)
        shard.write(b"damaged")
    (found,) = verify.verify("memory://verified").problems
    assert found.file == "coconut/shards/coconut-000000.tar" and "SHA-256" in found.what


def test_a_unit_of_the_plan_without_manifest_is_named(out):
    (out / "coconut/manifests/coconut-000001.json").unlink()
    named(out, "coconut/manifests", "1 of 3 units are not committed (coconut-000001)")


def test_an_image_of_the_plan_that_its_manifest_lacks_is_named(out):
    images = dict(manifest_of(out).images)
    images.pop("000000000002")
    edit_manifest(out, images=images)
    named(out, f"manifests/{UNIT}.json", "images of the work list missing: 1 (000000000002)")
    named(out, f"ledger/{UNIT}.parquet", "images not in the manifest: 1 (000000000002)")


def test_a_manifest_of_no_unit_of_the_plan_is_named(out):
    folder = out / "coconut" / "manifests"
    shutil.copy(folder / "coconut-000002.json", folder / "coconut-000009.json")
    named(out, "coconut-000009.json", "the work list has no such unit")
    named(out, "coconut-000009.json", "belongs to unit coconut-000002")


def test_an_image_that_is_planned_twice_is_named(out):
    path = out / "sa1b" / work_list_summary.FOLDER / work_list_summary.TABLE
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(1, 1)]), path, row_group_size=100)
    summary = path.with_name(work_list_summary.SUMMARY)
    early = json.loads(summary.read_text()) | {"table": "", "check": ""}
    summary.write_text(json.dumps(early))
    named(out, "sa1b/plan/plan.parquet: sa_1", "has this image 2 times")


def test_a_missing_or_damaged_plan_is_named(out):
    path = out / "coconut" / work_list_summary.FOLDER / work_list_summary.TABLE
    path.write_bytes(b"PAR1 no more")
    named(out, "coconut/plan/plan.parquet", "damaged", "build CONFIG` again")
    path.unlink()
    named(out, "coconut/plan/plan.parquet", "gone", "build CONFIG` again")
    path.with_name(work_list_summary.SUMMARY).write_bytes(b'{"subset": ' * 5000)
    named(out, "coconut/plan/plan.json", "not a work list", "build CONFIG` again")


def test_manifests_of_two_plans_are_named(out):
    edit_manifest(out, plan="0" * 64)
    named(out, "coconut/manifests", "1 units were built from another work list", UNIT)


def test_manifests_of_two_recipes_are_named(out):
    edit_manifest(out, recipe="stricter")
    named(out, "coconut/manifests", "units of 2 configurations", "stricter: 1 units")


def test_a_manifest_that_is_none_is_named(out):
    (out / "coconut/manifests/coconut-000001.json").write_bytes(b'{"unit": \xff')
    named(out, "coconut-000001.json", "not a manifest")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"regions_in": 17}, "regions_in 17 is not kept 7 + dropped 9"),
        ({"kept": 8, "regions_in": 17}, "kept 8 is not the sum over its images"),
        ({"shard": None}, "names no shard, although 7 regions are kept"),
        ({"subset": "sa1b"}, "belongs to subset sa1b"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_named(out, changes, what):
    edit_manifest(out, **changes)
    named(out, f"manifests/{UNIT}.json", what, deep=False)


def test_a_manifest_that_names_a_file_elsewhere_is_not_followed(out):
    entry = {"path": "../../../etc/passwd", "bytes": 1, "sha256": ""}
    edit_manifest(out, ledger=entry)
    named(out, f"manifests/{UNIT}.json", "../../../etc/passwd", "instead of ledger/coconut-000000.parquet")


@pytest.mark.parametrize("name", ["shards/coconut-000000.tar", "ledger/coconut-000000.parquet"])
def test_a_changed_byte_a_cut_and_a_missing_file_are_named(out, name):
    path = out / "coconut" / name
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    named(out, f"coconut/{name}", "SHA-256")
    path.write_bytes(data[:2000])
    named(out, f"coconut/{name}", "has 2000 bytes")
    named(out, f"coconut/{name}", "has 2000 bytes", deep=False)
    path.unlink()
    named(out, f"coconut/{name}", "missing", deep=False)


def test_counts_of_the_ledger_that_differ_from_the_manifest_are_named(out):
    edit_manifest(out, dropped={"caption/caption_none": 9})
    named(out, f"ledger/{UNIT}.parquet", "drops by reason", deep=False)


def test_kept_regions_of_an_image_that_differ_from_the_manifest_are_named(out):
    images = dict(manifest_of(out).images)
    images["000000000000"], images["000000000001"] = images["000000000001"], images["000000000000"]
    edit_manifest(out, images=images)
    named(out, "000000000000", "2 kept regions, its manifest says 3")


def test_a_region_that_is_there_twice_is_named(out):
    edit_ledger(out, lambda row: (row["key"], row["region"]) == ("000000000000", 2), region=1)
    named(out, "000000000000 #1", "occurs 2 times")


def test_a_kept_region_with_a_drop_reason_is_named(out):
    edit_ledger(out, first_kept, drop_reason="iou_low", drop_stage="x")
    named(out, "000000000000 #1", "either kept or have a drop reason")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rle_counts": "not a mask \x01"}, "does not fill 128x96"),
        ({"rle_counts": "P" * 5000}, "does not fill 128x96"),
        ({"rle_counts": ""}, "does not fill"),
        ({"rle_counts": "6000 6288"}, "does not fill 128x96"),  # run lengths as text are no RLE in a corpus
        ({"rle_counts": None}, "kept without a mask"),
        ({"area": 1}, "area says 1"),
        ({"bbox_w": 1}, "bbox says"),
        ({"image_width": 127}, "does not fill 127x96"),
    ],
)
def test_a_mask_that_is_not_what_stands_beside_it_is_named(out, changes, what):
    edit_ledger(out, first_kept, **changes)
    named(out, f"ledger/{UNIT}.parquet: 000000000000 #1", what)


@pytest.mark.parametrize(
    ("caption", "what"),
    [("Too short.", "text_too_short"), ("the cat " * 40, "text_repeats"), ("", "without a caption")],
)
def test_a_caption_that_breaks_a_text_rule_is_named(out, caption, what):
    edit_ledger(out, first_kept, caption=caption)
    named(out, "000000000000 #1", what)


def test_captions_are_checked_by_the_rules_of_the_corpus_itself(out):
    path = out / "config.yaml"
    path.write_text(path.read_text().replace("min_words: 5", "min_words: 50"))
    named(out, "000000000000 #1", "text_too_short")
    path.write_text("no config")
    named(out, "config.yaml", "captions are not checked")


@pytest.mark.parametrize("name", ["json_offset", "json_length", "photo_offset", "photo_length"])
def test_an_offset_that_leads_elsewhere_is_named(out, name):
    edit_ledger(out, first_kept, **{name: 3})
    named(out, f"shards/{UNIT}.tar: 000000000000 #1", "it lies at")


def test_a_sample_that_says_something_else_than_the_ledger_is_named(out):
    edit_shard(out, b"A plain cat with", b"A plane cat with")
    named(out, f"shards/{UNIT}.tar: 000000000000", "not those that the ledger keeps")


def test_a_sample_without_kept_rows_and_rows_without_a_sample_are_named(out):
    path = out / "coconut" / "ledger" / f"{UNIT}.parquet"
    table = pq.read_table(path)
    rows = [row for row in table.to_pylist() if row["key"] != "000000000000"]
    path.write_bytes(table_bytes(pa.Table.from_pylist(rows, schema=table.schema)))
    sign(out, "ledger")
    named(out, f"shards/{UNIT}.tar: 000000000000", "no row of the ledger")
    data = (out / "coconut/shards/coconut-000001.tar").read_bytes()
    (out / "coconut" / "shards" / f"{UNIT}.tar").write_bytes(data)
    sign(out, "shard")
    named(out, f"shards/{UNIT}.tar: 000000000001", "no sample")


def test_a_json_member_that_is_no_sample_is_named(out):
    edit_shard(out, b'{"key":"000000000000"', b'["key",[000000000000"')
    named(out, f"shards/{UNIT}.tar: 000000000000.json", "not a sample")


def test_a_json_member_of_another_key_is_named(out):
    edit_shard(out, b'{"key":"000000000000"', b'{"key":"000000000777"')
    named(out, "000000000000.json", "belongs to coconut/000000000777")


def test_a_photo_that_is_none_is_named(out):
    edit_shard(out, b"\xff\xd8\xff\xe0", b"none")
    named(out, "000000000000.jpg", "photo_unreadable")


def test_a_photo_whose_size_is_not_the_samples_is_named(out):
    edit_shard(out, b'"width":128', b'"width":127')
    named(out, "000000000000.jpg", "128x96", "its JSON says jpeg 127x96")


def repack(out: Path, change) -> None:
    """Write the shard anew with members as `change` makes them from (TarInfo, bytes)."""
    path = out / "coconut" / "shards" / f"{UNIT}.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for member, data in change(members):
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    sign(out, "shard")


def test_a_member_with_a_path_in_its_name_is_named_and_not_followed(out):
    def rename(members):
        members[0][0].name = "../../evil.jpg"
        return members

    repack(out, rename)
    named(out, f"shards/{UNIT}.tar: '../../evil.jpg'", "not a member of a shard")
    named(out, f"shards/{UNIT}.tar: 000000000000", "a JSON without its photo")
    assert not list(out.parent.rglob("evil*"))


def test_a_member_with_a_time_or_an_owner_is_named(out):
    def touch(members):
        members[0][0].mtime = 1
        return members

    repack(out, touch)
    named(out, f"shards/{UNIT}.tar: 000000000000.jpg", "has a time or an owner")


def test_samples_in_another_order_or_twice_are_named(out):
    repack(out, lambda members: [*members[2:], *members[:2]])
    named(out, f"shards/{UNIT}.tar", "not sorted by key")


def test_an_empty_photo_and_one_without_json_are_named(out):
    repack(out, lambda members: [(members[0][0], b""), *members[1:-1]])
    named(out, "000000000000.jpg", "photo_unreadable", "empty file")
    named(out, f"shards/{UNIT}.tar: 000000000003", "a photo without its JSON")


def test_a_shard_that_is_no_tar_is_named(out):
    (out / "coconut" / "shards" / f"{UNIT}.tar").write_bytes(b"x" * 4096)
    sign(out, "shard")
    named(out, f"shards/{UNIT}.tar", "not a readable tar")


def test_a_ledger_that_is_no_parquet_is_named(out):
    (out / "coconut" / "ledger" / f"{UNIT}.parquet").write_bytes(b"x" * 4096)
    sign(out, "ledger")
    named(out, f"ledger/{UNIT}.parquet", "not a ledger")


def test_leftovers_are_notes_and_no_problems(out):
    (out / "coconut/shards/.tmp-coconut-000000-abc.tar").write_bytes(b"half")
    shutil.copy(out / "coconut/shards/coconut-000000.tar", out / "coconut/shards/coconut-000007.tar")
    report = verify.verify(out)
    assert report.ok
    assert [note.file for note in report.notes] == [
        "coconut/shards/.tmp-coconut-000000-abc.tar",
        "coconut/shards/coconut-000007.tar",
    ]
    assert report.text().startswith("note: coconut/shards/.tmp-coconut-000000-abc.tar")


def test_an_index_or_statistics_of_other_units_are_named(out):
    index = (out / "index.parquet").read_bytes()
    (out / "index.parquet").write_bytes(index[:-9] + b"x" + index[-8:])
    named(out, "index.parquet", "paracaption merge")
    (out / "index.parquet").unlink()
    named(out, "index.parquet", "paracaption merge")
    (out / "index.parquet").write_bytes(index)
    edit_manifest(out, recipe="other")
    named(out, "stats.json: coconut", "does not describe the units that are committed now")


def test_a_corpus_that_is_not_merged_yet_is_a_note(tmp_path):
    committed.write(tmp_path / "out")
    report = verify.verify(tmp_path / "out")
    assert report.ok and "not merged" in report.notes[0].what


def test_many_problems_of_one_kind_are_counted_and_not_all_listed(out):
    edit_ledger(out, lambda row: row["rle_counts"] is not None, area=1)
    assert len([p for p in found(out) if "area says 1" in p]) == 16
    from paracaption.pipeline.corpus import verify_unit

    unit = verify_unit.UnitCheck(reader.open_corpus(out).units("coconut")[0])
    for i in range(50):
        unit.report("a", str(i), "is wrong", "wrongness")
    assert len(unit.finish()) == 21 and "30 more of this kind" in unit.finish()[-1].what


def test_a_region_count_that_a_merge_would_trip_over_is_found_first(out):
    edit_ledger(out, first_kept, kept=False, drop_stage="x", drop_reason="iou_low")
    named(out, "kept regions: 6, its manifest says 7")
    with pytest.raises(merge.IntegrityError, match="paracaption verify"):
        merge.merge(out)


def test_a_photo_that_is_not_the_captioned_one_is_found(out):
    path = out / "coconut" / "ledger" / f"{UNIT}.parquet"
    table = pq.read_table(path)
    kept = table["kept"].to_pylist()
    shard = (out / "coconut" / "shards" / f"{UNIT}.tar").read_bytes()
    places = zip(table["photo_offset"].to_pylist(), table["photo_length"].to_pylist(), kept, strict=True)
    digests = [
        hashlib.sha256(shard[at : at + size]).hexdigest() if is_kept else None for at, size, is_kept in places
    ]
    for wrong in (False, True):
        if wrong:
            digests[kept.index(True)] = "0" * 64
        path.write_bytes(table_bytes(table.append_column("photo_digest", pa.array(digests, pa.string()))))
        sign(out, "ledger")
        assert any("another photo was captioned" in problem for problem in found(out)) == wrong
