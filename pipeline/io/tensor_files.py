"""Checkpoints as tables of tensors: read one by one, written in bounded files, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...schemas.errors import ConfigError
from . import weights

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 4 << 30
"""Largest file, unless a tensor alone is larger."""

INDEX = "model.safetensors.index.json"

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of weights, as safetensors and torch call them."""

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ABANDONED_S = 6 * 3600
"""A temporary folder untouched for this long belongs to nobody."""


class Entry(NamedTuple):
    """A tensor that is not in memory.

    Attributes:
        dtype: as safetensors calls it.
        shape: its sizes.
        load: reads or makes it.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return math.prod(self.shape) * _BYTES[self.dtype]


def table(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint's folder by name, by its index if it has one.

    Raises:
        ConfigError: a file is missing or broken, lacks a tensor that the index puts there, or holds one that
            another file holds too.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Entry] = {}
    for path in weights.safetensors_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in found:
                        raise ConfigError(f"{path}: {name} is in another file of the folder too; remove one")
                    part = file.get_slice(name)
                    shape, dtype = tuple(part.get_shape()), part.get_dtype()
                    if dtype not in _BYTES:
                        raise ConfigError(
                            f"{path}: {name} is {dtype}; convert the checkpoint to bfloat16 first"
                        )
                    found[name] = Entry(dtype, shape, partial(_load, path, name))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not a sound safetensors file ({error}); download it again") from error
    index = folder / INDEX
    promised = read_json(index)["weight_map"] if index.is_file() else found
    if absent := sorted(set(promised) - set(found)):
        raise ConfigError(f"{index}: names {_some(absent)}, which no file holds; download it again")
    return found


def match(
    folder: Path,
    found: Mapping[str, Entry],
    wanted: Mapping[str, tuple[int, ...]],
    spare: Mapping[str, tuple[int, ...] | None],
) -> None:
    """Check that a folder holds every tensor that is wanted, and nothing unknown.

    Args:
        folder: named in the error.
        found: its tensors.
        wanted: what must be there, with shapes; floating point numbers.
        spare: what may be there; None: in any shape.

    Raises:
        ConfigError: names the missing, unexpected and unfit tensors.
    """
    problems = []
    if missing := sorted(set(wanted) - set(found)):
        problems.append(f"missing: {_some(missing)}")
    if unexpected := sorted(set(found) - set(wanted) - set(spare)):
        problems.append(f"unexpected: {_some(unexpected)}")
    unfit = []
    for name, entry in found.items():
        shape = wanted.get(name) or spare.get(name)
        if shape is not None and entry.shape != shape:
            unfit.append(f"{name} is {_sizes(entry.shape)}, not {_sizes(shape)}")
        elif name in wanted and entry.dtype not in FLOATS:
            unfit.append(f"{name} is {entry.dtype}, not a floating point number")
    if unfit:
        problems.append(f"unfit: {_some(sorted(unfit))}")
    if problems:
        raise ConfigError(
            f"{folder}: its tensors are not those of its config.json; {'; '.join(problems)}; download it "
            "again, or name the folder of the right model"
        )


def write(folder: Path, entries: Mapping[str, Entry], shard_bytes: int = SHARD_BYTES) -> int:
    """Write tensors one at a time into numbered safetensors with an index; flushed to the disk.

    Args:
        folder: there already.
        entries: by name, in this order.
        shard_bytes: of a file at most, unless one tensor alone is larger.

    Returns:
        Bytes of the tensors.
    """
    shards: list[dict[str, Entry]] = [{}]
    held = 0
    for name, entry in entries.items():
        if shards[-1] and held + entry.num_bytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = entry
        held += entry.num_bytes
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    total = sum(entry.num_bytes for entry in entries.values())
    write_json(
        folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    )
    return total


@contextmanager
def appearing(target: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary folder that gets the target's name when the block ends; none is left if it fails.

    Args:
        target: not there yet, or empty.
        num_bytes: that will be written, more or less.

    Raises:
        ConfigError: the target is there, cannot be written, or its disk has not as much room.
    """
    refuse_taken(target)
    partial_folder = target.parent / f".{target.name}.{os.uname().nodename}-{os.getpid()}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(target)
        free = shutil.disk_usage(target.parent).free
        if free < num_bytes:
            raise ConfigError(f"{target}: {num_bytes:,} bytes to write, but only {free:,} are free there")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
        yield partial_folder
        for path in [*partial_folder.rglob("*"), partial_folder]:
            _sync(path)
        partial_folder.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise ConfigError(f"{target}: the checkpoint cannot be written there: {error}") from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def refuse_taken(target: Path) -> None:
    """Raises ConfigError if there is something under this name already, but for an empty folder."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: is there already; move it away, or name another folder with --to")


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError if the file is no sound JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not to be read as JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no JSON object; download it again")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _load(path: Path, name: str) -> torch.Tensor:
    """Opened for each tensor anew: what was mapped for the last one does not stay in memory."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _write_shard(path: Path, shard: Mapping[str, Entry]) -> None:
    """One file: length of the header, header, tensors. The widest types come first: all are then aligned."""
    import torch

    order = sorted(shard, key=lambda name: -_BYTES[shard[name].dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + shard[name].num_bytes
        header[name] = {
            "dtype": shard[name].dtype,
            "shape": list(shard[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = shard[name].load()
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            assert flat.numel() == shard[name].num_bytes, name
            file.write(flat.numpy().data)
            del tensor, flat
        file.flush()
        os.fsync(file.fileno())


def _clear_abandoned(target: Path) -> None:
    for left in target.parent.glob(f".{target.name}.*.partial"):
        if time.time() - left.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
