"""`s3://` and `gs://` against servers on this machine, and what is said where they cannot be read."""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import fsspec
import fsspec.config
import pytest

from paracaption.pipeline.io import files
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import Blob
from tests.file_server import serving

FILES = {"data [1]/a.txt": b"hello", "data [1]/b.txt": b"you", "data [1]/sub/c.txt": b"", "d.txt": b"d"}


@pytest.fixture
def s3(monkeypatch) -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
    fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)
    yield "s3://bucket"
    server.stop()


@pytest.fixture
def gs(monkeypatch) -> Iterator[str]:
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    assert server._api.is_running.wait(30)
    address = f"http://127.0.0.1:{server._api._httpd.server_port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon", "endpoint_url": address})
    yield "gs://bucket"
    server.stop()


@pytest.fixture(params=["s3", "gs"])
def bucket(request: Any) -> str:
    url = request.getfixturevalue(request.param)
    store = fsspec.filesystem(request.param)
    for name, data in FILES.items():
        store.pipe(f"bucket/{name}", data)
    return url


@pytest.mark.soak
def test_files_of_a_store_are_listed_and_read_in_place_whatever_is_in_their_names(bucket):
    folder = f"{bucket}/data [1]"
    assert files.expand(f"{folder}/*.txt") == [f"{folder}/a.txt", f"{folder}/b.txt"]
    assert files.expand(f"{folder}/a.txt") == [f"{folder}/a.txt"]
    assert sorted(name for _, name in files.walk(folder)) == ["a.txt", "b.txt", "sub/c.txt"]
    assert (files.is_folder(folder), files.is_folder(f"{folder}/a.txt")) == (True, False)
    assert files.read(Blob(f"{folder}/a.txt"), 1, 3) == b"ell"
    assert list(files.read_many([f"{folder}/a.txt", f"{folder}/b.txt"])) == [b"hello", b"you"]
    assert files.expand(f"{bucket}/nothing") == [] and not files.exists(f"{bucket}/nothing")
    with pytest.raises(FileNotFoundError):
        files.read(Blob(f"{bucket}/nothing"))


def plan(url: str) -> str:
    """The line with which planning ends."""
    config = BuildConfig.model_validate(
        {"out": "out", "sa1b": [{"paths": [url]}], "failures": {"read_retry_s": 0}}
    )
    with pytest.raises(ConfigError) as caught:
        list(open_source(config, "sa1b").catalog())
    assert "\n" not in str(caught.value) and url in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("store", ["s3", "gs"])
@pytest.mark.soak
def test_a_bucket_that_is_not_there_is_one_line(request, store):
    request.getfixturevalue(store)
    assert "ucket" in plan(f"{store}://nobody-has-this-one/sa_0.tar") or "nothing found" in plan(
        f"{store}://nobody-has-this-one/sa_0.tar"
    )


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.soak
def test_credentials_that_a_store_does_not_take_are_one_line(tmp_path, s3, monkeypatch, status):
    with serving(tmp_path) as server:
        server.fault = lambda _method, _path: status
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.url})
        assert "credentials" in plan("s3://bucket/sa_0.tar")


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("s3://b/x.tar", "s3fs"),
        ("gs://b/x.tar", "gcsfs"),
        ("gcs://b/x.tar", "gcsfs"),
        ("az://b/x.tar", "adlfs"),
        ("abfs://b/x.tar", "adlfs"),
        ("hf://datasets/a/b/x.tar", "huggingface_hub"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_extra_that_has_it(monkeypatch, url, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    scheme = url.partition("://")[0]
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, scheme, raising=False)
    told = plan(url)
    assert f"{package} reads {scheme}://, and is not installed" in told
    assert "install paracaption again with the extra `remote`" in told


def test_an_address_that_no_package_reads_is_one_line():
    assert "no package reads this kind" in plan("foo://bucket/x.tar")
