"""The checkpoint's own language model as a folder that vLLM loads."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....schemas.errors import ConfigError
from ...io import weights
from . import checkpoint
from .checkpoint import GarConfig

if TYPE_CHECKING:
    import torch

VERSION = 1
"""Of what is written; another one makes exports stale."""

RECORD = "export.json"
"""Says what the folder was made from. Written into it before it gets its name, so it is never without."""

SHARD_BYTES = 4 << 30
"""Largest file; also about the memory that an export needs."""

_ABANDONED_S = 6 * 3600
"""A temporary folder untouched for this long belongs to nobody."""


def default_folder(model: str | Path) -> Path:
    """Where the export of a checkpoint lies if nothing else is said: beside it."""
    path = Path(model).absolute()
    return path.with_name(f"{path.name}-vllm")


def prepare(model: str | Path, to: str | Path | None = None) -> Path:
    """Export the language model of a GAR checkpoint, unless that was done.

    Tensors are copied one at a time. The folder appears under its name whole or not at all; an export of
    other weights that is found there is replaced. Processes of one node wait for each other; of several, one
    wins and the rest take its folder.

    Args:
        model: folder of the published checkpoint.
        to: where to; default: beside it, as `<model>-vllm`.

    Returns:
        The folder.

    Raises:
        ConfigError: not a sound GAR checkpoint; the target cannot be written, or is something else.
    """
    config = checkpoint.read_config(model)
    target = Path(to).absolute() if to is not None else default_folder(config.folder)
    record = record_of(config)
    if is_done(target, record):
        return target
    checkpoint.check_tensors(config)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock"):
            if not is_done(target, record):
                _export(config, target, record)
    except OSError as error:
        raise ConfigError(
            f"{target}: the language model cannot be exported there: {error}; name a folder that can be "
            "written: captioner.options.language_model, or `paracaption models prepare gar MODEL --to FOLDER`"
        ) from error
    return target


def record_of(config: GarConfig) -> dict[str, Any]:
    """Identifies what an export is made from."""
    return {"version": VERSION, "weights": weights.identity(config.folder)}


def is_done(target: Path, record: dict[str, Any]) -> bool:
    """Whether the folder is whole and made from this.

    Raises:
        ConfigError: it is something else, which is not ours to replace.
    """
    if not target.exists():
        return False
    try:
        found = json.loads((target / RECORD).read_text())
        sizes = found.pop("files")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if target.is_dir() and not any(target.iterdir()):
            return False
        raise ConfigError(
            f"{target}: is there and no export of ours (no sound {RECORD} in it); move it away, or name "
            "another folder with captioner.options.language_model"
        ) from error
    whole = all(
        (target / name).is_file() and (target / name).stat().st_size == size for name, size in sizes.items()
    )
    return whole and found == record


def _export(config: GarConfig, target: Path, record: dict[str, Any]) -> None:
    for left in target.parent.glob(f".{target.name}.*.partial"):
        if time.time() - left.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)
    partial = target.parent / f".{target.name}.{os.uname().nodename}-{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        tied = _write_weights(config, partial)
        _write_json(partial / "config.json", _llama_config(config, tied))
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        _write_json(partial / RECORD, {**record, "files": sizes})
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        _swap(partial, target, record)
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, target: Path, record: dict[str, Any]) -> None:
    """Give the folder its name, unless another node was first.

    A stale export goes out of the way before: a folder cannot be replaced.
    """
    if is_done(target, record):
        return
    if target.exists():
        stale = target.parent / f"{partial.name.removesuffix('.partial')}.stale.partial"
        shutil.rmtree(stale, ignore_errors=True)
        target.rename(stale)
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.rename(target)
    except OSError:
        if not is_done(target, record):  # another node came between
            raise


def _write_weights(config: GarConfig, folder: Path) -> bool:
    """Write the tensors in files of at most `SHARD_BYTES`, or one tensor; whether the head is tied."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    num_bytes = 0
    total = 0
    tied = True

    def flush() -> None:
        nonlocal num_bytes
        shards.append(list(held))
        save_file(held, folder / f"part-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        held.clear()
        num_bytes = 0

    for name, tensor in _tensors(config):
        size = tensor.numel() * tensor.element_size()
        if held and num_bytes + size > SHARD_BYTES:
            flush()
        held[name] = tensor
        num_bytes += size
        total += size
        tied = tied and name != "lm_head.weight"
    flush()
    names = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number:05d}.safetensors").rename(folder / file)
        names |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    _write_json(folder / "model.safetensors.index.json", index)
    return tied


def _tensors(config: GarConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(name as Llama has it, tensor) of the language model."""
    for name, tensor in weights.read(config.folder, checkpoint.LANGUAGE):
        if "rotary_emb" not in name:
            yield "model." + name.removeprefix(checkpoint.LANGUAGE), tensor
    for _, tensor in weights.read(config.folder, checkpoint.HEAD):
        yield "lm_head.weight", tensor


def _llama_config(config: GarConfig, tied: bool) -> dict[str, Any]:
    settings = {
        key: value for key, value in config.text.items() if value is not None and key != "_name_or_path"
    }
    return {
        **settings,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": config.dtype,
        "tie_word_embeddings": tied,
    }


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone on this node. The kernel frees the lock when a process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
