"""Sources: read a subset's images and masks from where the publisher put them, whatever state they are in.

A source does its work in two steps. `catalog` runs once, on the driver, over lists and JSON only: it yields a
`CatalogEntry` per image in a stable order. `read` runs on the workers, per image: it opens the annotation, makes the
masks, checks the photo's header, and returns an `ImageRecord` in which everything unusable is dropped with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec

from schemas.config import Limits
from schemas.records import Blob, Drop, ImageRecord


class CatalogEntry(msgspec.Struct, frozen=True):
    """One image of a subset, as far as lists can tell; a row of the plan.

    Attributes:
        key: unique in the subset, `[A-Za-z0-9_-]+`.
        source: index of the source in the config's list.
        photo: the photo; None if no folder or tar has it.
        annotation: where the masks are: the label PNG (COCONut) or the JSON (SA-1B); None if missing.
        record: the annotation's own JSON of this image (COCONut: image and segments), as bytes; empty for SA-1B.
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


class Source(Protocol):
    """One subset's sources together (all entries of the config's list)."""

    subset: str

    def catalog(self) -> Iterator[CatalogEntry]:
        """Every image of the subset exactly once, in a stable order.

        Raises:
            ConfigError: an annotation file or folder is missing or is not what the config says.
        """
        ...

    def read(self, entry: CatalogEntry, limits: Limits) -> ImageRecord:
        """The image with every declared region, unusable ones dropped. Never raises for bad data."""
        ...


SOURCE_STAGE = "source"
"""Name of the stage under which sources drop."""
