"""Reads the files of torch's distributed checkpoints without running what stands in them.

Such a folder holds pickles: an index, and values that are no tensors. torch loads both as programs. Here the
index is made of the few classes that it has, and values only of what torch calls weights; and files are read
only in the checkpoint's folder.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

_INDEX, _DATA = ".metadata", ".distcp"
_OF_CHECKPOINTS = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
}
"""Module -> what an index names in it. None of these does anything when it is called but make a value."""


class _Index(pickle.Unpickler):
    """Makes only what an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _OF_CHECKPOINTS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours has")


class CheckpointReader(FileSystemReader):
    """Reads a checkpoint's folder.

    Args:
        folder: the checkpoint.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *_args: Any, **_named: Any) -> Metadata:
        """What the checkpoint holds.

        Raises:
            pickle.UnpicklingError: its index holds something else, or names a file that is not of its folder.
        """
        with open(self._folder / _INDEX, "rb") as file:
            found = _Index(file).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise pickle.UnpicklingError("it is not the index of a checkpoint")
        for each in found.storage_data.values():
            name = str(each.relative_path)
            if Path(name).name != name or not name.endswith(_DATA) or (self._folder / name).is_symlink():
                raise pickle.UnpicklingError(f"it names {name[:100]!r}, no file next to it")
        if found.storage_meta is not None:
            found.storage_meta.load_id = self.load_id
        return found


class TensorsAndNumbers(DefaultLoadPlanner):
    """Loads values that are no tensors as weights, which are data, and never as programs."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value into the state."""
        torch.load(value, weights_only=True)  # raises for anything that could run
        value.seek(0)
        super().load_bytes(read_item, value)
