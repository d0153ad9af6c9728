"""An export that is being written, and what an interrupted one has left: the next one keeps its whole shards.

A repository is written in `.NAME.exporting` next to its place. There `shards.jsonl` says in its first line of
what the export is, and in others which shards are whole, with their SHA-256; a file `writer-...` names who is
writing.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ...schemas.errors import ConfigError, IntegrityError
from ..io import files
from ..io.disk_errors import refused_by_store
from ..io.process_identity import is_dead, name_of, process_named, this_process
from ..io.store import store_of

NOTES = "shards.jsonl"
_WRITER = "writer-"


class Unfinished:
    """The folder of an export that is being written; made by `unfinished`.

    Attributes:
        folder: what is to get the repository's name.
        kept: SHA-256 of the shards in it that are whole, by path.
    """

    def __init__(self, folder: Path, kept: dict[str, str], notes: IO[bytes], writer: str):
        self.folder, self.kept, self._notes = folder, kept, notes
        self._own = {NOTES, writer}

    def begin(self, identity: str) -> None:
        """Remove what is not to be kept, and write the notes again."""
        self._remove_others()
        self._notes.truncate(0)
        self._notes.write(_line(identity))
        for path, sha256 in self.kept.items():
            self.note(path, sha256)

    def note(self, path: str, sha256: str) -> None:
        """Note that a shard is whole, and on the disk."""
        self.kept[path] = sha256
        self._notes.write(_line([path, sha256]))
        self._notes.flush()
        os.fsync(self._notes.fileno())

    def end(self, to: Path) -> None:
        """Let the folder appear under its name, without what is no part of the repository."""
        for name in self._own:
            (self.folder / name).unlink()
        files.sync_tree(self.folder)
        store_of(self.folder).move(str(self.folder), str(to.absolute()))

    def paths(self) -> list[str]:
        """The files of the repository that are there, by their paths in it, sorted."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted({path.relative_to(self.folder).as_posix() for path in found} - self._own)

    def tidy(self) -> None:
        """Leave the whole shards alone, and nothing if there are none."""
        if self.kept:
            self._remove_others()
        else:
            store_of(self.folder).delete_folder(str(self.folder))

    def _remove_others(self) -> None:
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in self._own and name not in self.kept:
                path.unlink()


@contextmanager
def unfinished(to: Path, identity: str, sizes: Mapping[str, int]) -> Iterator[Unfinished]:
    """Write a folder that appears whole at its place when the block ends, or go on with writing it.

    After an error that says something of the corpus nothing is left. After any other one, and after a kill,
    the whole shards are.

    Args:
        to: the place: a folder that does not exist yet, or is empty. Folders above it are made.
        identity: of all that the shards depend on. What is left of an export with another one is removed.
        sizes: bytes of each shard by its path.

    Raises:
        ConfigError: the place is taken, or another process is writing there.
        OSError: as the file system has it.
    """
    files.refuse_existing(to)
    folder = to.absolute().with_name(f".{to.absolute().name}.exporting")
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder, to) as writer, open(folder / NOTES, "a+b") as notes:
        files.refuse_existing(to)  # by an export that has ended meanwhile
        begun = Unfinished(folder, _whole(folder, identity, sizes, notes), notes, writer)
        try:
            begun.begin(identity)
            yield begun
            begun.end(to)
        except BaseException as error:
            if isinstance(error, IntegrityError) and refused_by_store(error) is None:
                begun.kept.clear()
            begun.tidy()
            raise


@contextmanager
def _only_writer(folder: Path, to: Path) -> Iterator[str]:
    """Name this process in a folder, and see that no other one is named there that may be alive.

    Of two that begin at the same time each sees the other.
    """
    own = f"{_WRITER}{uuid.uuid4().hex[:12]}~{name_of(this_process())}"
    (folder / own).touch()
    try:
        for path in folder.glob(f"{_WRITER}*"):
            process = process_named(path.name.partition("~")[2])
            if path.name != own and not (process is not None and is_dead(process)):
                who = "another process" if process is None else f"process {process.pid} on {process.host}"
                raise ConfigError(
                    f"{to}: {who} is writing this export; wait until it ends, or delete {path} if it is gone"
                )
        yield own
    finally:
        with suppress(FileNotFoundError):
            (folder / own).unlink()


def _whole(folder: Path, identity: str, sizes: Mapping[str, int], notes: IO[bytes]) -> dict[str, str]:
    """SHA-256 of the noted shards that are there as they were written, by path."""
    notes.seek(0)
    lines = notes.read().split(b"\n")[:-1]  # the last one may be cut short
    if not lines or lines[0] + b"\n" != _line(identity):
        return {}
    found: dict[str, str] = {}
    with suppress(ValueError, TypeError):  # a damaged line, as after a power cut
        for path, sha256 in map(json.loads, lines[1:]):
            place = folder / path
            if path in sizes and place.is_file() and place.stat().st_size == sizes[path]:
                if files.sha256_of(place) == sha256:
                    found[path] = sha256
    return found


def _line(content: object) -> bytes:
    return json.dumps(content).encode() + b"\n"
