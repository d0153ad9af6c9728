"""What to say of an error of a disk or a network that no reader has turned into a record's reason."""

from __future__ import annotations

import errno
import os

from ...schemas.secrets import shorten
from .failures import Kind, ReadError, classify


def to_line(error: OSError) -> str | None:
    """The line with which a command ends for an error of the system; None for any other OSError.

    A full or failing disk and a folder that may not be written are met anywhere: in the output, in a folder
    for temporary files, in a cache.
    """
    if isinstance(error, ReadError):
        return f"{error}; {_what_to_do(error)}"
    if error.errno is None or not error.strerror:
        return None
    names = [os.fsdecode(each) for each in (error.filename, error.filename2) if isinstance(each, str | bytes)]
    told = f"{' -> '.join(names)}: {error.strerror}" if names else f"{error.strerror}"
    return shorten(f"{told}; {_what_to_do(error)}")


def fix_of(error: BaseException | None, otherwise: str) -> str:
    """What to do about a file of a corpus that could not be read.

    Args:
        error: that reading it raised, or what was raised from that.
        otherwise: for a file that is damaged.
    """
    refused = refused_by_store(error)
    return otherwise if refused is None else _what_to_do(refused)


def refused_by_store(error: BaseException | None) -> ReadError | None:
    """The error of a store that is away or refuses this user, from which another one was raised; or None."""
    while error is not None:
        if isinstance(error, ReadError) and "://" in error.url and error.kind is not Kind.RECORD:
            return error
        error = error.__cause__
    return None


_FIXES = {
    errno.EACCES: "give this user the permission, or choose another place",
    errno.EDQUOT: "make room, and run the same command again",
    errno.EIO: "the disk or its mount reports errors; repair it, and run the same command again",
    errno.ELOOP: "correct the link",
    errno.EMFILE: "raise the limit of open files (ulimit -n), and run the same command again",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOENT: "correct the path, or mount its folder",
    errno.ENOSPC: "make room, and run the same command again",
    errno.EPERM: "give this user the permission, or choose another place",
    errno.EROFS: "it is mounted read-only; choose another place",
}


def _what_to_do(error: OSError) -> str:
    if error.errno in _FIXES:
        return _FIXES[error.errno]
    is_in_bucket = isinstance(error, ReadError) and "://" in error.url
    match classify(error):
        case Kind.TRANSIENT:
            return f"run the same command again when the {'store' if is_in_bucket else 'file system'} answers"
        case Kind.SETUP | Kind.REFUSED if is_in_bucket:
            return "check the address, the credentials and their permissions"
    return "correct the path"
