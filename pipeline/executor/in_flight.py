"""Which images a worker is working on, kept on disk, so that one that kills its worker is found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec

from ...schemas.records import ImageRecord
from ..sources.protocols import CatalogEntry

log = logging.getLogger(__name__)

Keyed = TypeVar("Keyed", ImageRecord, CatalogEntry)


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

    Args:
        folder: OUT/<subset>/journal/<stage>.
        unit: name of the unit.
        attempts: deaths alone in a batch after which an image is not tried again.
    """

    def __init__(self, folder: Path, unit: str, attempts: int):
        self.path = folder / f"{unit}.json"
        self.attempts = attempts
        self.deaths: dict[str, int] = {}
        self._halvings = 0
        self._warned = False

    def __enter__(self) -> InFlight:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            note = msgspec.json.decode(self.path.read_bytes(), type=Note)
        except FileNotFoundError:
            return self
        except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            log.warning(
                "%s: the note of the images in progress cannot be read (%s) and is ignored", self.path, error
            )
            return self
        self.deaths, self._halvings = note.deaths, note.halvings + (len(note.working) > 1)
        for key in note.working:
            self.deaths[key] = self.deaths.get(key, 0) + (len(note.working) == 1)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
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

    def _write(self, working: list[str]) -> None:
        try:
            self.path.write_bytes(msgspec.json.encode(Note(self.deaths, working, self._halvings)))
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning(
                "%s: cannot be written (%s), so an image that crashes its worker cannot be identified and "
                "dropped",
                self.path,
                error,
            )
            self._warned = True
