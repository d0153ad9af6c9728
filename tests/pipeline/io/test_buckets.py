"""Buckets of corpora: one winner for a name, answers that are lost, errors, and nothing left behind."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from paracaption.pipeline.io import files, scratch
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.records import Blob

obstore = pytest.importorskip("obstore")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of moto's server of S3 on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch) -> str:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    bucket = f"b-{uuid.uuid4().hex[:12]}"
    assert httpx.put(f"{s3_server}/{bucket}").is_success
    return f"s3://{bucket}/corpus"


@pytest.fixture(params=["memory", "s3"])
def out(request, monkeypatch, tmp_path) -> str:
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path / "scratch"))
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return f"memory://b-{uuid.uuid4().hex[:12]}/corpus"


def staged(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]


def test_what_is_written_is_read_through_both_doors(out):
    store = store_of(out)
    store.put(f"{out}/a/b.json", b"hello")
    assert store.create(f"{out}/a/c [1]{{0}} %20\u00fc#?.json", b"you")
    assert store.read(f"{out}/a/b.json") == files.read(Blob(f"{out}/a/b.json")) == b"hello"
    assert store.size(f"{out}/a/b.json") == files.size_of(Blob(f"{out}/a/b.json")) == 5
    names = ["b.json", "c [1]{0} %20\u00fc#?.json"]
    assert store.list(f"{out}/a") == files.list_names(f"{out}/a") == names
    assert store.list(out) == ["a"]
    store.put(f"{out}/a/b.json", b"again")
    assert files.read(Blob(f"{out}/a/b.json"), 1, 3) == b"gai"
