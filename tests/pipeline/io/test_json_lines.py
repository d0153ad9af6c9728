"""Whole lines count, whatever ended their writer; nobody sees a torn one."""

import json
import os
import signal
from pathlib import Path

import pytest

from paracaption.pipeline.io.json_lines import LineReader, LineWriter, read_lines
from tests.pipeline.io.short_file import ShortFile


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "lines.jsonl"


def test_records_are_lines_in_order_and_are_read_again(path):
    assert read_lines(path) == []
    for numbers in ((1, 2), (3,)):
        with LineWriter(path) as lines:
            for number in numbers:
                lines.append({"n": number})
    assert path.read_bytes() == b'{"n":1}\n{"n":2}\n{"n":3}\n'
    assert [json.loads(line)["n"] for line in read_lines(path)] == [1, 2, 3]


def test_a_line_without_its_end_is_not_read_and_the_next_writer_removes_it(path):
    path.write_bytes(b'{"n":1}\n{"n":2')
    assert read_lines(path) == [b'{"n":1}']
    with LineWriter(path) as lines:
        lines.append({"n": 3})
    assert path.read_bytes() == b'{"n":1}\n{"n":3}\n'


def test_a_file_that_is_one_torn_line_is_empty(path):
    path.write_bytes(b'{"n":1')
    assert read_lines(path) == []
    LineWriter(path).close()
    assert path.read_bytes() == b""


@pytest.mark.soak
def test_a_record_is_on_its_way_to_the_disk_when_append_returns(path):
    child = os.fork()
    if not child:
        LineWriter(path).append({"n": 1})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert read_lines(path) == [b'{"n":1}']


def test_a_record_that_a_full_disk_cuts_short_is_an_error_and_leaves_no_part(path):
    lines = LineWriter(path)
    lines.append({"n": 1})
    plain, lines._file = lines._file, ShortFile(lines._file)
    with pytest.raises(OSError, match="No space left"):
        lines.append({"number": 2})
    lines._file = plain
    lines.append({"n": 3})
    assert path.read_bytes() == b'{"n":1}\n{"n":3}\n'


def test_a_reader_gives_each_line_once_when_it_has_ended(path):
    reader = LineReader(path)
    assert reader.new() == []
    with open(path, "ab", buffering=0) as file:
        file.write(b'{"n":1}\n{"n"')
        assert reader.new() == [b'{"n":1}']
        file.write(b":2}\n")
        assert reader.new() == [b'{"n":2}'] and reader.new() == []


def test_a_reader_starts_over_where_another_file_takes_the_name(path, tmp_path):
    reader = LineReader(path)
    path.write_bytes(b"1\n2\n")
    assert reader.new() == [b"1", b"2"]
    (tmp_path / "other").write_bytes(b"3\n")
    os.replace(tmp_path / "other", path)
    assert reader.new() == [b"3"]


def test_the_writer_of_a_record_may_choose_its_form(path):
    with LineWriter(path, encode=lambda record: json.dumps(record).encode()) as lines:
        lines.append({"n": 1})
    assert path.read_bytes() == b'{"n": 1}\n'
