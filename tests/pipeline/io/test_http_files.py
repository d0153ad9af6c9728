"""Files over HTTP, from a server of our own that fails in every way that servers do."""

import itertools

import pytest

from paracaption.pipeline.io import failures, files
from paracaption.pipeline.io.failures import Kind, ReadError
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import Blob
from tests.file_server import serving

DATA = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(DATA)
    (tmp_path / "photos" / "b c.jpg").write_bytes(b"b")
    (tmp_path / "empty").write_bytes(b"")
    with serving(tmp_path) as found:
        yield found


@pytest.fixture
def url(server):
    return f"{server.url}/photos/a.jpg"


@pytest.fixture
def patient(monkeypatch):
    """Reads are tried again, and waiting takes no time."""
    waits: list[float] = []
    monkeypatch.setattr(failures.RETRYING, "_sleep", waits.append)
    failures.RETRYING.set_budget(60)
    return waits


def at_first(times: int, fault):
    """The fault of the first requests."""
    counter = itertools.count()
    return lambda _method, _path: fault if next(counter) < times else None


@pytest.mark.parametrize(
    "fault", [None, "no ranges", "no length", "no head"], ids=["plain", "no ranges", "no length", "no head"]
)
@pytest.mark.soak
def test_files_and_their_parts_are_read_whatever_the_server_lacks(server, url, fault):
    server.fault = lambda *_: fault
    assert files.read(Blob(url)) == DATA == files.fetch(Blob(url))
    assert files.read(Blob(url), 100, 50) == DATA[100:150] == files.fetch(Blob(url, 100, 50))
    assert files.read(Blob(url, 10_000)) == DATA[10_000:]
    assert files.read(Blob(url, 10_000, 999)) == DATA[10_000:], "short at its end"
    assert files.size_of(Blob(url)) == len(DATA) == files.fetch_size(Blob(url))
    assert files.version(url).startswith(f"{len(DATA)}-")
    with files.open_url(url, 1000) as file:
        file.seek(-3, 2)
        assert file.read() == DATA[-3:]
        file.seek(0)
        assert file.read() == DATA
    assert files.read(Blob(f"{server.url}/empty")) == b"" == files.read(Blob(f"{server.url}/empty"), 0, 10)


def test_what_is_there_is_told_from_what_is_not(server, url):
    assert files.expand(url) == [url] and files.expand(url + "x") == []
    assert files.is_folder(f"{server.url}/photos") and files.is_folder(f"{server.url}/photos/")
    assert not files.is_folder(url) and not files.is_folder(url + "x")
    assert files.list_names(f"{server.url}/photos") == ["a.jpg", "b c.jpg"]
    assert files.list_names(f"{server.url}/no") == []
    assert files.expand(f"{server.url}/photos/*.jpg") == [url, f"{server.url}/photos/b c.jpg"]
    assert list(files.read_many([url, url])) == [DATA, DATA]


@pytest.mark.parametrize("fault", [500, 502, 503, 504, 429, 408, "reset", "short", "page"])
@pytest.mark.soak(keep=4)
def test_what_passes_is_waited_for(server, url, patient, fault):
    server.fault = at_first(3, fault)
    assert files.fetch(Blob(url)) == DATA
    assert len(patient) == 3


@pytest.mark.parametrize("ask", [files.size_of, files.fetch_size], ids=["size_of", "fetch_size"])
def test_a_size_is_waited_for_too(server, url, patient, ask):
    server.fault = at_first(2, 503)
    assert ask(Blob(url)) == len(DATA) and len(patient) == 2


def test_a_503_is_never_taken_for_a_file_that_is_not_there(server, url):
    server.fault = lambda *_: 503
    for ask in (files.expand, files.is_folder, files.version, files.list_names):
        with pytest.raises(OSError, match="HTTP 503") as raised:
            ask(url)
        assert not isinstance(raised.value, FileNotFoundError)


def test_retry_after_is_kept(server, url, patient):
    server.fault, server.headers = at_first(1, 503), {"Retry-After": "5"}
    assert files.fetch(Blob(url)) == DATA
    assert patient == [5]


def test_a_body_without_a_length_that_was_cut_is_not_believed(server, url, patient):
    server.fault = at_first(1, "cut")
    assert files.fetch(Blob(url)) == DATA
    assert len(patient) == 1


@pytest.mark.parametrize(
    ("status", "kind"), [(401, Kind.SETUP), (403, Kind.REFUSED), (410, Kind.RECORD), (503, Kind.TRANSIENT)]
)
def test_a_status_says_whose_fault_it_is(server, url, status, kind):
    server.fault = lambda *_: status
    with pytest.raises(ReadError, match=f"HTTP {status}") as raised:
        files.fetch(Blob(url))
    assert raised.value.kind is kind and url in str(raised.value)


def test_a_404_is_the_records_if_the_folders_page_agrees(server):
    with pytest.raises(ReadError) as raised:
        files.fetch(Blob(f"{server.url}/photos/no.jpg"))
    assert (raised.value.kind, raised.value.missing) == (Kind.RECORD, True)


def test_a_404_of_what_the_folders_page_has_passes(server, url, patient):
    server.fault = lambda _, path: 404 if path.endswith(".jpg") and len(server.asked) < 5 else None
    assert files.fetch(Blob(url)) == DATA and patient


def test_a_404_on_a_server_without_listings_is_no_verdict(server):
    server.fault = lambda _, path: "no listing" if path.endswith("/") else None
    with pytest.raises(ReadError) as raised:
        files.fetch(Blob(f"{server.url}/photos/no.jpg"))
    assert raised.value.kind is Kind.TRANSIENT


def test_ranges_far_into_a_file_of_a_server_without_them_are_one_clear_line(server, url, monkeypatch):
    from paracaption.pipeline.io import http_files

    monkeypatch.setattr(http_files, "_FARTHEST_BYTES", 1000)
    server.fault = lambda *_: "no ranges"
    assert files.read(Blob(url), 900, 10) == DATA[900:910]
    with pytest.raises(ConfigError, match=r"a\.jpg: the server does not serve ranges .*; fetch the file"):
        files.read(Blob(url), 2000, 10)


def test_a_server_that_is_not_there_is_transient():
    with pytest.raises(ReadError) as raised:
        files.fetch(Blob("http://127.0.0.1:9/a.jpg"))
    assert raised.value.kind is Kind.TRANSIENT


def test_headers_of_fsspecs_configuration_are_sent(server, url, monkeypatch):
    import fsspec

    from paracaption.pipeline.io.http_files import HttpFiles

    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"X-Token": "t"}})
    assert HttpFiles()._client().headers["x-token"] == "t"
