"""What a command says of an error of the system that no reader has turned into a record's reason."""

import errno
import os

import pytest

from paracaption.pipeline.io import disk_errors, files
from paracaption.pipeline.io.failures import Kind, ReadError
from paracaption.schemas.records import Blob


def error_of(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (error_of(errno.EIO, "/data/a"), "/data/a: Input/output error; the disk or its mount reports errors"),
        (error_of(errno.ENOSPC, "/out/x"), "/out/x: No space left on device; make room"),
        (error_of(errno.EACCES, "/out"), "/out: Permission denied; give this user the permission"),
        (error_of(errno.EROFS, "/out"), "/out: Read-only file system; it is mounted read-only"),
        (error_of(errno.ESTALE, "/nfs/a"), "/nfs/a: Stale file handle; run the same command again"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), "/a -> /b: Invalid cross"),
        (error_of(errno.EIO), "Input/output error; the disk"),
        (ReadError("s3://b/x", "HTTP 503", Kind.TRANSIENT), "s3://b/x: HTTP 503; run the same command again"),
    ],
)
def test_an_error_of_the_system_is_a_line_with_its_file_and_what_to_do(error, told):
    line = disk_errors.to_line(error)
    assert line is not None
    assert line.startswith(told)
    assert "\n" not in line


def test_an_error_without_a_number_is_no_error_of_the_system():
    assert disk_errors.to_line(OSError("broken data stream when reading image file")) is None


def test_a_read_that_fails_after_the_file_was_opened_names_the_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x")

    class Failing(type(files.backend_of("a"))):
        def read(self, url, start=0, length=None):
            raise error_of(errno.EIO)

    before = files.backend_of("a")
    files.register("file", Failing())
    try:
        with pytest.raises(OSError, match=str(path)):
            files.read(Blob(str(path)))
    finally:
        files.register("file", before)


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        (Kind.TRANSIENT, "run the same command again when the store answers"),
        (Kind.REFUSED, "check the address, the credentials and their permissions"),
        (Kind.SETUP, "check the address, the credentials and their permissions"),
        (Kind.RECORD, "correct the path"),
    ],
)
def test_an_error_of_a_bucket_says_what_to_do_about_it(kind, fix):
    line = disk_errors.to_line(ReadError("s3://bucket/a", "HTTP 500", kind))
    assert line == f"s3://bucket/a: HTTP 500; {fix}"
