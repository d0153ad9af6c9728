"""Folders that nothing leads out of: a corpus may be a stranger's, and a link in it may lead anywhere.

Once a folder is confined, this process reads and writes what is named below it only if it lies there, and
only files and folders: no link, and no `..`, leads to another place, and no pipe or device is opened.
Everything that goes through `files` and `store` asks here first; who opens files in another way asks `check`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from ...schemas.errors import IntegrityError

FOLLOW_LINKS = "PARACAPTION_FOLLOW_LINKS"
"""The environment variable with which links out of a corpus are followed, if it is 1."""

_CONFINED: dict[str, tuple[str, ...]] = {}
"""A folder as it was named -> the folders in which what is below it may really lie."""


def confine(folder: str | Path) -> None:
    """Let nothing lead out of a local folder from now on, in this process; a URL's folder has no links."""
    if "://" in str(folder).removeprefix("file://"):
        return
    named = _absolute(str(folder)).rstrip("/")
    real = os.path.realpath(named)
    inside = (real, *_blobs_of(real))
    for name in {named, str(Path(named)), os.path.normpath(named)}:
        _CONFINED[name] = inside


def folders_of(folder: str | Path) -> list[str]:
    """The folders in which what is below a confined folder may really lie, for who asks them itself."""
    if os.environ.get(FOLLOW_LINKS) == "1":
        return ["/"]
    return [_absolute(str(folder)), *(_inside_of(_absolute(str(folder))) or ())]


def check(path: str | Path) -> None:
    """Refuse a path of a confined folder that is a pipe or a device, or leads out of the folder.

    Raises:
        IntegrityError: it does.
    """
    if not _CONFINED:
        return
    named = _absolute(str(path))
    inside = _inside_of(named)
    if inside is None or os.environ.get(FOLLOW_LINKS) == "1":
        return
    real = os.path.realpath(named)
    if not is_below(real, *inside):
        raise IntegrityError(
            f"{path}: leads out of the corpus, to {real}, which is not opened; put the file itself there, or "
            f"set {FOLLOW_LINKS}=1 if the link is your own"
        )
    if not is_plain(real):
        raise IntegrityError(f"{path}: is neither a file nor a folder; delete it")


def check_all(paths: Sequence[str]) -> None:
    """`check` many files, with one look at each that is no link.

    Raises:
        IntegrityError: one leads out of its folder.
    """
    for folder in {path.rpartition("/")[0] for path in paths}:
        check(folder)
    for path in paths:
        try:
            if stat.S_ISREG(os.lstat(path).st_mode):
                continue
        except (OSError, ValueError):
            continue
        check(path)


def is_below(path: str, *folders: str) -> bool:
    """Whether a real path is one of some real folders, or lies in one."""
    return any(path == each or path.startswith(each.rstrip("/") + "/") for each in folders)


def _inside_of(named: str) -> tuple[str, ...] | None:
    """Where a path may lie: of the innermost confined folder above it; None if none is."""
    while True:
        if named in _CONFINED:
            return _CONFINED[named]
        above = named.rpartition("/")[0]
        if not above:
            return None
        named = above


def is_plain(path: str) -> bool:
    """Whether a path is that of a file or folder, or of nothing: no pipe, socket or device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return True  # whoever opens it says what is wrong
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _blobs_of(folder: str) -> list[str]:
    """The folder that Hugging Face's cache has its files in, if this is a snapshot of it: all are links."""
    parts = folder.split("/")
    places = [place for place, part in enumerate(parts) if part == "snapshots" and place + 1 < len(parts)]
    blobs = ["/".join([*parts[:place], "blobs"]) for place in places]
    return [each for each in blobs if os.path.isdir(each) and not os.path.islink(each)]


def _absolute(path: str) -> str:
    """The path from the root, as it is written: `..` stays, so that nothing is cut off."""
    path = path.removeprefix("file://")
    return path if path.startswith("/") else f"{os.getcwd()}/{path}"
