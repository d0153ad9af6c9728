import json
import logging
import os
import socket

from paracaption.pipeline.corpus.events import Event, EventLog, EventReader
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
