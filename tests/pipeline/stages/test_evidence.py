import pytest

from paracaption.pipeline.stages.agreement import Resegmented
from paracaption.pipeline.stages.caption import Captioned
from paracaption.pipeline.stages.category import Judged
from paracaption.pipeline.stages.evidence import EvidenceStore, digest, fingerprint


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        (Captioned, [Captioned("a cat"), Captioned(None), Captioned("")]),
        (Judged, [Judged("yes", 0.5), Judged("no", None), Judged("", -1.0)]),
        (Resegmented, [Resegmented(0.25, 0.9, "0P1", 3), Resegmented(0.0, 0.0, None, 0)]),
    ],
)
def test_evidence_comes_back_as_it_was_saved(tmp_path, kind, answers):
    store = EvidenceStore(tmp_path / "caption-0", kind)
    evidence = {("image", i): (fingerprint(i), answer) for i, answer in enumerate(answers)}
    store.save("unit", evidence)
    assert store.load("unit") == evidence


def test_equal_evidence_is_equal_bytes_in_any_order(tmp_path):
    rows = [(("b", 1), ("x", Captioned("one"))), (("a", 2), ("y", Captioned("two")))]
    first, second = EvidenceStore(tmp_path / "1", Captioned), EvidenceStore(tmp_path / "2", Captioned)
    first.save("unit", dict(rows))
    second.save("unit", dict(reversed(rows)))
    assert first.path("unit").read_bytes() == second.path("unit").read_bytes()


def test_no_file_is_no_evidence(tmp_path):
    assert EvidenceStore(tmp_path, Captioned).load("unit") == {}


def test_an_unreadable_file_is_no_evidence_and_says_so(tmp_path, caplog):
    store = EvidenceStore(tmp_path, Captioned)
    store.path("unit").write_bytes(b"PAR1 cut short")
    assert store.load("unit") == {}
    assert "unit.parquet" in caplog.text


def test_a_failed_save_leaves_the_old_evidence_and_no_temporary_file(tmp_path, monkeypatch):
    store = EvidenceStore(tmp_path, Captioned)
    store.save("unit", {("a", 0): ("x", Captioned("old"))})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        store.save("unit", {("a", 0): ("x", Captioned("new"))})
    monkeypatch.undo()
    assert store.load("unit")["a", 0][1].caption == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["unit.parquet"]


def test_digests_do_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
