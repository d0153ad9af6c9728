"""Reads URLs that name environment variables, such as `s3://$BUCKET/photos`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from . import variables
from .backends import Backend, FileKind


class ExpandedBackend:
    """Reads URLs that name environment variables. What it finds in a folder is named like the folder."""

    def __init__(self, backend: Backend):
        self._backend = backend

    def read(self, url: str, start: int = 0, length: int | None = None) -> bytes:
        return self._backend.read(variables.expand(url), start, length)

    def size(self, url: str) -> int:
        return self._backend.size(variables.expand(url))

    def version(self, url: str) -> str:
        return self._backend.version(variables.expand(url))

    def forget(self, url: str) -> None:
        forget = getattr(self._backend, "forget", None)
        if forget is not None:
            forget(variables.expand(url))

    def kind(self, url: str) -> FileKind | None:
        return self._backend.kind(variables.expand(url))

    def list_names(self, folder: str) -> list[str]:
        return self._backend.list_names(variables.expand(folder))

    def walk(self, folder: str) -> Iterator[tuple[str, str]]:
        for _, relative in self._backend.walk(variables.expand(folder)):
            yield f"{folder.rstrip('/')}/{relative}", relative

    def glob(self, pattern: str) -> list[str]:
        return [variables.fold(url, pattern) for url in self._backend.glob(variables.expand(pattern))]

    def read_many(self, urls: Sequence[str]) -> list[bytes]:
        return self._backend.read_many([variables.expand(url) for url in urls])
