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
    "zeros": (bytes(300), "only zero bytes"),
}
"""Files that are nothing that a source reads, and what is said of each, whatever it should be."""

TEXTS = {
    "UTF-16": ('{"images": []}'.encode("utf-16"), "UTF-16; save it as UTF-8"),
    "UTF-16 BE": ('{"images": []}'.encode("utf-16-be"), "UTF-16; save it as UTF-8"),
    "UTF-32": ('{"images": []}'.encode("utf-32"), "UTF-32; save it as UTF-8"),
    "Parquet": (b"PAR1" + bytes(99), "a Parquet file"),
}
"""The same, said only where JSON is wanted."""


@pytest.mark.parametrize("wanted", ["JSON", "photo", "tar"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_file_is_called_what_it_is(name, wanted):
    data, words = OTHERS[name]
    assert words in what_is(data, wanted)
    assert name != "web page" or f"fetch the {wanted} itself" in what_is(data, wanted)


@pytest.mark.parametrize("name", TEXTS)
def test_text_of_another_encoding_is_named_where_json_is_wanted(name):
    data, words = TEXTS[name]
    assert words in what_is(data) and what_is(data, "photo") == ""


@pytest.mark.parametrize("data", [b"{", b'{"a": 1} 2', b"not json", b"\xff\xd8\xff\xe0", b"\xef\xbb\xbf[1"])
def test_nothing_is_said_of_what_may_be_what_it_should_be(data):
    assert what_is(data) == ""
