"""A corpus in a bucket: the same records, ledgers and manifests as in a folder."""

from __future__ import annotations

import os

import pytest

from paracaption.pipeline.corpus import log, reader
from paracaption.pipeline.corpus.verify import verify
from paracaption.pipeline.executor import driver, preflight
from paracaption.pipeline.executor.findings import FAIL
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io import bucket_clients
from paracaption.pipeline.io.store import store_of
from paracaption.pipeline.models import vllm_engine
from paracaption.pipeline.models.vllm_engine import START_METHOD
from paracaption.schemas.config import Backend
from paracaption.schemas.errors import ConfigError
from tests.buckets import committed_in_bucket
from tests.building import calls, committed, config_of
from tests.synthetic import write_coconut, write_sa1b


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return {"coconut": write_coconut(folder / "coconut", 10), "sa1b": write_sa1b(folder / "sa1b", 3)}


@pytest.mark.soak(keep=1)
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


@pytest.mark.soak
def test_a_build_that_is_run_again_asks_nothing_and_writes_nothing(bucket_out, sources, tmp_path):
    config = config_of(bucket_out, beside=tmp_path, **sources)
    driver.build(config, LocalEngine())
    asked, number = calls(tmp_path / "captioner.log"), log.read_state(bucket_out).number
    driver.build(config, LocalEngine())
    assert calls(tmp_path / "captioner.log") == asked
    assert log.read_state(bucket_out).number == number


def test_a_store_in_which_two_drivers_could_both_commit_is_refused_before_anything_is_planned(
    faulty_s3, sources, tmp_path
):
    faulty_s3.make_bucket("careless")
    faulty_s3.set_faults(ignores_conditions=True)
    with pytest.raises(ConfigError, match="s3://careless: the store ignores `If-None-Match"):
        driver.build(config_of("s3://careless/out", beside=tmp_path, **sources), LocalEngine())
    assert not faulty_s3.objects("careless") and not (tmp_path / "captioner.log").exists()


def test_a_url_with_a_secret_is_refused_before_anything_is_asked(faulty_s3, sources, tmp_path):
    config = config_of("memory://b/out", beside=tmp_path, **sources)
    config = config.model_copy(update={"out": "s3://me:hunter2@corpus/out"})
    with pytest.raises(ConfigError, match="s3://corpus/out: holds a user or a password") as raised:
        driver.build(config, LocalEngine())
    assert "hunter2" not in str(raised.value) and not faulty_s3.requests()


@pytest.mark.parametrize("where", ["the nodes", "the stage"])
def test_a_vllm_that_would_fork_is_refused_for_a_bucket_alone(sources, tmp_path, monkeypatch, where):
    (tmp_path / "model").mkdir()
    judge = {"name": "vllm", "options": {"model": str(tmp_path / "model")}}
    if where == "the stage":
        judge["runtime_env"] = {"env_vars": {START_METHOD: "fork"}}
    else:
        monkeypatch.setenv(START_METHOD, "fork")
    config = config_of("memory://b/out", beside=tmp_path, **sources)
    config = config.model_copy(update={"judge": Backend.model_validate(judge)})
    (found,) = preflight.check_forks(config)
    assert (found.subject, found.state) == ("judge vllm", FAIL) and found.found.startswith(START_METHOD)
    assert "set it to spawn" in found.fix
    assert not list(preflight.check_forks(config.model_copy(update={"out": str(tmp_path / "out")})))
    monkeypatch.setenv(START_METHOD, "spawn")
    assert len(list(preflight.check_forks(config))) == (where == "the stage")


def test_an_engine_starts_its_processes_by_spawn_in_a_process_that_has_used_a_bucket(memory_out, monkeypatch):
    monkeypatch.setattr(bucket_clients, "_first_used_in", None)
    monkeypatch.setenv(START_METHOD, "fork")
    vllm_engine._never_fork_from_a_bucket()
    store_of(memory_out).put(f"{memory_out}/a", b"")
    with pytest.raises(ConfigError, match=f"{START_METHOD}=fork: .*waits for ever"):
        vllm_engine._never_fork_from_a_bucket()
    monkeypatch.delenv(START_METHOD)
    vllm_engine._never_fork_from_a_bucket()
    assert os.environ[START_METHOD] == "spawn"
