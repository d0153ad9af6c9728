"""The log of a corpus in a bucket, as processes and their threads read it."""

from __future__ import annotations

import pytest

from paracaption.pipeline.corpus import log
from paracaption.pipeline.corpus.owner import Owner
from paracaption.pipeline.corpus.processes import claim_of_this_process
from paracaption.pipeline.corpus.records import Config
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.errors import IntegrityError


def begin(out: str, records: int) -> Owner:
    """An owner whose log has so many records after its claim."""
    begun = Owner(out, log.LogState())
    begun.append(claim_of_this_process("build"))
    for number in range(records):
        begun.append(Config(text=str(number), files=[]))
    return begun


def forget() -> None:
    """As in another process."""
    log._SEEN.clear()
    log._RECENT.clear()


def test_a_long_log_is_read_from_its_checkpoint_by_requests_at_the_same_time(faulty_s3):
    begun = begin("s3://corpus/out", 110)
    forget()
    asked = len(faulty_s3.requests())
    assert log.read_state("s3://corpus/out") == begun.state
    assert len(faulty_s3.requests()) - asked < 20


@pytest.mark.parametrize("read", [log.read_state, log.read_records])
def test_a_record_that_is_missing_is_named(memory_out, read):
    begin(memory_out, 12)
    forget()
    store_of(memory_out).delete(log.record_path(memory_out, 5))
    with pytest.raises(IntegrityError, match=r"000000000005\.json: missing"):
        read(memory_out)


def test_what_a_thread_read_late_is_not_taken_for_what_was_written_meanwhile(memory_out, monkeypatch):
    begun, follow = begin(memory_out, 1), log._follow

    def write_meanwhile(out, number, last):
        yield from follow(out, number, last)  # there is no more record
        monkeypatch.setattr(log, "_follow", follow)
        begun.append(Config(text="later", files=[]))

    monkeypatch.setattr(log, "_follow", write_meanwhile)
    log.read_state(memory_out)
    state = log.recent_state(memory_out)
    assert state.config is not None and state.config.text == "later"
