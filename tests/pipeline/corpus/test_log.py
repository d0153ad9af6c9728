"""The commit log as a reader sees it: numbers without holes, checksums, checkpoints, and the state."""

import hashlib
from pathlib import Path

import msgspec
import pytest

from paracaption.pipeline.corpus import log, records
from paracaption.pipeline.corpus.owner import Owner
from paracaption.pipeline.corpus.records import (
    Adopt,
    Checkpoint,
    Claim,
    Commit,
    Config,
    Done,
    LogFile,
    LogUnit,
    Merged,
    Sweep,
)
from paracaption.schemas.errors import IntegrityError

CLAIM = Claim(command="build", host="here", boot="", process="", pid=1)


def unit(name: str = "coconut-000000", **changes) -> LogUnit:
    """A unit without a shard, whose files nobody has written."""
    files = {
        "manifest": LogFile(f"coconut/manifests/{name}.json", 10, "aa"),
        "ledger": LogFile(f"coconut/ledger/{name}.parquet", 20, "bb"),
    }
    return LogUnit(plan="p", recipe="r", **({"regions": 3, "kept": 1} | files | changes))


def write(out: Path, *written) -> Owner:
    """Append records to a log."""
    owner = Owner(str(out), log.read_state(str(out)))
    for record in written:
        owner.append(record)
    return owner


def test_a_folder_without_records_has_no_log(tmp_path):
    assert not log.exists(str(tmp_path))
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / ".tmp-000000000001.json-abc").write_bytes(b"half")
    (tmp_path / "log" / "notes.txt").write_bytes(b"")
    assert not log.exists(str(tmp_path))
    assert log.read_state(str(tmp_path)) == log.LogState()
    assert log.read_records(str(tmp_path)) == []


def test_records_are_numbered_from_one_without_a_hole(tmp_path):
    write(tmp_path, CLAIM, Sweep(), Done())
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == [
        f"{number:012}.json" for number in (1, 2, 3)
    ]
    found = log.read_records(str(tmp_path))
    assert [record.number for record in found] == [1, 2, 3]
    assert [type(record) for record in found] == [Claim, Sweep, Done]
    assert len({record.nonce for record in found}) == 3
    assert [record.number for record in log.read_records(str(tmp_path), after=2)] == [3]


def test_the_state_is_what_the_records_say_together(tmp_path):
    first, second = unit("coconut-000000"), unit("coconut-000001", kept=0)
    write(
        tmp_path,
        CLAIM,
        Adopt(units={"coconut/coconut-000000": first}, files=[LogFile("README.md", 1, "cc")]),
        Config(text="out: here", files=[LogFile("config.yaml", 9, "dd")]),
        Commit(units={"coconut/coconut-000001": second}),
        Merged(files=[LogFile("README.md", 2, "ee")]),
    )
    state = log.read_state(str(tmp_path))
    assert {name: (found.unit, found.since) for name, found in state.units.items()} == {
        "coconut/coconut-000000": (first, 2),
        "coconut/coconut-000001": (second, 4),
    }
    assert {path: file.sha256 for path, file in state.files.items()} == {
        "README.md": "ee",
        "config.yaml": "dd",
    }
    assert state.config and state.config.text == "out: here"
    assert (state.number, state.epoch, state.released) == (5, 1, False)
    write(tmp_path, Done())
    assert log.read_state(str(tmp_path), state).released
    assert not state.released, "a state is never changed"


def test_a_missing_record_is_an_error_that_names_it(tmp_path):
    write(tmp_path, CLAIM, Sweep(), Done())
    (tmp_path / "log" / "000000000002.json").unlink()
    with pytest.raises(IntegrityError, match=r"000000000002\.json: missing; restore it from a copy"):
        log.read_state(str(tmp_path))


@pytest.mark.parametrize("number", [100, 3])
def test_a_missing_checkpoint_or_record_that_it_needs_is_an_error_that_names_it(tmp_path, number):
    write(tmp_path, CLAIM, Sweep(), Config(text="a: 1", files=[]), *[Sweep()] * 110)
    Path(log.record_path(str(tmp_path), number)).unlink()
    with pytest.raises(IntegrityError, match=rf"{number:012}\.json: missing; restore it from a copy"):
        log.read_state(str(tmp_path))


@pytest.mark.parametrize("number", [2, 4])
def test_a_record_that_the_disk_does_not_give_is_an_error_that_names_it(tmp_path, number):
    write(tmp_path, CLAIM, Sweep(), Done())
    path = Path(log.record_path(str(tmp_path), number))
    path.unlink(missing_ok=True)
    path.mkdir()
    with pytest.raises(IntegrityError, match=rf"{number:012}\.json: not readable \(Is a directory\); run"):
        log.read_state(str(tmp_path))


def test_a_listing_that_is_late_hides_no_record(tmp_path, monkeypatch):
    write(tmp_path, CLAIM, Sweep(), Done())
    monkeypatch.setattr(log, "last_number", lambda out: 1)
    assert log.read_state(str(tmp_path)).number == 3


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "spaces", "two"])
def test_a_damaged_record_is_an_error_that_names_it(tmp_path, change):
    write(tmp_path, CLAIM, Sweep())
    path = tmp_path / "log" / "000000000002.json"
    data = path.read_bytes()
    path.write_bytes(
        {
            "flip": data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
            "cut": data[:-10],
            "empty": b"",
            "spaces": data + b" ",
            "two": data + data,
        }[change]
    )
    with pytest.raises(IntegrityError, match=r"000000000002\.json: .*restore it from a copy") as raised:
        log.read_state(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_no_single_changed_byte_of_a_record_goes_unnoticed():
    data = records.encode(Commit(number=7, units={"coconut/coconut-000000": unit()}))
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(IntegrityError):
            records.decode(changed, "a record")


def test_a_record_under_another_number_is_an_error(tmp_path):
    write(tmp_path, CLAIM, Sweep())
    first, second = (tmp_path / "log" / f"{number:012}.json" for number in (1, 2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(IntegrityError, match="is record 1; restore"):
        log.read_state(str(tmp_path))


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a//b", "", "a/./b", "a\0b"])
def test_a_record_names_no_file_outside_of_its_corpus(path):
    line = records.encode(Merged(files=[LogFile("README.md", 1, "aa")]))
    record = msgspec.json.decode(line)["record"]
    record["files"][0]["path"] = path
    changed = records._line(msgspec.json.encode(record))
    with pytest.raises(IntegrityError, match="not a file of a corpus"):
        records.decode(changed, "a record")


def test_a_unit_has_no_other_files_than_its_own():
    with pytest.raises(ValueError, match="other files than its own"):
        Commit(units={"coconut/coconut-000001": unit("coconut-000000")})
    with pytest.raises(ValueError, match="outside of the corpus"):
        Commit(units={}, replaced=["../other/shard.tar"])


def test_each_hundredth_record_is_a_checkpoint_and_readers_start_there(tmp_path, monkeypatch):
    name = "coconut/coconut-000000"
    write(tmp_path, CLAIM, Config(text="a: 1", files=[]), Commit(units={name: unit()}), *[Sweep()] * 202)
    assert isinstance(log.read_record(str(tmp_path), 100), Checkpoint)
    assert isinstance(log.read_record(str(tmp_path), 200), Checkpoint)
    every = log.read_records(str(tmp_path))
    assert [record.number for record in every] == list(range(1, len(every) + 1))
    assert sum(isinstance(record, Checkpoint) for record in every) == 2
    whole = log.LogState()
    for record in every:
        whole = whole.after(record)
    read, decode = list[int](), log._decode
    ask = log.read_record

    def decoded(data, path, number):
        read.append(number)
        return decode(data, path, number)

    def asked(out, number):
        if not Path(log.record_path(out, number)).exists():
            read.append(number)
        return ask(out, number)

    monkeypatch.setattr(log, "_decode", decoded)
    monkeypatch.setattr(log, "read_record", asked)
    assert log.read_state(str(tmp_path)) == whole
    # The checkpoint, the record whose files may not have been moved, what follows, and the free number.
    assert read == [200, 3, *range(201, len(every) + 2)]
    read.clear()
    assert log.read_state(str(tmp_path), whole) == whole
    assert read == [len(every) + 1]


def test_a_log_whose_checkpoint_is_none_is_an_error(tmp_path):
    write(tmp_path, CLAIM, *[Sweep()] * 110)
    path = tmp_path / "log" / f"{100:012}.json"
    path.write_bytes(records.encode(Sweep(number=100)))
    with pytest.raises(IntegrityError, match="not a checkpoint; restore it"):
        log.read_state(str(tmp_path))


def test_a_unit_is_whole_under_either_of_its_names(tmp_path):
    for folder in ("manifests", "ledger"):
        (tmp_path / "coconut" / folder).mkdir(parents=True)
    place, temporary = "coconut/manifests/coconut-000000.json", "coconut/manifests/.tmp-a"
    found = unit(manifest=LogFile(place, 10, "aa", temporary))
    (tmp_path / "coconut" / "ledger" / "coconut-000000.parquet").write_bytes(b"b" * 20)
    (tmp_path / temporary).write_bytes(b"a" * 10)
    assert log.is_whole(str(tmp_path), found)
    (tmp_path / temporary).rename(tmp_path / place)
    assert log.is_whole(str(tmp_path), found)
    (tmp_path / place).write_bytes(b"a" * 9)
    assert not log.is_whole(str(tmp_path), found)


def test_equal_units_have_equal_records_but_for_who_and_when():
    """What a record names is equal between two builds; the log itself is not."""
    one, two = (Commit(units={"coconut/coconut-000000": unit()}, nonce=nonce) for nonce in "ab")
    assert one.units == two.units
    assert hashlib.sha256(records.encode(one)).digest() != hashlib.sha256(records.encode(two)).digest()
