"""The checkpoint's own language model as a folder that vLLM loads."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ....schemas.errors import ConfigError
from ...io import files, tensor_files, weights
from ...io.tensor_files import LazyTensor
from . import checkpoint
from .checkpoint import GarConfig

VERSION = 1
"""Of what is written; another one makes exports stale."""

RECORD = "export.json"
"""Says what the folder was made from. Written into it before it gets its name, so it is never without."""


def default_folder(model: str | Path) -> Path:
    """Where the export of a checkpoint lies if nothing else is said: next to it."""
    path = Path(model).absolute()
    return path.with_name(f"{path.name}-vllm")


def prepare(model: str | Path, to: str | Path | None = None) -> Path:
    """Export the language model of a GAR checkpoint, unless that was done.

    Tensors are copied one at a time. The folder appears under its name whole or not at all; an export of
    other weights that is found there is replaced. Processes of one node wait for each other; of several, one
    wins and the rest take its folder.

    Args:
        model: folder of the published checkpoint.
        to: where to; default: next to it, as `<model>-vllm`.

    Returns:
        The folder.

    Raises:
        ConfigError: not a sound GAR checkpoint, or a weight is NaN or infinite; the target cannot be
            written, or is something else.
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
            f"{target}: already exists and is not an export of this program (no sound {RECORD} in it); move "
            "it away, or set another folder with captioner.options.language_model"
        ) from error
    whole = all(
        (target / name).is_file() and (target / name).stat().st_size == size for name, size in sizes.items()
    )
    return whole and found == record


def _export(config: GarConfig, target: Path, record: dict[str, Any]) -> None:
    """Write the export, unless another node has done so meanwhile."""
    try:
        with files.write_folder_atomic(target, replace=True) as folder:
            tensors = _language_model(config)
            tensor_files.write_tensors(folder, tensors, by_name=True)
            llama = _llama_config(config, tied="lm_head.weight" not in tensors)
            weights.write_json(folder / "config.json", llama, sort_keys=True)
            sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            weights.write_json(folder / RECORD, {**record, "files": sizes}, sort_keys=True)
            if is_done(target, record):
                raise FileExistsError(target)  # the folder in use there is not replaced
    except OSError:
        if not is_done(target, record):
            raise


def _language_model(config: GarConfig) -> dict[str, LazyTensor]:
    """The language model's tensors under Llama's names; one that holds NaN or infinity cannot be read."""
    stored = tensor_files.list_tensors(config.folder)
    found = {
        "model." + name.removeprefix(checkpoint.LANGUAGE): tensor_files.finite(name, tensor)
        for name, tensor in stored.items()
        if name.startswith(checkpoint.LANGUAGE) and "rotary_emb" not in name
    }
    if checkpoint.HEAD in stored:
        found["lm_head.weight"] = tensor_files.finite(checkpoint.HEAD, stored[checkpoint.HEAD])
    return found


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
