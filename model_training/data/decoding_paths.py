"""Decoding paths: in which order a teacher decoded the captions of a corpus's regions, and what it wrote.

A folder of paths has files `paths-PART-NUMBER.npy`, each with a row for a region, and `about.json`, which
says what the numbers mean: the tokenizer's digest and the number of slots. A file appears when it is whole.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...pipeline.io import files
from ...schemas.errors import BadSample, ConfigError, IntegrityError
from .corpus import tokenizer_digest
from .order import key_of

if TYPE_CHECKING:
    from ..model.processor import PerceptionDLMProcessor

ABOUT = "about.json"
RECORD = "record them with `paracaption models paths CONFIG`"


class DecodingPath(NamedTuple):
    """How a caption was decoded.

    Attributes:
        tokens_S: the token of each slot, ends of text included.
        step_S: the step of the decoder, from 0 on, in which each slot got it.
    """

    tokens_S: np.ndarray
    step_S: np.ndarray


def _row(num_slots: int) -> np.dtype:
    return np.dtype([("region", "<u8"), ("tokens", "<i4", num_slots), ("steps", "<i2", num_slots)])


def _region_key(subset: str, key: str, region: int) -> int:
    return key_of("decoding path", subset, key, region)


def facts_of(processor: PerceptionDLMProcessor, num_slots: int) -> dict[str, str | int]:
    """What paths depend on besides the teacher."""
    return {"tokenizer": tokenizer_digest(processor), "max_new_tokens": num_slots}


def write_paths(path: Path, regions: Sequence[tuple[str, str, int]], paths: Sequence[DecodingPath]) -> None:
    """Write a file of paths; it appears when it is complete.

    Args:
        path: the file, in a folder of paths.
        regions: (subset, key of the image, id of the region) of each path.
        paths: at least one, all with the same number of slots.
    """
    rows = np.zeros(len(paths), _row(len(paths[0].tokens_S)))
    rows["region"] = [_region_key(*region) for region in regions]
    rows["tokens"], rows["steps"] = (
        np.stack([each[part] for each in paths]) for part in range(len(DecodingPath._fields))
    )
    written = io.BytesIO()
    np.save(written, rows)
    with files.write_atomic(path) as file:
        file.write(written.getvalue())


class DecodingPaths:
    """The paths of a folder, mapped into memory.

    Args:
        folder: what `paracaption models paths` wrote.
        processor: the processor of the model that is trained.
        num_slots: slots of a caption, `data.max_new_tokens`.

    Raises:
        ConfigError: the folder has no paths, or those of another tokenizer or number of slots.
        IntegrityError: a file is damaged.
    """

    def __init__(self, folder: str | Path, processor: PerceptionDLMProcessor, num_slots: int):
        self.folder = Path(folder)
        found = sorted(self.folder.glob("paths-*.npy"))
        if not found or not (self.folder / ABOUT).is_file():
            raise ConfigError(f"distillation.paths: {folder}: there are no decoding paths; {RECORD}")
        about, facts = json.loads((self.folder / ABOUT).read_text()), facts_of(processor, num_slots)
        if changed := [name for name, value in facts.items() if about.get(name) != value]:
            raise ConfigError(
                f"distillation.paths: {folder}: recorded with another {changed[0]}; {RECORD} into a new one"
            )
        self._open(found, num_slots)

    def _open(self, found: list[Path], num_slots: int) -> None:
        self.num_slots, self.files = num_slots, found
        self.parts = [_mapped(path, num_slots) for path in found]
        keys = np.concatenate([part["region"] for part in self.parts])
        self.order = np.argsort(keys, kind="stable")
        self.keys = keys[self.order]
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.folder, self.files, self.num_slots)  # a worker process maps the files itself

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, subset: str, key: str, region: int) -> DecodingPath:
        """The path of a region's caption.

        Raises:
            BadSample: it was not recorded.
        """
        wanted = np.uint64(_region_key(subset, key, region))
        at = int(np.searchsorted(self.keys, wanted))
        if at == len(self.keys) or self.keys[at] != wanted:
            raise BadSample(
                "no_decoding_path",
                f"{self.folder}: no decoding path of {subset}/{key}#{region}; {RECORD}, or set "
                "data.on_bad_sample: skip",
            )
        number = int(self.order[at])
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        row = self.parts[part][number - self.starts[part]]
        return DecodingPath(row["tokens"].astype(np.int64), row["steps"].astype(np.int64))


def _reopen(folder: Path, found: list[Path], num_slots: int) -> DecodingPaths:
    opened = DecodingPaths.__new__(DecodingPaths)
    opened.folder = folder
    opened._open(found, num_slots)
    return opened


def _mapped(path: Path, num_slots: int) -> np.ndarray:
    try:
        rows = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise IntegrityError(f"{path}: unreadable ({error}); delete it and {RECORD} again") from error
    if rows.dtype != _row(num_slots):
        raise IntegrityError(f"{path}: not a file of decoding paths; delete it and {RECORD} again")
    return rows
