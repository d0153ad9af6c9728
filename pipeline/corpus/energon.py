"""Megatron-Energon's metadata of the shards of a repository, as its command `energon prepare` writes it.

    energon.yaml                                   blends the subsets
    data/<subset>/.nv-meta/                        makes a subset's folder a dataset of Energon
    data/<subset>/<shard>.tar.idx                  where each sample begins

Each subset is a dataset of its own, because Energon wants a key once in a dataset. Energon is not needed: the
writer of the shards knows where each sample lies. The forms are those of version 7.
"""

from __future__ import annotations

import hashlib
import sqlite3
import struct
import uuid
from pathlib import Path
from typing import Any

import yaml

from ...schemas.sample import PHOTO_ENDING
from ..io import files
from .hub_plan import HubPlan, Shard
from .ledger import Place
from .tar import header_size, member_size

BLEND = "energon.yaml"
FOLDER = ".nv-meta"

_PARTS = {"train": "train", "validation": "val"}
"""Our splits by the names of Energon's parts."""

_DATASET = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
"""A sample is a dict of its members, decoded; the task that trains makes of it what it needs."""

_TABLES = (
    "CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, "
    "sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER)",
    "CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, "
    "content_byte_offset INTEGER, content_byte_size INTEGER)",
)
_INDICES = (
    "CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index)",
    "CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset)",
    "CREATE INDEX idx_sample_parts_full ON sample_parts(tar_file_id, sample_index, part_name, "
    "content_byte_offset, content_byte_size)",
)


def texts(plan: HubPlan) -> dict[str, str]:
    """The metadata that is text, by the names of its files in the repository."""
    found = {BLEND: _yaml(_blend(plan))}
    for subset in plan.subsets:
        folder = f"data/{subset}/{FOLDER}"
        shards = plan.of(subset)
        counts = {_name(shard): shard.images for shard in shards}
        parts = {
            part: [_name(each) for each in shards if each.split == split] for split, part in _PARTS.items()
        }
        found[f"{folder}/.info.json"] = files.json_text({"shard_counts": counts}).decode()
        found[f"{folder}/split.yaml"] = _yaml({"split_parts": {**parts, "test": []}, "exclude": []})
        found[f"{folder}/dataset.yaml"] = _yaml({**_DATASET, "subflavors": {"subset": subset}})
    return found


def _blend(plan: HubPlan) -> dict[str, Any]:
    """Energon's metadataset: every image of every subset once in an epoch."""
    parts: dict[str, Any] = {}
    for split in plan.splits:
        found = [subset for subset in plan.subsets if plan.of(subset, split)]
        blend = [{"repetitions": 1, "path": f"data/{subset}"} for subset in found]
        parts[_PARTS[split]] = {"blend_epochized": blend}
    return {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": parts}


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False)


def _name(shard: Shard) -> str:
    return shard.path.rpartition("/")[2]


class Metadata:
    """Writes what is not text: the index of each shard, and the table of all samples of a subset.

    Args:
        plan: the shards.
        folder: of the repository.
    """

    def __init__(self, plan: HubPlan, folder: Path):
        self._folder = folder
        self._numbers = {each.path: number for s in plan.subsets for number, each in enumerate(plan.of(s))}
        self._tables = {subset: _Table(folder / "data" / subset / FOLDER) for subset in plan.subsets}

    def __enter__(self) -> Metadata:
        return self

    def __exit__(self, *_: object) -> None:
        for table in self._tables.values():
            table.close()

    def add(self, shard: Shard, places: dict[str, Place]) -> None:
        """Index a shard that is written: `places` has its samples in order."""
        starts, end = [], 0
        for key, at in places.items():
            starts.append(at.photo_offset - header_size(f"{key}.{PHOTO_ENDING}"))
            name = f"{key}.json"
            end = at.json_offset - header_size(name) + member_size(name, at.json_length)
        offsets = [*starts, end]
        path = self._folder / f"{shard.path}.idx"
        path.write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
        self._tables[shard.subset].add(self._numbers[shard.path], places, offsets)


class _Table:
    """`index.sqlite` of a subset, and `index.uuid`, which changes when it does."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._digest = folder, hashlib.sha256()
        self._database = sqlite3.connect(folder / "index.sqlite")
        for statement in _TABLES:
            self._database.execute(statement)

    def add(self, number: int, places: dict[str, Place], offsets: list[int]) -> None:
        """Add the samples of the shard with this number."""
        samples, parts = [], []
        for index, (key, at) in enumerate(places.items()):
            samples.append((number, key, index, offsets[index], offsets[index + 1] - offsets[index]))
            parts.append((number, index, PHOTO_ENDING, at.photo_offset, at.photo_length))
            parts.append((number, index, "json", at.json_offset, at.json_length))
        self._database.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", samples)
        self._database.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", parts)
        self._database.commit()
        self._digest.update(repr((samples, parts)).encode())

    def close(self) -> None:
        for statement in _INDICES:
            self._database.execute(statement)
        self._database.commit()
        self._database.close()
        identity = uuid.UUID(bytes=self._digest.digest()[:16], version=4)
        (self._folder / "index.uuid").write_text(str(identity))
