"""What a file is, by its beginning."""

import bz2
import gzip
import io
import lzma
import zipfile

import pytest

from paracaption.pipeline.io.file_kinds import what_is


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.json", "{}")
    return buffer.getvalue()


OTHERS = {
    "gzip": (gzip.compress(b"{}"), "gzip; unpack it"),
    "zip": (zipped(), "a zip file; unpack it"),
    "bzip2": (bz2.compress(b"{}"), "bzip2; unpack it"),
    "xz": (lzma.compress(b"{}"), "xz; unpack it"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "web page behind a mark": (b"\xef\xbb\xbf\n <html>404</html>", "web page"),
    "empty": (b"", "the file is empty"),
    "blank": (b" \n", "the file is empty"),
    "GIF": (b"GIF89a" + bytes(9), "a GIF; save it as PNG"),
    "HEIC": (b"\0\0\0\x18ftypheic", "HEIC, AVIF or a video"),
    "notes": (
        b"\x00\x05\x16\x07" + bytes(40),
        "a metadata file of macOS (their names begin with `._`); delete it",
    ),
    "zeros": (bytes(300), "only zero bytes"),
}
"""Files that are nothing that a source reads, and what is said of each, whatever it should be."""

TEXTS = {
    "UTF-16": ('{"images": []}'.encode("utf-16"), "UTF-16; save it as UTF-8"),
    "UTF-16 BE": ('{"images": []}'.encode("utf-16-be"), "UTF-16; save it as UTF-8"),
    "UTF-32": ('{"images": []}'.encode("utf-32"), "UTF-32; save it as UTF-8"),
}
"""The same, said only where text is wanted."""

ELSEWHERE = {
    "Parquet file": (b"PAR1" + bytes(99), "a Parquet file"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(9), "a PNG"),
    "photo": (b"\xff\xd8\xff\xe0", "a JPEG"),
    "JSON": (b'{"images": []}', "JSON"),
}
"""Files that are right in the place of this name and wrong in others."""


@pytest.mark.parametrize("wanted", ["JSON", "photo", "tar"])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.soak(keep=5)
def test_a_file_is_called_what_it_is(name, wanted):
    data, words = OTHERS[name]
    assert words in what_is(data, wanted)
    assert name != "web page" or f"fetch the {wanted} itself" in what_is(data, wanted)


@pytest.mark.parametrize("wanted", ["JSON", "YAML"])
@pytest.mark.parametrize("name", TEXTS)
def test_text_of_another_encoding_is_named_where_text_is_wanted(name, wanted):
    data, words = TEXTS[name]
    assert words in what_is(data, wanted) and what_is(data, "photo") == ""


@pytest.mark.parametrize("wanted", ["JSON", "photo", "PNG", "Parquet file", "tar"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_file_in_the_place_of_another_is_named_and_in_its_own_not(name, wanted):
    data, words = ELSEWHERE[name]
    right = name == wanted or (name, wanted) == ("PNG", "photo")
    assert what_is(data, wanted).startswith(words) is not right
    assert bool(what_is(data, wanted)) is not right


@pytest.mark.parametrize("data", [b"{", b'{"a": 1} 2', b"not json", b"\xef\xbb\xbf[1"])
def test_nothing_is_said_of_what_may_be_what_it_should_be(data):
    assert what_is(data) == ""
