"""Checkpoints on disk: their folder, that nothing in them is executed, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...schemas.errors import ConfigError
from .failures import describe
from .file_kinds import what_is

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""Endings of files whose usual reader runs code. The publisher's `training_args.bin` is one too."""

INDEX = "model.safetensors.index.json"
"""Says which tensor lies in which of a checkpoint's files."""

_KERNEL = "/"
"""Stands in the name of an implementation that transformers would fetch from a hub."""

_WHOLE_BYTES = 8 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 64 << 10


def folder(path: str | Path, what: str) -> Path:
    """The folder of a checkpoint in the Hugging Face layout, refused if it carries a pickle.

    Args:
        path: a local folder; a hub name is not fetched.
        what: names the option in the error, such as "judge.options.model".

    Raises:
        ConfigError: no such folder, no config.json, no safetensors, a pickle, or code; names the file.
    """
    found = Path(path)
    if not (found / "config.json").is_file():
        raise ConfigError(
            f"{what}: {path} is not a checkpoint folder (no config.json in it); download it once with "
            "`hf download NAME --local-dir FOLDER` where every node sees it, and name that folder"
        )
    pickled = sorted(file.name for file in found.iterdir() if file.suffix in PICKLES)
    if pickled:
        raise ConfigError(
            f"{found / pickled[0]}: this is a pickle, which can run code when it is loaded; download the "
            "safetensors of this model instead, or delete the pickle if the folder has safetensors, too"
        )
    safetensors_files(found)
    refuse_code(found)
    return found


def refuse_code(folder: Path) -> None:
    """Refuse a checkpoint whose config.json has transformers fetch code: a kernel of a hub is a program.

    Classes that it names (`auto_map`) are no reason: nobody loads them, and published checkpoints name some.

    Raises:
        ConfigError: names the file and the field.
    """
    path = folder / "config.json"
    for field, value in _fields(read_json(path)):
        if field.endswith("_implementation") and isinstance(value, str) and _KERNEL in value:
            raise ConfigError(
                f"{path}: {field} is {value!r}, a kernel to download, which is code and never run; remove it"
            )


def _fields(value: Any, field: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a JSON object, however deep, with the key that it, or what holds it, stands under."""
    yield field, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _fields(inner, field if field.endswith("_implementation") else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _fields(inner, field)


def safetensors_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors, by its index if it has one.

    Raises:
        ConfigError: there is none, or one that the index names is missing.
    """
    index = folder / INDEX
    if index.is_file():
        found = [folder / name for name in _files_of_index(index)]
    else:
        found = sorted(folder.glob("*.safetensors"))
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        raise ConfigError(
            f"{missing[0] if missing else folder / '*.safetensors'}: not there; download it again"
        )
    for path in found:
        _check_header(path)
    return found


def _files_of_index(index: Path) -> list[str]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ConfigError(f"{index}: has no weight_map, which names the files; download it again")
    for tensor, name in listed.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            what = f"{tensor[:100]} is in {str(name)[:100]!r}, which is not a safetensors file next to it"
            raise ConfigError(f"{index}: {what}; download it again")
    return sorted(set(listed.values()))


_LONGEST_HEADER = 100_000_000
"""Bytes; longer ones safetensors does not read either."""


def _check_header(path: Path) -> None:
    """Refuse what is no safetensors file, by its first bytes and its size; its own reader sees the rest."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({describe(error)}); download it again") from error
    length = int.from_bytes(start[:8], "little")
    if len(start) > 8 and start[8:9] == b"{" and length <= _LONGEST_HEADER:
        if 8 + length > size:
            raise ConfigError(f"{path}: cut short, after {size:,} bytes; download it again")
        return
    what = what_is(start, "safetensors file") or "not a safetensors file; download it again"
    raise ConfigError(f"{path}: {what}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint.

    Raises:
        ConfigError: it is missing, or holds no JSON object.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not there; download the whole checkpoint") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({describe(error)}); download it again") from error
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        what = what_is(data) or f"{describe(error)}; download it again"
        raise ConfigError(f"{path}: cannot be read as JSON: {what}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a JSON object; download it again")
    return content


def write_json(path: Path, content: Mapping[str, Any], sort_keys: bool = False) -> None:
    """Write a JSON file of a checkpoint, indented for people."""
    path.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def identity(path: str | Path) -> str:
    """A digest of a checkpoint (a folder or one file), wherever it lies: part of the evidence digest.

    Small files are read whole; of a large one the size, the first and last 64 KiB and 64 samples between.
    Files that change no answer (Markdown, Python, hidden ones) are left out.
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted(file for file in root.iterdir() if _matters(file))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if file != root else ''}\0{size}\0".encode())
        with open(file, "rb") as data:
            if size <= _WHOLE_BYTES:
                digest.update(data.read())
                continue
            for sample in range(_SAMPLES + 1):
                data.seek((size - _SAMPLE_BYTES) * sample // _SAMPLES)
                digest.update(data.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _matters(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and file.suffix not in {".md", ".py"}
