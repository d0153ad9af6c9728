"""Every kind of source, registered once, and the sources of a subset. A kind is imported when needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
from pydantic import ValidationError

from ...schemas.config import BuildConfig, Limits
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.reasons import LEFT, Reason
from ...schemas.records import Blob, ImageRecord
from ...schemas.strict import FileContext, one_line_each
from ..io import backends, benchmark_photos, failures, own_modules
from .earlier_keys import EarlierKeys
from .protocols import Catalog, CatalogEntry, Note, Source, SourceOptions, drop

SOURCES = {
    "coconut": "paracaption.pipeline.sources.coconut:Coconut",
    "sa1b": "paracaption.pipeline.sources.sa1b:Sa1b",
    "coco": "paracaption.pipeline.sources.coco:Coco",
    "boxes": "paracaption.pipeline.sources.boxes:Boxes",
    "masks": "paracaption.pipeline.sources.masks:Masks",
    "webdataset": "paracaption.pipeline.sources.webdataset:WebDataset",
    "automatic": "paracaption.pipeline.sources.automatic:Automatic",
}
"""Kind, as the configuration names it, -> its class."""


_ALLOWED: set[str] = set()


def allow_kinds(configured: Iterable[Any]) -> None:
    """Let kinds of the user's own, such as "mysource:MySource", be imported from now on.

    Whoever reads a configuration that the user has given says so. A corpus that somebody else has built names
    kinds as well, and reading it must run no code.

    Args:
        configured: the subsets of a configuration, or what stands in their place in a file.
    """
    for subset in configured:
        listed = subset.get("sources") if isinstance(subset, dict) else getattr(subset, "sources", None)
        for each in [listed] if isinstance(listed, dict) else listed if isinstance(listed, list) else []:
            kind = each.get("source") if isinstance(each, dict) else None
            if isinstance(kind, str) and ":" in kind:
                _ALLOWED.add(kind)


def find_source(kind: str) -> type[Source[Any]]:
    """The class of a kind: one of ours, or a class of the user's own as `module:Class` (`own_modules`).

    Raises:
        ConfigError: there is no such kind, and it names the choices; or the class is no whole source.
    """
    if kind in SOURCES:
        return own_modules.load_class(SOURCES[kind], "source")
    if kind not in _ALLOWED:
        raise ConfigError(
            f"unknown kind of source {kind!r}; choose from {', '.join(SOURCES)}, "
            "or give your own as 'package.module:Class'"
        )
    found = own_modules.load_class(kind, "source")
    where = f"source: {kind!r} in {own_modules.file_of(found)}"
    if not issubclass(found, Source):
        raise ConfigError(f"{where} is not a Source; derive it from `protocols.Source` (docs/sources.md)")
    needs = [name for name in ("title", "options_type", "recipe") if not hasattr(found, name)]
    if inspect.isabstract(found) or needs:
        lacking = ", ".join(f"`{name}`" for name in (*needs, *sorted(found.__abstractmethods__)))
        raise ConfigError(f"{where} has no {lacking}; add what is missing (docs/sources.md)")
    return found


def find_options(kind: str) -> type[SourceOptions]:
    """The options of a kind; see `find_source`."""
    return find_source(kind).options_type


def default_recipe(sources: Sequence[Mapping[str, Any]]) -> str:
    """The recipe of a subset that names none, by its sources: their kinds and options.

    Raises:
        ConfigError: a kind is unknown, they have different recipes, or one has no recipe by default.
    """
    defaults = {find_source(each["source"]).recipe_for(each) for each in sources}
    if None in defaults:
        raise ConfigError(
            "not every region of its sources has a name, so no recipe is the default; set `recipe` of the "
            "subset, such as `identify`, which names each region from its caption"
        )
    if len(defaults) > 1:
        named = " and ".join(sorted(map(str, defaults)))
        raise ConfigError(f"its sources have the recipes {named}; set `recipe` of the subset")
    return str(defaults.pop())


def file_context(absolute: Callable[[str], str] = str, ours: bool = False) -> FileContext:
    """What a build's configuration is read with, so that its sources are checked and completed."""
    return FileContext(absolute, find_options, default_recipe, ours)


def complete(config: BuildConfig) -> BuildConfig:
    """The configuration with every option of its sources and every recipe written out.

    One that comes from a file is complete already; one that a program makes need not be.

    Raises:
        ConfigError: a kind or an option is unknown, or a value does not suit it; a line for each.
    """
    try:
        return BuildConfig.model_validate(config.model_dump(), context=file_context())
    except ValidationError as error:
        raise ConfigError(one_line_each(error, "", "see `paracaption config` for all keys")) from error


def subset_title(subset: str) -> str:
    """A subset's name for people: the title of its kind if it is named after one, else its own name."""
    return find_source(subset).title if subset in SOURCES else subset


def recipe_name(config: BuildConfig, subset: str) -> str | list[Any]:
    """The recipe of a subset: the configured name or list, else the default of its kinds of source.

    Raises:
        ConfigError: its kinds have different defaults, or one is unknown.
    """
    if subset not in config.subsets:  # a corpus keeps what an earlier configuration built
        return default_recipe([{"source": subset}])
    found = config.subsets[subset]
    try:
        return found.recipe or default_recipe(found.sources)
    except ConfigError as error:
        raise ConfigError(f"subsets.{subset}.recipe: {error}") from error


def find_mask_stage(config: BuildConfig, subset: str) -> tuple[str, str]:
    """Which stage makes the masks of a subset, and for which kind of source; both "" if they have masks.

    Raises:
        ConfigError: its sources differ in that.
    """
    listed = config.subsets[subset].sources if subset in config.subsets else [{"source": subset}]
    found: dict[str, str] = {}
    for each in listed:
        with suppress(ConfigError):  # a kind that only whoever made the corpus has
            found.setdefault(find_source(each["source"]).mask_stage, each["source"])
    if len(found) > 1:
        (one, first), (two, second), *_ = sorted(found.items())
        brings = f"gets them from `{one}`" if one else "brings masks"
        raise ConfigError(
            f"subsets.{subset}.sources: `{first}` {brings} and `{second}` gets them from `{two}`; give each "
            "a subset of its own"
        )
    stage, kind = next(iter(found.items()), ("", ""))
    return (stage, kind) if stage else ("", "")


def option_texts(sources: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(option, text) of every text that is an option of one of these sources or in one, in order."""
    values = [(name, value) for source in sources for name, value in sorted(source.items())]
    listed = [(name, value if isinstance(value, list) else [value]) for name, value in values]
    return [(name, value) for name, each in listed for value in each if isinstance(value, str)]


def open_source(config: BuildConfig, subset: str) -> SubsetSource:
    """The sources of a subset; reads nothing yet.

    From then on every read of this process is tried again for `failures.read_retry_s`.

    Raises:
        ConfigError: the configuration has no such subset, or its sources are wrong.
    """
    if subset not in config.subsets:
        raise ConfigError(f"no subset {subset!r} in the configuration; it has {', '.join(config.subsets)}")
    failures.RETRYING.set_budget(config.failures.read_retry_s)
    sources = []
    for number, entry in enumerate(complete(config).subsets[subset].sources):
        kind = find_source(entry.pop("source"))
        sources.append(kind(kind.options_type.model_validate(entry), f"subsets.{subset}.sources.{number}"))
    benchmarks = config.benchmarks
    return SubsetSource(subset, sources, benchmarks.leave_out is not False, tuple(benchmarks.photos))


@contextmanager
def _one_line(subset: str) -> Iterator[None]:
    """Let an error of a source end planning in one line that names the file and what to do."""
    try:
        yield
    except Exception as error:
        stop = failures.to_stop(error, subset)
        if stop is None or stop is error:
            raise
        raise stop from error


class SubsetSource:
    """The sources of one subset, read one after the other as one.

    Attributes:
        subset: its name.
        sources: in the configuration's order.
        leave_out: whether `catalog` drops the photos of the published benchmarks, by file name and id.
        pictures: folders with photos of benchmarks, which `read` compares each photo with.
        notes: what the last complete `catalog` saw that is no image's problem.
    """

    def __init__(
        self,
        subset: str,
        sources: list[Source[Any]],
        leave_out: bool = False,
        pictures: tuple[str, ...] = (),
    ):
        self.subset = subset
        self.sources = sources
        self.leave_out = leave_out
        self.pictures = pictures
        self.notes: list[Note] = []
        self._listed: Catalog | None = None
        self._listing = Catalog()

    def fingerprint(self) -> dict[str, str]:
        """The files and folders by URL, each with a string that changes when it does, as they are now.

        No file is opened.

        Raises:
            ConfigError, SourceUnavailable: as `catalog`.
        """
        self._listed = Catalog()
        backends.forget_listings()
        with _one_line(self.subset):
            return {
                url: version
                for source in self.sources
                for url, version in source.fingerprint(self._listed).items()
            }

    def catalog(self, early_keys: bool = False, earlier: EarlierKeys | None = None) -> Iterator[CatalogEntry]:
        """Every image of the subset exactly once, in a stable order.

        Args:
            early_keys: with the keys of early releases; see `file_names.key_of`.
            earlier: keys that images had before and keep. The subset has to have been listed without them.

        Raises:
            ConfigError: an annotation file or folder is missing or is not what the configuration says.
            SourceUnavailable: it does not answer now.
        """
        catalog, self._listed = self._listed or Catalog(), None  # folders are listed once for both
        if early_keys or earlier is not None:
            settled = self._listing.settle(earlier) if earlier is not None else None
            catalog = Catalog(early_keys, settled)
        self._listing = catalog
        catalog.benchmarks = benchmark_photos.load_names() if self.leave_out else None
        self.notes = catalog.notes
        with _one_line(self.subset):
            for number, source in enumerate(self.sources):
                for entry in source.catalog(catalog):
                    entry = catalog.without_benchmarks(entry)
                    yield msgspec.structs.replace(entry, source=number) if number else entry
        catalog.note_unclaimed_files()

    def read(self, entry: CatalogEntry, limits: Limits, notes: list[Note] | None = None) -> ImageRecord:
        """The image of an entry. A worker opens the sources again, and needs nothing else of the catalog."""
        if entry.drop is not None and entry.drop.reason in LEFT:
            return ImageRecord(entry.key, self.subset, None, 0, 0, drop=entry.drop)
        image = self.sources[entry.source].read(entry, limits, notes, self.subset)
        listed = entry.drop
        if listed is not None and listed.reason is Reason.BENCHMARK_PHOTO and image.drop is None:
            image.reject(listed)  # its source has not looked at its entry's drop
        if self.pictures and image.drop is None and image.photo is not None:
            self._compare(image, image.photo, limits)
        return image

    def _compare(self, image: ImageRecord, photo: Blob, limits: Limits) -> None:
        """Drop an image whose photo is one of those that the user has named as a benchmark's."""
        known = benchmark_photos.load_pictures(self.pictures, limits.max_pixels)
        try:
            found = known.find(photo, limits.max_pixels)
        except BadRecord as error:
            image.reject(drop(error.reason, error.detail), failures.kind_of(error))
            return
        if found:
            detail = f"{image.file_name or image.key}: the same picture as {found} in `benchmarks.photos`"
            image.reject(drop(Reason.BENCHMARK_PHOTO, detail))

    def declares_regions(self, entry: CatalogEntry) -> bool:
        """Whether the source of an image says which regions it has; else a stage makes them."""
        return self.sources[entry.source].declares_regions

    @property
    def mask_stage(self) -> str:
        """The stage that makes the regions, where no source declares any; "" if one does."""
        return "" if any(each.declares_regions for each in self.sources) else self.sources[0].mask_stage

    def fixes(self) -> dict[str, str]:
        """What to do about a problem, by the reason of a drop or by the kind of a note."""
        return {reason: fix for source in self.sources for reason, fix in source.fixes.items()}
