import json
import logging
import os
import socket
import subprocess
import sys

import pytest

from paracaption.pipeline.corpus import event_parts
from paracaption.pipeline.corpus.event_parts import PartWriter
from paracaption.pipeline.corpus.events import Event, EventLog, EventReader
from paracaption.pipeline.io.location import locate
from paracaption.pipeline.io.store import store_of
from tests.pipeline.io.short_file import ShortFile


def test_an_event_comes_back_as_it_was_emitted(tmp_path):
    EventLog(tmp_path, "caption").emit(
        "unit", stage="caption", unit="u", images=2, regions=9, asked=4, seconds=0.5
    )
    (event,) = EventReader(tmp_path).new()
    assert event.time_s > 1e9
    assert event == Event(event.time_s, "unit", "caption", "u", images=2, regions=9, asked=4, seconds=0.5)


def test_each_process_has_a_file_of_its_own(tmp_path):
    log = EventLog(tmp_path, "caption")
    log.emit("started")
    assert [path.name for path in tmp_path.iterdir()] == [
        f"caption-{socket.gethostname()}-{os.getpid()}.jsonl"
    ]
    assert log.path.exists()


def test_a_line_is_json_without_what_is_not_known(tmp_path):
    log = EventLog(tmp_path, "caption")
    log.emit("batch", unit="ü\n")
    line, rest = log.path.read_bytes().split(b"\n")
    assert rest == b""
    assert set(json.loads(line)) == {"time_s", "what", "unit"}


def test_a_reader_gives_each_event_once_and_follows_new_files(tmp_path):
    reader = EventReader(tmp_path)
    assert list(reader.new()) == []
    first, second = EventLog(tmp_path, "a"), EventLog(tmp_path, "b")
    first.emit("started")
    assert [event.what for event in reader.new()] == ["started"]
    first.emit("unit")
    second.emit("ready")
    assert sorted(event.what for event in reader.new()) == ["ready", "unit"]
    assert list(reader.new()) == []


def test_a_line_still_being_written_waits_for_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"time_s":1.0,"what":"unit"}\n{"time_s":2.0,"wh')
    reader = EventReader(tmp_path)
    assert [event.what for event in reader.new()] == ["unit"]
    with open(path, "ab") as file:
        file.write(b'at":"batch"}\n')
    assert [event.what for event in reader.new()] == ["batch"]


def test_a_line_cut_short_is_passed_over_and_the_next_one_read(tmp_path):
    whole = b'{"time_s":1.0,"what":"unit"}\n'
    (tmp_path / "a.jsonl").write_bytes(b'{"time_s":1.0,"wh\n' + b"\xff\xfe\n\n" + whole)
    assert [event.what for event in EventReader(tmp_path).new()] == ["unit"]


def test_an_event_that_the_disk_cut_short_is_lost_and_the_next_one_is_whole(tmp_path, caplog):
    log = EventLog(tmp_path, "a")
    log.emit("started")
    plain, log._lines._file = log._lines._file, ShortFile(log._lines._file)
    log.emit("batch")
    log._lines._file = plain
    log.emit("unit")
    assert [event.what for event in EventReader(tmp_path).new()] == ["started", "unit"]
    assert log.path.read_bytes().count(b"\n") == 2 and "events are lost" in caplog.text


def test_a_folder_that_takes_no_events_is_one_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        log = EventLog(tmp_path / "none", "a")
        log.emit("started")
        log.emit("unit")
    assert len([line for line in caplog.messages if "events are lost" in line]) == 1
    (tmp_path / "none").mkdir()
    log.emit("batch")
    assert [event.what for event in EventReader(tmp_path / "none").new()] == ["batch"]


# In a bucket.


@pytest.fixture
def run(memory_out, monkeypatch):
    monkeypatch.setattr(event_parts, "EVERY_S", 0.0)
    return locate(memory_out) / "events" / "run"


def test_events_of_a_bucket_come_in_parts_each_once(run):
    first, second, reader = PartWriter(run, "a-host-1.abc"), EventLog(run, "b"), EventReader(run)
    first.append(Event(1.0, "started"))
    first.flush()
    second.emit("ready")
    second.close()
    assert sorted(event.what for event in reader.new()) == ["ready", "started"]
    first.append(Event(2.0, "unit"))
    first.close()
    assert [(worker, event.what) for worker, event in reader.named()] == [("a-host-1.abc", "unit")]
    assert list(reader.new()) == []


def test_files_beside_the_events_are_uploaded_when_they_change_and_deleted_when_they_are_gone(run):
    writer, files = PartWriter(run, "a"), {"stack-a.txt": b"one"}
    writer.add_files(lambda: dict(files))
    writer.flush()
    assert store_of(run).read(f"{run}/stack-a.txt") == b"one"
    store_of(run).delete(f"{run}/stack-a.txt")
    writer.flush()
    assert store_of(run).list(str(run)) == [], "what has not changed is not uploaded again"
    files["stack-a.txt"] = b"two"
    writer.flush()
    assert store_of(run).read(f"{run}/stack-a.txt") == b"two"
    files.clear()
    writer.close()
    assert store_of(run).list(str(run)) == []


def test_an_outage_keeps_the_events_for_later_and_ends_nothing(faulty_s3, monkeypatch):
    monkeypatch.setattr(event_parts, "EVERY_S", 0.0)
    run = locate("s3://corpus/out") / "events" / "run"
    writer, reader = PartWriter(run, "a"), EventReader(run)
    for status in ("503", "403"):
        gate = faulty_s3.fail(status, "PUT", count=None)
        writer.append(Event(1.0, f"after {status}"))
        writer.flush()
        faulty_s3.release(gate)
    writer.close()
    assert [event.what for event in reader.new()] == ["after 503", "after 403"]


_ENDING = """
import sys
from paracaption.pipeline.corpus.events import EventLog
from paracaption.pipeline.io.location import locate
EventLog(locate(sys.argv[1]), "a").emit("unit")
"""


def test_a_process_that_ends_without_closing_its_events_uploads_them(faulty_s3):
    subprocess.run([sys.executable, "-c", _ENDING, "s3://corpus/out/events/run"], check=True)
    (name,) = faulty_s3.objects()
    assert b'"what":"unit"' in faulty_s3.content(name)
