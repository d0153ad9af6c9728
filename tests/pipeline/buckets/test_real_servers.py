"""Corpora on real object stores: built, checked, looked at, trained on and exported as in a folder."""

from __future__ import annotations

import hashlib
import html
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from starlette.testclient import TestClient

from paracaption.model_training.train import metrics
from paracaption.model_training.train.trainer import fit
from paracaption.pipeline.corpus import log, reader
from paracaption.pipeline.corpus.export import export
from paracaption.pipeline.corpus.verify import verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.context import Explorer
from paracaption.pipeline.io import files, scratch
from paracaption.pipeline.io.location import locate
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import Blob
from tests import servers
from tests.building import committed, config_of
from tests.model_training.toy_corpus import config_of as training_of
from tests.synthetic import write_coconut, write_sa1b

pytestmark = pytest.mark.servers


class Made(NamedTuple):
    """A corpus of both subsets in a folder, and what it was made of."""

    folder: Path
    sources: dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    home = tmp_path_factory.mktemp("made")
    sources: dict[str, Any] = {
        "coconut": write_coconut(home / "coconut", 10),
        "sa1b": write_sa1b(home / "sa1b", 3),
    }
    driver.build(config_of(home / "corpus", **sources), LocalEngine())
    return Made(home / "corpus", sources)


@pytest.fixture(scope="module")
def corpus(object_store, made, tmp_path_factory) -> Iterator[str]:
    """The same corpus on each of the three stores; the environment leads there."""
    home = tmp_path_factory.mktemp(object_store.name)
    with pytest.MonkeyPatch.context() as patch:
        servers.set_environment(patch, object_store.environment)
        patch.setenv(scratch.VARIABLE, str(home / "scratch"))
        bucket = f"b-{uuid.uuid4().hex[:12]}"
        object_store.make_bucket(bucket)
        out = f"{object_store.url(bucket)}/corpus"
        driver.build(config_of(out, beside=home, **made.sources), LocalEngine())
        yield out


def test_records_ledgers_and_manifests_are_those_of_a_folder(corpus, made):
    units = log.read_state(corpus).units.values()
    found = {
        file.path: hashlib.sha256(files.read(Blob(f"{corpus}/{file.place}"))).hexdigest()
        for each in units
        for file in each.unit.files()
    }
    assert found == committed(made.folder)
    ours, theirs = reader.open_corpus(corpus), reader.open_corpus(made.folder)
    assert list(ours.samples()) == list(theirs.samples())
    assert ours.summary == theirs.summary


def test_it_is_whole(corpus):
    report = verify(corpus)
    assert (report.problems, report.notes) == ([], [])


def test_a_training_on_it_has_the_losses_of_the_folder(corpus, made, tmp_path):
    losses = []
    for name, each in (("folder", str(made.folder)), ("bucket", corpus)):
        data = {"max_tokens": 256, "workers": 0, "cache": str(tmp_path / "cache"), "on_too_long": "skip"}
        run = training_of(tmp_path / name, Path("unused"), corpora=[{"corpus": each}], data=data, steps=3)
        fit(run)
        losses.append([record["loss"] for record in metrics.read_metrics(tmp_path / name)])
    assert len(losses[0]) == 3 and losses[0] == losses[1]


def test_it_is_exported_as_the_folder_is(corpus, made, tmp_path):
    for name, each in (("folder", made.folder), ("bucket", corpus)):
        export(each, "coco", tmp_path / name)
    written = [
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("folder", "bucket")
    ]
    assert written[0] == written[1] and any(name.endswith(".json") for name in written[0])


def test_a_page_of_the_explorer_shows_the_same_images(corpus, made):
    pages = []
    for each in (str(made.folder), corpus):
        client = TestClient(make_app(Explorer(locate(each))), base_url="http://localhost")
        answers = [client.get(page) for page in ("/", "/browse?subset=coconut")]
        assert [answer.status_code for answer in answers] == [200, 200]
        photos = re.findall(r'src="(/[^"]*thumb[^"]*)"', answers[1].text)
        assert client.get(html.unescape(photos[0])).headers["content-type"].startswith("image/")
        pages.append(photos)
    assert len(pages[0]) >= 8 and pages[0] == pages[1]


def test_s3rver_is_refused_before_anything_is_written(s3rver, made, tmp_path, monkeypatch):
    servers.set_environment(monkeypatch, s3rver.environment)
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path / "scratch"))
    bucket = f"b-{uuid.uuid4().hex[:12]}"
    s3rver.make_bucket(bucket)
    config = config_of(f"s3://{bucket}/corpus", beside=tmp_path, **made.sources)
    with pytest.raises(ConfigError, match="ignores `If-None-Match"):
        driver.build(config, LocalEngine())
    assert "<Key>" not in httpx.get(f"{s3rver.address}/{bucket}").text
