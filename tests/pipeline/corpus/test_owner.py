"""Who may write to a corpus: one driver, until it ends, is dead, or gives no sign of life for a lease."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from paracaption.pipeline.corpus import adopt, log, owner, processes, reader
from paracaption.pipeline.corpus.owner import Fenced, Owner, own
from paracaption.pipeline.corpus.records import (
    Adopt,
    Checkpoint,
    Claim,
    Commit,
    Config,
    Done,
    LogUnit,
    Merged,
)
from paracaption.pipeline.corpus.verify import verify
from paracaption.pipeline.io.store import FolderStore
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests import committed
from tests.pipeline.corpus.owners import LEASE_S, NAME, begin, claim_of, contents, draft, places

# Taking over.


def test_an_owner_claims_marks_beats_and_releases(tmp_path):
    out = str(tmp_path / "out")
    with own(out, "build", LEASE_S) as owned:
        assert not log.read_state(out).released
        first = (tmp_path / "out" / "beat" / "000001").read_bytes()
        time.sleep(0.2)
        assert (tmp_path / "out" / "beat" / "000001").read_bytes() != first
        owned.held_back["a/b"] = "its source fails"
    found = log.read_records(out)
    assert [type(record) for record in found] == [Claim, Done]
    assert found[0].pid == os.getpid() and found[0].command == "build"
    assert found[1].held_back == {"a/b": "its source fails"}
    assert (tmp_path / "out" / adopt.MARKER).read_bytes() == adopt.MARKER_TEXT


def test_a_living_owner_is_not_replaced_and_is_named(tmp_path):
    with own(str(tmp_path), "build", LEASE_S):
        before = contents(tmp_path), log.last_number(str(tmp_path))
        with (
            pytest.raises(ConfigError, match=f"`build` of process {os.getpid()} on .* is writing here; wait"),
            own(str(tmp_path), "merge", LEASE_S),
        ):
            pass
        assert (contents(tmp_path), log.last_number(str(tmp_path))) == before


def test_an_owner_that_has_released_is_followed_at_once(tmp_path):
    with own(str(tmp_path), "build", 60):
        pass
    started = time.monotonic()
    with own(str(tmp_path), "merge", 60) as owned:
        assert owned.state.epoch == 2
    assert time.monotonic() - started < 1


def test_an_owner_that_ends_with_an_error_releases_too(tmp_path):
    with pytest.raises(ZeroDivisionError), own(str(tmp_path), "build", 60):
        raise ZeroDivisionError
    assert log.read_state(str(tmp_path)).released


def test_an_owner_that_ends_while_it_is_watched_is_followed_at_once(tmp_path):
    begun = begin(tmp_path, claim_of(host="elsewhere"))
    threading.Timer(0.2, lambda: begun.append(Done())).start()
    started = time.monotonic()
    with own(str(tmp_path), "merge", 20) as owned:
        assert owned.state.epoch == 2
    assert time.monotonic() - started < 10


_OWNS = """
import sys, time
from paracaption.pipeline.corpus.owner import own
with own(sys.argv[1], "build", 60):
    print("owns", flush=True)
    time.sleep(60)
"""


def test_a_killed_owner_on_this_machine_is_followed_at_once(tmp_path):
    with subprocess.Popen([sys.executable, "-c", _OWNS, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"owns\n"
        other.send_signal(signal.SIGKILL)
        started = time.monotonic()
        other.wait()
        with own(str(tmp_path), "build", 60) as owned:
            assert owned.state.epoch == 2
        assert time.monotonic() - started < 5


def test_a_process_that_got_the_number_of_a_dead_owner_is_not_taken_for_it():
    claim = claim_of()
    assert not processes.is_dead(claim)
    assert processes.is_dead(msgspec.structs.replace(claim, process=claim.process[:-1] + "x"))


@pytest.mark.parametrize(
    "change", [{"host": "elsewhere"}, {"boot": "another"}, {"boot": ""}, {"process": "pid:[1]/2/3"}]
)
def test_an_owner_elsewhere_is_never_known_to_be_dead(change):
    assert not processes.is_dead(claim_of(**({"pid": 4_000_000} | change)))


def test_an_owner_on_another_host_is_followed_after_a_lease_without_a_sign_of_life(tmp_path):
    begin(tmp_path, claim_of(host="elsewhere"))
    started = time.monotonic()
    with own(str(tmp_path), "build", LEASE_S) as owned:
        assert time.monotonic() - started >= LEASE_S
        assert owned.state.epoch == 2


def test_an_owner_on_another_host_that_beats_or_writes_is_left_alone(tmp_path):
    for sign in ("beat", "record"):
        out = tmp_path / sign
        begun = begin(out, claim_of(host="elsewhere"))
        write = begun.beat if sign == "beat" else lambda begun=begun: begun.append(Config(text="", files=[]))
        threading.Timer(0.1, write).start()
        with pytest.raises(ConfigError, match="is writing here"), own(str(out), "build", LEASE_S):
            pass


def test_a_challenger_that_was_paused_until_the_lease_was_over_looks_once_more(tmp_path, monkeypatch):
    begun, now = begin(tmp_path, claim_of(host="elsewhere")), [0.0]
    monkeypatch.setattr(owner.time, "monotonic", lambda: now[0])
    is_dead = processes.is_dead

    def paused(claim):
        begun.beat()
        now[0] += 3600
        return is_dead(claim)

    monkeypatch.setattr(processes, "is_dead", paused)
    with pytest.raises(ConfigError, match="is writing here"), own(str(tmp_path), "merge", LEASE_S):
        pass
    begun.check()


def test_a_sign_of_life_that_cannot_be_read_is_neither_one_nor_none(tmp_path, monkeypatch):
    begun, read = begin(tmp_path, claim_of(host="elsewhere")), owner.files.read

    def fails(blob):
        if "/beat/" in blob.url:
            raise OSError(errno.EIO, "Input/output error")
        return read(blob)

    monkeypatch.setattr(owner.files, "read", fails)
    with pytest.raises(OSError, match="Input/output"), own(str(tmp_path), "merge", LEASE_S):
        pass
    begun.check()


def test_the_clocks_of_machines_are_not_compared(tmp_path):
    """The beat's time is years off in both directions; only whether it changes counts."""
    begin(tmp_path, claim_of(host="elsewhere"))
    beat = tmp_path / "beat" / "000001"
    for moved in (-1e8, 1e8):
        os.utime(beat, (time.time() + moved,) * 2)
        with own(str(tmp_path), "build", LEASE_S):
            pass
        begin(tmp_path, claim_of(host="elsewhere"))
        beat = max((tmp_path / "beat").iterdir())


def test_of_many_that_claim_at_once_one_wins_and_the_others_are_told(tmp_path):
    barrier, won, told = threading.Barrier(8), [], []
    ended = threading.Event()

    def claim() -> None:
        barrier.wait()
        try:
            with own(str(tmp_path), "build", 0.2) as owned:
                won.append(owned.state.epoch)
                ended.wait(10)
        except ConfigError as error:
            told.append(str(error))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 10
    while len(won) + len(told) < 8 and time.monotonic() < end:
        time.sleep(0.01)
    ended.set()
    for thread in threads:
        thread.join()
    assert won == [1]
    assert len(told) == 7
    assert all("begun to write here" in line or "is writing here" in line for line in told)
    assert [type(record) for record in log.read_records(str(tmp_path))] == [Claim, Done]


# Fencing.


@pytest.mark.parametrize("fate", ["moved", "deleted"])
def test_an_owner_whose_folder_is_gone_begins_no_log_in_another_one(tmp_path, fate):
    out = tmp_path / "out"
    with (
        pytest.raises(FileNotFoundError, match="the commit log is gone; mount or restore") as raised,
        own(str(out), "build", 60) as begun,
    ):
        out.rename(tmp_path / "elsewhere")
        if fate == "deleted":
            shutil.rmtree(tmp_path / "elsewhere")
        begun.beat()
        begun.append(Commit(units={}))
    assert raised.value.filename == log.record_path(str(out), 1)
    assert not out.exists()


def test_a_fenced_owner_writes_nothing_and_says_who_took_over(tmp_path):
    paused = begin(tmp_path, claim_of(host="elsewhere"))
    late = draft(paused, b"late")
    with own(str(tmp_path), "build", LEASE_S) as owned:
        owned.append(Commit(units={NAME: draft(owned, b"new")}))
        before = {**contents(tmp_path)}, log.last_number(str(tmp_path))
        with pytest.raises(
            Fenced, match=f"`build` of process {os.getpid()} on .* has taken over; nothing is lost"
        ):
            paused.append(Commit(units={NAME: late}))
        with pytest.raises(Fenced):
            paused.check()
        assert ({**contents(tmp_path)}, log.last_number(str(tmp_path))) == before
        owned.check()
    assert (tmp_path / places(late)[0]).read_bytes() == b"new"


def test_a_fenced_owner_releases_nothing(tmp_path):
    with pytest.raises(Fenced), own(str(tmp_path), "build", 60) as fenced:
        begin(tmp_path, claim_of(host="elsewhere"))
        fenced.append(Config(text="", files=[]))
    assert [type(record) for record in log.read_records(str(tmp_path))] == [Claim, Claim]
    assert not log.read_state(str(tmp_path)).released


def test_an_owner_that_is_fenced_by_the_record_of_a_third_one_is_fenced(tmp_path):
    paused = begin(tmp_path, claim_of(host="elsewhere"))
    for _ in range(2):
        with own(str(tmp_path), "build", LEASE_S):
            pass
    with pytest.raises(Fenced):
        paused.append(Config(text="", files=[]))


def test_a_lost_answer_to_an_append_is_no_fence(tmp_path, monkeypatch):
    begun, create = begin(tmp_path, claim_of()), FolderStore.create

    def twice(self, path, data):  # as a client does that has lost the first answer
        create(self, path, data)
        return create(self, path, data)

    monkeypatch.setattr(FolderStore, "create", twice)
    begun.append(Config(text="a", files=[]))
    assert begun.state == log.read_state(str(tmp_path))


def answer_lost(monkeypatch, error: type[OSError] = OSError):
    """Let the next record be written without an answer."""
    create = FolderStore.create

    def once(self, path, data):
        create(self, path, data)
        monkeypatch.setattr(FolderStore, "create", create)
        raise error("no answer")

    monkeypatch.setattr(FolderStore, "create", once)


def test_an_owner_that_got_no_answer_to_a_record_is_not_fenced_by_it(tmp_path, monkeypatch):
    """It is released in the end, and nobody is said to have taken over."""
    with pytest.raises(OSError, match="no answer"), own(str(tmp_path), "build", 60) as owned:
        answer_lost(monkeypatch)
        owned.append(Config(text="a", files=[]))
    state = log.read_state(str(tmp_path))
    assert state.config is not None and state.config.text == "a"
    assert state.released and state.number == 3


def test_an_owner_that_got_no_answer_goes_on_after_its_record(tmp_path, monkeypatch):
    begun = begin(tmp_path, claim_of())
    answer_lost(monkeypatch)
    with pytest.raises(OSError, match="no answer"):
        begun.append(Config(text="a", files=[]))
    begun.append(Config(text="b", files=[]))
    assert [type(record) for record in log.read_records(str(tmp_path))] == [Claim, Config, Config]
    assert begun.state == log.read_state(str(tmp_path))


@pytest.mark.parametrize("fails", ["answer", "move"])
def test_a_commit_that_failed_half_way_is_finished_before_the_next_one(tmp_path, monkeypatch, fails):
    """Another subset of the build goes on; only the newest record may have files that are not moved."""
    begun = begin(tmp_path, claim_of())
    first, second = draft(begun, b"first"), begun.write("sa1b/ledger/sa1b-000000.parquet", b"second")
    manifest = begun.write("sa1b/manifests/sa1b-000000.json", b"second")
    if fails == "answer":
        answer_lost(monkeypatch)
    else:
        move = FolderStore.move
        monkeypatch.setattr(FolderStore, "move", lambda *_: (_ for _ in ()).throw(OSError("no answer")))
    with pytest.raises(OSError, match="no answer"):
        begun.append(Commit(units={NAME: first}))
    if fails == "move":
        monkeypatch.setattr(FolderStore, "move", move)
    begun.append(Commit(units={"sa1b/sa1b-000000": LogUnit("p", "r", 0, 0, manifest, second)}))
    found = contents(tmp_path)
    assert set(found) == {*places(first), manifest.path, second.path}


@pytest.mark.soak
def test_an_unanswered_record_before_a_checkpoint_does_not_take_its_place(tmp_path, monkeypatch):
    begun = begin(tmp_path, claim_of())
    for number in range(97):
        begun.append(Config(text=str(number), files=[]))
    answer_lost(monkeypatch)
    with pytest.raises(OSError, match="no answer"):
        begun.append(Config(text="lost", files=[]))
    begun.append(Config(text="next", files=[]))
    found = log.read_records(str(tmp_path))
    assert [type(record) for record in found[98:]] == [Config, Checkpoint, Config]
    assert begun.state == log.read_state(str(tmp_path))


def test_a_challenger_does_not_claim_after_a_record_of_the_owner_that_it_has_not_seen(tmp_path):
    begun = begin(tmp_path, claim_of())
    late = Owner(str(tmp_path), log.read_state(str(tmp_path)))
    begun.append(Config(text="a", files=[]))
    with pytest.raises(Fenced):
        late.append(claim_of(host="elsewhere"))
    begun.check()


# Files of an owner.


def test_a_file_that_is_given_up_is_not_left(tmp_path):
    begun = begin(tmp_path, claim_of())
    with pytest.raises(ZeroDivisionError), begun.open("a/b.tar") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert contents(tmp_path) == {}


def test_a_local_file_is_copied_and_hashed(tmp_path):
    begun = begin(tmp_path / "out", claim_of())
    (tmp_path / "plan.parquet").write_bytes(b"a" * 3_000_000)
    entry = begun.copy("coconut/plan/plan.parquet", tmp_path / "plan.parquet")
    assert (entry.bytes, entry.path) == (3_000_000, "coconut/plan/plan.parquet")
    assert (tmp_path / "out" / entry.temporary).read_bytes() == b"a" * 3_000_000
    begun.append(Merged(files=[entry]))
    assert list(contents(tmp_path / "out")) == [entry.path]


def test_a_beat_that_cannot_be_written_is_one_that_is_missed(tmp_path):
    begun = begin(tmp_path, claim_of())
    shutil.rmtree(tmp_path / "beat")
    (tmp_path / "beat").write_bytes(b"a file in its way")
    begun.beat()
    begun.append(Done())
    assert log.read_state(str(tmp_path)).released


def test_a_beat_that_is_refused_for_a_while_is_not_the_last_one(tmp_path, monkeypatch):
    """As by a store whose credentials are renewed."""
    put, beats = FolderStore.put, []

    def refused_once(self, path, data):
        beats.append(path)
        if len(beats) == 2:
            raise ConfigError("403")
        put(self, path, data)

    monkeypatch.setattr(FolderStore, "put", refused_once)
    with own(str(tmp_path), "build", LEASE_S):
        end = time.monotonic() + 20
        while len(beats) < 4 and time.monotonic() < end:
            time.sleep(0.01)
    assert len(beats) >= 4


# Adoption, and the marker.


def test_a_corpus_without_a_log_is_adopted_as_it_is(tmp_path):
    out = committed.unlogged(committed.merged(tmp_path / "out"))
    before, units = contents(out), log.read_units(str(out))
    with own(str(out), "build", LEASE_S) as owned:
        assert {name: found.unit for name, found in owned.state.units.items()} == units
        assert owned.state.config and owned.state.config.text == (out / reader.CONFIG).read_text()
        assert {"README.md", "index.parquet", "stats.json", "config.yaml"} < set(owned.state.files)
    assert contents(out) == before
    assert [type(record) for record in log.read_records(str(out))] == [Claim, Adopt, Config, Done]
    with own(str(out), "build", LEASE_S):
        pass
    assert [type(record) for record in log.read_records(str(out), after=4)] == [Claim, Done]


def test_a_corpus_whose_log_is_lost_is_adopted_from_its_manifests(tmp_path):
    out = committed.merged(tmp_path / "out")
    before, units = contents(out), log.read_units(str(out))
    (out / log.LOG / "000000000003.json").write_bytes(b"damaged")
    with pytest.raises(IntegrityError, match="restore it from a copy"), own(str(out), "build", LEASE_S):
        pass
    (out / log.LOG).rename(tmp_path / "moved-away")
    with own(str(out), "build", LEASE_S) as owned:
        found = {name: found.unit for name, found in owned.state.units.items()}
    assert contents(out) == before
    assert {name: places(unit) for name, unit in found.items()} == {
        name: places(unit) for name, unit in units.items()
    }
    assert not verify(out).problems


def test_an_adoption_that_was_killed_is_made_by_the_next_owner(tmp_path):
    out = committed.unlogged(committed.merged(tmp_path / "out"))
    units = log.read_units(str(out))
    begin(out, claim_of(host="elsewhere"))  # it claims, and dies before it adopts
    with own(str(out), "build", LEASE_S) as owned:
        assert {name: found.unit for name, found in owned.state.units.items()} == units


def test_a_corpus_whose_manifest_is_damaged_is_not_adopted(tmp_path):
    out = committed.unlogged(committed.merged(tmp_path / "out"))
    manifest = out / "coconut" / "manifests" / "coconut-000000.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with (
        pytest.raises(IntegrityError, match=r"coconut-000000\.json: not a manifest .*delete it"),
        own(str(out), "build", LEASE_S),
    ):
        pass


def test_a_folder_with_files_that_is_no_corpus_is_refused(tmp_path):
    (tmp_path / "coconut" / "shards").mkdir(parents=True)
    (tmp_path / "coconut" / "shards" / "coconut-000000.tar").write_bytes(b"of somebody else")
    with pytest.raises(ConfigError, match="has other files and is not a corpus; choose another"):
        adopt.refuse_foreign(str(tmp_path), ["coconut"])
    adopt.refuse_foreign(str(tmp_path), ["sa1b"])
    adopt.mark(str(tmp_path))
    adopt.mark(str(tmp_path))
    with pytest.raises(ConfigError, match="has other files and is not a corpus; choose another"):
        adopt.refuse_foreign(str(tmp_path), ["coconut"])
    (tmp_path / "coconut" / "plan").mkdir()
    (tmp_path / "coconut" / "plan" / "plan.json").write_bytes(b"{}")
    adopt.refuse_foreign(str(tmp_path), ["coconut"])
    assert (tmp_path / adopt.MARKER).read_bytes() == adopt.MARKER_TEXT


def test_the_lease_is_that_of_the_configuration():
    from paracaption.schemas.config import Failures

    assert Failures().lease_s == owner.LEASE_S
