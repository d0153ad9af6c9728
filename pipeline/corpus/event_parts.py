"""The events of a worker in a bucket, where nothing can be appended: each few seconds they are another part.

OUT/events/<run>/<worker>-<host>-<pid>.000001.jsonl
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from ...schemas.errors import ConfigError
from ..io import files
from ..io.location import Prefix
from ..io.store import store_of

log = logging.getLogger(__name__)

EVERY_S = 5.0
"""How often what has happened is uploaded, and how often a reader looks for it."""


class PartWriter:
    """Uploads records in parts, from a thread of its own.

    What cannot be uploaded is tried again with the next part; what a killed process has not uploaded is lost.

    Args:
        folder: OUT/events/<run>.
        name: of the worker; nobody else in this run has it.
    """

    def __init__(self, folder: Prefix, name: str):
        self._folder, self._name = folder, name
        self._lines: list[bytes] = []
        self._number = 0
        self._read_beside: Callable[[], Mapping[str, bytes]] = dict
        self._beside: dict[str, bytes] = {}
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def append(self, record: Any) -> None:
        """Have a record uploaded within seconds."""
        with self._lock:
            self._lines.append(msgspec.json.encode(record) + b"\n")
        self._start()

    def add_files(self, read: Callable[[], Mapping[str, bytes]]) -> None:
        """Keep files of this machine next to the parts.

        Args:
            read: their bytes by name, asked every few seconds. What has changed is uploaded, and what is not
                among them any more is deleted.
        """
        self._read_beside = read
        self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="events")
            self._thread.start()
            atexit.register(self.close)  # an actor of Ray ends without a word

    def _run(self) -> None:
        while not self._ended.wait(EVERY_S):
            self.flush()

    def flush(self) -> None:
        """Upload what has happened since the last part. What cannot be uploaded now is no error."""
        with self._flushing:
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
        store = store_of(self._folder)
        try:
            if lines:
                number = self._number + 1
                store.put(f"{self._folder}/{self._name}.{number:06}.jsonl", b"".join(lines))
                self._number, lines = number, []
            beside = self._read_beside()
            for name in beside.keys() | self._beside.keys():
                if name not in beside:
                    store.delete(f"{self._folder}/{name}")
                    del self._beside[name]
                elif self._beside.get(name) != beside[name]:
                    store.put(f"{self._folder}/{name}", beside[name])
                    self._beside[name] = beside[name]
        except (OSError, ConfigError) as error:  # whoever writes what matters says that it may not
            log.debug("%s: events are uploaded later: %s", self._folder, error)
            with self._lock:
                self._lines[:0] = lines

    def close(self) -> None:
        """Upload what is left."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self.close)
        self.flush()


class PartReader:
    """Follows the parts of all workers of a run.

    Args:
        folder: OUT/events/<run>.
    """

    def __init__(self, folder: Prefix):
        self._folder = folder
        self._seen: set[str] = set()
        self._looked_s = -EVERY_S

    def new(self) -> Iterator[tuple[str, bytes]]:
        """(worker, line) of the parts that have come since the last look; there is one every few seconds.

        Raises:
            OSError: the bucket cannot be listed or read.
        """
        if time.monotonic() - self._looked_s < EVERY_S:
            return
        self._looked_s = time.monotonic()
        names = [name for name in files.list_names(str(self._folder)) if name.endswith(".jsonl")]
        fresh = [name for name in names if name not in self._seen]
        for name, data in zip(
            fresh, files.read_many([f"{self._folder}/{name}" for name in fresh]), strict=True
        ):
            self._seen.add(name)
            worker = name.removesuffix(".jsonl").rpartition(".")[0]
            for line in data.split(b"\n")[:-1]:
                yield worker, line
