"""What `verify` reports: a broken promise, or what is worth knowing, in one line that names file and fix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ...schemas.errors import ParaCaptionError, one_line
from ...schemas.records import Blob
from ..io import files
from ..io.disk_errors import fix_of
from ..io.location import is_bucket

_DELETE_FIRST = re.compile(r"delete (it|this file|the unit's manifest)( \([^)]*\))? and ")
"""How a remedy for a damaged file may begin. A missing one needs only the rest: the build notices it."""


class Problem(NamedTuple):
    """A broken promise, or (`note`) something that breaks none but is worth knowing.

    Attributes:
        file: path below the corpus.
        record: key, key and region, unit or member; "" if it is about the file.
        what: what is wrong, and what to do.
        note: readers are not affected, for example by a file that no manifest names.
    """

    file: str
    record: str
    what: str
    note: bool = False

    def __str__(self) -> str:
        where = f"{self.file}: {self.record}" if self.record else self.file
        return f"{'note: ' if self.note else ''}{where}: {self.what}"


@contextmanager
def guarded(problems: list[Problem], file: str, fix: str) -> Iterator[None]:
    """Make a problem of whatever the block raises.

    What tar, Parquet, JSON, YAML and image readers raise on damaged bytes is no closed list.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - see above
        problems.append(Problem(file, "", f"cannot be checked ({one_line(error)}); {fix_of(error, fix)}"))


def what_is_wrong(error: ParaCaptionError, path: str) -> str:
    """An error's text without the path, and without what to do, for a problem that has its own remedy."""
    text = str(error).removeprefix(f"{path}: ")
    return text.rpartition("; ")[0] or text


def compare_file(
    out: str, path: str, expected: tuple[int, str], whose: str, deep: bool, fix: str
) -> list[Problem]:
    """Whether a file is there and is what was written; a problem if not.

    Args:
        out: the corpus.
        path: of the file below it, which the caller knows to lie inside.
        expected: number of bytes, and SHA-256 in hex.
        whose: who says so, for the message.
        deep: also compare the SHA-256.
        fix: for the message. A missing file needs nothing deleted first.
    """
    problems: list[Problem] = []
    with guarded(problems, path, fix):
        try:
            url = f"{out}/{path}"
            # In a bucket, to ask for the size alone would be another request.
            size, digest = files.measure(url) if deep and is_bucket(url) else (files.size_of(Blob(url)), "")
            if size != expected[0]:
                what = f"has {size} bytes, {whose} says {expected[0]}"
            elif deep and (digest or files.sha256_of(url)) != expected[1]:
                what = f"its SHA-256 is not that of {whose}"
            else:
                return []
        except FileNotFoundError:
            what, fix = "missing", _DELETE_FIRST.sub("", fix, count=1)
        except OSError as error:
            what, fix = f"{error.strerror or error}", fix_of(error, fix)
        problems.append(Problem(path, "", f"{what}; {fix}"))
    return problems
