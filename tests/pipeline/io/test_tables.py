"""Parquet files are read whole or in part, by the thread that asks, to the values that pyarrow reads."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.io.tables import TableFile


@pytest.fixture
def table():
    draw = np.random.default_rng(0)
    photos = [{"bytes": draw.bytes(40), "path": None if row % 3 else f"{row}.jpg"} for row in range(5000)]
    return pa.table(
        {
            "key": [f"{row:06}" for row in range(5000)],
            "photo": photos,
            "box": [[row, row / 2] for row in range(5000)],
            "few": draw.integers(0, 9, 5000),
            "subset": ["coconut"] * 3000 + ["sa1b"] * 2000,
        }
    )


WRITTEN = [
    {},
    {"compression": "none", "use_dictionary": False, "write_statistics": False},
    {"compression": "zstd", "data_page_version": "2.0", "write_page_index": True},
    {"write_page_checksum": True, "data_page_size": 512},
]


@pytest.mark.parametrize("options", WRITTEN, ids=[",".join(each) or "default" for each in WRITTEN])
@pytest.mark.soak
def test_what_is_read_is_what_was_written(tmp_path, table, options):
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path, row_group_size=700, **options)
    read = TableFile(path)
    assert (read.num_rows, read.num_row_groups, read.names) == (5000, 8, table.column_names)
    assert read.read().equals(table)
    assert read.read(["photo", "few"]).equals(table.select(["photo", "few"]))
    assert read.read_row_group(7, ["box"]).equals(table.slice(4900).select(["box"]))
    assert read.find(["few"], subset="sa1b", key="003123")["few"].to_pylist() == [table["few"][3123].as_py()]
    assert read.find(["few"], subset="coconut", key="003123").num_rows == 0
    assert read.find(["key"], subset="sa1b").num_rows == 2000


def test_a_table_without_rows_has_its_columns(tmp_path, table):
    pq.write_table(table.slice(0, 0), tmp_path / "a.parquet")
    read = TableFile(str(tmp_path / "a.parquet"))
    assert read.read(["key", "box"]).equals(table.slice(0, 0).select(["key", "box"]))
    assert read.find(["box"], key="1").num_rows == 0


def test_only_the_columns_that_are_asked_for_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    draw = np.random.default_rng(0)
    rows = {"mask": [draw.bytes(10_000) for _ in range(200)], "key": [str(row) for row in range(200)]}
    pq.write_table(pa.table(rows), path, row_group_size=50, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    place = data.find(rows["mask"][100])
    data[place - 20 : place] = bytes(20)  # the head of the third row group's masks
    path.write_bytes(data)
    with pytest.raises((pa.ArrowException, OSError)):
        TableFile(str(path)).read(["mask"])
    assert TableFile(str(path)).read_row_group(3, ["mask"])["mask"].to_pylist() == rows["mask"][150:]
    assert TableFile(str(path)).read(["key"])["key"].to_pylist() == rows["key"]


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1" + bytes(8), b"PAR1" + b"\xff" * 4 + b"PAR1", b"x" * 100]
)
def test_what_is_no_parquet_file_is_an_error(tmp_path, data):
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises((pa.ArrowException, OSError)):
        TableFile(str(tmp_path / "a.parquet"))


def test_a_column_that_is_not_there_cannot_be_searched(tmp_path, table):
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(KeyError, match="no column unit"):
        TableFile(str(tmp_path / "a.parquet")).find(["unit"], key="1")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.soak
def test_no_thread_of_pyarrow_is_left_that_could_abort_a_program_at_its_end(tmp_path, table):
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    program = (
        "import os, sys, pyarrow.parquet\n"
        "from paracaption.pipeline.io.tables import TableFile\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "table = TableFile(sys.argv[1])\n"
        "assert table.read().num_rows == 5000 and table.find(['few'], key='1').num_rows == 0\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.parquet")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


@pytest.mark.soak
def test_a_footer_that_describes_a_column_as_none_can_be_is_an_error_and_not_the_end_of_the_process(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"name": ["a", None], "other": [1, 2]}), path)
    optional = b"\x15\x0c\x25\x02\x18\x04name"  # of the schema: a text that may be null
    assert path.read_bytes().count(optional) == 1
    path.write_bytes(path.read_bytes().replace(optional, optional.replace(b"\x25\x02", b"\x25\x00")))
    program = (
        "import sys\n"
        "from paracaption.pipeline.io.tables import TableFile\n"
        "table = TableFile(sys.argv[1])\n"
        "assert table.read(['other'])['other'].to_pylist() == [1, 2]\n"
        "for ask in (table.read, lambda: table.find(['other'], name='a')):\n"
        "    try:\n"
        "        ask()\n"
        "    except OSError as error:\n"
        "        print(str(error)[:26])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Definition level histogram\n" * 2), done.stderr
