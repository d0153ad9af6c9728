"""A disk in memory that can fail, and that forgets at a crash what was not flushed.

It stands below `FolderStore` in the place of the module `os`, and below `files` as the backend of plain
paths, so what runs in a simulation is our own code down to the system calls. Files of other folders than its
own are left to the real disk: events, notes and scratch files are not part of what a corpus promises.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

from paracaption.pipeline.io.backends import LocalFiles, expand_by_listing
from paracaption.pipeline.io.failures import ShortRead


class Killed(BaseException):
    """The process was killed here; nothing that it does afterwards reaches the disk."""


class Inode:
    """A file: its content, what of it is on the platter, and how many names it has."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.flushed = b""
        self.links = 1


class Disk:
    """The files of some folders.

    Args:
        roots: the folders; every other path is the real disk's.
        on_call: asked before each call, with its kind ("read", "list", "create", "write", "flush", "name",
            "delete") and its path. It may raise, or return a number of bytes after which a read ends.
    """

    def __init__(self, roots: list[str], on_call: Callable[[str, str], int | None] = lambda *_: None):
        self.roots = [f"{root.rstrip('/')}/" for root in roots]
        self.on_call = on_call
        self.names: dict[str, Inode] = {}
        self.durable: dict[str, Inode] = {}
        self.pending: list[tuple[str, str, str, Inode | None]] = []
        self.folders: set[str] = set()

    def has(self, path: str) -> bool:
        """Whether a path is this disk's."""
        return f"{path.rstrip('/')}/".startswith(tuple(self.roots))

    def load(self, folder: str) -> None:
        """Copy a real folder onto this disk."""
        for at, _, found in os.walk(folder):
            self.folders.add(at)
            for name in found:
                inode = Inode()
                with open(f"{at}/{name}", "rb") as file:
                    inode.data[:] = inode.flushed = file.read()
                self.names[f"{at}/{name}"] = self.durable[f"{at}/{name}"] = inode

    def snapshot(self, folder: str) -> dict[str, bytes]:
        """The files below a folder, by path."""
        return {path: bytes(each.data) for path, each in self.names.items() if path.startswith(f"{folder}/")}

    def crash(self, random: Random) -> None:
        """Lose what was not flushed; chance decides what of it had reached the platter all the same."""
        for folder in sorted({each[0] for each in self.pending}):
            changes = [each for each in self.pending if each[0] == folder]
            self._settle(changes[: random.randint(0, len(changes))])
        for inode in self.durable.values():
            if bytes(inode.data) != inode.flushed:
                inode.data[:] = inode.flushed + bytes(inode.data[len(inode.flushed) :])[: random.randrange(9)]
                inode.flushed = bytes(inode.data)
        self.names, self.pending = dict(self.durable), []

    def change(self, path: str, inode: Inode | None, gone: str = "") -> None:
        """Give a name to a file, or take it away; `gone` is the name that a renamed file had before."""
        if inode is None:
            del self.names[path]
        else:
            self.names[path] = inode
        if gone:
            del self.names[gone]
        self.pending.append((os.path.dirname(path), path, gone, inode))

    def flush_folder(self, folder: str) -> None:
        """Make the names in a folder durable."""
        self._settle([each for each in self.pending if each[0] == folder])

    def _settle(self, changes: list[tuple[str, str, str, Inode | None]]) -> None:
        """Make changes of names durable, each as a whole and in their order."""
        for change in changes:
            _, path, gone, inode = change
            if inode is None:
                self.durable.pop(path, None)
            else:
                self.durable[path] = inode
            self.durable.pop(gone, None)
            self.pending.remove(change)

    def inode(self, path: str) -> Inode:
        if path not in self.names:
            number = errno.EISDIR if path in self.folders else errno.ENOENT
            raise OSError(number, os.strerror(number), path)
        return self.names[path]

    def list(self, folder: str) -> list[str]:
        if folder not in self.folders:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), folder)
        below = f"{folder}/"
        found = [path for path in [*self.names, *self.folders] if path.startswith(below)]
        return sorted({path[len(below) :].partition("/")[0] for path in found})

    def make_folders(self, path: str) -> None:
        while path not in ("", "/"):
            self.folders.add(path)
            path = os.path.dirname(path)


class _File(io.RawIOBase):
    """A file of the disk that is being written."""

    def __init__(self, disk: Disk, path: str, mode: str):
        assert mode == "xb"
        disk.on_call("create", path)
        if path in disk.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        if os.path.dirname(path) not in disk.folders:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self.disk, self.path, self.name, self.inode_ = disk, path, path, Inode()
        disk.change(path, self.inode_)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.disk.on_call("write", self.path)
        self.inode_.data += bytes(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self.disk.on_call("flush", self.path)
            self.inode_.flushed = bytes(self.inode_.data)


class SystemCalls:
    """What `store.py` uses of the module `os`, on the disk."""

    path, O_RDONLY, strerror, replace_real = os.path, os.O_RDONLY, staticmethod(os.strerror), os.replace

    def __init__(self, disk: Disk):
        self.disk = disk
        self._opened: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def link(self, path: str, target: str) -> None:
        self.disk.on_call("name", target)
        inode = self.disk.inode(path)
        if target in self.disk.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        self.disk.change(target, inode)
        inode.links += 1

    def replace(self, path: str, target: str) -> None:
        self.disk.on_call("name", target)
        inode = self.disk.inode(path)
        if target in self.disk.folders:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
        self.disk.change(target, inode, gone=path)

    def unlink(self, path: str) -> None:
        self.disk.on_call("delete", path)
        self.disk.inode(path).links -= 1
        self.disk.change(path, None)

    def mkdir(self, path: str) -> None:
        if not self.disk.has(path):
            return os.mkdir(path)
        if path in self.disk.folders or path in self.disk.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        above = os.path.dirname(path)
        if self.disk.has(above) and above not in self.disk.folders:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self.disk.make_folders(path)
        return None

    def listdir(self, path: str) -> list[str]:
        self.disk.on_call("list", path)
        return self.disk.list(path)

    def stat(self, path: str) -> Any:
        self.disk.on_call("list", path)
        inode = self.disk.inode(path)
        return SimpleNamespace(st_size=len(inode.data), st_nlink=inode.links, st_mtime=0.0)

    def open(self, path: str, _flags: int) -> int:
        number = 1_000_000 + len(self._opened)
        self._opened[number] = path
        return number

    def fsync(self, number: int) -> None:
        """Of a folder: its entries are durable now."""
        folder = self._opened[number]
        self.disk.on_call("flush", folder)
        self.disk.flush_folder(folder)

    def close(self, number: int) -> None:
        del self._opened[number]


class DiskFiles(LocalFiles):
    """Reads plain paths from the disk, and from the real one what is not there."""

    def __init__(self, disk: Disk):
        self.disk = disk

    def read(self, url: str, start: int = 0, length: int | None = None) -> bytes:
        if not self.disk.has(url):
            return super().read(url, start, length)
        short = self.disk.on_call("read", url)
        data = bytes(self.disk.inode(url).data[start : None if length is None else start + length])
        if short is not None and length is None and short < len(data):
            raise ShortRead(f"{short} of {len(data)} bytes")
        return data if short is None else data[:short]

    def size(self, url: str) -> int:
        if not self.disk.has(url):
            return super().size(url)
        self.disk.on_call("list", url)
        return len(self.disk.inode(url).data)

    def version(self, url: str) -> str:
        return f"{self.size(url)}-0" if self.disk.has(url) else super().version(url)

    def kind(self, url: str) -> Any:
        if not self.disk.has(url):
            return super().kind(url)
        self.disk.on_call("list", url)
        path = url.rstrip("/")
        return "file" if path in self.disk.names else "folder" if path in self.disk.folders else None

    def list_names(self, folder: str) -> list[str]:
        if not self.disk.has(folder):
            return super().list_names(folder)
        self.disk.on_call("list", folder)
        return self.disk.list(folder.rstrip("/"))

    def walk(self, folder: str) -> Iterator[tuple[str, str]]:
        if not self.disk.has(folder):
            yield from super().walk(folder)
            return
        self.disk.on_call("list", folder)
        root = folder.rstrip("/")
        for path in sorted(self.disk.names):
            if path.startswith(f"{root}/"):
                yield path, path[len(root) + 1 :]

    def glob(self, pattern: str) -> list[str]:
        return expand_by_listing(self, pattern)
