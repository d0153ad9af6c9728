"""Sources: read a subset's images and masks from where the publisher put them, whatever state they are in.

A source does its work in two steps. `catalog` runs once, on the driver, over lists and JSON only: it yields a
`CatalogEntry` per image in a stable order. `read` runs on the workers, per image: it opens the annotation,
makes the masks, checks the photo's header, and returns an `ImageRecord` in which everything unusable is
dropped with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec

from ...schemas.config import Limits
from ...schemas.records import Blob, Drop, ImageRecord


class CatalogEntry(msgspec.Struct, frozen=True):
    """One image of a subset, as far as lists can tell; a row of the plan.

    Attributes:
        key: unique in the subset, `[A-Za-z0-9_-]+`.
        source: index of the source in the config's list.
        photo: the photo; None if no folder or tar has it.
        annotation: where the masks are: the label PNG (COCONut) or the JSON (SA-1B); None if missing.
        record: the annotation's own JSON of this image (COCONut: size and segments); empty for SA-1B.
        file_name: the publisher's name of the photo.
        drop: a problem that the lists alone show (duplicate key, unsafe name, missing partner).
    """

    key: str
    source: int
    photo: Blob | None
    annotation: Blob | None
    record: bytes = b""
    file_name: str = ""
    drop: Drop | None = None


class Note(msgspec.Struct, frozen=True):
    """Something odd that drops nothing; `audit` reports it.

    Attributes:
        kind: "undeclared_ids", "area_differs", ...
        detail: names the file and the record.
        region: position of the region; None if it is about the image or a file.
    """

    kind: str
    detail: str
    region: int | None = None


class Source(Protocol):
    """One subset's sources together (all entries of the config's list)."""

    subset: str
    notes: list[Note]
    """What the last complete `catalog` saw that is no image's problem, as label maps without a record."""

    def fingerprint(self) -> dict[str, str]:
        """The annotation files, tars and folders by URL, each with a string that changes when it does.

        Cheap: no file is opened. Of a folder it covers the names in it, not what the files hold.

        Raises:
            ConfigError: as `catalog`.
        """
        ...

    def catalog(self) -> Iterator[CatalogEntry]:
        """Every image of the subset exactly once, in a stable order.

        Raises:
            ConfigError: an annotation file or folder is missing or is not what the config says.
        """
        ...

    def read(self, entry: CatalogEntry, limits: Limits, notes: list[Note] | None = None) -> ImageRecord:
        """The image with every declared region, unusable ones dropped. Never raises for bad data.

        Args:
            entry: from `catalog`; nothing else that `catalog` learned is needed: a worker opens the source
            anew.
            limits: what is refused.
            notes: what is odd but usable is appended to it.
        """
        ...


SOURCE_STAGE = "source"
"""Name of the stage under which sources drop."""
