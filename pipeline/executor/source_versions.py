"""Whether the files of a source behind a URL are still those that the work list was made of.

A build plans once and reads for days. A tar, a Parquet file or a list of annotations that is replaced in that
time would give units of both: its members lie elsewhere, or rows say something else. So each unit asks, when
everything of it was read, for the versions (size and etag) of the files that hold several of its records, and
is held back if one is not what it was when it was listed. That is one HEAD for each such file and unit.

A file of its own, as a photo in a folder is, is not asked about: docs/sources.md says what is noticed of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...schemas.secrets import shorten
from ..corpus.work_list_summary import WorkList
from ..io import files
from ..io.failures import describe
from ..sources.file_names import is_listing
from ..sources.protocols import CatalogEntry
from ..sources.registry import SubsetSource


def planned_versions(work_list: WorkList) -> dict[str, str]:
    """The versions, when they were listed, of the files behind URLs; folders have none. By URL."""
    found = work_list.fingerprint.items()
    return {url: version for url, version in found if files.is_url(url) and not is_listing(version)}


def files_read(entries: Iterable[CatalogEntry], source: SubsetSource, versions: dict[str, str]) -> list[str]:
    """Of the files with versions, those that images are read from, with their lists of categories."""
    if not versions:
        return []
    entries = list(entries)
    named = {blob.url for entry in entries for blob in (entry.photo, entry.annotation) if blob is not None}
    used = {entry.source for entry in entries}
    options: list[Any] = [source.sources[number].options for number in used]
    lists: set[str] = {getattr(each, "categories", None) or "" for each in options}
    return sorted((named | lists) & versions.keys())


def why_changed(urls: Iterable[str], versions: dict[str, str]) -> str:
    """Which file has changed since it was listed, and what to do; "" if none has."""
    for url in urls:
        try:
            now = files.present_version(url)
        except OSError as error:
            return f"{shorten(url)}: {describe(error)}, so it is not known whether it has changed"
        if now.replace('"', "") != versions[url].replace('"', ""):
            return (
                f"{shorten(url)}: has changed since the work list was made; run the same command again, "
                "which lists it again"
            )
    return ""
