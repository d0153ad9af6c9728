"""The photos of benchmarks: the list of names next to this file, and photos that a user points to."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ...filters.benchmark_photos import Listed, PhotoNames, PictureHash, find_look, picture_hash
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.records import Blob
from . import files, photos

if TYPE_CHECKING:
    from collections.abc import Sequence

LIST = "benchmark_photos.json"
"""Name -> [width, height, benchmarks]; `paracaption benchmark photos` makes it of the annotation files."""

LIST_VERSION = 1
"""Of the list. Raised when photos are added; a corpus keeps the version that it was planned with."""

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@functools.cache
def load_names() -> PhotoNames:
    """The photos of the published benchmarks by name and id."""
    text = resources.files("paracaption.pipeline.io").joinpath(LIST).read_bytes()
    return PhotoNames(msgspec.json.decode(text, type=dict[str, Listed]))


class Pictures(NamedTuple):
    """The benchmarks' photos themselves.

    Attributes:
        digest: of their bytes; it changes when a photo does.
        by_bytes: SHA-256 of a photo's bytes -> its file's name.
        looks: how each of them looks, and its file's name.
    """

    digest: str
    by_bytes: dict[str, str]
    looks: list[tuple[PictureHash, str]]

    def find(self, photo: Blob, max_pixels: int) -> str:
        """The file's name of the benchmark's photo that a photo is, or is a copy of; "" if there is none.

        Raises:
            BadRecord: it could not be read, or cannot be decoded.
        """
        data = photos.fetch(photo)
        known = self.by_bytes.get(photos.digest_of(data))
        return known or find_look(picture_hash(photos.decode_image(photo, data, max_pixels)), self.looks)


@functools.cache
def load_pictures(folders: tuple[str, ...], max_pixels: int) -> Pictures:
    """Read the photos in some folders, once in a process.

    Raises:
        ConfigError: a folder is missing or has no photo, or a photo in it cannot be read.
    """
    by_bytes: dict[str, str] = {}
    looks: list[tuple[PictureHash, str]] = []
    for folder in folders:
        for url, name in _photos_in(folder):
            photo = Blob(url)
            try:
                data = photos.fetch(photo)
                looks.append((picture_hash(photos.decode_image(photo, data, max_pixels)), name))
            except BadRecord as error:
                raise ConfigError(f"benchmarks.photos: {error.detail}") from error
            by_bytes[photos.digest_of(data)] = name
    digest = hashlib.sha256("".join(sorted(by_bytes)).encode()).hexdigest()[:16]
    return Pictures(digest, by_bytes, looks)


def _photos_in(folder: str) -> Sequence[tuple[str, str]]:
    if not files.is_folder(folder):
        raise ConfigError(f"benchmarks.photos: no folder {folder}; correct the path, or mount the folder")
    listed = sorted((url, name) for url, name in files.walk(folder) if name.lower().endswith(_ENDINGS))
    if not listed:
        raise ConfigError(f"benchmarks.photos: {folder}: no photo in it; name the folder of the photos")
    return listed
