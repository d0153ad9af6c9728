"""The tensors of checkpoints: listed, checked and written one at a time, so that none is whole in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...schemas.errors import ConfigError
from . import weights

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 4 << 30
"""Largest file, unless a tensor alone is larger."""

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of weights, as safetensors and torch call them."""

_INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

Shape = tuple[int, ...]


class LazyTensor(NamedTuple):
    """A tensor that is not in memory yet.

    Attributes:
        dtype: its type, as safetensors calls it.
        shape: its sizes.
        load: reads or makes it.
        file: where it lies; None if it is made.
    """

    dtype: str
    shape: Shape
    load: Callable[[], torch.Tensor]
    file: Path | None = None

    @property
    def num_bytes(self) -> int:
        """On disk.

        Raises:
            ConfigError: its type is not one that is copied.
        """
        if self.dtype not in _BYTES:
            raise ConfigError(f"{self.file}: tensors are {self.dtype}; convert them to bfloat16 first")
        return math.prod(self.shape) * _BYTES[self.dtype]


def from_torch(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> LazyTensor:
    """A tensor in memory as one to check or write; it is converted to `dtype` only when it is written."""
    dtype = dtype or tensor.dtype
    return LazyTensor(dtype_name(dtype), tuple(tensor.shape), lambda: tensor.to(dtype))


def finite(name: str, tensor: LazyTensor) -> LazyTensor:
    """The same tensor, which refuses to be loaded with NaN or infinity in it: a ConfigError that names it."""

    def load() -> torch.Tensor:
        values = tensor.load()
        num_wrong = int((~values.isfinite()).sum()) if values.is_floating_point() else 0
        if num_wrong:
            raise ConfigError(
                f"{tensor.file}: {name} has {num_wrong:,} values of {values.numel():,} that are NaN or "
                "infinite; the file is damaged, or its training diverged: download it again"
            )
        return values

    return tensor._replace(load=load)


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls a type of torch."""
    names = {f"torch.{torch_name}": name for name, torch_name in (FLOATS | _INTEGERS).items()}
    return names[str(dtype)]


def list_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of a checkpoint's folder by name, from the files' headers. An index is followed.

    Raises:
        ConfigError: a file is missing or broken, lacks a tensor that the index puts there, or holds one that
            another file holds too.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, LazyTensor] = {}
    for path in weights.safetensors_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in found:
                        raise ConfigError(f"{path}: {name} is in another file of the folder too; remove one")
                    part = file.get_slice(name)
                    load = partial(_load, path, name)
                    found[name] = LazyTensor(part.get_dtype(), tuple(part.get_shape()), load, path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not a sound safetensors file ({error}); download it again") from error
    index = folder / weights.INDEX
    promised = weights.read_json(index)["weight_map"] if index.is_file() else found
    if absent := sorted(set(promised) - set(found)):
        raise ConfigError(f"{index}: names {_some(absent)}, which no file holds; download it again")
    return found


def check_tensors(
    where: Path,
    found: Mapping[str, LazyTensor],
    wanted: Mapping[str, Shape],
    allowed: Mapping[str, Shape | None] | None = None,
) -> None:
    """Check that a checkpoint holds every tensor that its configuration asks for, and nothing unknown.

    Args:
        where: the checkpoint's folder or file, named in the error.
        found: its tensors.
        wanted: name and shape of every tensor that must be there, in floating point numbers.
        allowed: name and shape of what may be there too; a shape of None allows any.

    Raises:
        ConfigError: names the missing and the unexpected tensors and those of a wrong shape or type, with
            their files.
    """
    allowed = allowed or {}
    unexpected, wrong = [], []
    for name, tensor in sorted(found.items()):
        place = f" ({tensor.file.name})" if tensor.file else ""
        shape = wanted[name] if name in wanted else allowed.get(name)
        if name not in wanted and name not in allowed:
            unexpected.append(name + place)
        elif shape is not None and tensor.shape != shape:
            wrong.append(f"{name} is {_sizes(tensor.shape)}, not {_sizes(shape)}{place}")
        elif name in wanted and tensor.dtype not in FLOATS:
            wrong.append(f"{name} is {tensor.dtype}, not a floating point type{place}")
    missing = sorted(set(wanted) - set(found))
    problems = {"missing": missing, "unexpected": unexpected, "wrong": wrong}
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise ConfigError(
            f"{where}: its tensors are not those that its configuration describes; {listed}; download the "
            "checkpoint again, or name the right one"
        )


def write_tensors(
    folder: Path, tensors: Mapping[str, LazyTensor], shard_bytes: int = SHARD_BYTES, by_name: bool = False
) -> int:
    """Write tensors one at a time into numbered safetensors files with an index; flushed to the disk.

    Args:
        folder: an existing one.
        tensors: by name; files are filled in this order.
        shard_bytes: largest file, unless one tensor alone is larger.
        by_name: sort the tensors within a file by name, as safetensors' own writer does.

    Returns:
        Bytes of the tensors.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if shards[-1] and held + tensor.num_bytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.num_bytes
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, dict(sorted(shard.items())) if by_name else shard)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    weights.write_json(folder / weights.INDEX, index)
    return total


def write_file(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write tensors one at a time into one safetensors file; flushed to the disk.

    The file is the length of the header, the header, and the tensors, in the given order but for their types:
    the widest come first, so that all are aligned.
    """
    import torch

    order = sorted(tensors, key=lambda name: -_BYTES[tensors[name].dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].num_bytes
        header[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].load()
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            assert flat.numel() == tensors[name].num_bytes, name
            file.write(flat.numpy().data)
            del tensor, flat
        file.flush()
        os.fsync(file.fileno())


def _load(path: Path, name: str) -> torch.Tensor:
    """One tensor. The file is opened again for each: what was mapped for the last one leaves the memory."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _sizes(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"
