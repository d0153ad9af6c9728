"""The real object stores of `tests/servers.py`: three keep the condition of a put, s3rver does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from obstore.exceptions import AlreadyExistsError
from obstore.store import from_url

from tests import servers


@pytest.mark.servers
def test_a_conditional_create_has_one_winner_of_sixteen(object_store, monkeypatch):
    servers.set_environment(monkeypatch, object_store.environment)
    object_store.make_bucket("race")
    object_store.make_bucket("race")  # once more: nothing happens
    bucket = from_url(object_store.url("race") + "/corpus")
    for key in (f"log/{number:012d}.json" for number in range(20)):
        assert servers.race(bucket, key) == [bytes(bucket.get(key).bytes())]


@pytest.mark.servers
def test_s3rver_refuses_no_create(s3rver, monkeypatch):
    servers.set_environment(monkeypatch, s3rver.environment)
    s3rver.make_bucket("race")
    bucket = from_url(s3rver.url("race") + "/corpus")
    assert [len(servers.race(bucket, f"log/{number:012d}.json")) for number in range(20)] == [16] * 20


@pytest.mark.servers
def test_what_a_store_needs_is_in_its_url_and_environment(object_store, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of somebody else")
    servers.set_environment(monkeypatch, object_store.environment)
    object_store.make_bucket("whole")
    bucket = from_url(object_store.url("whole"))
    content = bytes(range(256)) * 50_000
    bucket.put("shards/a b.tar", content, chunk_size=5 << 20)
    assert bytes(bucket.get_range("shards/a b.tar", start=12_000_001, length=3)) == b"\x01\x02\x03"
    assert [each["path"] for page in bucket.list("shards") for each in page] == ["shards/a b.tar"]
    bucket.delete("shards/a b.tar")
    with pytest.raises(FileNotFoundError):
        bucket.head("shards/a b.tar")


@pytest.mark.soak
def test_moto_keeps_conditions_too(moto, monkeypatch):
    """It is a development package, so this one runs everywhere."""
    servers.set_environment(monkeypatch, moto.environment)
    moto.make_bucket("plain")
    bucket = from_url(moto.url("plain"))
    bucket.put("a", b"1", mode="create")
    with pytest.raises(AlreadyExistsError):
        bucket.put("a", b"2", mode="create")
    assert bytes(bucket.get("a").bytes()) == b"1"


@pytest.mark.parametrize("missing", ["npm", "the registry"])
def test_what_cannot_be_installed_is_skipped_with_the_reason(tmp_path, monkeypatch, missing):
    monkeypatch.setenv("PARACAPTION_TESTS_CACHE", str(tmp_path))
    if missing == "npm":
        monkeypatch.setenv("PATH", str(tmp_path))
        reason = "npm is missing, which installs azurite"
    else:
        npm = tmp_path / "npm"
        npm.write_text("#!/bin/sh\necho npm error network: no registry >&2\nexit 1\n")
        npm.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        reason = "azurite could not be installed: npm error network: no registry"
    with pytest.raises(pytest.skip.Exception, match=reason):
        servers.npm_program("azurite", servers.AZURITE, "azurite-blob")
    assert not list(Path(tmp_path).rglob("installed"))
