"""What happens to files between a publisher and a user: each damage says what it did.

A damage takes a random generator, the source and its parts, changes the parts in place, and returns words for
people; None if it does not fit this source. `CONTAINER` damages change written tars and Parquet files.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image

from tests.cases.field_damages import FIELDS
from tests.cases.layouts import Made
from tests.cases.parts import LABEL, PHOTO, TEXT, Parts, kind_of

Damage = Callable[[Random, Made, Parts], str | None]

_HTML = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
_TRAILERS = (bytes(4096), b"\xff" * 200, b"<!-- served by a proxy -->", b"SEFT" + bytes(range(256)) * 40)


def pick(random: Random, parts: Parts, kind: str) -> str | None:
    """A part of a kind."""
    names = [name for name in parts if kind_of(name) == kind]
    return random.choice(names) if names else None


def of_part(kind: str, change: Callable[[Random, bytes], bytes]) -> Damage:
    """A damage that changes the bytes of one part."""

    def damage(random: Random, _made: Made, parts: Parts) -> str | None:
        name = pick(random, parts, kind)
        if name is None:
            return None
        try:
            parts[name] = change(random, parts[name])
        except (OSError, ValueError):  # hit before: no image any more
            return None
        return name

    return damage


def cut(random: Random, data: bytes) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def flip(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 3, 20))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def zero(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + bytes(min(len(data) - at, random.choice((1, 16, 512)))) + data[at + 512 :]


def insert(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.randint(1, 8)) + data[at:]


def replaced(random: Random, _data: bytes) -> bytes:
    return random.choice(
        (b"", b"\n", _HTML, _LFS, b"PK\x03\x04" + bytes(64), bytes(700), b"null", b"[]", b"{}")
    )


def trailer(random: Random, data: bytes) -> bytes:
    return data + random.choice((*_TRAILERS, data))


def compressed(_random: Random, data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def marked(_random: Random, data: bytes) -> bytes:
    return b"\xef\xbb\xbf" + data


def recoded(random: Random, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    return random.choice(
        (text.encode("utf-16"), text.replace(",", ",\r\n").encode(), text.encode("latin-1", "replace"))
    )


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def turned(random: Random, data: bytes) -> bytes:
    """An EXIF tag that says to turn the photo."""
    image = opened(data)
    exif = Image.Exif()
    exif[0x0112] = random.randint(2, 8)
    kind = image.format or "PNG"
    return saved(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


def of_another_kind(random: Random, data: bytes) -> bytes:
    image = opened(data).convert("RGB")
    kind = random.choice(("WEBP", "BMP", "TIFF", "GIF", "gray", "P", "CMYK", "RGBA", "progressive"))
    if kind == "gray":
        return saved(image.convert("L"), "JPEG")
    if kind in ("P", "RGBA"):
        return saved(image.convert(kind), "PNG")
    if kind == "CMYK":
        return saved(image.convert(kind), "JPEG")
    return saved(image, "JPEG", progressive=True) if kind == "progressive" else saved(image, kind)


def resized(random: Random, data: bytes) -> bytes:
    image = opened(data)
    kind = image.format or "PNG"
    if random.random() < 0.5:
        return saved(image.transpose(Image.Transpose.ROTATE_90), kind)
    return saved(image.resize((image.width + 1, image.height), Image.Resampling.NEAREST), kind)


def with_long_header(random: Random, data: bytes) -> bytes:
    image = opened(data)
    size = random.choice((1000, 60_000, 70_000))
    return saved(image, image.format or "PNG", icc_profile=random.randbytes(size))


def as_palette(_random: Random, data: bytes) -> bytes:
    """The same colors in palette mode, as oxipng and others write them; without loss."""
    image = opened(data)
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError
    colors = np.asarray(image.convert("RGB"))
    found, places = np.unique(colors.reshape(-1, 3), axis=0, return_inverse=True)
    if len(found) > 256:
        raise ValueError
    made = Image.fromarray(places.reshape(colors.shape[:2]).astype(np.uint8), "P")
    made.putpalette(found.astype(np.uint8).tobytes())
    return saved(made, "PNG", optimize=True)


def other_ids(random: Random, data: bytes) -> bytes:
    """A label map that says something else: colors in another order, grayed, merged or smoothed."""
    image = opened(data).convert("RGB")
    kind = random.choice(("bgr", "gray", "merged", "smooth", "indices"))
    if kind == "bgr":
        return saved(Image.fromarray(np.asarray(image)[..., ::-1].copy()), "PNG")
    if kind == "gray":
        return saved(image.convert("L"), "PNG")
    if kind == "smooth":
        small = image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR)
        return saved(small.resize(image.size, Image.Resampling.BILINEAR), "PNG")
    if kind == "merged":
        return saved(image.quantize(2), "PNG")
    places = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_inverse=True)[1]
    return saved(Image.fromarray(places.reshape(image.size[::-1]).astype(np.uint8)), "PNG")


def swap(kind: str) -> Damage:
    """Two files have each other's content."""

    def damage(random: Random, _made: Made, parts: Parts) -> str | None:
        names = [name for name in parts if kind_of(name) == kind]
        if len(names) < 2:
            return None
        first, second = random.sample(names, 2)
        parts[first], parts[second] = parts[second], parts[first]
        return f"{first}, {second}"

    return damage


def delete(random: Random, _made: Made, parts: Parts) -> str | None:
    name = random.choice([name for name in parts if not name.startswith(("categories", "rows"))] or [""])
    if not name or len(parts) < 3:
        return None
    del parts[name]
    return name


def rename(random: Random, _made: Made, parts: Parts) -> str | None:
    """A name in other letters, with another ending, or in another folder. Its order stays."""
    names = [name for name in parts if "/" in name and not name.startswith("rows")]
    if not names:
        return None
    old = random.choice(names)
    folder, _, base = old.rpartition("/")
    stem, _, ending = base.rpartition(".")
    new = random.choice(
        (
            f"{folder}/{stem}.{ending.upper()}",
            f"{folder}/{stem.upper()}.{ending}",
            f"{folder}/{stem}.{ending}.bak",
            f"{folder}/other/{base}",
            f"{folder}/x{base}",
            f"{folder}/{stem}.tif",
            f"{folder}/.{base}",
            f"{folder}/__{base}",
        )
    )
    _renamed(parts, old, new)
    return f"{old} -> {new}"


def _renamed(parts: Parts, old: str, new: str) -> None:
    changed = {new if name == old else name: data for name, data in parts.items()}
    parts.clear()
    parts.update(changed)


def copy(random: Random, _made: Made, parts: Parts) -> str | None:
    """A file lies a second time in another folder; where it does, it may be another one of that name."""
    names = [name for name in parts if "/" in name and not name.startswith("rows")]
    if not names:
        return None
    name = random.choice(names)
    folder, _, base = name.rpartition("/")
    data = parts[name] if random.random() < 0.5 else parts[random.choice(names)]
    new = f"{folder}/{random.choice(('again', 'a'))}/{base}"
    parts[new] = data if kind_of(name) == kind_of(new) else parts[name]
    return f"{name} also as {new}"


def stray(random: Random, _made: Made, parts: Parts) -> str | None:
    """Files that belong to nothing."""
    folders = sorted({name.rpartition("/")[0] for name in parts if "/" in name})
    if not folders:
        return None
    base = random.choice(("Thumbs.db", "stray.png", "stray.jpg", ".DS_Store", "a.txt"))
    name = f"{random.choice(folders)}/{base}"
    parts[name] = random.choice((b"", b"\0\x05\x16\x07" + bytes(60), next(iter(parts.values()))))
    return name


PHOTOS: dict[str, Damage] = {
    "photo cut": of_part(PHOTO, cut),
    "photo flipped": of_part(PHOTO, flip),
    "photo zeroed": of_part(PHOTO, zero),
    "photo replaced": of_part(PHOTO, replaced),
    "photo with a trailer": of_part(PHOTO, trailer),
    "photo turned": of_part(PHOTO, turned),
    "photo of another kind": of_part(PHOTO, of_another_kind),
    "photo resized": of_part(PHOTO, resized),
    "photo with a long header": of_part(PHOTO, with_long_header),
    "photos swapped": swap(PHOTO),
}
NAMES: dict[str, Damage] = {"deleted": delete, "renamed": rename, "copied": copy, "stray": stray}
LABELS: dict[str, Damage] = {
    "labels cut": of_part(LABEL, cut),
    "labels replaced": of_part(LABEL, replaced),
    "labels with a trailer": of_part(LABEL, trailer),
    "labels as a palette": of_part(LABEL, as_palette),
    "labels turned": of_part(LABEL, turned),
    "labels resized": of_part(LABEL, resized),
}
WITNESSED: dict[str, Damage] = {
    "labels flipped": of_part(LABEL, flip),
    "labels zeroed": of_part(LABEL, zero),
    "labels of another kind": of_part(LABEL, of_another_kind),
    "labels with other ids": of_part(LABEL, other_ids),
    "labels swapped": swap(LABEL),
}
"""What only the declared areas can tell: not for sources without them, nor after they were changed."""

TEXTS: dict[str, Damage] = {
    "JSON cut": of_part(TEXT, cut),
    "JSON flipped": of_part(TEXT, flip),
    "JSON zeroed": of_part(TEXT, zero),
    "JSON inserted": of_part(TEXT, insert),
    "JSON replaced": of_part(TEXT, replaced),
    "JSON twice": of_part(TEXT, trailer),
    "JSON compressed": of_part(TEXT, compressed),
    "JSON with a mark": of_part(TEXT, marked),
    "JSON recoded": of_part(TEXT, recoded),
    **FIELDS,
}


def flip_container(random: Random, data: bytes) -> bytes:
    return random.choice((flip, zero))(random, data)


def no_end(_random: Random, data: bytes) -> bytes:
    return data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512)


def zero_block(random: Random, data: bytes) -> bytes:
    """A block of zeros between two members, or anywhere."""
    starts = [at for at in range(512, len(data) - 512, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = random.choice(starts) if starts else 0
    return data[:at] + bytes(512 * random.choice((1, 2, 20))) + data[at:]


def two_tars(random: Random, data: bytes) -> bytes:
    """Two tars, one after the other."""
    starts = [at for at in range(512, len(data) - 512, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = random.choice(starts) if starts else 0
    return data[:at] + bytes(10240 - at % 10240) + data[at:]


TARS = {
    "tar cut": cut,
    "tar flipped": flip_container,
    "tar gzipped": compressed,
    "tar without its end": no_end,
    "tar with zeros inside": zero_block,
    "two tars in one": two_tars,
    "tar with a trailer": lambda random, data: data + random.choice(_TRAILERS),
}
PARQUETS = {"Parquet cut": cut, "Parquet flipped": flip_container}
