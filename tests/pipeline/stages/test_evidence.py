import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.io.location import locate
from paracaption.pipeline.stages.agreement import Resegmented
from paracaption.pipeline.stages.caption import Captioned
from paracaption.pipeline.stages.category import Judged
from paracaption.pipeline.stages.evidence import Answered, EvidenceStore, digest, fingerprint
from paracaption.schemas.errors import StageFailed


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        (Captioned, [Captioned("a cat"), Captioned(None), Captioned("")]),
        (Captioned, [Captioned("a cat", 0.5), Captioned(None), Captioned("", 1.0)]),
        (Judged, [Judged("yes", 0.5), Judged("no", None), Judged("", -1.0)]),
        (Resegmented, [Resegmented(0.25, 0.9, "0P1", 3), Resegmented(0.0, 0.0, None, 0)]),
    ],
)
def test_evidence_comes_back_as_it_was_saved(tmp_path, kind, answers):
    store = EvidenceStore(tmp_path / "caption-0", kind)
    evidence = {
        ("image", i): Answered(fingerprint(i), answer, "ab" * 32 * (i % 2))
        for i, answer in enumerate(answers)
    }
    store.save("unit", evidence)
    assert store.load("unit") == evidence


def test_equal_evidence_is_equal_bytes_in_any_order(tmp_path):
    rows = [(("b", 1), Answered("x", Captioned("one"))), (("a", 2), Answered("y", Captioned("two")))]
    first, second = EvidenceStore(tmp_path / "1", Captioned), EvidenceStore(tmp_path / "2", Captioned)
    first.save("unit", dict(rows))
    second.save("unit", dict(reversed(rows)))
    assert first.path("unit").read_bytes() == second.path("unit").read_bytes()


def test_a_field_of_a_later_release_has_no_column_if_no_answer_has_it(tmp_path):
    store = EvidenceStore(tmp_path, Captioned)
    store.save("without", {("a", 0): Answered("x", Captioned("old"))})
    store.save(
        "with", {("a", 0): Answered("x", Captioned("old")), ("a", 1): Answered("y", Captioned("new", 0.5))}
    )
    names = ["key", "region", "asked", "photo", "caption"]
    assert pq.read_schema(store.path("without")).names == names
    assert pq.read_schema(store.path("with")).names == [*names, "confidence"]


def test_no_file_is_no_evidence(tmp_path):
    assert EvidenceStore(tmp_path, Captioned).load("unit") == {}


def test_an_unreadable_file_is_no_evidence_and_says_so(tmp_path, caplog):
    store = EvidenceStore(tmp_path, Captioned)
    store.path("unit").write_bytes(b"PAR1 cut short")
    assert store.load("unit") == {}
    assert "unit.parquet" in caplog.text


def test_a_failed_save_leaves_the_old_evidence_and_no_temporary_file(tmp_path, monkeypatch):
    store = EvidenceStore(tmp_path, Captioned)
    store.save("unit", {("a", 0): Answered("x", Captioned("old"))})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        store.save("unit", {("a", 0): Answered("x", Captioned("new"))})
    monkeypatch.undo()
    assert store.load("unit")["a", 0][1].caption == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["unit.parquet"]


def test_digests_do_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


ROWS = {
    Captioned: lambda i: Captioned(f"A red box of {i} pixels on a white table."),
    Judged: lambda i: Judged("yes" if i % 3 else "no", 0.125 * i),
    Resegmented: lambda i: Resegmented(i / 7, 0.9, f"0P{i}1o", i % 4),
}


@pytest.fixture(params=list(ROWS), ids=lambda kind: kind.__name__)
def stored(tmp_path, request):
    """A store of each kind with evidence of one unit, and that evidence."""
    store = EvidenceStore(tmp_path, request.param)
    evidence = {
        (f"image{i // 3}", i % 3): Answered(fingerprint(i), ROWS[request.param](i), fingerprint(i // 3) * 4)
        for i in range(12)
    }
    store.save("unit", evidence)
    return store, evidence


@pytest.mark.parametrize("every", [70, pytest.param(7, marks=pytest.mark.soak)])
@pytest.mark.soak
def test_no_flipped_bit_is_another_answer(stored, every):
    store, evidence = stored
    path = store.path("unit")
    good = path.read_bytes()
    damaged = 0
    for place in range(0, len(good), every):
        data = bytearray(good)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        found = store.load("unit")
        assert found in ({}, evidence), f"bit {place % 8} of byte {place}"
        damaged += not found
    assert damaged > len(good) / (2 * every)


def test_a_file_cut_short_or_with_zeros_in_it_is_absent(stored, caplog):
    store, evidence = stored
    good = store.path("unit").read_bytes()
    middle = len(good) // 3
    for data in (b"", good[:4], good[:-9], good[:middle] + bytes(64) + good[middle + 64 :], good + good):
        store.path("unit").write_bytes(data)
        assert store.load("unit") in ({}, evidence)
    assert "unit.parquet: unreadable evidence" in caplog.text


def test_evidence_with_the_column_and_without_its_digest_is_damaged(stored, caplog):
    store, _ = stored
    table = pq.read_table(store.path("unit"))
    pq.write_table(table.replace_schema_metadata(None), store.path("unit"))
    assert store.load("unit") == {} and "not what was written" in caplog.text


def test_evidence_of_early_releases_names_no_photo_and_is_read(stored):
    store, evidence = stored
    table = pq.read_table(store.path("unit"))
    pq.write_table(table.drop_columns(["photo"]).replace_schema_metadata(None), store.path("unit"))
    assert store.load("unit") == {place: row._replace(photo="") for place, row in evidence.items()}


@pytest.mark.parametrize("change", ["fewer", "more", "renamed", "another type"])
def test_any_other_set_of_columns_is_damaged(stored, change, caplog):
    store, _ = stored
    table = pq.read_table(store.path("unit")).drop_columns(["photo"])
    changed = {
        "fewer": table.drop_columns(["asked"]),
        "more": table.append_column("note", table["key"]),
        "renamed": table.rename_columns(["kex", *table.column_names[1:]]),
        "another type": table.set_column(1, "region", table["region"].cast("int32")),
    }
    pq.write_table(changed[change], store.path("unit"))
    assert store.load("unit") == {} and "unreadable evidence" in caplog.text


def test_more_rows_than_the_file_can_hold_are_not_read(stored, caplog, monkeypatch):
    store, _ = stored
    monkeypatch.setattr("paracaption.pipeline.stages.evidence._ROWS_PER_BYTE", 0.001)
    assert store.load("unit") == {} and "12 rows in" in caplog.text


def test_numbers_are_the_same_evidence_whatever_their_type(tmp_path):
    store = EvidenceStore(tmp_path, Judged)
    store.save("unit", {("a", 0): Answered("x", Judged("yes", 1))})
    assert store.load("unit") == {("a", 0): Answered("x", Judged("yes", 1.0))}


def test_a_disk_that_does_not_give_the_file_is_no_verdict_on_what_is_in_it(stored, monkeypatch):
    store, _ = stored
    error = OSError(5, "Input/output error")
    monkeypatch.setattr(
        "paracaption.pipeline.stages.evidence.files.read", lambda _: (_ for _ in ()).throw(error)
    )
    with pytest.raises(StageFailed, match=r"unit\.parquet: cannot be read \(Input/output error\)"):
        store.load("unit")


def test_what_is_saved_after_answers_were_forgotten_is_found(memory_out):
    """No part of a unit in a bucket may be left out: what comes after is not looked for."""
    store = EvidenceStore(locate(memory_out) / "caption-0", Captioned)
    for key in "abc":
        store.save("unit", {(key, 0): Answered("x", Captioned(key))})
    store.load("unit")
    assert store.forget("unit", ["a"])
    store.save("unit", {("d", 0): Answered("x", Captioned("d"))})
    found = EvidenceStore(store.folder, Captioned).load("unit")
    assert sorted(key for key, _ in found) == ["b", "c", "d"]
    store.load("unit")
    store.delete("unit")
    store.save("unit", {("e", 0): Answered("x", Captioned("e"))})
    assert sorted(EvidenceStore(store.folder, Captioned).load("unit")) == [("e", 0)]
