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
from .photo_folders import claim, images_in, is_image
from .protocols import Catalog, CatalogEntry, Note, Source, SourceOptions

_OTHERS = "other_files"
"""Kind of the note about files in a folder of photos that are none."""


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
        Reason.PHOTO_UNREADABLE: "fetch these photos again, or take them out of the folder",
        _OTHERS: f"they are passed over; photos end in {', '.join(file_names.PHOTO_ENDINGS)}",
    }

    def places(self) -> list[str]:
        return self.options.photos

    def fingerprint(self, catalog: Catalog) -> dict[str, str]:
        return {folder: self._list(catalog, folder).digest() for folder in self.options.photos}

    def catalog(self, catalog: Catalog) -> Iterator[CatalogEntry]:
        """Photos in the order of their folders and names."""
        seen: set[str] = set()
        for folder in self.options.photos:
            listing = self._list(catalog, folder)
            self._note_others(catalog, listing)
            for url, name in images_in(listing, file_names.PHOTO_ENDINGS):
                if url not in seen:
                    seen.add(url)
                    key, dropped = claim(url, name, catalog, self.where)
                    yield CatalogEntry(key, Blob(url), None, b"", name, dropped, credit=Credit())
        if not seen:
            raise ConfigError(f"{self.where}.photos: no photo in {', '.join(self.options.photos)}")

    def _note_others(self, catalog: Catalog, listing: file_names.Listing) -> None:
        others = [each for each in listing.names or () if not is_image(each, file_names.PHOTO_ENDINGS)]
        if others:
            number = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
            what = f"{number} no photo by the name, such as {others[0]!a}"
            catalog.notes.append(Note(_OTHERS, f"{listing.url}: {what}"))

    def fill(self, image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> None:
        refuse(image, entry, limits, f"{entry.photo}")
        read_header(image, entry, limits, notes)

    def _list(self, catalog: Catalog, folder: str) -> file_names.Listing:
        return catalog.list_folder(folder, f"{self.where}.photos")
