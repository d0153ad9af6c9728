"""`verify` takes the log as the truth: a record, a file that it names, or evidence that changed is named."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import msgspec
import pytest

from paracaption.pipeline.corpus import adopt, log, merge, reader, records, verify
from paracaption.pipeline.corpus.owner import LEASE_S, Owner, own
from paracaption.pipeline.corpus.records import Checkpoint, Commit, LogFile, LogUnit
from paracaption.pipeline.io import store
from paracaption.pipeline.stages.agreement import Resegmented
from paracaption.pipeline.stages.evidence import Answered, EvidenceStore
from paracaption.schemas.errors import IntegrityError
from tests import committed

UNIT = "coconut-000000"


@pytest.fixture
def out(tmp_path) -> Path:
    return committed.merged(tmp_path / "out")


def found(out: Path, **options) -> dict[str, str]:
    """What is wrong, by file."""
    by_file: dict[str, str] = {}
    for problem in verify.verify(out, **options).problems:
        by_file[problem.file] = f"{by_file.get(problem.file, '')}{problem.what}\n"
    return by_file


@pytest.mark.soak
def test_a_whole_corpus_with_a_log_has_no_problem_and_no_note(out):
    report = verify.verify(out)
    assert report.ok and not report.notes, report.text()
    assert (report.units, report.regions) == (4, 48)


NAMED = ("config.yaml", "README.md", "stats.json", "index.parquet", "plots/funnel.png")
NAMED += ("coconut/plan/plan.json", "coconut/plan/plan.parquet", "sa1b/plan/plan.json", "corpus.json")
NAMED += tuple(
    f"coconut/{each}" for each in (f"manifests/{UNIT}.json", f"ledger/{UNIT}.parquet", f"shards/{UNIT}.tar")
)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.soak(keep=1)
def test_each_file_that_the_log_names_is_named_if_it_is_changed_cut_or_gone(out, name):
    path = out / name
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for data in (bytes(changed), whole[:-1], b""):
        path.write_bytes(data)
        assert name in found(out), data[:20]
    path.unlink()
    problems = found(out)
    assert name in problems
    assert any(
        word in problems[name]
        for word in ("build CONFIG` again", "merge", "run `paracaption build CONFIG` again")
    )


@pytest.mark.soak
def test_what_the_remedy_says_mends_a_damaged_configuration_card_and_plot(out):
    for name in ("README.md", "plots/funnel.png", "stats.json", "index.parquet"):
        (out / name).write_bytes(b"x" * (out / name).stat().st_size)
        assert "paracaption merge" in found(out)[name]
    merge.merge(out)
    assert not found(out)


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.soak(keep=1)
def test_a_record_that_is_damaged_or_missing_is_named_and_nothing_crashes(out, number):
    name = f"log/{number:012}.json"
    path = out / name
    whole = path.read_bytes()
    for data in (
        b"",
        whole[:40],
        whole.replace(b'"epoch"', b'"epoxy"', 1),
        b'{"sha256": ' * 9000,
        b"\xff" * 90,
    ):
        path.write_bytes(data)
        assert "restore it from a copy" in found(out)[name]
    path.unlink()
    assert "missing" in found(out)[name]


def test_a_damaged_record_before_a_checkpoint_takes_no_unit_away(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "CHECKPOINT_EVERY", 5)
    out = tmp_path / "out"
    committed.write(out)
    record = next(each for each in log.read_records(str(out)) if isinstance(each, Commit))
    (out / f"log/{record.number:012}.json").write_bytes(b"{}")
    report = verify.verify(out)
    assert [problem.file for problem in report.problems] == [f"log/{record.number:012}.json"]
    assert report.units == 4


def test_a_checkpoint_that_says_something_else_than_the_records_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "CHECKPOINT_EVERY", 5)
    out = tmp_path / "out"
    committed.write(out)
    checkpoint = log.read_record(str(out), 10)
    assert isinstance(checkpoint, Checkpoint)
    path = out / "log/000000000010.json"
    path.write_bytes(records.encode(msgspec.structs.replace(checkpoint, released=not checkpoint.released)))
    assert "contradicts the records before it" in found(out)["log/000000000010.json"]


def rewrite(out: Path, unit: LogUnit) -> None:
    """Let the log say this of the first unit of COCONut; its checksums are right."""
    name = f"coconut/{UNIT}"
    for record in log.read_records(str(out)):
        if isinstance(record, Commit) and name in record.units:
            changed = msgspec.structs.replace(record, units=record.units | {name: unit})
            (out / f"log/{record.number:012}.json").write_bytes(records.encode(changed))


def logged(out: Path) -> LogUnit:
    return log.read_state(str(out)).units[f"coconut/{UNIT}"].unit


def test_a_manifest_that_says_something_else_than_the_log_is_named(out):
    rewrite(out, msgspec.structs.replace(logged(out), kept=logged(out).kept + 1))
    assert "does not agree with the log" in found(out)[f"coconut/manifests/{UNIT}.json"]


@pytest.mark.parametrize(
    "place", ["../../secret", "/etc/passwd", "coconut/../../secret", "coconut//x", "a\0b", ""]
)
@pytest.mark.parametrize("attribute", ["path", "temporary"])
def test_a_record_that_names_a_file_elsewhere_is_no_record_and_the_file_is_not_opened(
    out, place, attribute, monkeypatch
):
    if (place, attribute) == ("", "temporary"):
        pytest.skip("no temporary name")
    record = next(each for each in log.read_records(str(out)) if isinstance(each, Commit))
    content = msgspec.to_builtins(record)
    next(iter(content["units"].values()))["ledger"][attribute] = place
    path = f"log/{record.number:012}.json"
    (out / path).write_bytes(records._line(msgspec.json.encode(content)))
    opened = []
    real = verify.files.backend_of
    monkeypatch.setattr(verify.files, "backend_of", lambda url: opened.append(url) or real(url))
    assert "not a file of a corpus" in found(out)[path]
    assert opened and all(
        (".." not in url and url.startswith(f"{out}/")) or url == str(out) for url in opened
    )
    with pytest.raises(IntegrityError, match="not a file of a corpus"):
        log.read_state(str(out))


@pytest.mark.parametrize("name", ["coconut/../../x", "../coconut-000000", "coconut/coconut-000001"])
def test_a_unit_whose_name_leads_elsewhere_is_no_record(out, name):
    with pytest.raises(ValueError, match="other files than its own"):
        Commit(units={name: logged(out)})


def test_files_that_a_dead_driver_has_not_moved_are_checked_under_their_temporary_names(out, monkeypatch):
    unit = logged(out)
    renamed = {}
    for name in ("shard", "ledger", "manifest"):
        file: LogFile = getattr(unit, name)
        temporary = store.temporary_name(file.path)
        renamed[name] = LogFile(file.path, file.bytes, file.sha256, temporary)
        (out / file.path).rename(out / temporary)
    owner = Owner(str(out), log.read_state(str(out)))
    monkeypatch.setattr(owner, "move", lambda: None)
    owner.append(Commit(units={f"coconut/{UNIT}": msgspec.structs.replace(unit, **renamed)}))
    report = verify.verify(out)
    assert report.ok, report.text()
    assert [note.file for note in report.notes] == [f"log/{owner.state.number:012}.json"]
    assert "3 of its files still have temporary names" in report.notes[0].what
    shard = out / renamed["shard"].temporary
    shard.write_bytes(shard.read_bytes()[:-1])
    assert list(found(out)) == [renamed["shard"].temporary]


def test_a_file_that_was_replaced_and_is_kept_is_checked_too(out):
    unit = logged(out)
    owner = Owner(str(out), log.read_state(str(out)))
    ledger = owner.write(unit.ledger.path, (out / unit.ledger.path).read_bytes())
    owner.append(
        Commit(
            units={f"coconut/{UNIT}": msgspec.structs.replace(unit, ledger=ledger)}, replaced=[ledger.path]
        )
    )
    assert not found(out)
    kept = f".replaced/{owner.state.number}/{ledger.path}"
    (out / kept).write_bytes(b"x" * ledger.bytes)
    report = verify.verify(out)
    assert report.ok and [(note.file, "cannot restore this file" in note.what) for note in report.notes] == [
        (kept, True)
    ]
    shutil.rmtree(out / ".replaced")
    assert not verify.verify(out).notes


def test_a_subset_whose_folder_is_gone_is_missed(out):
    shutil.rmtree(out / "sa1b")
    problems = found(out)
    assert "sa1b/manifests/sa1b-000000.json" in problems and "sa1b/plan/plan.json" in problems


def test_a_corpus_of_which_only_the_log_is_left_has_problems_and_no_crash(out):
    for path in out.iterdir():
        if path.name != "log":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert {adopt.MARKER, reader.CONFIG, reader.STATS, f"coconut/shards/{UNIT}.tar"} <= found(out).keys()


def test_a_log_that_grows_while_it_is_read_is_a_note(out, monkeypatch):
    real = verify.check_named_files

    def meanwhile(*arguments):
        with own(str(out), "build", LEASE_S):
            return real(*arguments)

    monkeypatch.setattr(verify, "check_named_files", meanwhile)
    notes = verify.verify(out).notes
    assert any("meanwhile" in note.what for note in notes)


class Remembered:
    """Files that lie in memory, under the paths that they had on the disk."""

    def __init__(self, folder: Path):
        self.data = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def read(self, url: str, start: int = 0, length: int | None = None) -> bytes:
        if url not in self.data:
            raise FileNotFoundError(2, "No such file or directory", url)
        return self.data[url][start : None if length is None else start + length]

    def size(self, url: str) -> int:
        return len(self.read(url))

    def kind(self, url: str) -> str | None:
        is_folder = any(path.startswith(f"{url}/") for path in self.data)
        return "file" if url in self.data else "folder" if is_folder else None

    def list_names(self, folder: str) -> list[str]:
        below = [path.removeprefix(f"{folder}/") for path in self.data if path.startswith(f"{folder}/")]
        return list({path.partition("/")[0] for path in below})

    def read_many(self, urls: list[str]) -> list[bytes]:
        return [self.read(url) for url in urls]


@pytest.mark.parametrize("early", [False, True])
def test_everything_is_read_through_the_one_door(out, monkeypatch, early):
    if early:
        committed.unlogged(out)
    evidence(out)
    remembered = Remembered(out)
    shutil.rmtree(out)
    monkeypatch.setitem(verify.files._BACKENDS, "file", remembered)
    report = verify.verify(out)
    assert report.ok and not report.notes and report.units == 4, report.text()


# Evidence.

FOLDER = "sa1b/evidence/agree_with_segmenter-0123456789abcdef"


def evidence(out: Path, key: str = "sa_1") -> Path:
    """Evidence of one region of SA-1B; the file."""
    kept = EvidenceStore(out / FOLDER, Resegmented)
    answer = Resegmented(0.75, 0.5, None, 1)
    kept.save("sa1b-000000", {(key, 1): Answered("asked", answer, hashlib.sha256(b"photo").hexdigest())})
    return out / FOLDER / "sa1b-000000.parquet"


def test_damaged_evidence_is_named_with_what_the_next_build_does(out):
    path = evidence(out)
    name = f"{FOLDER}/sa1b-000000.parquet"
    assert not found(out)
    whole = path.read_bytes()
    for data in (b"", whole[:-1], whole[:40] + bytes([whole[40] ^ 4]) + whole[41:], b"PAR1" * 90):
        path.write_bytes(data)
        assert "asks the model again" in found(out)[name]
    assert name not in found(out, deep=False)


def test_evidence_of_other_images_of_no_unit_and_of_no_stage_is_named(out):
    path = evidence(out, key="of_another_unit")
    assert "not in this unit (of_another_unit)" in found(out)[f"{FOLDER}/sa1b-000000.parquet"]
    evidence(out).rename(path.with_name("sa1b-000009.parquet"))
    (out / "sa1b/evidence/guess-0123456789abcdef").mkdir()
    report = verify.verify(out)
    notes = {note.file: note.what for note in report.notes}
    assert report.ok and "no unit of the work list" in notes[f"{FOLDER}/sa1b-000009.parquet"]
    assert "no stage" in notes["sa1b/evidence/guess-0123456789abcdef"]


@pytest.mark.parametrize("error", [RecursionError, MemoryError, ZeroDivisionError, OSError])
@pytest.mark.parametrize("call", ["read_manifest", "read_ledger", "decode_sample"])
def test_whatever_a_reader_raises_is_a_problem_that_names_the_file(out, monkeypatch, call, error):
    def fail(*_: object) -> None:
        raise error("boom")

    monkeypatch.setattr(reader, call, fail)
    folders = {"read_manifest": "manifests", "read_ledger": "ledger", "decode_sample": "shards"}
    assert any(folders[call] in name and "boom" in what for name, what in found(out).items())


def test_a_json_member_of_many_nested_objects_is_a_problem(out):
    with pytest.raises(IntegrityError, match="not a sample"):
        reader.decode_sample(b'{"a":' * 100_000, "here")
    with pytest.raises(IntegrityError, match="not a manifest"):
        reader.decode_manifest(b'{"a":' * 100_000, "here")


@pytest.mark.parametrize("text", ["a: !!bool x", "a: 2024-99-99", "[" * 5000, "\x00", "- 1"])
@pytest.mark.soak(keep=2)
def test_a_configuration_that_yaml_chokes_on_is_one_line(out, text):
    (out / "config.yaml").write_text(text)
    with pytest.raises(IntegrityError, match="run `paracaption build CONFIG` again"):
        reader.read_config(out)
    assert "config.yaml" in found(out)
