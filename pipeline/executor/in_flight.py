"""Which images a worker is working on, kept on disk, so that one that kills its worker is found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec

from ...schemas.errors import ConfigError
from ...schemas.records import ImageRecord
from ..io.location import Location
from ..io.store import store_of
from ..sources.protocols import CatalogEntry

log = logging.getLogger(__name__)

Keyed = TypeVar("Keyed", ImageRecord, CatalogEntry)

_UNREADABLE = (msgspec.MsgspecError, UnicodeError, RecursionError)


class Note(msgspec.Struct):
    """The file of one unit.

    Attributes:
        deaths: image key -> how often a worker died while the image was alone in its batch.
        working: keys of the images in flight.
        halvings: how often a worker died in a batch of several images, none of which was done then.
    """

    deaths: dict[str, int] = {}
    working: list[str] = []
    halvings: int = 0


class InFlight:
    """The images of one unit that are in flight, remembered across the death of a worker.

    One small file per unit, written before each batch and removed when the unit is through. It is not durable
    on purpose: a lost note costs one more crash. For the same reason a disk that takes no notes is a warning,
    not an error: whoever writes the evidence or the shard next says it clearly.

    A corpus in a bucket has no folder that every machine sees. The next worker on the machine of a death puts
    what it finds into the bucket; one that gets the unit on another machine first does not know of the last
    death there, which costs one more crash.

    Args:
        folder: OUT/<subset>/journal/<stage>, of this machine if the corpus is in a bucket.
        unit: name of the unit.
        attempts: deaths alone in a batch after which an image is not tried again.
        shared: the same place in the bucket.
    """

    def __init__(self, folder: Path, unit: str, attempts: int, shared: Location | None = None):
        self.path = folder / f"{unit}.json"
        self.attempts = attempts
        self.deaths: dict[str, int] = {}
        self._halvings = 0
        self._warned = False
        self._shared = shared and shared / f"{unit}.json"
        self._is_shared = False

    def __enter__(self) -> InFlight:
        note = self._own_note()
        if self._shared is not None and (others := self._shared_note(self._shared)) is not None:
            self._is_shared = True
            note.halvings = max(note.halvings, others.halvings)
            note.deaths = {
                key: max(note.deaths.get(key, 0), others.deaths.get(key, 0))
                for key in note.deaths | others.deaths
            }
        self.deaths, self._halvings = note.deaths, note.halvings + (len(note.working) > 1)
        for key in note.working:
            self.deaths[key] = self.deaths.get(key, 0) + (len(note.working) == 1)
        if note.working and self._shared is not None:
            self._write([])  # else a death in the next line would be counted twice
            self._share(self._shared)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            try:
                self.path.unlink(missing_ok=True)
                if self._is_shared:
                    store_of(str(self._shared)).delete(str(self._shared))
            except (OSError, ConfigError) as error:
                self._warn(error)

    def _own_note(self) -> Note:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return msgspec.json.decode(self.path.read_bytes(), type=Note)
        except FileNotFoundError:
            return Note()
        except (OSError, *_UNREADABLE) as error:
            return self._ignored(self.path, error)

    def _shared_note(self, place: Location) -> Note | None:
        try:
            return msgspec.json.decode(store_of(str(place)).read(str(place)), type=Note)
        except FileNotFoundError:
            return None
        except (OSError, ConfigError, *_UNREADABLE) as error:
            return self._ignored(place, error)

    def _ignored(self, place: Location, error: Exception) -> Note:
        log.warning("%s: the note of the images in progress cannot be read (%s) and is ignored", place, error)
        return Note()

    def _share(self, place: Location) -> None:
        try:
            store_of(str(place)).put(str(place), self._note([]))
            self._is_shared = True
        except (OSError, ConfigError) as error:
            self._warn(error)

    def is_poison(self, key: str) -> bool:
        """Whether the image killed its worker too often."""
        return self.deaths.get(key, 0) >= self.attempts

    def crash_detail(self, key: str) -> str:
        """The detail of a poison image's drop."""
        return f"the worker died {self.deaths[key]} times while it had only this image"

    def split(self, images: list[Keyed], size: int) -> Iterator[list[Keyed]]:
        """Batches of `size`; images that were in flight when a worker died come one by one, last.

        After each death in a batch the next ones are half as large: a worker that is preempted every now and
        then has to come to the end of one.
        """
        size = max(1, size >> self._halvings)
        calm = [image for image in images if image.key not in self.deaths]
        for start in range(0, len(calm), size):
            yield calm[start : start + size]
        for image in images:
            if image.key in self.deaths:
                yield [image]

    @contextmanager
    def batch(self, keys: list[str], most: int | None = None) -> Iterator[Callable[[str], None]]:
        """Note that these images are being worked on; the note stays if the process dies in the block.

        Args:
            keys: of the images, in the order in which they are begun.
            most: how many are worked on at the same time; the note names no more. None is all.

        Yields:
            What to call with the key of an image that is done; the note then names others.
        """
        waiting = dict.fromkeys(keys)
        noted = keys[:most]
        self._write(noted)

        def is_done(key: str) -> None:
            nonlocal noted
            waiting.pop(key, None)
            if key in noted:
                noted = list(islice(waiting, most))
                self._write(noted)

        try:
            yield is_done
        finally:
            self._write([])

    def _note(self, working: list[str]) -> bytes:
        return msgspec.json.encode(Note(self.deaths, working, self._halvings))

    def _write(self, working: list[str]) -> None:
        try:
            self.path.write_bytes(self._note(working))
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError | ConfigError) -> None:
        if not self._warned:
            log.warning(
                "%s: cannot be written (%s), so an image that crashes its worker cannot be identified and "
                "dropped",
                self.path,
                error,
            )
            self._warned = True
