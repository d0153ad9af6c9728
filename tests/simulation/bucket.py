"""A bucket in memory that fails as `tests/object_server.py` does, in the place of obstore.

What is kept is kept by obstore's own store in memory, so what it answers is what obstore answers; around each
of its calls stands what a network and an object store may do. Nothing depends on time: what comes late comes
so many requests later, in whichever process they are made.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any
from unittest import mock

import obstore
from obstore.exceptions import GenericError
from obstore.store import MemoryStore

from paracaption.pipeline.corpus import log as commit_log
from paracaption.pipeline.corpus.owner import own
from paracaption.pipeline.corpus.records import Commit
from paracaption.pipeline.corpus.sweep import sweep
from paracaption.pipeline.io import bucket_checks, bucket_clients, bucket_files, scratch
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.evidence import EvidenceStore, unit_of_file
from paracaption.pipeline.stages.recipes import recipe_of
from paracaption.schemas.config import BuildConfig
from tests.simulation.disk import Killed
from tests.simulation.world import KINDS, World

BUCKET, CORPUS = "simulated", "corpus"

REQUESTS = ("kill", "kill_done", "kill_stuck", "503", "down", "refused", "clock", "stuck", "repeated_late")
"""What may happen at any request. "kill_done": it is done, and then the process is killed. "kill_stuck": the
process is killed, and the request is done some requests later. "503": nothing is done. "down": from here to
the end of this build nothing can be asked. "refused": this once, by 403. "stuck": an error, and it is done
some requests later; "repeated_late": it is done now, and then once more."""

WRITES = ("lost_answer", "repeated")
"""What may happen at one that writes. "lost_answer": it is done, and the answer is an error. "repeated": it
is done twice, as by a client that asks again by itself, and the second answer is returned."""

BUCKET_KINDS = (*KINDS, *(kind for kind in (*REQUESTS, *WRITES) if kind not in KINDS))

_LATER = (1, 10, 60, 130, 170, 230)
"""So many requests later what the network held arrives. A driver claims a corpus with its 100th or so."""

_ANSWERS = {
    "503": "Generic S3 error: Server returned non-2xx status code: 503 Service Unavailable: ",
    "refused": "Generic S3 error: Server returned non-2xx status code: 403 Forbidden: ",
    "stuck": "Generic S3 error: HTTP error: connection reset by peer",
    "lost_answer": "Generic S3 error: HTTP error: connection closed before message completed",
    "down": "Generic S3 error: HTTP error: connection refused",
}


class Requests(ModuleType):
    """What stands in the place of the module obstore.

    Args:
        on_request: asked before each request, with whether it writes, and its key; returns what befalls it.
    """

    exceptions = obstore.exceptions

    def __init__(self, on_request: Callable[[bool, str], str]):
        super().__init__("obstore")
        self.on_request = on_request
        self.random = Random(0)
        self.client = MemoryStore()
        self.late_puts = 0
        self._put: dict[str, int] = {}
        self._puts = 0
        self._held: list[tuple[int, Callable[[], Any]]] = []
        self._number = 0

    def begin(self, objects: dict[str, bytes]) -> None:
        """Forget everything, and have these objects, as if they had always been there."""
        self.client, self._put, self._puts, self._held = MemoryStore(), {}, 0, []
        for key, data in objects.items():
            obstore.put(self.client, key, data)

    def objects(self) -> dict[str, bytes]:
        """What is there now, by key."""
        found = sorted(each["path"] for each in obstore.list(self.client).collect())
        return {key: obstore.get(self.client, key).bytes().to_bytes() for key in found}

    def deliver(self, all_of_it: bool = False) -> None:
        """Do what the network has held long enough."""
        due = [each for each in self._held if all_of_it or each[0] <= self._number]
        self._held = [each for each in self._held if each not in due]
        for _, request in due:
            request()

    # The calls of obstore that `pipeline/io` makes.

    def put(self, client: Any, key: str, data: Any, mode: str = "overwrite") -> Any:
        content = data.read_bytes() if isinstance(data, Path) else bytes(data)
        return self._write(key, lambda: self._do_put(key, content, mode))

    def delete(self, client: Any, keys: str | list[str]) -> Any:
        return self._write(keys if isinstance(keys, str) else keys[0], lambda: self._do_delete(keys))

    def get(self, client: Any, key: str, options: Any = None) -> Any:
        return self._read(key, lambda: obstore.get(self.client, key, options=options))

    def get_range(self, client: Any, key: str, *, start: int, length: int) -> Any:
        return self._read(key, lambda: obstore.get_range(self.client, key, start=start, length=length))

    def head(self, client: Any, key: str) -> Any:
        return self._read(key, lambda: obstore.head(self.client, key))

    def list(self, client: Any, prefix: str | None = None, chunk_size: int = 50) -> Any:
        return self._read(prefix or "", lambda: _Listing(self._seen(prefix)))

    def list_with_delimiter(self, client: Any, prefix: str | None = None) -> Any:
        return self._read(prefix or "", lambda: self._folder(prefix))

    # What befalls them.

    def _write(self, key: str, request: Callable[[], Any]) -> Any:
        what = self._befalls(True, key, request)
        if what == "lost_answer":
            request()
            raise GenericError(_ANSWERS[what])
        if what == "repeated":
            request()
        return request()

    def _read(self, key: str, request: Callable[[], Any]) -> Any:
        self._befalls(False, key, request)
        return request()

    def _befalls(self, writes: bool, key: str, request: Callable[[], Any]) -> str:
        self._number += 1
        self.deliver()
        what = self.on_request(writes, key)
        if what == "kill_done":
            request()
        if what in ("stuck", "kill_stuck", "repeated_late") and writes:
            self._held.append((self._number + self.random.choice(_LATER), lambda: _quietly(request)))
        if what.startswith("kill"):
            raise Killed
        if what in _ANSWERS and what != "lost_answer":
            raise GenericError(_ANSWERS[what])
        return what

    def _do_put(self, key: str, data: bytes, mode: str) -> Any:
        done = obstore.put(self.client, key, data, mode=mode)  # pyright: ignore[reportArgumentType]
        self._puts += 1
        self._put.setdefault(key, self._puts)
        return done

    def _do_delete(self, keys: str | list[str]) -> None:
        for key in [keys] if isinstance(keys, str) else keys:
            self._put.pop(key, None)
        obstore.delete(self.client, keys)

    def _seen(self, prefix: str | None) -> list[Any]:
        """What a listing shows: not what the last puts have made."""
        newest = self._puts - self.late_puts
        found = obstore.list(self.client, prefix).collect()
        return [each for each in found if self._put.get(each["path"], newest) <= newest]

    def _folder(self, prefix: str | None) -> Any:
        start = f"{prefix}/" if prefix else ""
        seen = self._seen(prefix)
        below = {
            each["path"][len(start) :].partition("/")[0] for each in seen if "/" in each["path"][len(start) :]
        }
        objects = [each for each in seen if "/" not in each["path"][len(start) :]]
        return {"common_prefixes": [f"{start}{name}" for name in sorted(below)], "objects": objects}


class _Listing:
    def __init__(self, found: list[Any]):
        self._found = found

    def collect(self) -> list[Any]:
        return self._found

    def __iter__(self) -> Iterator[list[Any]]:
        return iter([self._found] if self._found else [])


def _quietly(request: Callable[[], Any]) -> None:
    """Do what nobody waits for."""
    try:
        request()
    except (FileNotFoundError, obstore.exceptions.BaseError):
        return


class BucketWorld(World):
    """The sources and models of `World`, and a corpus in a bucket.

    Args:
        root: a real, empty folder; scratch is there.
    """

    kinds = BUCKET_KINDS
    retries_s = 10.0

    def __init__(self, root: Path):
        self.requests = Requests(self._on_request)
        self.is_quiet, self.is_down = False, False
        super().__init__(root, f"s3://{BUCKET}/{CORPUS}")

    def _on_request(self, writes: bool, key: str) -> str:
        if self.is_quiet or f"{CORPUS}/events/" in key:  # of a thread of its own, and never read back
            return ""
        if self.dead:
            raise Killed
        if self.is_down:
            return "down"
        self.calls += 1
        self.where.append("write" if writes else "request")
        if self.fault is None or self.calls - 1 != self.fault.at or not self.fault.fits(self.where[-1]):
            return ""
        self.happened = f"{self.fault.kind} at {'write' if writes else 'request'} {key}"
        self.dead = self.fault.kind.startswith("kill")
        self.is_down = self.fault.kind == "down"
        if self.fault.kind == "clock":
            self.jump_s += 20 * 86_400
        return self.fault.kind

    def _begin(self, random: Random) -> None:
        """A process begins: it knows nothing of what others have read, and listings lag in their own way."""
        self.is_down = False
        self.requests.random = random
        self.requests.late_puts = random.choice((0, 0, 2, 10, 100))

    def _patches(self) -> list[Any]:
        return [*super()._patches(), *self._bucket_patches()]

    def _bucket_patches(self) -> list[Any]:
        files = bucket_files.BucketFiles
        return [
            mock.patch.dict(sys.modules, {"obstore": self.requests}),
            mock.patch.object(bucket_clients, "client_of", lambda _: self.requests.client),
            mock.patch.object(files, "read_many", lambda each, urls: [each.read(url) for url in urls]),
            mock.patch.object(bucket_checks, "_tried", set()),
            mock.patch.dict(commit_log._SEEN, clear=True),
            mock.patch.dict(commit_log._RECENT, clear=True),
            mock.patch.dict("os.environ", {scratch.VARIABLE: str(self.root)}),
        ]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Nothing fails, and listings show everything."""
        late, self.requests.late_puts, self.is_quiet = self.requests.late_puts, 0, True
        patches = self._bucket_patches()
        try:
            for each in patches:
                each.start()
            yield
        finally:
            for each in reversed(patches):
                each.stop()
            self.requests.late_puts, self.is_quiet = late, False

    # What holds.

    def saved(self) -> Any:
        return super().saved(), self.requests.objects()

    def restore(self, saved: Any) -> None:
        names, objects = saved
        super().restore(names)
        self.requests.begin(objects)

    def only_sources(self) -> Any:
        return super().only_sources(), {}

    def evidence(self, config: BuildConfig) -> set[tuple[str, str, int]]:
        return {(stage, *place) for stage, _, rows in self._evidence(config) for place in rows}

    def _evidence(self, config: BuildConfig) -> list[tuple[str, str, Any]]:
        """(subset/stage, unit, rows) of all that is saved."""
        found, keys = [], self.requests.objects()
        with self.reading():
            for subset in config.subsets:
                for stage in recipe_of(config, subset):
                    if isinstance(stage, ModelStage):
                        store: EvidenceStore[Any] = stage.store(self._folder(subset))
                        start = f"{CORPUS}/{subset}/evidence/{store.folder.name}/"
                        units = {
                            unit_of_file(key.removeprefix(start)) for key in keys if key.startswith(start)
                        }
                        found += [
                            (f"{subset}/{stage.name}", unit, store.load(unit)) for unit in sorted(units)
                        ]
        return found

    def _folder(self, subset: str) -> Any:
        from paracaption.pipeline.io.location import locate

        return locate(self.out) / subset

    def content(self, place: str) -> bytes | None:
        return self.requests.objects().get(f"{CORPUS}/{place}")

    def snapshot(self) -> dict[str, bytes]:
        return self.requests.objects()

    def finished(self) -> dict[str, str]:
        with self.reading():
            state = commit_log.read_state(self.out)
        named = [file for found in state.units.values() for file in found.unit.files()]
        objects = self.requests.objects()
        files = {
            file.path: hashlib.sha256(objects[f"{CORPUS}/{file.place}"]).hexdigest()
            for file in [*named, *state.files.values()]
            if not file.path.endswith("/plan.json")
        }
        told = {
            f"{stage}/{unit}": repr(sorted(rows.items())) for stage, unit, rows in self._evidence(self.loose)
        }
        return files | told

    def left_over(self) -> list[str]:
        """What the next build's sweep leaves that no record names; what the network held has arrived.

        Raises:
            AssertionError: a unit was committed twice as the same files.
        """
        self.requests.deliver(all_of_it=True)
        with self.reading():
            with own(self.out, "merge", 60.0) as owner:
                sweep(owner)
            written = commit_log.read_records(self.out)
        named = {f"{CORPUS}/{file.place}" for each in written for file in commit_log.files_of(each)}
        times = Counter(
            (name, unit.manifest.sha256)
            for each in written
            if isinstance(each, Commit)
            for name, unit in each.units.items()
        )
        assert set(times.values()) == {1}, f"committed twice: {times.most_common(1)}; {self.happened}"
        others = tuple(f"{CORPUS}/{name}/" for name in ("log", "beat", "events"))
        return [
            key
            for key in self.requests.objects()
            if key not in named
            and not key.startswith(others)
            and "/evidence/" not in key
            and not key.startswith((f"{CORPUS}/corpus.json", f"{CORPUS}/{bucket_checks.PROBE}"))
        ]
