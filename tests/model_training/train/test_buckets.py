"""Training on a corpus in a bucket: the batches and losses of a folder, whatever befalls the requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from paracaption.flows.preflight import check_training
from paracaption.model_training.data.corpus import TrainingCorpus
from paracaption.model_training.data.loader import Loader
from paracaption.model_training.decoding.read_regions import iter_photo_regions, read_photo_regions
from paracaption.model_training.evaluation.select_images import choose_images
from paracaption.model_training.toy.world import WorldOptions, write_world
from paracaption.model_training.train import checkpoints, metrics
from paracaption.model_training.train.trainer import fit
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io import scratch
from paracaption.pipeline.io.failures import SourceUnavailable
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.training import CorpusSource, DataOptions, TrainConfig
from tests.model_training.corpora import processor
from tests.model_training.toy_corpus import config_of
from tests.object_server import ObjectServer, serving

BUCKET = "s3://corpus/world"
SHARDS = "world/coconut/shards/*"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> BuildConfig:
    """A world of twelve scenes, and its corpus in a folder."""
    folder = tmp_path_factory.mktemp("toy") / "world"
    config = load_config(write_world(folder, 12, 0, WorldOptions(places=False)))
    config = config.model_copy(update={"images_per_shard": 4})
    driver.build(config, LocalEngine())
    return config


@pytest.fixture(scope="module")
def bucket(made, tmp_path_factory) -> Iterator[ObjectServer]:
    """A server that has the same corpus; it names `s3://corpus/world`."""
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv(scratch.VARIABLE, str(tmp_path_factory.mktemp("scratch")))
        for name, value in server.environment.items():
            patch.setenv(name, value)
        driver.build(made.model_copy(update={"out": BUCKET}), LocalEngine())
        yield server


@pytest.fixture
def s3(bucket) -> Iterator[ObjectServer]:
    """The same server, without the faults and the requests of other tests."""
    bucket.forget_requests()
    yield bucket
    bucket.set_faults(shares={}, keys="*")


def run_of(out: Path, corpus: str, **changes: Any) -> TrainConfig:
    data = {"max_tokens": 256, "workers": 0, "cache": str(out.parent / "cache"), "read_retry_s": 30}
    changes["data"] = data | changes.get("data", {})
    return config_of(out, Path("unused"), corpora=[{"corpus": corpus}], **changes)


def loader(corpus: str, cache: Path, method: Any = "spawn", **options: Any) -> Loader:
    given = {"max_tokens": 600, "workers": 0, "cache": str(cache), "read_retry_s": 30} | options
    return Loader([CorpusSource(corpus=corpus)], processor(), DataOptions(**given), start_method=method)


def assert_equal(found: list[Any], wanted: list[Any]) -> None:
    assert [each.keys for each in found] == [each.keys for each in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.tokens.ids_BL, theirs.tokens.ids_BL)
        assert torch.equal(ours.images.views_N3SS, theirs.images.views_N3SS)


def shard_reads(server: ObjectServer) -> list[str]:
    return [each["keys"][0] for each in server.requests() if "/shards/" in each["keys"][0]]


# The same batches and losses.


@pytest.mark.parametrize(
    "shares",
    [{"slow_body": 1.0}, {"503": 0.05, "reset": 0.05, "cut_body": 0.1, "lost_answer": 0.05, "500": 0.05}],
    ids=["latency", "faults"],
)
@pytest.mark.soak
def test_a_run_on_a_bucket_has_the_losses_of_a_folder(made, s3, tmp_path, shares):
    fit(run_of(tmp_path / "a", made.out))
    s3.set_faults(shares=shares, seed=3, slow_s=0.02)
    fit(run_of(tmp_path / "b", BUCKET))
    losses = [[each["loss"] for each in metrics.read_metrics(tmp_path / run)] for run in "ab"]
    assert len(losses[0]) == 8 and losses[0] == losses[1]
    assert sum(s3.counts()["faults"].values()) > 5


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
@pytest.mark.soak
def test_worker_processes_give_the_batches_of_a_folder(made, s3, tmp_path, method):
    wanted = list(loader(made.out, tmp_path / "cache"))
    end_fork_server()  # an earlier test's has an environment without the bucket
    ours = loader(BUCKET, tmp_path / "cache", method, workers=2, max_tokens=600)
    s3.set_faults(shares={"slow_body": 0.5, "503": 0.1}, seed=1, slow_s=0.02)
    assert_equal(list(ours), wanted)
    assert_equal(list(ours), list(iterator_of_epoch(made, tmp_path, 1)))
    ours.close()
    end_fork_server()


def end_fork_server() -> None:
    forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]


def iterator_of_epoch(made: BuildConfig, folder: Path, epoch: int) -> Iterator[Any]:
    again = loader(made.out, folder / "cache")
    again.epoch = epoch
    return iter(again)


def test_a_forked_worker_is_refused(s3, tmp_path):
    with pytest.raises(ConfigError, match="no forked process can read: choose forkserver or spawn"):
        loader(BUCKET, tmp_path, "fork", workers=1)


# How it is read.


def test_a_sample_is_one_request_for_as_many_bytes_as_it_has(made, s3, tmp_path):
    ours = loader(BUCKET, tmp_path / "cache")
    s3.forget_requests()
    items = sum(len(batch.keys) for batch in ours)
    assert items >= 12 and len(shard_reads(s3)) <= items
    assert {each["operation"] for each in s3.requests()} == {"GetObject"}
    (source,) = ours.make.sources
    assert isinstance(source, TrainingCorpus)
    rows = source.table.rows
    bound = items * int((rows["photo_length"] + rows["json_length"] + 4096).max())
    assert s3.counts()["bytes"]["out"] <= bound


def test_the_next_samples_are_asked_for_while_the_first_is_on_its_way(made, s3, tmp_path):
    ours = loader(BUCKET, tmp_path / "cache")
    gate = s3.gate("GET", SHARDS, count=None)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(next(iter(ours))), daemon=True)
    thread.start()
    s3.held(gate, wait_s=30, count=4)
    assert not found
    s3.release(gate)
    thread.join(30)
    assert len(found) == 1


@pytest.mark.soak
def test_a_run_goes_on_with_what_it_began_with_while_a_rebuild_replaces_it(made, s3, tmp_path):
    own = made.model_copy(update={"out": "s3://corpus/rebuilt"})
    driver.build(own, LocalEngine())
    wanted = list(loader(made.out, tmp_path / "cache"))
    ours = loader(own.out, tmp_path / "cache")
    masks = made.masks.model_copy(update={"min_area_px": 10**6})
    driver.build(own.model_copy(update={"masks": masks}), LocalEngine())
    assert_equal(list(ours), wanted)
    with pytest.raises(ConfigError, match="no region was kept"):
        loader(own.out, tmp_path / "cache")


# What does not come.


@pytest.mark.soak
def test_an_outage_ends_the_run_with_a_checkpoint_from_which_it_goes_on(made, s3, tmp_path):
    fit(run_of(tmp_path / "whole", made.out, gradient_accumulation_steps=3))
    config = run_of(
        tmp_path / "run",
        BUCKET,
        gradient_accumulation_steps=3,
        data={"read_retry_s": 0.5, "on_bad_sample": "skip"},
    )
    seen: list[int] = []
    gates: list[int] = []

    def break_off(record: dict[str, Any]) -> None:
        seen.append(record["step"])
        if record["step"] == 3:
            gates.append(s3.fail("503", "GET", SHARDS, count=None))

    with pytest.raises(
        SourceUnavailable, match=r"shards/.*: HTTP 503.*run the same command again"
    ) as failure:
        fit(config, report=break_off)
    assert "\n" not in str(failure.value)
    last = checkpoints.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert last is not None and last.name == f"step-{seen[-1]:08}" and seen[-1] in (3, 4)
    s3.release(gates[0])
    fit(config)
    losses = [[each["loss"] for each in metrics.read_metrics(tmp_path / run)] for run in ("whole", "run")]
    assert losses[0] == losses[1]


def test_a_refusal_is_no_bad_sample(s3, tmp_path):
    ours = loader(BUCKET, tmp_path / "cache", on_bad_sample="skip")
    gate = s3.fail("403", "GET", SHARDS, count=None)
    with pytest.raises(ConfigError, match=r"403.*; check the credentials"):
        list(ours)
    s3.release(gate)


# What else reads a corpus.


def test_an_evaluation_and_a_benchmark_read_the_same_from_a_bucket(made, s3):
    ours, theirs = (list(iter_photo_regions(each)) for each in (BUCKET, made.out))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.pixels == other.pixels).all()
        assert [r.caption for r in one.regions] == [r.caption for r in other.regions]
    assert choose_images(BUCKET, 5) == choose_images(made.out, 5)
    key = ours[0].name.rpartition("#")[2]
    assert (read_photo_regions(None, [f"{BUCKET}#{key}"]).pixels == ours[0].pixels).all()


def test_a_corpus_in_a_bucket_is_checked_before_the_run(s3, tmp_path):
    def found(corpus: str, subsets: tuple[str, ...] | None = None) -> tuple[str, str]:
        config = run_of(tmp_path / "run", corpus, model={"tokenizer": "toy"})
        source = config.corpora[0].model_copy(update={"subsets": subsets})
        findings = check_training(config.model_copy(update={"corpora": [source]}))
        (finding,) = [each for each in findings if each.subject == "corpora[0].corpus"]
        return finding.state, finding.found

    assert found(BUCKET) == ("ok", f"{BUCKET} has committed units")
    assert found(BUCKET, ("sa1b",)) == ("FAIL", f"the corpus {BUCKET} has no subset sa1b")
    assert found("s3://corpus/nowhere") == ("FAIL", "no corpus at s3://corpus/nowhere")


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_run_writes_to_no_bucket(tmp_path, kind):
    from paracaption.schemas.evaluation import EvaluateConfig

    with pytest.raises(ConfigError, match="out: has to be a folder that every node mounts"):
        if kind == "training":
            given = {"model": {"tokenizer": "toy"}, "corpora": [{"corpus": BUCKET}], "steps": 1}
            TrainConfig.checked({"out": "s3://corpus/run", **given})
        else:
            given = {"label": "a", "captioner": {"name": "classical"}, "toy": BUCKET}
            EvaluateConfig.checked({"out": "s3://corpus/run", **given})
