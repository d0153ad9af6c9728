"""What a store of a corpus does, whether it is a folder or a bucket."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import IO, ClassVar


class Store(ABC):
    """Where files of a corpus lie. Paths are whole: a local path, or a URL of the store's scheme.

    Attributes:
        moves: whether a file is moved to its place once a record of the log names it. Where nothing can be
            moved, it keeps the name that `new_name` gave it.
    """

    moves: ClassVar[bool]

    @abstractmethod
    def new_name(self, path: str) -> str:
        """A name that nobody else has, for a file that is to take its place at `path`, below the corpus."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless its name is taken. Of all who try, one gets True; it is durable then.

        Raises:
            OSError: it was not written, or it is not known.
        """

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Write a file, or replace it: readers see the old one or the new one, each whole."""

    @abstractmethod
    def write(self, path: str) -> IO[bytes]:
        """Open a new file to be written piece by piece. It is there when it is closed; not atomic, so give it
        a name of `new_name`. Folders above it are made. Who does not want it any more gives it up
        (`give_up`), since to close it may be to upload it.
        """

    @abstractmethod
    def move(self, path: str, target: str) -> bool:
        """Rename a file, over another one if need be; False if it is not there (moved already). In both cases
        the names in the target's folder are durable then.
        """

    @abstractmethod
    def keep(self, path: str, target: str) -> bool:
        """Give a file a second name, so that it stays when the first one is replaced.

        Returns:
            False if there is no such file. A second name that is taken already is left as it is.
        """

    @abstractmethod
    def flush(self, folder: str) -> None:
        """Make the names in a folder durable, whoever gave or took them; no such folder, no names."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete a file; one that is not there is deleted already."""

    @abstractmethod
    def delete_folder(self, path: str) -> None:
        """Delete a folder and all in it; what cannot be deleted is left."""

    @abstractmethod
    def make_folder(self, path: str) -> None:
        """Make a folder and those above it, if they are not there."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Number of bytes of a file; None if there is no such file."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def list(self, folder: str) -> list[str]:
        """Names of the files and folders in a folder, sorted; none if there is no such folder."""

    @abstractmethod
    def modified_s(self, path: str) -> float:
        """When a file was last written, in seconds since the epoch, by the store's clock."""


def give_up(file: IO[bytes]) -> None:
    """Close a new file that nobody wants any more. It may lie there under its name, or not at all."""
    discard = getattr(file, "discard", None)
    if discard is None:
        file.close()
    else:
        discard()
