"""Every kind of source, registered once, and the sources of a subset. A kind is imported when needed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import msgspec
from pydantic import ValidationError

from ...schemas.config import BuildConfig, Limits
from ...schemas.errors import ConfigError
from ...schemas.records import ImageRecord
from ...schemas.strict import FileContext, one_line_each
from .protocols import Catalog, CatalogEntry, Note, Source, SourceOptions

SOURCES = {
    "coconut": "paracaption.pipeline.sources.coconut:Coconut",
    "sa1b": "paracaption.pipeline.sources.sa1b:Sa1b",
}
"""Kind, as the configuration names it, -> its class."""

ALL_KEYS = "see `paracaption config` for all keys"


def find_source(kind: str) -> type[Source[Any]]:
    """The class of a kind.

    Raises:
        ConfigError: there is no such kind; names the choices.
    """
    if kind not in SOURCES:
        raise ConfigError(f"unknown kind {kind!r}; choose from {', '.join(SOURCES)}")
    module, _, name = SOURCES[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def find_options(kind: str) -> type[SourceOptions]:
    """The options of a kind; see `find_source`."""
    return find_source(kind).options_type


def complete(config: BuildConfig) -> BuildConfig:
    """The configuration with every option of its sources checked and written out.

    One that comes from a file has been checked already; one that a program makes has not.

    Raises:
        ConfigError: a kind or an option is unknown, or a value does not suit it; a line for each.
    """
    try:
        return BuildConfig.model_validate(config.model_dump(), context=FileContext(options_of=find_options))
    except ValidationError as error:
        raise ConfigError(one_line_each(error, "", ALL_KEYS)) from error


def subset_title(subset: str) -> str:
    """A subset's name for people: the title of its kind if it is named after one, else its own name."""
    return find_source(subset).title if subset in SOURCES else subset


def recipe_name(config: BuildConfig, subset: str) -> str:
    """The recipe of a subset: the configured one, else the default of its kinds of source.

    A subset that the configuration no longer has is taken to be of the kind that it is named after.

    Raises:
        ConfigError: its kinds have different defaults, or one is unknown.
    """
    if subset not in config.subsets:
        return find_source(subset).recipe
    chosen = config.subsets[subset].recipe
    if chosen is not None:
        return chosen
    defaults = {find_source(each["source"]).recipe for each in config.subsets[subset].sources}
    if len(defaults) > 1:
        raise ConfigError(
            f"subsets.{subset}.recipe: its sources have the recipes {' and '.join(sorted(defaults))}; "
            "name one, or make two subsets"
        )
    return defaults.pop()


def open_source(config: BuildConfig, subset: str) -> SubsetSource:
    """The sources of a subset; reads nothing yet.

    Raises:
        ConfigError: the configuration has no such subset, or its sources are wrong.
    """
    if subset not in config.subsets:
        raise ConfigError(f"no subset {subset!r} in the configuration; it has {', '.join(config.subsets)}")
    sources = []
    for number, entry in enumerate(complete(config).subsets[subset].sources):
        kind = find_source(entry.pop("source"))
        sources.append(kind(kind.options_type.model_validate(entry), f"subsets.{subset}.sources.{number}"))
    return SubsetSource(subset, sources)


class SubsetSource:
    """The sources of one subset, read one after the other as one.

    Attributes:
        subset: its name.
        sources: in the configuration's order.
        notes: what the last complete `catalog` saw that is no image's problem.
    """

    def __init__(self, subset: str, sources: list[Source[Any]]):
        self.subset = subset
        self.sources = sources
        self.notes: list[Note] = []
        self._listed: Catalog | None = None

    def fingerprint(self) -> dict[str, str]:
        """The files and folders by URL, each with a string that changes when it does. No file is opened.

        Raises:
            ConfigError: as `catalog`.
        """
        self._listed = Catalog()
        return {
            url: version
            for source in self.sources
            for url, version in source.fingerprint(self._listed).items()
        }

    def catalog(self) -> Iterator[CatalogEntry]:
        """Every image of the subset exactly once, in a stable order.

        Raises:
            ConfigError: an annotation file or folder is missing or is not what the configuration says.
        """
        catalog, self._listed = self._listed or Catalog(), None  # folders are listed once for both
        self.notes = catalog.notes
        for number, source in enumerate(self.sources):
            for entry in source.catalog(catalog):
                yield msgspec.structs.replace(entry, source=number) if number else entry
        catalog.note_unclaimed_files()

    def read(self, entry: CatalogEntry, limits: Limits, notes: list[Note] | None = None) -> ImageRecord:
        """The image of an entry. A worker opens the sources anew, and needs nothing else of the catalog."""
        return self.sources[entry.source].read(entry, limits, notes, self.subset)

    def fixes(self) -> dict[str, str]:
        """What to do about a problem, by the reason of a drop or by the kind of a note."""
        return {reason: fix for source in self.sources for reason, fix in source.fixes.items()}
