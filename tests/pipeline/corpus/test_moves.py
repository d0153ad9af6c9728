"""Moves of files after their record: half done, late, or left over."""

from __future__ import annotations

import pytest

from paracaption.pipeline.corpus import log, moves
from paracaption.pipeline.corpus.owner import Fenced, Owner, own
from paracaption.pipeline.corpus.records import Checkpoint, Commit, Done, LogUnit
from paracaption.pipeline.io.store import FolderStore
from tests.pipeline.corpus.owners import LEASE_S, NAME, begin, claim_of, contents, draft, places


class _Stopped(BaseException):
    pass


def replace(begun: Owner, shard: bool = True) -> tuple[LogUnit, Commit]:
    """A committed unit, and the record that is to replace it."""
    begun.append(Commit(units={NAME: draft(begun, b"old")}))
    old, new = begun.state.units[NAME].unit, draft(begun, b"new", shard)
    return old, Commit(units={NAME: new}, replaced=sorted(places(old)))


@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("stop", range(7))
@pytest.mark.soak(keep=3)
def test_moves_half_done_are_finished_by_the_next_owner(tmp_path, monkeypatch, stop, shard):
    """Stopped before the nth move or keep; at every moment each place has the old file or the new one."""
    begun = begin(tmp_path, claim_of())
    old, record = replace(begun, shard)
    calls = [0]

    def stopping(name: str):
        real = getattr(FolderStore, name)

        def call(self, *args):
            if calls[0] == stop:
                raise _Stopped
            calls[0] += 1
            return real(self, *args)

        return call

    with monkeypatch.context() as patched:
        for name in ("move", "keep"):
            patched.setattr(FolderStore, name, stopping(name))
        try:
            begun.append(record)
        except _Stopped:
            assert not moves.is_moved(str(tmp_path), log.read_state(str(tmp_path)))
    for path in places(record.units[NAME]):
        assert (tmp_path / path).read_bytes() in (b"old", b"new")
    assert log.is_whole(str(tmp_path), log.read_state(str(tmp_path)).units[NAME].unit)
    begin(tmp_path, claim_of(host="elsewhere"))  # one more, which dies before it moves anything
    with own(str(tmp_path), "merge", LEASE_S / 3) as owned:
        assert moves.is_moved(str(tmp_path), owned.state)
    number = next(each.number for each in log.read_records(str(tmp_path)) if getattr(each, "replaced", None))
    kept = {f"{log.REPLACED}/{number}/{path}": b"old" for path in places(old)}
    assert contents(tmp_path) == kept | {path: b"new" for path in places(record.units[NAME])}


def test_a_late_move_of_a_paused_owner_does_no_harm(tmp_path):
    paused = begin(tmp_path, claim_of(host="elsewhere"))
    _, record = replace(paused)
    paused._append(record)  # paused between its record and its moves
    with own(str(tmp_path), "build", LEASE_S) as owned:
        newer = draft(owned, b"newer")
        owned.append(Commit(units={NAME: newer}, replaced=sorted(places(newer))))
    before = contents(tmp_path)
    paused.move()
    assert contents(tmp_path) == before


def test_a_late_removal_of_a_paused_owner_is_refused(tmp_path):
    """It would take the file of the owner after it: the name of a shard that is removed is used again."""
    paused = begin(tmp_path, claim_of(host="elsewhere"))
    _, record = replace(paused, shard=False)
    paused._append(record)
    with own(str(tmp_path), "build", LEASE_S) as owned:
        newer = draft(owned, b"newer")
        owned.append(Commit(units={NAME: newer}, replaced=places(record.units[NAME])))
    before = contents(tmp_path)
    with pytest.raises(Fenced):
        paused.move()
    assert contents(tmp_path) == before


def test_a_checkpoint_keeps_what_is_left_to_move(tmp_path, monkeypatch):
    begun = begin(tmp_path, claim_of())
    while begun.state.number < 98:
        begun.append(Done())
    unit = draft(begun, b"new")

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(FolderStore, "move", fail)
        with pytest.raises(OSError, match="Input/output"):
            begun.append(Commit(units={NAME: unit}))
    assert begun.state.number == 99
    begun = Owner(str(tmp_path), log.read_state(str(tmp_path)))
    begun._append(begun.state.checkpoint())
    for _ in range(20):
        begun._append(Done())
    assert isinstance(log.read_record(str(tmp_path), 100), Checkpoint)
    with own(str(tmp_path), "merge", LEASE_S):
        assert (tmp_path / places(unit)[0]).read_bytes() == b"new"
