"""What strangers' files turn out to be: a damage takes a file or folder, and leaves something else there."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Damage = Callable[[Path], None]

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
HTML = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"
HUGE = "9" * 400


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(buffer, kind)
    return buffer.getvalue()


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def missing(path: Path) -> None:
    remove(path)


def folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def loop(path: Path) -> None:
    remove(path)
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    remove(path)
    path.symlink_to("not-there")


def pipe(path: Path) -> None:
    remove(path)
    os.mkfifo(path)


def holding(data: bytes) -> Damage:
    def damage(path: Path) -> None:
        if path.is_dir():
            remove(path)
        path.write_bytes(data)

    return damage


def changed(change: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def flipped(data: bytes) -> bytes:
    return bytes(byte ^ (255 * (place % 61 == 30)) for place, byte in enumerate(data))


FILES: dict[str, Damage] = {
    "missing": missing,
    "a folder": folder,
    "a loop": loop,
    "a dangling link": dangling,
    "a pipe": pipe,
    "empty": holding(b""),
    "a pointer": holding(LFS),
    "HTML": holding(HTML),
    "a picture": holding(picture()),
    "zeros": holding(bytes(3000)),
    "not UTF-8": holding(b"\xff\xfe\xe4\xf6\xfc: 1\n"),
    "cut": changed(lambda data: data[: len(data) // 2]),
    "cut at its end": changed(lambda data: data[:-3]),
    "gzipped": changed(lambda data: gzip.compress(data, mtime=0)),
    "flipped": changed(flipped),
}
"""What happens to any file."""

JSONS: dict[str, Damage] = {
    "null": holding(b"null"),
    "a list": holding(b"[1]"),
    "a number": holding(b"1"),
    "no fields": holding(b"{}"),
    "deep": holding(b'{"a":' * 90_000 + b"1" + b"}" * 90_000),
    "a deep list": holding(b"[" * 90_000 + b"]" * 90_000),
    "a long number": holding(b"{" + b'"a": ' + HUGE.encode() + b"}"),
    "a BOM": changed(lambda data: b"\xef\xbb\xbf" + data),
    "UTF-16": changed(lambda data: data.decode().encode("utf-16")),
}
"""What happens to a JSON."""

ODD: tuple[Any, ...] = (None, -1, 2**63, 2**64, 1.5, float("nan"), float("inf"), "x", "", "\ud800", "a\0b")
ODD += ("../../x", True, [], {}, [[]], {"x": None}, "y" * 5000)
"""Values for a field."""


def fields(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value in a JSON; of a list only the first and the last."""
    found = [at] if at else []
    if isinstance(value, dict):
        for name in value:
            found += fields(value[name], (*at, name))
    elif isinstance(value, list):
        for place in sorted({0, len(value) - 1} if value else ()):
            found += fields(value[place], (*at, place))
    return found


def with_field(content: Any, at: tuple[Any, ...], value: Any) -> bytes:
    """A JSON with another value in a place; `KeyError` removes it."""
    content = json.loads(json.dumps(content))
    inner = content
    for step in at[:-1]:
        inner = inner[step]
    if value is KeyError:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return json.dumps(content).encode()


def with_long_number(content: Any, at: tuple[Any, ...]) -> bytes:
    return with_field(content, at, "@@").replace(b'"@@"', HUGE.encode())


KINDS: tuple[tuple[str, Any, Any], ...] = (
    ("text", pa.string(), "x"),
    ("a number", pa.int64(), -1),
    ("a float", pa.float64(), float("nan")),
    ("bytes", pa.binary(), b"\xff\xfe"),
    ("a list", pa.list_(pa.int64()), [1]),
    ("a struct", pa.struct([("a", pa.int64())]), {"a": 1}),
    ("a date", pa.timestamp("us"), 0),
    ("decimals", pa.decimal128(20, 2), None),
    ("nothing", pa.null(), None),
    ("booleans", pa.bool_(), True),
    ("a dictionary", pa.dictionary(pa.int32(), pa.string()), "x"),
    ("a map", pa.map_(pa.string(), pa.int64()), [("a", 1)]),
    ("long text", pa.large_string(), "x" * 3000),
)


def _rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def column_of_kind(name: str, kind: Any, value: Any) -> Damage:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        column = pa.array([value] * table.num_rows, kind)
        return table.set_column(place, pa.field(name, kind), column)

    return lambda path: _rewrite(path, change)


def column_gone(name: str) -> Damage:
    return lambda path: _rewrite(path, lambda table: table.drop_columns([name]))


def column_renamed(name: str) -> Damage:
    def change(table: pa.Table) -> pa.Table:
        return table.rename_columns([f"{each}_" if each == name else each for each in table.column_names])

    return lambda path: _rewrite(path, change)


def column_twice(name: str) -> Damage:
    return lambda path: _rewrite(path, lambda table: table.append_column(name, table[name]))


TABLES: dict[str, Damage] = {
    "no rows": lambda path: _rewrite(path, lambda table: table.slice(0, 0)),
    "no columns": lambda path: _rewrite(path, lambda table: table.select([])),
    "another table": lambda path: pq.write_table(pa.table({"a": [1]}), path),
    "rows twice": lambda path: _rewrite(path, lambda table: pa.concat_tables([table, table])),
}
"""What happens to a Parquet file, beside what happens to its columns."""
