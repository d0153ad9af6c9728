"""Photos in folders, for sources whose lists are the folders themselves."""

from __future__ import annotations

from collections.abc import Iterator

from ...schemas.errors import ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import Drop
from . import file_names
from .protocols import Catalog, drop


def images_in(listing: file_names.Listing, endings: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(URL, path in its folder) of the images of a folder, sorted by that path. Hidden files are none: macOS
    keeps `._photo.jpg`, which is no photo, next to what it copies.

    Raises:
        ConfigError: it cannot be listed.
    """
    if listing.names is None:
        raise ConfigError(f"{listing.url}: a folder of a plain HTTP server cannot be listed; copy it first")
    for name in listing.names:
        if is_image(name, endings):
            yield f"{listing.url.rstrip('/')}/{name}", name


def is_image(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(endings) and not file_names.base_name(name).startswith(".")


def claim(url: str, name: str, catalog: Catalog, where: str) -> tuple[str, Drop | None]:
    """The key of a photo of a folder, and what its name alone drops it for.

    Args:
        url: of the photo.
        name: its path in its folder.
        catalog: gives out the keys.
        where: the source's place in the configuration.
    """
    key, again = catalog.claim_key(file_names.path_stem(name), where)
    if not file_names.is_text(name) or not file_names.is_safe(name):
        return key, drop(Reason.UNSAFE_NAME, f"{name!a}: no plain UTF-8 name; rename it")
    if again:
        detail = f"{url}: a photo of this name was listed before; the first one counts"
        return key, drop(Reason.DUPLICATE_KEY, detail)
    return key, None
