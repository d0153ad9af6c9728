"""Lets DuckDB read the ledgers of a corpus in a bucket: a file system of fsspec's kind, for `Catalog` alone.

DuckDB sees `corpus://<path below the corpus>`, and nothing else: of these, only what the catalog has named
is opened. What is read is kept in memory, block by block, since these files are never written again.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

from ...schemas.records import Blob
from ..io import files

SCHEME = "corpus"
BLOCK_BYTES = 1 << 20
"""What is read at a time: most ledgers are one block."""

MOST_BYTES = 128 << 20
"""What is kept in memory of all ledgers together."""


class BlockCache:
    """Blocks of files that are never written again, for any number of threads; the oldest make room.

    Args:
        most_bytes: of all blocks together.
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self._most, self._bytes = most_bytes, 0
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()

    def size(self, url: str) -> int:
        """Number of bytes of a file; the first block is read with it."""
        with self._lock:
            if url in self._sizes:
                return self._sizes[url]
        with files.open_url(url, BLOCK_BYTES) as file:
            first = file.read(BLOCK_BYTES)
            size = file.seek(0, io.SEEK_END)
        with self._lock:
            self._sizes[url] = size
        self._keep(url, 0, first)
        return size

    def read(self, url: str, start: int, length: int) -> bytes:
        """Bytes `[start, start + length)`; fewer at the end. Blocks next to each other are one request."""
        stop = min(start + length, self.size(url))
        if start >= stop:
            return b""
        first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        parts: list[bytes] = []
        number = first
        while number <= last:
            if (block := self._find(url, number)) is not None:
                parts.append(block)
                number += 1
                continue
            end = number + 1
            while end <= last and self._find(url, end) is None:
                end += 1
            data = files.read(Blob(url), number * BLOCK_BYTES, (end - number) * BLOCK_BYTES)
            for place in range(number, end):
                at = (place - number) * BLOCK_BYTES
                self._keep(url, place, data[at : at + BLOCK_BYTES])
            parts.append(data)
            number = end
        offset = start - first * BLOCK_BYTES
        return b"".join(parts)[offset : offset + stop - start]

    def _find(self, url: str, number: int) -> bytes | None:
        with self._lock:
            block = self._blocks.get((url, number))
            if block is not None:
                self._blocks.move_to_end((url, number))
            return block

    def _keep(self, url: str, number: int, block: bytes) -> None:
        with self._lock:
            old = self._blocks.pop((url, number), b"")
            self._blocks[url, number] = block
            self._bytes += len(block) - len(old)
            while self._bytes > self._most and len(self._blocks) > 1:
                _, gone = self._blocks.popitem(last=False)
                self._bytes -= len(gone)


class CorpusFiles(AbstractFileSystem):
    """The files of one corpus that DuckDB may read.

    Args:
        out: URL of the corpus.
    """

    protocol = SCHEME
    cachable = False

    def __init__(self, out: str):
        super().__init__()
        self._out = out
        self._blocks = BlockCache()
        self._allowed: set[str] = set()

    def allow(self, urls: list[str]) -> list[str]:
        """Let these files of the corpus be read, and no others; what DuckDB calls them."""
        names = [url.removeprefix(f"{self._out}/") for url in urls]
        self._allowed.update(names)  # in one step: several threads ask for ledgers
        return [f"{SCHEME}://{name}" for name in names]

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
        if mode != "rb":
            raise PermissionError(f"{path}: is only read")
        return io.BufferedReader(_BlockFile(self._blocks, self._url(path)), BLOCK_BYTES)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Size and kind of a file, as fsspec has them."""
        name = self._strip_protocol(path)
        return {"name": name, "size": self._blocks.size(self._url(path)), "type": "file"}

    def modified(self, path: str) -> datetime:
        """The same for every file, as none is written again: DuckDB may keep its footer."""
        return datetime(1970, 1, 1, tzinfo=UTC)

    def exists(self, path: str, **_: Any) -> bool:
        """Whether a file may be read; whoever opens it says if it is gone."""
        return self._strip_protocol(path) in self._allowed

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself: names are explicit."""
        return [str(self._strip_protocol(path))] if self.exists(path) else []

    def _url(self, path: str) -> str:
        name = str(self._strip_protocol(path))
        if name not in self._allowed:
            raise FileNotFoundError(f"{name}: not a file of this corpus")
        return f"{self._out}/{name}"


class _BlockFile(io.RawIOBase):
    """A file that is read from a cache of blocks."""

    def __init__(self, blocks: BlockCache, url: str):
        self._blocks, self._url, self._at = blocks, url, 0
        self.size = blocks.size(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._blocks.read(self._url, self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
