"""The plan: deterministic, read by unit, reused on a resume and refused when its sources have changed."""

import io
import os
import shutil
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paracaption.pipeline.corpus import work_list, work_list_summary
from paracaption.pipeline.corpus.pending import find_pending_units
from paracaption.pipeline.sources import file_names
from paracaption.pipeline.sources.protocols import CatalogEntry
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas import manifest as manifests
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import IntegrityError
from paracaption.schemas.manifest import FileEntry, Manifest
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Blob, Drop
from tests.synthetic import write_sa1b


class FakeSource:
    """A source whose catalog is what the test says."""

    subset = "sa1b"

    def __init__(self, entries, version="1"):
        self.entries = entries
        self.version = version
        self.notes = []
        self.times_listed = 0

    def fingerprint(self):
        return {"list": self.version}

    def catalog(self, earlier=None):
        self.times_listed += 1
        yield from self.entries

    def read(self, entry, limits, notes=None):
        raise AssertionError("planning reads no image")


@pytest.fixture
def tmp_path(tmp_path):
    """A subset's folder in a corpus of its own, whose log lies beside it."""
    folder = tmp_path / "sa1b"
    folder.mkdir()
    return folder


def config_of(tmp_path, images_per_shard=3):
    values = {"out": str(tmp_path), "sa1b": {"paths": ["x"]}, "images_per_shard": images_per_shard}
    return BuildConfig.model_validate(values)


def entries_of(*keys):
    return [
        CatalogEntry(key, Blob(f"/{key}.jpg"), Blob("/t.tar", 512, 9), b"{}", f"{key}.jpg") for key in keys
    ]


blobs = st.none() | st.builds(
    Blob, st.text(max_size=9), st.integers(0, 2**40), st.none() | st.integers(0, 2**40)
)
drops = st.none() | st.builds(Drop, st.just("source"), st.sampled_from(Reason), st.text(max_size=9))
entries = st.builds(
    CatalogEntry,
    st.uuids().map(str),
    blobs,
    blobs,
    st.binary(max_size=99),
    st.text(max_size=9),
    drops,
    st.integers(0, 9),
)


@given(st.lists(entries, max_size=12, unique_by=lambda entry: entry.key), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
@pytest.mark.soak
def test_units_hold_every_image_once_in_order(tmp_path_factory, listed, size):
    folder = tmp_path_factory.mktemp("plan") / "sa1b"
    made = work_list.make_work_list(FakeSource(listed), config_of(folder, size), folder)
    units = [work_list_summary.read_unit(folder, index) for index in range(made.num_units)]
    assert [entry for unit in units for entry in unit] == listed
    assert [len(unit) for unit in units[:-1]] == [size] * (made.num_units - 1)
    assert made.num_images == len(listed)


def test_units_are_named_in_order(tmp_path):
    made = work_list.make_work_list(FakeSource(entries_of("a", "b", "c", "d")), config_of(tmp_path), tmp_path)
    assert made.unit_names() == ["sa1b-000000", "sa1b-000001"]
    assert [entry.key for entry in made.read_unit(1)] == ["d"]
    assert work_list_summary.load_work_list(tmp_path) == made


def test_the_same_sources_make_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        work_list.make_work_list(FakeSource(entries_of(*"abcdefg")), config_of(tmp_path), tmp_path / name)
    for file in (work_list_summary.TABLE, work_list_summary.SUMMARY):
        assert (tmp_path / "one/plan" / file).read_bytes() == (tmp_path / "two/plan" / file).read_bytes()


def test_a_resume_with_unchanged_sources_does_not_list_them_again(tmp_path):
    source = FakeSource(entries_of("a", "b"))
    first = work_list.make_work_list(source, config_of(tmp_path), tmp_path)
    assert work_list.make_work_list(source, config_of(tmp_path), tmp_path) == first
    assert source.times_listed == 1


def test_a_plan_whose_table_is_gone_is_made_again_and_a_changed_source_is_still_refused(tmp_path):
    first = work_list.make_work_list(FakeSource(entries_of("a", "b")), config_of(tmp_path), tmp_path)
    table = tmp_path / work_list_summary.FOLDER / work_list_summary.TABLE
    before = table.read_bytes()
    table.unlink()
    assert not work_list.is_current(first, FakeSource(entries_of("a", "b")), config_of(tmp_path))
    assert work_list.make_work_list(FakeSource(entries_of("a", "b")), config_of(tmp_path), tmp_path) == first
    assert table.read_bytes() == before
    table.unlink()
    with pytest.raises(IntegrityError, match="old work list is gone"):
        work_list.make_work_list(FakeSource(entries_of("a", "c"), "2"), config_of(tmp_path), tmp_path)


def test_touched_sources_with_the_same_content_go_on(tmp_path):
    first = work_list.make_work_list(FakeSource(entries_of("a", "b")), config_of(tmp_path), tmp_path)
    again = work_list.make_work_list(FakeSource(entries_of("a", "b"), "2"), config_of(tmp_path), tmp_path)
    assert again.digest == first.digest and again.fingerprint == {"list": "2"}


def test_a_photo_that_is_found_later_or_elsewhere_does_not_make_another_plan(tmp_path):
    (found,) = entries_of("a")
    drop = Drop("source", Reason.PHOTO_MISSING, "a")
    missing = msgspec.structs.replace(found, photo=None, drop=drop)
    first = work_list.make_work_list(FakeSource([missing]), config_of(tmp_path), tmp_path)
    again = work_list.make_work_list(FakeSource([found], "2"), config_of(tmp_path), tmp_path)
    assert again.digest == first.digest and again.read_unit(0) == [found]


def test_changed_sources_make_the_list_grow_and_its_units_keep_their_images(tmp_path):
    first = work_list.make_work_list(FakeSource(entries_of(*"abcd")), config_of(tmp_path), tmp_path)
    changed = entries_of("new0", "a", "c", "d", *(f"new{i}" for i in range(1, 7)))
    changed[2] = msgspec.structs.replace(changed[2], record=b"other")
    with tempfile.TemporaryDirectory() as scratch:
        planned = work_list.plan(FakeSource(changed, "2"), config_of(tmp_path), tmp_path, Path(scratch))
        assert str(planned.growth) == (
            "7 images are new (new0, new1, new2, new3, new4, ...): 3 units are added; "
            "1 image changed in the source (c): 1 unit is built again; "
            "1 image is gone from the source (b) and stays in the corpus"
        )
    assert work_list_summary.load_work_list(tmp_path) == first
    made = work_list.make_work_list(FakeSource(changed, "2"), config_of(tmp_path), tmp_path)
    units = [[entry.key for entry in made.read_unit(index)] for index in range(made.num_units)]
    assert units == [[*"abc"], ["d"], ["new0", "new1", "new2"], ["new3", "new4", "new5"], ["new6"]]
    assert [made.num_images_of(index) for index in range(5)] == [3, 1, 3, 3, 1] and made.num_images == 11
    assert made.plans() == [made.digest, first.digest, *[made.digest] * 3]
    assert made.read_unit(0)[1].drop.reason is Reason.GONE and made.read_unit(0)[2].record == b"other"
    assert (made.gone, made.gone_examples) == (1, ["b"])
    assert work_list_summary.load_work_list(tmp_path) == made and work_list_summary.find_damage(made) is None
    again = work_list.make_work_list(FakeSource(changed, "3"), config_of(tmp_path), tmp_path)
    assert again.digest == made.digest and again.steps == made.steps


@pytest.mark.parametrize("damaged", [work_list_summary.TABLE, work_list_summary.SUMMARY])
def test_a_damaged_list_that_has_grown_is_made_again_in_its_steps(tmp_path, damaged):
    config = config_of(tmp_path)
    work_list.make_work_list(FakeSource(entries_of(*"abcd")), config, tmp_path)
    grown = work_list.make_work_list(FakeSource(entries_of(*"abcdef"), "2"), config, tmp_path)
    before = work_list_summary.table_path(tmp_path).read_bytes()
    path = tmp_path / work_list_summary.FOLDER / damaged
    path.write_bytes(path.read_bytes()[:-9])
    again = work_list.make_work_list(FakeSource(entries_of(*"abcdef"), "2"), config, tmp_path)
    assert again == grown and work_list_summary.load_work_list(tmp_path) == grown
    assert work_list_summary.table_path(tmp_path).read_bytes() == before
    path.unlink()
    more = work_list.make_work_list(FakeSource(entries_of(*"abcdefg"), "3"), config, tmp_path)
    units = [[entry.key for entry in more.read_unit(index)] for index in range(more.num_units)]
    assert units == [[*"abc"], ["d"], [*"ef"], ["g"]]


def test_an_image_that_is_gone_and_comes_back_is_as_it_was(tmp_path):
    config = config_of(tmp_path)
    first = work_list.make_work_list(FakeSource(entries_of(*"abcd")), config, tmp_path)
    gone = work_list.make_work_list(FakeSource(entries_of(*"acd"), "2"), config, tmp_path)
    assert (gone.digest, gone.gone, gone.steps) == (first.digest, 1, [])
    back = work_list.make_work_list(FakeSource(entries_of(*"abcd"), "1"), config, tmp_path)
    assert back == first


def test_another_order_is_the_same_list_and_another_unit_size_is_refused(tmp_path):
    first = work_list.make_work_list(FakeSource(entries_of("a", "b")), config_of(tmp_path), tmp_path)
    again = work_list.make_work_list(FakeSource(entries_of("b", "a"), "2"), config_of(tmp_path), tmp_path)
    assert again.digest == first.digest and [entry.key for entry in again.read_unit(0)] == ["a", "b"]
    with pytest.raises(IntegrityError, match="images_per_shard was 3, is now 4"):
        work_list.make_work_list(FakeSource(entries_of("a", "c")), config_of(tmp_path, 4), tmp_path)


def test_a_limit_takes_the_first_images(tmp_path):
    made = work_list.make_work_list(FakeSource(entries_of(*"abcdef")), config_of(tmp_path), tmp_path, limit=4)
    assert made.num_images == 4 and made.num_units == 2


def test_a_source_without_images_makes_a_plan_without_units(tmp_path):
    made = work_list.make_work_list(FakeSource([]), config_of(tmp_path), tmp_path)
    assert (made.num_images, made.num_units, find_pending_units(made, "r")) == (
        0,
        0,
        [],
    )


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff"])
def test_a_plan_that_does_not_parse_is_named(tmp_path, damage):
    work_list.make_work_list(FakeSource(entries_of("a")), config_of(tmp_path), tmp_path)
    (tmp_path / "plan" / work_list_summary.SUMMARY).write_bytes(damage)
    with pytest.raises(IntegrityError, match=r"plan\.json.*delete it"):
        work_list_summary.load_work_list(tmp_path)


@pytest.mark.parametrize("index", [-1, 1])
def test_a_unit_that_is_not_there_is_named(tmp_path, index):
    made = work_list.make_work_list(FakeSource(entries_of("a")), config_of(tmp_path), tmp_path)
    with pytest.raises(IntegrityError, match="no unit"):
        made.read_unit(index)


def test_a_table_that_is_damaged_is_named(tmp_path):
    made = work_list.make_work_list(FakeSource(entries_of("a")), config_of(tmp_path), tmp_path)
    (tmp_path / work_list_summary.FOLDER / work_list_summary.TABLE).write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match=r"plan\.parquet"):
        made.read_unit(0)


def write_manifest(folder, made, index, recipe="r", digest=None):
    """Commit a unit as early releases did, which had no log."""
    shutil.rmtree(folder.parent.parent / "log", ignore_errors=True)
    for name in ("manifests", "ledger"):
        (folder.parent / name).mkdir(exist_ok=True)
    unit = made.unit_name(index)
    entry = FileEntry(f"ledger/{unit}.parquet", 1, "0" * 64)
    found = Manifest(unit, made.subset, digest or made.digest, recipe, None, entry, {}, 0, 0, {}, {})
    (folder.parent / "ledger" / f"{unit}.parquet").write_bytes(b"?")
    (folder / f"{unit}.json").write_bytes(manifests.encode(found))


def test_units_without_a_manifest_or_of_another_recipe_are_pending(tmp_path):
    made = work_list.make_work_list(FakeSource(entries_of(*"abcdefghij")), config_of(tmp_path), tmp_path)
    folder = tmp_path / "manifests"
    assert find_pending_units(made, "r") == [0, 1, 2, 3]
    write_manifest(folder, made, 1)
    write_manifest(folder, made, 2, recipe="other")
    (folder / ".tmp-sa1b-000003.json-1").write_bytes(b"")
    assert find_pending_units(made, "r") == [0, 2, 3]


def test_manifests_of_another_plan_or_of_no_unit_or_of_nothing_are_refused_by_name(tmp_path):
    made = work_list.make_work_list(FakeSource(entries_of("a")), config_of(tmp_path), tmp_path)
    folder = tmp_path / "manifests"
    write_manifest(folder, made, 0, digest="other")
    with pytest.raises(
        IntegrityError, match=r"sa1b-000000\.json: this unit was built from the work list other"
    ):
        find_pending_units(made, "r")
    write_manifest(folder, made, 0)
    write_manifest(folder, made, 5)
    with pytest.raises(IntegrityError, match=r"sa1b-000005\.json: the work list has no such unit"):
        find_pending_units(made, "r")
    (folder / "sa1b-000000.json").write_bytes(b"{")
    with pytest.raises(IntegrityError, match=r"sa1b-000000\.json: not a manifest.*delete it"):
        find_pending_units(made, "r")


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


def entries_of_all_kinds():
    """What each column of the table may hold."""
    listed = entries_of(*"abcdefg")
    drop = Drop("source", Reason.PHOTO_MISSING, "c.jpg: in none of the folders of `photos`")
    listed[2] = CatalogEntry("c", None, None, b'{"width": 3}', "c.jpg", drop)
    return [*listed, *(msgspec.structs.replace(each, key=f"{each.key}2", source=1) for each in listed)]


def lists(folder, listed, config):
    """What a build would work on: the list made or found, and every unit of it."""
    made = work_list.make_work_list(FakeSource(listed), config, folder)
    return made.digest, [made.read_unit(index) for index in range(made.num_units)]


@pytest.mark.soak
def test_no_flipped_bit_of_the_table_is_another_list_and_a_damaged_one_is_made_anew(tmp_path):
    listed, config = entries_of_all_kinds(), config_of(tmp_path, 4)
    expected = lists(tmp_path, listed, config)
    path = work_list_summary.table_path(tmp_path)
    good = path.read_bytes()
    for place in range(0, len(good), len(good) // 25):
        path.write_bytes(flipped(good, place))
        for index, unit in enumerate(expected[1]):  # a worker that meets it has an error or the unit
            with suppress(IntegrityError):
                assert work_list_summary.read_unit(tmp_path, index) == unit, f"byte {place}"
        assert lists(tmp_path, listed, config) == expected
        assert path.read_bytes() == good


@pytest.mark.soak
def test_no_flipped_bit_of_the_summary_is_another_list_and_a_damaged_one_is_made_anew(tmp_path):
    listed, config = entries_of_all_kinds(), config_of(tmp_path, 4)
    expected = lists(tmp_path, listed, config)
    path = work_list_summary.summary_path(tmp_path)
    good = path.read_bytes()
    for place in range(0, len(good), len(good) // 25):
        path.write_bytes(flipped(good, place))
        assert lists(tmp_path, listed, config) == expected, f"byte {place}"
        assert work_list_summary.load_work_list(tmp_path).num_units == 4
        path.write_bytes(good)


def as_early_releases_wrote_it(folder):
    """Take away what they did not write: the checks, and in the summary what was added."""
    path = work_list_summary.table_path(folder)
    groups = []
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(index) for index in range(file.num_row_groups)]
    groups = [group.drop_columns(["credit", "check"]) for group in groups]
    with pq.ParquetWriter(path, groups[0].schema, compression="zstd", compression_level=1) as writer:
        for group in groups:
            writer.write_table(group)
    summary = msgspec.json.decode(work_list_summary.summary_path(folder).read_bytes())
    for name in ("sources", "table", "check", "credits"):
        del summary[name]
    work_list_summary.summary_path(folder).write_bytes(msgspec.json.encode(summary))


def test_a_list_of_an_early_release_is_taken_as_it_is_and_what_shows_of_damage_is_found(tmp_path):
    listed, config = entries_of_all_kinds(), config_of(tmp_path, 4)
    expected = lists(tmp_path, listed, config)
    as_early_releases_wrote_it(tmp_path)
    path = work_list_summary.table_path(tmp_path)
    early = path.read_bytes()
    assert lists(tmp_path, listed, config) == expected and path.read_bytes() == early
    summary = msgspec.json.decode(work_list_summary.summary_path(tmp_path).read_bytes())
    for name, value in (("num_units", 3), ("num_images", 13), ("digest", "0" * 64)):
        work_list_summary.summary_path(tmp_path).write_bytes(msgspec.json.encode(summary | {name: value}))
        found = work_list_summary.find_work_list(tmp_path)
        assert found is not None and "damaged" in (work_list_summary.find_damage(found) or "")
    work_list_summary.summary_path(tmp_path).write_bytes(msgspec.json.encode(summary))
    path.write_bytes(early[:-20])
    assert lists(tmp_path, listed, config) == expected
    assert work_list_summary.load_work_list(tmp_path).table  # it is a list of today's now


def test_rows_that_are_gone_or_in_another_place_are_damage(tmp_path):
    config = config_of(tmp_path, 3)
    work_list.make_work_list(FakeSource(entries_of(*"abcdef")), config, tmp_path)
    path = work_list_summary.table_path(tmp_path)
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(index) for index in range(2)]
    for changed in (
        [groups[0][:2], groups[1]],
        [groups[1], groups[0]],
        [groups[0].take([1, 0, 2]), groups[1]],
    ):
        with pq.ParquetWriter(path, groups[0].schema) as writer:
            for group in changed:
                writer.write_table(group)
        with pytest.raises(IntegrityError, match="row 0 of unit 0 is damaged"):
            work_list_summary.read_unit(tmp_path, 0)
    with pq.ParquetWriter(path, groups[0].schema) as writer:
        writer.write_table(groups[0][:0])
    with pytest.raises(IntegrityError, match=r"no row|no unit"):
        work_list_summary.read_unit(tmp_path, 0)


def test_damage_with_other_sources_is_one_clear_error(tmp_path):
    work_list.make_work_list(FakeSource(entries_of("a", "b")), config_of(tmp_path), tmp_path)
    work_list_summary.table_path(tmp_path).write_bytes(b"PAR1")
    with pytest.raises(
        IntegrityError, match=r"cannot be named, because the old work list is damaged.*use a new `out`"
    ):
        work_list.make_work_list(FakeSource(entries_of("a", "c"), "2"), config_of(tmp_path), tmp_path)


def coconut_config(tmp_path, **changes):
    source = {
        "source": "coconut",
        "annotations": ["/d/panoptic.json"],
        "labels": "/d/labels",
        "photos": ["/d/a", "/d/b"],
    }
    values = {"out": str(tmp_path), "subsets": {"sa1b": {"sources": [source | changes]}}}
    return BuildConfig.model_validate(values)


SWAPS = {
    "order of photos": ({"photos": ["/d/b", "/d/a"]}, "photos was /d/a, /d/b, is /d/b, /d/a"),
    "roles": ({"photos": ["/d/labels", "/d/b"], "labels": "/d/a"}, "labels was /d/labels, is /d/a"),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_places_in_another_order_or_role_are_planned_anew_and_refused_beside_committed_units(tmp_path, swap):
    changes, difference = SWAPS[swap]
    source = FakeSource(entries_of("a", "b"))
    first = work_list.make_work_list(source, coconut_config(tmp_path), tmp_path)
    swapped = coconut_config(tmp_path, **changes)
    assert not work_list.is_current(first, source, swapped)
    write_manifest(tmp_path / "manifests", first, 0)
    with pytest.raises(IntegrityError, match="the committed units were read with other settings") as caught:
        work_list.make_work_list(source, swapped, tmp_path)
    assert difference in str(caught.value)
    assert work_list_summary.load_work_list(tmp_path) == first
    (tmp_path / "manifests" / "sa1b-000000.json").unlink()
    again = work_list.make_work_list(source, swapped, tmp_path)
    assert again.digest == first.digest and again.sources != first.sources and source.times_listed == 2


def test_places_that_are_added_or_moved_are_planned_anew_and_not_refused(tmp_path):
    source = FakeSource(entries_of("a", "b"))
    first = work_list.make_work_list(source, coconut_config(tmp_path), tmp_path)
    write_manifest(tmp_path / "manifests", first, 0)
    for photos in (["/d/a", "/d/b", "/d/c"], ["/e/a", "/e/b"], ["/e/b"]):
        again = work_list.make_work_list(source, coconut_config(tmp_path, photos=photos), tmp_path)
        assert again.digest == first.digest and again.sources[0]["photos"] == photos
    assert source.times_listed == 4


def test_any_other_option_is_planned_anew(tmp_path):
    source = FakeSource(entries_of("a", "b"))
    work_list.make_work_list(source, coconut_config(tmp_path), tmp_path)
    work_list.make_work_list(source, coconut_config(tmp_path, categories="/d/categories.json"), tmp_path)
    assert source.times_listed == 2


def test_a_list_of_an_early_release_does_not_know_its_roles_and_counts_as_unchanged(tmp_path):
    source = FakeSource(entries_of("a", "b"))
    work_list.make_work_list(source, coconut_config(tmp_path), tmp_path)
    as_early_releases_wrote_it(tmp_path)
    early = work_list_summary.load_work_list(tmp_path)
    for changes, _ in SWAPS.values():
        swapped = coconut_config(tmp_path, **changes)
        assert work_list.is_current(early, source, swapped)
        assert work_list.make_work_list(source, swapped, tmp_path) == early
    assert source.times_listed == 1


def test_a_corpus_with_keys_of_an_early_release_keeps_them_on_a_resume(tmp_path, monkeypatch):
    folder = tmp_path.parent / "tars"
    config = BuildConfig.model_validate({"out": str(tmp_path.parent), "sa1b": [write_sa1b(folder, 3)]})
    for name in ("sa_0", "sa_1"):  # in the names of members
        path = folder / "sa_000000.tar"
        path.write_bytes(renamed(path, name, f"__{name}"))
    with monkeypatch.context() as patched:
        patched.setattr(file_names, "HIDDEN", "no name begins so")
        early = work_list.make_work_list(open_source(config, "sa1b"), config, tmp_path)
    keys = [entry.key for entry in early.read_unit(0)]
    assert keys == ["__sa_0", "__sa_1", "sa_2"]
    os.utime(folder / "sa_000000.tar", (1, 1))
    resumed = work_list.make_work_list(open_source(config, "sa1b"), config, tmp_path)
    assert resumed.digest == early.digest and resumed.fingerprint != early.fingerprint
    assert [entry.key for entry in resumed.read_unit(0)] == keys
    fresh = work_list.make_work_list(open_source(config, "sa1b"), config, tmp_path.parent / "fresh" / "sa1b")
    assert [entry.key[:7] for entry in fresh.read_unit(0)] == ["x__sa_0", "x__sa_1", "sa_2"]


def renamed(path, old, new):
    """The bytes of a tar in which the members of one base name have another one."""
    buffer = io.BytesIO()
    with tarfile.open(path) as source, tarfile.open(fileobj=buffer, mode="w") as target:
        for member in source:
            data = source.extractfile(member)
            member.name = member.name.replace(f"{old}.", f"{new}.")
            target.addfile(member, data)
    return buffer.getvalue()
