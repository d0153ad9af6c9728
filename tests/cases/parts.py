"""A source's photos, label maps and JSONs as one list of named bytes, whatever container they lie in.

A name is the path below the source's folder; what lies in a container follows a `!`: `sa_0.tar!./a.jpg`,
`rows.parquet!000.png` (the label map of a row) and `rows.parquet!000.json` (its other columns).
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.cases.layouts import tar_of

Parts = dict[str, bytes]
PHOTO, LABEL, TEXT = "photo", "label", "text"


def kind_of(name: str) -> str:
    """What a part is, by its place and its ending."""
    if name.lower().endswith(".json"):
        return TEXT
    return LABEL if name.startswith(("labels/", "rows.parquet!")) else PHOTO


def read_parts(root: Path) -> Parts:
    """Every part of a source, in the order of their names."""
    found: Parts = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = str(path.relative_to(root))
        if name.endswith(".tar"):
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    found[f"{name}!{member.name}"] = file.read()
        elif name.endswith(".parquet"):
            found |= {f"{name}!{key}": data for key, data in _rows(path)}
        else:
            found[name] = path.read_bytes()
    return found


def write_parts(root: Path, parts: Parts) -> None:
    """Make the folder hold these parts and nothing else.

    Raises:
        ValueError: a Parquet file cannot have such rows.
    """
    folders = [path for path in root.rglob("*") if path.is_dir()]
    containers = {path.name for path in root.iterdir() if path.suffix in (".tar", ".parquet")}
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".parquet":
            path.unlink()
    inside: dict[str, list[tuple[str, bytes]]] = {name: [] for name in containers}
    for name, data in parts.items():
        container, mark, member = name.partition("!")
        if mark:
            inside[container].append((member, data))
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
    for name, members in inside.items():
        if name.endswith(".tar"):
            (root / name).write_bytes(tar_of(members))
        else:
            _write_rows(root / name, dict(members))
    assert all(folder.is_dir() for folder in folders)


def _rows(path: Path) -> Iterator[tuple[str, bytes]]:
    import pyarrow.parquet as pq

    for number, row in enumerate(pq.read_table(path).to_pylist()):
        mask = row.pop("mask")
        yield f"{number:03d}.json", json.dumps(row).encode()
        yield f"{number:03d}.png", mask["bytes"]


def _write_rows(path: Path, members: dict[str, bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for name in sorted({name.partition(".")[0] for name in members}):
        row = json.loads(members.get(f"{name}.json", b"{}"))
        if not isinstance(row, dict):
            raise ValueError("a row is an object")
        rows.append({"mask": {"bytes": members.get(f"{name}.png"), "path": f"{name}.png"}, **row})
    try:
        table = pa.Table.from_pylist(rows)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=2)
    except (pa.ArrowException, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(str(error)) from error
    path.write_bytes(buffer.getvalue())
