"""Reads Parquet files, of any backend, in the thread that asks.

pyarrow reads a Python file in threads of its own. Such a thread may still let go of the file while the
program ends, and then the interpreter aborts with exit code 134 ("terminate called without an active
exception"), although everything was read. So the bytes are read here, and pyarrow is given memory.

Where a damaged footer describes a column that cannot be, pyarrow ends the process, too, as soon as its
metadata is asked for that column: nothing catches what is thrown there. Its reader does, so that one is asked
first; see `TableFile._chunks`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import files

if TYPE_CHECKING:
    import pyarrow as pa

_TAIL_BYTES = 64 << 10
"""What is read first of a file, from its end: most footers fit."""

_GAP_BYTES = 64 << 10
"""Up to this many bytes between two columns are read and not used, instead of reading twice."""

_PADDING_BYTES = 100
"""By so much some early writers understate the length of a column (PARQUET-816)."""

_AT_A_PAGE = "page header"
"""Part of what pyarrow says of a page of zeros."""


BATCH_ROWS = 64
"""Rows that `batches` gives at a time."""

_FEW_ROWS = 1 << 16
_MOST_BYTES, _MOST_TIMES = 1 << 28, 64
"""What a row group may unpack to: bytes, or times the size of the file. Text shrinks to a tenth or less."""


class TableFile:
    """A Parquet file: its footer is read when it is opened, and the columns of a row group when asked for.

    Args:
        url: path or URL of the file.

    Raises:
        OSError: as `files.open_url`.
        pyarrow.ArrowException: the file is no Parquet file.
    """

    def __init__(self, url: str):
        import pyarrow.parquet as pq

        self._file = files.open_url(url)
        self._size = self._file.seek(0, 2)
        memory, start = self._memory(), max(0, self._size - _TAIL_BYTES)
        self._fill(memory, start, self._size)
        footer = self._size - 8 - int.from_bytes(memory[-8:-4], "little")
        if memory[-4:] == b"PAR1" and 0 <= footer < start:
            self._fill(memory, footer, start)
        self._opened = _parquet_file(memory, None)
        self._metadata: pq.FileMetaData = self._opened.metadata

    @property
    def num_rows(self) -> int:
        """Number of rows, as the footer says."""
        return self._metadata.num_rows

    @property
    def num_row_groups(self) -> int:
        """Number of row groups."""
        return self._metadata.num_row_groups

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return self._opened.schema_arrow.names

    def read_row_group(self, index: int, columns: list[str] | None = None) -> pa.Table:
        """A row group, or some of its columns; names that the file does not have are left out.

        Raises:
            OSError: as `files.open_url`.
            pyarrow.ArrowException: the bytes are not what the footer says.
        """
        memory = self._memory()
        for start, end in self._ranges(index, columns):
            self._fill(memory, start, end)
        return _parquet_file(memory, self._metadata).read_row_group(index, columns, use_threads=False)

    def batches(self, index: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """A row group, `BATCH_ROWS` at a time: a value that all rows share is not made for all at once.

        Raises:
            as `read_row_group`; also of a file that holds far more than its size lets expect.
        """
        import pyarrow as pa

        memory, total = self._memory(), 0
        for start, end in self._ranges(index, columns):
            self._fill(memory, start, end)
        opened = _parquet_file(memory, self._metadata)
        for batch in opened.iter_batches(BATCH_ROWS, [index], columns, use_threads=False):
            total += batch.nbytes
            if total > max(_MOST_BYTES, _MOST_TIMES * self._size):
                raise pa.ArrowInvalid(
                    f"row group {index} has over {total:,} bytes when unpacked, too many for a file of "
                    f"{self._size:,} bytes"
                )
            yield batch

    def check_rows(self) -> None:
        """Refuse a file that declares more rows than it has bytes, as no table that says anything does.

        Raises:
            pyarrow.ArrowInvalid: it does.
        """
        import pyarrow as pa

        if self.num_rows > max(_FEW_ROWS, self._size):
            raise pa.ArrowInvalid(f"{self.num_rows:,} rows are too many for a file of {self._size:,} bytes")

    def row_groups(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Every row group in order; raises as `read_row_group`."""
        for index in range(self.num_row_groups):
            yield self.read_row_group(index, columns)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows; raises as `read_row_group`."""
        import pyarrow as pa

        if not self.num_row_groups:
            table = self._opened.schema_arrow.empty_table()
            return table if columns is None else table.select([n for n in columns if n in table.column_names])
        return pa.concat_tables(list(self.row_groups(columns)))

    def find(self, columns: list[str], **wanted: str) -> pa.Table:
        """Columns of the rows in which every column named in `wanted` has that text.

        Row groups are not read if their statistics show that none of their rows has it.

        Raises:
            KeyError: the file has no such column.
            OSError, pyarrow.ArrowException: as `read_row_group`.
        """
        import functools
        import operator

        import pyarrow as pa
        import pyarrow.compute as pc

        if missing := {*columns, *wanted} - set(self.names):
            raise KeyError(f"no column {', '.join(sorted(missing))}")
        condition = functools.reduce(operator.and_, (pc.field(name) == text for name, text in wanted.items()))
        found = [self._opened.schema_arrow.empty_table().select(columns)]
        for index in range(self.num_row_groups):
            if self._may_have(index, wanted):
                table = self.read_row_group(index, [*columns, *wanted])
                found.append(table.filter(condition).select(columns))
        return pa.concat_tables(found)

    def _may_have(self, index: int, wanted: dict[str, str]) -> bool:
        schema = self._metadata.schema
        for number, column in self._chunks(index, list(wanted)):
            text = wanted.get(column.path_in_schema)
            is_text = column.physical_type == schema.column(number).physical_type == "BYTE_ARRAY"
            statistics = column.statistics if text is not None and is_text else None
            if text is not None and statistics is not None and statistics.has_min_max:
                least, most = statistics.min, statistics.max
                if isinstance(least, str) and isinstance(most, str) and not least <= text <= most:
                    return False
        return True

    def _chunks(self, index: int, columns: list[str] | None) -> list[tuple[int, Any]]:
        """Number and metadata of the columns of a row group.

        Raises:
            OSError, pyarrow.ArrowException: the footer describes one of them as none can be.
        """
        schema, group = self._metadata.schema, self._metadata.row_group(index)
        tops = [schema.column(number).path.partition(".")[0] for number in range(len(schema))]
        numbers = [number for number, top in enumerate(tops) if columns is None or top in columns]
        reader = _parquet_file(self._memory(), self._metadata).reader
        for number in numbers:
            try:  # it reads zeros, and so comes as far as the first page
                reader.read_row_group(index, column_indices=[number], use_threads=False)
            except OSError as error:
                if _AT_A_PAGE not in str(error):
                    raise
        return [(number, group.column(number)) for number in numbers]

    def _ranges(self, index: int, columns: list[str] | None) -> list[tuple[int, int]]:
        """First byte and end of what holds the columns, in order; near ones are one."""
        merged: list[tuple[int, int]] = []
        for _, column in self._chunks(index, columns):
            start = column.data_page_offset
            if column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            merged.append((start, start + column.total_compressed_size + _PADDING_BYTES))
        merged.sort()
        ranges: list[tuple[int, int]] = []
        for start, end in merged:
            if not 0 <= start <= end - _PADDING_BYTES <= self._size:
                continue  # pyarrow says what is wrong with it
            if ranges and start - ranges[-1][1] <= _GAP_BYTES:
                ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
            else:
                ranges.append((start, end))
        return ranges

    def _memory(self) -> mmap.mmap:
        """Memory as long as the file, of which only what is filled takes room."""
        return mmap.mmap(-1, max(self._size, 12))

    def _fill(self, memory: mmap.mmap, start: int, end: int) -> None:
        self._file.seek(start)
        data = self._file.read(min(end, self._size) - start)
        memory[start : start + len(data)] = data


def _parquet_file(memory: mmap.mmap, metadata: Any) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.ParquetFile(pa.BufferReader(memory), metadata=metadata)
