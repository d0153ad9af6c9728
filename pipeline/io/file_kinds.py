"""What a file is that is not what it should be, by its beginning, and what to do about it."""

from __future__ import annotations

import json

_MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""

_KINDS = (
    (b"\x1f\x8b", "gzip; unpack it"),
    (b"PK\x03\x04", "a zip file; unpack it"),
    (b"BZh", "bzip2; unpack it"),
    (b"\xfd7zXZ", "xz; unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z file; unpack it"),
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull` where it is from"),
    (b"<", "a web page or XML; fetch the {wanted} itself"),
)
_NO_JSON = ((b"PAR1", "a Parquet file"),)


def what_is(data: bytes, wanted: str = "JSON") -> str:
    """What a file is by its beginning, and what to do; "" if that says nothing.

    Args:
        data: the file, or its first bytes; at least 64 where it has so many.
        wanted: what it should be. Of JSON the encoding is looked at, too.
    """
    start = bytes(data[:64]).removeprefix(_MARK).lstrip()
    if not start.strip(b"\0"):
        found = "only zero bytes" if start else "the file is empty"
        return found if wanted == "JSON" else f"{found}; fetch it again"  # who reads JSON says so itself
    kinds = (*_KINDS, *_NO_JSON) if wanted == "JSON" else _KINDS
    found = next((words for mark, words in kinds if start.startswith(mark)), "")
    if not found and wanted == "JSON":
        encoding = json.detect_encoding(start).upper()
        found = "" if encoding.startswith("UTF-8") else f"{encoding[:6]}; save it as UTF-8"
    return found.replace("{wanted}", wanted)
