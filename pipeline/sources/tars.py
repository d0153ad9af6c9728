"""The members of a tar from its headers alone, by offset: nothing is extracted."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...schemas.errors import ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import Blob, Drop
from ..io import files
from ..io.file_kinds import what_is
from . import file_names
from .protocols import Note, drop

TAR_FIXES = {
    "other_file": "not read",
    "tar_after_end": "not read; fetch the tar again if it should hold more",
    "tar_without_end": "the tar may have been cut between two members; compare its size with the publisher's",
}
"""What to do about the notes of `list_members`, and about members that are of no use."""

_HEADER_BLOCK = 16 << 10
"""Bytes asked of an object store for a tar's header; the next one is a photo away."""


class Member(NamedTuple):
    """A file of a tar or folder; `drop` says why it cannot be used."""

    name: str
    blob: Blob | None
    drop: Drop | None = None


def list_members(url: str, notes: list[Note]) -> Iterator[Member]:
    """The members of a tar, from its headers alone. What is cut or broken becomes a member with a drop.

    Raises:
        ConfigError: nothing in it can be read.
    """
    found, data_end = 0, 0
    try:
        with files.open_url(url, _HEADER_BLOCK) as file:
            size = file.seek(0, 2)
            file.seek(0)
            archive = _opened(file)
            after_end = None
            while True:
                if (member := _next(archive)) is None:
                    if (following := _after_zeros(archive.offset, file)) is None:
                        break
                    after_end, archive.offset = archive.offset, following
                    continue
                after_end = None
                vars(archive)["members"].clear()  # a tar of SA-1B has 22,000, which tarfile would keep
                found, data_end = found + 1, member.offset_data + member.size
                if not member.isdir():
                    yield _checked(member, url, size)
            broken = None if after_end is not None else _broken_at(archive, file, size)
            if after_end is not None:
                what = f"the {size - archive.offset} bytes from byte {archive.offset} on are not read"
                notes.append(Note("tar_after_end", f"{url}: the tar ends at byte {after_end}; {what}"))
            if data_end <= size <= archive.offset:
                detail = f"{url}: ends at byte {size} without an end mark"
                notes.append(Note("tar_without_end", detail))
    except tarfile.TarError as error:
        start = b"" if found else files.fetch(Blob(url), 0, 64)
        if start.startswith(b"\x1f\x8b"):
            raise ConfigError(f"{url}: gzipped; unpack it with gunzip, members are read by offset") from error
        if start and (words := what_is(start, "tar")):
            raise ConfigError(f"{url}: not a tar: {words}") from error
        raise ConfigError(f"{url}: not a readable tar ({error}); fetch it again") from error
    if broken is not None:
        if not found:
            raise ConfigError(f"{url}: broken at byte {broken}, no member can be read; fetch it again")
        detail = f"{url}: broken at byte {broken}; what follows cannot be read; fetch the tar again"
        yield Member(
            f"{file_names.stem(url)}-from-byte-{broken}.json",
            None,
            drop(Reason.ANNOTATION_UNREADABLE, detail),
        )


def _opened(file: Any) -> tarfile.TarFile:
    """The archive, with its first header read.

    Raises:
        tarfile.TarError: it is not a tar.
    """
    try:
        return tarfile.open(fileobj=file, mode="r:", errorlevel=0)
    except (ValueError, EOFError, OverflowError) as error:
        raise tarfile.ReadError(str(error)) from error


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next header; None where headers end or break, which `_broken_at` tells apart."""
    try:
        return archive.next()
    except (tarfile.TarError, ValueError, EOFError, OverflowError):
        return None


def _after_zeros(start: int, file: Any) -> int | None:
    """Where something follows a tar's end mark, as in tars after one another; None if nothing does."""
    file.seek(start)
    at = start
    while block := file.read(tarfile.BLOCKSIZE):
        if block.strip(b"\0"):
            return at if at > start else None
        at += len(block)
    return None


def _broken_at(archive: tarfile.TarFile, file: Any, size: int) -> int | None:
    """Where a tar stops being one; None if it ends as it should, in zeros.

    Also None if the data of its last member is cut: that member has its own drop by then.
    """
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) == tarfile.BLOCKSIZE and not block.strip(b"\0"):
        return None
    return None if archive.offset >= size else archive.offset


def _checked(member: tarfile.TarInfo, url: str, size: int) -> Member:
    name = member.name
    while name.startswith("./"):
        name = name[2:]
    where = f"{url}: member {name!r}"
    reason = Reason.ANNOTATION_UNREADABLE if file_names.ending(name) == ".json" else Reason.PHOTO_UNREADABLE
    if not file_names.is_safe(name):
        return Member(
            name, None, drop(Reason.UNSAFE_NAME, f"{where}: {file_names.why_unsafe(name)}; not opened")
        )
    if member.issym() or member.islnk():
        return Member(
            name,
            None,
            drop(Reason.UNSAFE_NAME, f"{where}: is a link, which is not followed; put the file itself there"),
        )
    if not member.isreg() or member.sparse is not None:
        return Member(name, None, drop(reason, f"{where}: not a plain file"))
    if member.offset_data + member.size > size:
        detail = f"cut short at byte {size} of the tar, {member.offset_data + member.size} needed"
        return Member(name, None, drop(reason, f"{where}: {detail}; fetch the tar again"))
    return Member(name, Blob(url, member.offset_data, member.size))
