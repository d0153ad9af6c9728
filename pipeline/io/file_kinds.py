"""What a file is that is not what it should be, by its beginning, and what to do about it."""

from __future__ import annotations

import json

_MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""

_NEVER = (
    (b"\x1f\x8b", "gzip; unpack it"),
    (b"PK\x03\x04", "a zip file; unpack it"),
    (b"BZh", "bzip2; unpack it"),
    (b"\xfd7zXZ", "xz; unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z file; unpack it"),
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull` where it is from"),
    (b"GIF8", "a GIF; save it as PNG"),
    (b"<", "a web page or XML; fetch the {wanted} itself"),
    (b"\x00\x05\x16\x07", "a metadata file of macOS (their names begin with `._`); delete it"),
)
"""How files begin that are nothing that is read, and what is said of them."""

_ELSEWHERE = (
    (b"PAR1", "a Parquet file", ("Parquet file",)),
    (b"\x89PNG", "a PNG", ("photo", "PNG")),
    (b"\xff\xd8\xff", "a JPEG", ("photo",)),
    (b"\x93NUMPY", "a NumPy array", ()),
    (b"%PDF", "a PDF", ()),
    (b"{", "JSON", ("JSON", "YAML")),
    (b"[", "JSON", ("JSON", "YAML")),
)
"""How files begin that are right in one place and wrong in others: the last are the places."""


def what_is(data: bytes, wanted: str = "JSON") -> str:
    """What a file is by its beginning, and what to do; "" if that says nothing.

    Args:
        data: the file, or its first bytes; at least 64 bytes if it has that many.
        wanted: what it should be: "JSON", "YAML", "photo", "PNG", "tar", "Parquet file". Of text the
            encoding is looked at, too.
    """
    text = wanted in ("JSON", "YAML")
    start = bytes(data[:64]).removeprefix(_MARK).lstrip()
    if not start.strip(b"\0"):
        found = "only zero bytes" if start else "the file is empty"
        return found if text else f"{found}; fetch it again"  # who reads text says so itself
    if found := next((words for mark, words in _NEVER if start.startswith(mark)), ""):
        return found.replace("{wanted}", wanted)
    for mark, name, places in _ELSEWHERE:
        if start.startswith(mark) and wanted not in places:
            return name if text else f"{name}; give the {wanted} itself"
    if start[4:8] == b"ftyp":
        return "HEIC, AVIF or a video; save it as JPEG or PNG"
    encoding = json.detect_encoding(start).upper() if text else "UTF-8"
    return "" if encoding.startswith("UTF-8") else f"{encoding[:6]}; save it as UTF-8"
