"""Photos without masks: the stage `automatic_masks` makes their regions."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from ...schemas.config import Limits
from ...schemas.errors import ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import Blob, Credit, ImageRecord
from ...schemas.strict import Location
from . import file_names
from .common import PHOTO_FIXES, read_header, refuse
from .photo_folders import claim, images_in
from .protocols import Catalog, CatalogEntry, Note, Source, SourceOptions


class AutomaticOptions(SourceOptions):
    """Photos alone: a mask generator finds their regions."""

    photos: list[Location] = Field(min_length=1, description="Folders of the photos.")


class Automatic(Source[AutomaticOptions]):
    """Folders of photos."""

    title = "Photos with generated masks"
    options_type = AutomaticOptions
    recipe = "identify"
    names_categories = False
    mask_stage = "automatic_masks"
    declares_regions = False
    checks_masks = True
    fixes = PHOTO_FIXES | {
        Reason.PHOTO_UNREADABLE: "fetch these photos again, or take them out of the folder"
    }

    def places(self) -> list[str]:
        return self.options.photos

    def fingerprint(self, catalog: Catalog) -> dict[str, str]:
        return {folder: self._list(catalog, folder).digest() for folder in self.options.photos}

    def catalog(self, catalog: Catalog) -> Iterator[CatalogEntry]:
        """Photos in the order of their folders and names."""
        seen: set[str] = set()
        for folder in self.options.photos:
            for url, name in images_in(self._list(catalog, folder), file_names.PHOTO_ENDINGS):
                if url not in seen:
                    seen.add(url)
                    key, dropped = claim(url, name, catalog, self.where)
                    yield CatalogEntry(key, Blob(url), None, b"", name, dropped, credit=Credit())
        if not seen:
            raise ConfigError(f"{self.where}.photos: no photo in {', '.join(self.options.photos)}")

    def fill(self, image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> None:
        refuse(image, entry, limits, f"{entry.photo}")
        read_header(image, entry, limits, notes)

    def _list(self, catalog: Catalog, folder: str) -> file_names.Listing:
        return catalog.list_folder(folder, f"{self.where}.photos")
