"""Reading what lies in the buckets of corpora, and leaving other buckets to fsspec."""

import copy
import hashlib

import fsspec
import pytest

from paracaption.pipeline.io import bucket_clients, failures, files
from paracaption.pipeline.io.backends import FsspecFiles
from paracaption.pipeline.io.bucket_files import BucketFiles
from paracaption.pipeline.io.failures import Kind, ReadError
from paracaption.pipeline.io.location import Prefix, locate
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import Blob

pytest.importorskip("obstore")
FILES = {"data [1]/a.txt": b"hello", "data [1]/b.txt": b"you", "data [1]/sub/c.txt": b"", "d.txt": b"d"}


@pytest.fixture
def out(bucket_out) -> str:
    for name, data in FILES.items():
        store_of(bucket_out).put(f"{bucket_out}/{name}", data)
    return bucket_out


def test_files_of_a_bucket_are_listed_and_read_in_place_whatever_is_in_their_names(out):
    folder = f"{out}/data [1]"
    assert isinstance(files.backend_of(folder), BucketFiles)
    assert files.expand(f"{folder}/*.txt") == [f"{folder}/a.txt", f"{folder}/b.txt"]
    assert files.expand(f"{folder}/a.txt") == [f"{folder}/a.txt"]
    assert sorted(files.walk(folder)) == [
        (f"{folder}/{name}", name) for name in ("a.txt", "b.txt", "sub/c.txt")
    ]
    assert (files.is_folder(folder), files.is_folder(f"{folder}/a.txt")) == (True, False)
    assert files.is_folder(f"{folder}/") and not files.exists(f"{out}/data")
    assert files.list_names(folder) == ["a.txt", "b.txt", "sub"]
    assert files.list_names(f"{out}/nothing") == []
    assert list(files.read_many([f"{folder}/b.txt", f"{folder}/a.txt"])) == [b"you", b"hello"]
    assert files.expand(f"{out}/nothing") == [] and not files.exists(f"{out}/nothing")


@pytest.mark.parametrize(
    ("start", "length", "found"),
    [
        (0, None, b"hello"),
        (2, None, b"llo"),
        (1, 3, b"ell"),
        (3, 99, b"lo"),
        (5, 1, b""),
        (9, 1, b""),
        (9, None, b""),
        (0, 0, b""),
        (2, -1, b""),
    ],
)
def test_a_range_ends_at_the_end_of_the_file(out, start, length, found):
    assert files.read(Blob(f"{out}/data [1]/a.txt"), start, length) == found


def test_an_empty_file_is_no_error(out):
    assert (
        files.read(Blob(f"{out}/data [1]/sub/c.txt"))
        == files.read(Blob(f"{out}/data [1]/sub/c.txt"), 0, 5)
        == b""
    )


def test_a_file_is_read_through_ranges(out):
    data = bytes(range(256)) * 20000
    with store_of(out).write(f"{out}/big") as file:
        file.write(data)
    with files.open_url(f"{out}/big", 1 << 16) as file:
        file.seek(-300, 2)
        assert file.read() == data[-300:]
        file.seek(123456)
        assert file.read(100) == data[123456:123556]
    assert files.sha256_of(f"{out}/big") == hashlib.sha256(data).hexdigest()


def test_what_is_missing_is_said_to_be_missing(out):
    with pytest.raises(FileNotFoundError) as caught:
        files.read(Blob(f"{out}/nothing"))
    assert caught.value.filename == f"{out}/nothing"
    assert files.is_gone(f"{out}/nothing") and not files.is_gone(f"{out}/d.txt")
    with pytest.raises(IsADirectoryError):
        files.read(Blob(out.rpartition("/")[0]))


def test_what_others_write_is_seen_at_once(out):
    path = f"{out}/log/1.json"
    assert not files.exists(path)
    store_of(out).put(path, b"1")
    assert files.exists(path) and files.list_names(f"{out}/log") == ["1.json"]


def test_the_version_changes_with_the_file(out):
    before = files.version(f"{out}/d.txt")
    assert before == files.version(f"{out}/d.txt") and before.startswith("1-")
    store_of(out).put(f"{out}/d.txt", b"e")
    assert files.version(f"{out}/d.txt") != before


def test_the_version_is_the_one_that_fsspec_gives(s3_out, monkeypatch):
    pytest.importorskip("s3fs")
    store_of(s3_out).put(f"{s3_out}/a", b"1")
    assert FsspecFiles().version(f"{s3_out}/a") == BucketFiles().version(f"{s3_out}/a")


def test_a_bucket_without_a_corpus_is_left_to_fsspec(memory_out):
    photos = memory_out.replace("memory://b", "memory://photos")
    fsspec.filesystem("memory").pipe(f"{photos}/a.jpg", b"photo")
    store_of(memory_out).put(f"{memory_out}/a", b"1")
    assert files.read(Blob(f"{photos}/a.jpg")) == b"photo"
    store_of(photos).size(f"{photos}/a.jpg")  # who only looks makes it no corpus
    assert isinstance(files.backend_of(photos), FsspecFiles)
    assert isinstance(files.backend_of("s3://photos-of-others/a.jpg"), FsspecFiles)


def test_a_located_corpus_is_read_over_obstore(s3_out):
    assert isinstance(files.backend_of(f"{s3_out}/log/1.json"), FsspecFiles)
    assert locate(f"{s3_out}/") == Prefix(s3_out)
    assert isinstance(files.backend_of(f"{s3_out}/log/1.json"), BucketFiles)


def test_a_process_that_is_sent_a_place_reads_it_over_obstore(monkeypatch):
    place = locate("s3://sent/corpus") / "log"
    monkeypatch.setattr(bucket_clients, "_corpora", set())  # as in another process
    assert isinstance(files.backend_of(f"{place}/1.json"), FsspecFiles)
    assert copy.copy(place) == place  # made anew, as by unpickling it
    assert isinstance(files.backend_of(f"{place}/1.json"), BucketFiles)


@pytest.mark.soak
def test_what_fails_for_a_while_is_read_again(faulty_s3):
    store_of("s3://corpus/out").put("s3://corpus/out/a", b"hello")
    failures.RETRYING.set_budget(30)
    faulty_s3.fail("503", count=8)
    assert files.read(Blob("s3://corpus/out/a"), 1, 2) == b"el"
    for fault in ("cut_body", "reset", "500", "lost_answer"):
        faulty_s3.fail(fault, "GET")
        assert files.read(Blob("s3://corpus/out/a")) == b"hello"
    failures.RETRYING.set_budget(0)
    faulty_s3.fail("500", count=None)
    with pytest.raises(ReadError) as caught:
        files.exists("s3://corpus/out/a")
    assert caught.value.kind is Kind.TRANSIENT


def test_a_refusal_is_no_missing_file(faulty_s3):
    locate("s3://corpus/out")
    faulty_s3.fail("403", count=None)
    with pytest.raises(ReadError) as caught:
        files.exists("s3://corpus/out/a")
    assert caught.value.kind is Kind.REFUSED


def test_a_bucket_that_is_not_there_is_one_line(s3_out):
    locate("s3://nobody-has-this-one/corpus")
    for ask in (files.list_names, files.exists, lambda url: files.read(Blob(url))):
        with pytest.raises(ConfigError, match="NoSuchBucket"):
            ask("s3://nobody-has-this-one/corpus")
    assert bucket_clients.is_of_corpus("s3://nobody-has-this-one/x")
