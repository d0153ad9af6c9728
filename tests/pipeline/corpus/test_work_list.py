"""The plan: deterministic, read by unit, reused on a resume and refused when its sources have changed."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paracaption.pipeline.corpus import work_list
from paracaption.pipeline.sources.protocols import CatalogEntry
from paracaption.schemas import manifest as manifests
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import IntegrityError
from paracaption.schemas.manifest import FileEntry, Manifest
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Blob, Drop


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

    def catalog(self):
        self.times_listed += 1
        yield from self.entries

    def read(self, entry, limits, notes=None):
        raise AssertionError("planning reads no image")


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
def test_units_hold_every_image_once_in_order(tmp_path_factory, listed, size):
    folder = tmp_path_factory.mktemp("plan")
    made = work_list.make_work_list(FakeSource(listed), config_of(folder, size), folder)
    units = [work_list.read_unit(folder, index) for index in range(made.num_units)]
    assert [entry for unit in units for entry in unit] == listed
    assert [len(unit) for unit in units[:-1]] == [size] * (made.num_units - 1)
    assert made.num_images == len(listed)


def test_units_are_named_in_order(tmp_path):
    made = work_list.make_work_list(FakeSource(entries_of("a", "b", "c", "d")), config_of(tmp_path), tmp_path)
    assert made.unit_names() == ["sa1b-000000", "sa1b-000001"]
    assert [entry.key for entry in made.read_unit(1)] == ["d"]
    assert work_list.load_work_list(tmp_path) == made


def test_the_same_sources_make_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        work_list.make_work_list(FakeSource(entries_of(*"abcdefg")), config_of(tmp_path), tmp_path / name)
    for file in (work_list.TABLE, work_list.SUMMARY):
        assert (tmp_path / "one/plan" / file).read_bytes() == (tmp_path / "two/plan" / file).read_bytes()


def test_a_resume_with_unchanged_sources_does_not_list_them_again(tmp_path):
    source = FakeSource(entries_of("a", "b"))
    first = work_list.make_work_list(source, config_of(tmp_path), tmp_path)
    assert work_list.make_work_list(source, config_of(tmp_path), tmp_path) == first
    assert source.times_listed == 1


def test_a_plan_whose_table_is_gone_is_made_again_and_a_changed_source_is_still_refused(tmp_path):
    first = work_list.make_work_list(FakeSource(entries_of("a", "b")), config_of(tmp_path), tmp_path)
    table = tmp_path / work_list.FOLDER / work_list.TABLE
    before = table.read_bytes()
    table.unlink()
    assert not first.is_current(FakeSource(entries_of("a", "b")), config_of(tmp_path))
    assert work_list.make_work_list(FakeSource(entries_of("a", "b")), config_of(tmp_path), tmp_path) == first
    assert table.read_bytes() == before
    table.unlink()
    with pytest.raises(IntegrityError, match="it is gone"):
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


def test_changed_sources_are_refused_with_the_difference_and_the_old_plan_stays(tmp_path):
    first = work_list.make_work_list(FakeSource(entries_of(*"abcd")), config_of(tmp_path), tmp_path)
    changed = entries_of("a", "c", "d", *(f"new{i}" for i in range(7)))
    changed[1] = msgspec.structs.replace(changed[1], record=b"other")
    with pytest.raises(IntegrityError) as caught:
        work_list.make_work_list(FakeSource(changed, "2"), config_of(tmp_path), tmp_path)
    message = str(caught.value)
    assert "7 images added (new0, new1, new2, new3, new4, ...)" in message
    assert "1 images removed (b)" in message and "1 images changed (c)" in message and "new `out`" in message
    assert work_list.load_work_list(tmp_path) == first and len(first.read_unit(0)) == 3
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == [work_list.SUMMARY, work_list.TABLE]


def test_another_order_and_another_unit_size_are_refused(tmp_path):
    work_list.make_work_list(FakeSource(entries_of("a", "b")), config_of(tmp_path), tmp_path)
    with pytest.raises(IntegrityError, match="another order"):
        work_list.make_work_list(FakeSource(entries_of("b", "a"), "2"), config_of(tmp_path), tmp_path)
    with pytest.raises(IntegrityError, match="images_per_shard was 3, is 4"):
        work_list.make_work_list(FakeSource(entries_of("a", "b")), config_of(tmp_path, 4), tmp_path)


def test_a_limit_takes_the_first_images(tmp_path):
    made = work_list.make_work_list(FakeSource(entries_of(*"abcdef")), config_of(tmp_path), tmp_path, limit=4)
    assert made.num_images == 4 and made.num_units == 2


def test_a_source_without_images_makes_a_plan_without_units(tmp_path):
    made = work_list.make_work_list(FakeSource([]), config_of(tmp_path), tmp_path)
    assert (made.num_images, made.num_units, work_list.find_pending_units(made, "r")) == (
        0,
        0,
        [],
    )


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff"])
def test_a_plan_that_does_not_parse_is_named(tmp_path, damage):
    work_list.make_work_list(FakeSource(entries_of("a")), config_of(tmp_path), tmp_path)
    (tmp_path / "plan" / work_list.SUMMARY).write_bytes(damage)
    with pytest.raises(IntegrityError, match=r"plan\.json.*delete it"):
        work_list.load_work_list(tmp_path)


@pytest.mark.parametrize("index", [-1, 1])
def test_a_unit_that_is_not_there_is_named(tmp_path, index):
    made = work_list.make_work_list(FakeSource(entries_of("a")), config_of(tmp_path), tmp_path)
    with pytest.raises(IntegrityError, match="no unit"):
        made.read_unit(index)


def test_a_table_that_is_damaged_is_named(tmp_path):
    made = work_list.make_work_list(FakeSource(entries_of("a")), config_of(tmp_path), tmp_path)
    (tmp_path / work_list.FOLDER / work_list.TABLE).write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match=r"plan\.parquet"):
        made.read_unit(0)


def write_manifest(folder, made, index, recipe="r", digest=None):
    folder.mkdir(exist_ok=True)
    unit = made.unit_name(index)
    entry = FileEntry(f"ledger/{unit}.parquet", 1, "0" * 64)
    found = Manifest(unit, made.subset, digest or made.digest, recipe, None, entry, {}, 0, 0, {}, {})
    (folder / f"{unit}.json").write_bytes(manifests.encode(found))


def test_units_without_a_manifest_or_of_another_recipe_are_pending(tmp_path):
    made = work_list.make_work_list(FakeSource(entries_of(*"abcdefghij")), config_of(tmp_path), tmp_path)
    folder = tmp_path / "manifests"
    assert work_list.find_pending_units(made, "r") == [0, 1, 2, 3]
    write_manifest(folder, made, 1)
    write_manifest(folder, made, 2, recipe="other")
    (folder / ".tmp-sa1b-000003.json-1").write_bytes(b"")
    assert work_list.find_pending_units(made, "r") == [0, 2, 3]


def test_manifests_of_another_plan_or_of_no_unit_or_of_nothing_are_refused_by_name(tmp_path):
    made = work_list.make_work_list(FakeSource(entries_of("a")), config_of(tmp_path), tmp_path)
    folder = tmp_path / "manifests"
    write_manifest(folder, made, 0, digest="other")
    with pytest.raises(IntegrityError, match=r"sa1b-000000\.json: of work list other"):
        work_list.find_pending_units(made, "r")
    write_manifest(folder, made, 0)
    write_manifest(folder, made, 5)
    with pytest.raises(IntegrityError, match=r"sa1b-000005\.json: of no unit"):
        work_list.find_pending_units(made, "r")
    (folder / "sa1b-000000.json").write_bytes(b"{")
    with pytest.raises(IntegrityError, match=r"sa1b-000000\.json: not a manifest.*delete it"):
        work_list.find_pending_units(made, "r")
