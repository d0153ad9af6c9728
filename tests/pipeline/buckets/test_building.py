"""A corpus in a bucket: the same records, ledgers and manifests as in a folder."""

from __future__ import annotations

import pytest

from paracaption.pipeline.corpus import log, reader
from paracaption.pipeline.corpus.verify import verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from tests.buckets import committed_in_bucket
from tests.building import calls, committed, config_of
from tests.synthetic import write_coconut, write_sa1b


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return {"coconut": write_coconut(folder / "coconut", 10), "sa1b": write_sa1b(folder / "sa1b", 3)}


def test_a_bucket_gets_the_files_of_a_folder(bucket_out, sources, tmp_path):
    driver.build(config_of(tmp_path / "folder", **sources), LocalEngine())
    driver.build(config_of(bucket_out, beside=tmp_path, **sources), LocalEngine())
    assert committed_in_bucket(bucket_out) == committed(tmp_path / "folder")
    report = verify(bucket_out)
    assert not report.problems and not report.notes
    folder, bucket = reader.open_corpus(tmp_path / "folder"), reader.open_corpus(bucket_out)
    assert bucket.subsets == folder.subsets == ["coconut", "sa1b"]
    assert bucket.summary == folder.summary
    assert list(bucket.samples()) == list(folder.samples())
    assert [t.to_pylist() for t in bucket.index()] == [t.to_pylist() for t in folder.index()]


def test_a_build_that_is_run_again_asks_nothing_and_writes_nothing(bucket_out, sources, tmp_path):
    config = config_of(bucket_out, beside=tmp_path, **sources)
    driver.build(config, LocalEngine())
    asked, number = calls(tmp_path / "captioner.log"), log.read_state(bucket_out).number
    driver.build(config, LocalEngine())
    assert calls(tmp_path / "captioner.log") == asked
    assert log.read_state(bucket_out).number == number
