"""A third kind of source, as somebody would add one: a CSV with a rectangle a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field

from paracaption.filters import rle
from paracaption.pipeline.io import files
from paracaption.pipeline.sources import file_names
from paracaption.pipeline.sources.common import PHOTO_FIXES, read_header, refuse
from paracaption.pipeline.sources.protocols import Catalog, CatalogEntry, Note, Source, SourceOptions, drop
from paracaption.schemas.config import Limits
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Blob, ImageRecord, Region
from paracaption.schemas.strict import Location


class RectanglesOptions(SourceOptions):
    """A CSV of rectangles: photo, x, y, width, height, category."""

    table: Location = Field(description="The CSV file.")
    photos: Location = Field(description="Folder of the photos.")


class Rectangles(Source[RectanglesOptions]):
    """Masks that are rectangles."""

    title = "Rectangles"
    options_type = RectanglesOptions
    recipe = "verify"
    fixes = PHOTO_FIXES | {"outside": "the part of the rectangle inside the photo counts"}

    def places(self) -> list[str]:
        return [self.options.table]

    def fingerprint(self, catalog: Catalog) -> dict[str, str]:
        listing = catalog.list_folder(self.options.photos, f"{self.where}.photos")
        return {self.options.table: files.version(self.options.table), self.options.photos: listing.digest()}

    def catalog(self, catalog: Catalog) -> Iterator[CatalogEntry]:
        rows: dict[str, list[str]] = {}
        for row in csv.reader(Path(self.options.table).read_text().splitlines()):
            rows.setdefault(row[0], []).append(",".join(row[1:]))
        listing = catalog.list_folder(self.options.photos, f"{self.where}.photos")
        find = file_names.Finder([listing], {file_names.stem(name) for name in rows}, (".jpg",)).find
        for name, lines in rows.items():
            key, again = catalog.claim_key(file_names.stem(name))
            url = find(name)
            dropped = None
            if again or url is None:
                reason = Reason.DUPLICATE_KEY if again else Reason.PHOTO_MISSING
                dropped = drop(reason, f"{self.options.table}: {name}")
            record = "\n".join(lines).encode()
            photo = None if url is None else Blob(url)
            yield CatalogEntry(key, photo, Blob(self.options.table), record, name, dropped)

    def fill(self, image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> None:
        rows = list(csv.reader(io.StringIO(entry.record.decode())))
        image.regions = [
            Region(number, None, category=row[-1], is_thing=True, source_id=number)
            for number, row in enumerate(rows)
        ]
        refuse(image, entry, limits, self.options.table)
        read_header(image, entry, limits, notes)
        for region, row in zip(image.regions, rows, strict=True):
            x, y, width, height = map(int, row[:-1])
            dense = np.zeros((image.height, image.width), bool)
            dense[y : y + height, x : x + width] = True
            if not dense.any():
                region.drop = drop(Reason.MASK_EMPTY, f"{self.options.table}: {entry.file_name}: {row}")
                continue
            region.rle, region.area, region.bbox = rle.from_mask(dense)
            if region.area != width * height:
                notes.append(Note("outside", f"{self.options.table}: {entry.file_name}: {row}", region.id))
