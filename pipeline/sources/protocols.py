"""What a source is: the class that reads one entry of a subset's `sources`, and what it reads.

A source does its work in two steps. `catalog` runs once, on the driver, over lists and JSON only: it yields a
`CatalogEntry` per image in a stable order. `read` runs on the workers, per image: it opens the annotation,
makes the masks, checks the photo's header, and returns an `ImageRecord` in which everything unusable is
dropped with a reason.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from pydantic import Field

from ...filters.benchmark_photos import PhotoNames
from ...schemas.config import Limits
from ...schemas.errors import BadRecord, ConfigError, ParaCaptionError
from ...schemas.plain import MAX_DETAIL, plain_detail, words_of
from ...schemas.reasons import ERRORS, Reason
from ...schemas.records import Blob, Credit, Drop, ImageRecord
from ...schemas.strict import Strict
from ..io import failures, files
from . import file_names
from .clean import clean_image
from .earlier_keys import EarlierKeys, Settled

SOURCE_STAGE = "source"
"""Name of the stage under which sources drop."""


class CatalogEntry(msgspec.Struct, frozen=True):
    """One image of a subset, as far as lists can tell; a row of the work list.

    Attributes:
        key: unique in the subset, `[A-Za-z0-9_-]+`.
        photo: the photo; None if no folder or tar has it.
        annotation: where the masks are, such as a label PNG or a JSON file; None if missing.
        record: what else a worker needs to read the image, as its source encodes it.
        file_name: the publisher's name of the photo.
        drop: a problem that the lists alone show (duplicate key, unsafe name, missing partner).
        source: index of the source in the subset's list; `SubsetSource` sets it.
        credit: license and origin as the lists state them. None if the source does not look for them, or if
            the work list is of a release that did not: then the annotation is not asked either.
    """

    key: str
    photo: Blob | None
    annotation: Blob | None
    record: bytes = b""
    file_name: str = ""
    drop: Drop | None = None
    source: int = 0
    credit: Credit | None = None


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

    def __post_init__(self) -> None:
        if not self.detail.isascii() or len(self.detail) > MAX_DETAIL:
            msgspec.structs.force_setattr(self, "detail", plain_detail(self.detail))


class Catalog:
    """What the sources of one subset share while they list their images.

    Attributes:
        notes: what was seen that is no image's problem, such as label maps without a record.
        benchmarks: photos that are left out; None leaves out none. `SubsetSource` sets it.

    Args:
        early_keys: give out the keys of early releases; see `file_names.key_of`.
        settled: keys by that of the base name, for each claim in order, as `EarlierKeys.settle` gives them.
    """

    def __init__(self, early_keys: bool = False, settled: Mapping[str, list[Settled]] | None = None) -> None:
        self.benchmarks: PhotoNames | None = None
        self.notes: list[Note] = []
        self._early_keys = early_keys
        self._settled = settled or {}
        self._claims: dict[str, list[tuple[str, str]]] = {}
        self._listings: dict[str, file_names.Listing] = {}
        self._claimed: dict[tuple[str, str, str], set[str]] = {}

    def claim_key(self, name: str, home: str = "") -> tuple[str, bool]:
        """The key for the next image of this name, and whether the image was claimed before.

        The first image of a base name has it as its key, those of other folders have their folders in it too.

        Args:
            name: without its ending; folders in it tell images of one base name apart.
            home: the list that names it. In one list, other folders mean other images; of two lists, one may
                give only the last folders of what the other gives whole, or none.
        """
        folder, base = file_names.folder(name), file_names.base_name(name)
        key = file_names.key_of(base, self._early_keys)
        claims = self._claims.setdefault(key, [])
        again = any(_is_same(folder, home, *claim) for claim in claims)
        claims.append((folder, home))
        whole = file_names.key_of(f"{folder}/{base}", self._early_keys)
        if len(claims) <= len(settled := self._settled.get(key, ())):
            found = settled[len(claims) - 1]
            return found.key or whole, found.again
        if len(claims) == 1:
            return key, False
        return (f"{key}-dup{len(claims)}", True) if again else (whole, False)

    def settle(self, earlier: EarlierKeys) -> dict[str, list[Settled]]:
        """The keys of what was claimed here, if the images that had keys before had been listed first."""
        return earlier.settle(self._claims, _is_same)

    def without_benchmarks(
        self,
        entry: CatalogEntry,
        number: int | str | None = None,
        size: tuple[int | None, int | None] = (None, None),
    ) -> CatalogEntry:
        """The entry, with a drop if it is a benchmark's photo: whether its files are there matters no more.

        `SubsetSource` asks this of each entry by its file's name. A source whose lists say more asks itself.

        Args:
            entry: of the catalog.
            number: the image's id, if the source's lists have one.
            size: its declared width and height in pixels.
        """
        if self.benchmarks is None or (entry.drop is not None and entry.drop.reason not in ERRORS):
            return entry
        if not (title := self.benchmarks.find(entry.file_name or entry.key, number, size)):
            return entry
        dropped = drop(Reason.BENCHMARK_PHOTO, f"{entry.file_name or entry.key}: a photo of {title}")
        return msgspec.structs.replace(entry, drop=dropped)

    def list_folder(self, url: str, setting: str) -> file_names.Listing:
        """The files of a folder, listed once; see `file_names.list_folder`."""
        if url not in self._listings:
            self._listings[url] = file_names.list_folder(url, setting)
        return self._listings[url]

    def claim_files(self, folder: str, ending: str, stems: set[str], note: str) -> None:
        """Say which files of a folder some annotation names; when all is listed, each other one is noted.

        Args:
            folder: as it was given to `list_folder`.
            ending: of the files in question, as ".png".
            stems: names without their ending.
            note: kind of the note about a file that nobody claims.
        """
        self._claimed.setdefault((folder, ending, note), set()).update(
            file_names.base_name(file_names.plain(each)) for each in stems
        )

    def note_unclaimed_files(self) -> None:
        """Note each file of the claimed folders that no source claims."""
        for (folder, ending, note), stems in self._claimed.items():
            for name in self.list_folder(folder, "").names or ():
                if name.lower().endswith(ending) and file_names.compared_stem(name) not in stems:
                    self.notes.append(Note(note, f"{folder}/{name}"))


def _is_same(folder: str, home: str, other: str, other_home: str) -> bool:
    if folder == other or home == other_home:
        return folder == other
    return f"/{folder}".endswith(f"/{other}") or f"/{other}".endswith(f"/{folder}") or not (folder and other)


class SourceOptions(Strict):
    """Options of every kind of source."""

    license: str = Field(
        default="unknown", description="License of the photos and masks, which the dataset card shows."
    )


Options = TypeVar("Options", bound=SourceOptions)


class Source(ABC, Generic[Options]):
    """One kind of source; an instance reads one entry of a subset's list.

    Attributes:
        title: the kind's name for people.
        options_type: the model of its options; `Location` is the type of those that are paths.
        recipe: the recipe of a subset that names none; see `recipe_for`.
        names_categories: whether its regions have a category; see `has_categories`.
        mask_stage: of a source whose regions come without masks, the stage that makes them. It stands first
            in a recipe that is a name, such as `verify`. "" if every region has its mask.
        declares_regions: whether its images have regions at all; if not, `mask_stage` makes those too.
        fixes: what to do about a problem, by the reason of a drop or by the kind of a note.
        paper_size: images and regions of this kind in the paper's corpus; None if it has none.
        checks_masks: whether all its masks come from `filters.rle`. Those of any other source are checked
            when an image has been read.

    Args:
        options: of this entry.
        where: the entry's place in the configuration, for messages.
    """

    title: ClassVar[str]
    options_type: ClassVar[type[SourceOptions]]
    recipe: ClassVar[str]
    names_categories: ClassVar[bool] = True
    mask_stage: ClassVar[str] = ""
    declares_regions: ClassVar[bool] = True
    fixes: ClassVar[Mapping[str, str]] = {}
    paper_size: ClassVar[tuple[int, int] | None] = None
    checks_masks: ClassVar[bool] = False

    def __init__(self, options: Options, where: str = "source"):
        self.options = options
        self.where = where

    @classmethod
    def recipe_for(cls, options: Mapping[str, Any]) -> str | None:
        """The recipe of a subset that names none, by the options; None if one has to be given.

        One has to be given if regions without a name are kept (`unnamed: keep`).

        Args:
            options: of an entry, possibly without those that have their default.
        """
        return None if options.get("unnamed") == "keep" else cls.recipe

    @classmethod
    def has_categories(cls, options: Mapping[str, Any]) -> bool:
        """Whether every region has a category, by the options. If not, a stage that needs one is refused."""
        return cls.names_categories and cls.recipe_for(options) is not None

    @abstractmethod
    def places(self) -> list[str]:
        """The files or folders that the dataset card names as the source."""

    @abstractmethod
    def fingerprint(self, catalog: Catalog) -> dict[str, str]:
        """The annotation files, tars and folders by URL, each with a string that changes when it does.

        Cheap: no file is opened. Of a folder it covers the names in it, not what the files hold.

        Raises:
            ConfigError: as `catalog`.
        """

    @abstractmethod
    def catalog(self, catalog: Catalog) -> Iterator[CatalogEntry]:
        """Every image exactly once, in a stable order.

        Args:
            catalog: gives out the keys; shared with the subset's other sources.

        Raises:
            ConfigError: an annotation file or folder is missing or is not what the configuration says.
        """

    @abstractmethod
    def fill(self, image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> None:
        """Add the size of the photo and every declared region to an image; drop regions that are unusable.

        Args:
            image: as far as the entry says what it is.
            entry: from `catalog`. A worker has nothing else that `catalog` learned.
            limits: what is refused.
            notes: what is odd but usable is appended to it.

        Raises:
            BadRecord: the image is unusable; the regions that it has by then are dropped with it.
        """

    def read(
        self, entry: CatalogEntry, limits: Limits, notes: list[Note] | None = None, subset: str = ""
    ) -> ImageRecord:
        """The image with every declared region, unusable ones dropped.

        Whatever goes wrong, the regions that the image has by then stay with it. An image whose files could
        not be read is marked (`ImageRecord.failed`): that is no verdict on it.

        Raises:
            ConfigError: nothing can be read with this set-up, such as without credentials.
        """
        image = ImageRecord(
            entry.key, subset, entry.photo, 0, 0, file_name=entry.file_name, credit=entry.credit
        )
        try:
            self.fill(image, entry, limits, [] if notes is None else notes)
        except BadRecord as error:
            image.reject(drop(error.reason, error.detail), failures.kind_of(error))
        except ParaCaptionError:
            raise
        except Exception as error:  # noqa: BLE001 - an unforeseen record is a drop, not the end of a build
            found = _unforeseen(error, f"{entry.annotation}")
            image.reject(drop(found.reason, found.detail), failures.kind_of(found))
        clean_image(image, SOURCE_STAGE, self.checks_masks, bool(self.mask_stage))
        return image


def _unforeseen(error: Exception, where: str) -> BadRecord:
    unreadable = Reason.ANNOTATION_UNREADABLE
    if not failures.is_of_reading(error):
        return BadRecord(unreadable, f"{where}: {words_of(error)}")
    name = getattr(error, "filename", None)
    if failures.is_missing(error) and isinstance(name, str) and not files.is_gone(name):
        error = failures.ReadError(name, failures.describe(error), failures.Kind.TRANSIENT, missing=True)
    found = failures.to_failure(error, unreadable, unreadable, where=where)
    if isinstance(found, ConfigError):
        raise found from error
    return found


def drop(reason: Reason, detail: str) -> Drop:
    """A drop by a source."""
    return Drop(SOURCE_STAGE, reason, detail)
