"""What docs/buckets.md says about other programs, run on a bucket of this machine."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from paracaption.pipeline.io.store import store_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "buckets.md"


def _shard() -> bytes:
    photo, shard = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(photo, "JPEG")
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for name, data in (("1.jpg", photo.getvalue()), ("1.json", json.dumps({"key": "1"}).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return shard.getvalue()


def test_datasets_streams_the_shards_of_a_bucket(faulty_s3, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("s3fs")
    registered = pytest.importorskip("fsspec.registry")._registry
    monkeypatch.setitem(registered, "s3", registered.get("s3"))
    url = "s3://corpus/out/shards/a.tar"
    store_of(url).put(url, _shard())
    start = PAGE.read_text().index("import fsspec")
    values: dict[str, Any] = {"shards": [url]}
    exec(PAGE.read_text()[start:].partition("\n\nimport duckdb")[0], values)
    (row,) = values["rows"]
    assert row["json"] == {"key": "1"} and row["jpg"].size == (8, 8)
