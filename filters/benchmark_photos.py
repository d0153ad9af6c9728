"""Which photo is one of a benchmark's: by its name, by its id and size, or by how it looks.

A model that was trained on a benchmark's photos is not measured by it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_COCO = re.compile(r"(?:coco_(?:train|val|test)20\d\d_)?(\d{12})")
_OBJECTS365 = re.compile(r"objects365_v\d_\d{8}")
_ENDING = re.compile(r"\.[a-z][a-z0-9]{1,4}$")
_NUMBER = re.compile(r"\d{1,11}")

MAX_BITS = (14, 8)
"""Most bits in which the two hashes of a photo and of its copy differ, of 64 and 63.

Of 54 real photos, copies (JPEG at quality 20, a quarter of the size, both together, half the size, gray, 10%
brighter) differ in at most 13 and 6 bits. Their 1,431 pairs differ in at least 18 bits of the second.
"""


class Listed(NamedTuple):
    """A photo of a benchmark: its size in pixels, and whose it is.

    Attributes:
        width, height: as the benchmark's annotation declares them.
        title: of the benchmark, or of several.
    """

    width: int
    height: int
    title: str


def canonical(name: str) -> str:
    """The name that COCO or Objects365 gave a photo, from a path with any ending; "" for other names."""
    last = _ENDING.sub("", re.split(r"[/\\]", name)[-1].lower())
    coco = _COCO.fullmatch(last)
    return coco[1] if coco else last if _OBJECTS365.fullmatch(last) else ""


class PhotoNames:
    """The photos of benchmarks by name and id.

    Args:
        photos: by the name that their publisher gave, without folder and ending.
    """

    def __init__(self, photos: Mapping[str, Listed]):
        self.photos = {name.lower(): listed for name, listed in photos.items()}
        self._by_id: dict[int, Listed] = {int(name.rpartition("_")[2]): each for name, each in photos.items()}

    def find(
        self, name: str, number: int | str | None = None, size: tuple[int | None, int | None] = (None, None)
    ) -> str:
        """The benchmark that has a photo; "" if none is known to.

        A name of COCO or Objects365 decides alone, whatever the id says. Of another name, the id counts, or
        the name if it is one, where the size is the benchmark's too: other publishers number from 1 as well.

        Args:
            name: the file's name, with or without folders.
            number: the image's id.
            size: declared width and height in pixels.
        """
        own = canonical(name)
        given = "" if number is None else str(number)
        if not own and (own := canonical(given)) == "":
            bare = _ENDING.sub("", re.split(r"[/\\]", name)[-1].lower())
            for text in (given, bare):
                found = self._by_id.get(int(text)) if _NUMBER.fullmatch(text) else None
                if found is not None and (found.width, found.height) == size:
                    return found.title
            return ""
        found = self.photos.get(own)
        return "" if found is None else found.title


class PictureHash(NamedTuple):
    """Two perceptual hashes: of the brightness gradient (64 bits), and of the lowest frequencies (63)."""

    gradient: int
    frequencies: int


def picture_hash(picture: Image.Image) -> PictureHash:
    """How a picture looks, whatever its size, its compression and, roughly, its brightness."""
    from PIL import Image

    gray = picture.convert("L")
    steps = np.asarray(gray.resize((9, 8), Image.Resampling.BOX), np.int16)
    small = np.asarray(gray.resize((32, 32), Image.Resampling.BOX), np.float64)
    waves = _cosines() @ small @ _cosines().T
    low = waves.ravel()[1:]
    return PictureHash(_bits(steps[:, 1:] > steps[:, :-1]), _bits(low > np.median(low)))


@functools.cache
def _cosines() -> np.ndarray:
    """(8, 32) the lowest rows of a discrete cosine transform."""
    return np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)


def _bits(flags: np.ndarray) -> int:
    return int.from_bytes(np.packbits(flags.ravel()).tobytes(), "big")


def find_look(found: PictureHash, known: Iterable[tuple[PictureHash, str]]) -> str:
    """The name of the first picture that looks the same; "" if none does."""
    for other, name in known:
        pairs = zip(found, other, MAX_BITS, strict=True)
        if all((one ^ two).bit_count() <= most for one, two, most in pairs):
            return name
    return ""
