"""Reads a shard: every sample of a tar with its photo, and a sample from its bytes."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from ...schemas.errors import REBUILD, IntegrityError
from ...schemas.sample import PHOTO_ENDING, Sample
from ..io import files
from ..io.disk_errors import fix_of
from ..io.location import Location


class StoredSample(NamedTuple):
    """A sample with the bytes of its two members, as they lie in the shard."""

    sample: Sample
    photo: bytes
    record: bytes


def iter_shard(shard: str | Location) -> Iterator[tuple[Sample, bytes]]:
    """Every sample of a shard with the bytes of its photo, in one pass.

    Raises:
        IntegrityError: the tar is damaged, or a member is not what a shard holds.
    """
    return ((stored.sample, stored.photo) for stored in iter_stored(shard))


def iter_stored(shard: str | Location) -> Iterator[StoredSample]:
    """The same with the bytes of the JSON too, which may have fields that `Sample` does not know."""
    photos: dict[str, bytes] = {}
    try:
        with files.open_url(str(shard), 8 << 20) as opened, tarfile.open(fileobj=opened, mode="r|") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                data = b"" if file is None else file.read()
                key, _, ending = member.name.rpartition(".")
                if ending == PHOTO_ENDING:
                    photos[key] = data
                elif ending == "json" and key in photos:
                    sample = decode_sample(data, f"{shard}: {member.name}")
                    yield StoredSample(sample, photos.pop(key), data)
                else:
                    raise IntegrityError(f"{shard}: {member.name}: not a member of a shard; {REBUILD}")
    except (OSError, tarfile.TarError) as error:
        raise IntegrityError(f"{shard}: not readable ({error}); {fix_of(error, REBUILD)}") from error
    if photos:
        raise IntegrityError(f"{shard}: {min(photos)}: a photo without its JSON; {REBUILD}")


_SAMPLE = msgspec.json.Decoder(Sample)


def decode_sample(data: bytes, where: str) -> Sample:
    """A sample from its JSON member; `where` is for the message.

    Raises:
        IntegrityError: the bytes are not a sample.
    """
    try:
        return _SAMPLE.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise IntegrityError(f"{where}: not a sample ({error}); {REBUILD}") from error
