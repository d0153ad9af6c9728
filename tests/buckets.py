"""Fixtures: places for a corpus in buckets of this machine."""

from __future__ import annotations

import hashlib
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from paracaption.pipeline.corpus import log
from paracaption.pipeline.io import bucket_clients, files, scratch
from paracaption.schemas.records import Blob
from tests.object_server import ObjectServer, serving

_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(autouse=True)
def _corpora_end_with_the_test() -> Iterator[None]:
    """A bucket that a test has named as a corpus's is a source's again for the next one.

    What its log said is forgotten: the next test may have a server of its own with a bucket of that name.
    And s3fs forgets the server of the test: it keeps a client for all who ask in the same words.
    """
    before = set(bucket_clients._corpora)
    yield
    bucket_clients._corpora.intersection_update(before)
    log._RECENT.clear()
    log._SEEN.clear()
    if s3fs := sys.modules.get("s3fs"):
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """The address of moto's S3."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_out(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place in a new bucket of moto's S3, which the environment leads to."""
    for name, value in {**_ENVIRONMENT, "AWS_ENDPOINT_URL": moto_url}.items():
        monkeypatch.setenv(name, value)
    bucket = f"b-{uuid.uuid4().hex[:12]}"
    assert httpx.put(f"{moto_url}/{bucket}").is_success
    return f"s3://{bucket}/corpus"


@pytest.fixture
def memory_out() -> str:
    """A place in a new bucket of this process's memory."""
    return f"memory://b-{uuid.uuid4().hex[:12]}/corpus"


@pytest.fixture(params=["memory", "s3"])
def bucket_out(request: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> str:
    """Both, one after the other; what is staged lies below `tmp_path / "scratch"`."""
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path / "scratch"))
    return request.getfixturevalue(f"{request.param}_out")


@pytest.fixture
def faulty_s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[ObjectServer]:
    """A server of S3 with the bucket `corpus`, which fails as it is told to; the environment names it."""
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path / "scratch"))
    with serving() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def committed_in_bucket(out: str) -> dict[str, str]:
    """SHA-256 of every committed file by its place, as `tests.building.committed` has them of a folder."""
    return {
        file.path: hashlib.sha256(files.read(Blob(f"{out}/{file.place}"))).hexdigest()
        for found in log.read_state(out).units.values()
        for file in found.unit.files()
    }
