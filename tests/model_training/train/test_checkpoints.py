"""Checkpoints are whole or not there; a run that is killed goes on from the last one to the last bit."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from paracaption.model_training.train import checkpoints, metrics
from paracaption.model_training.train.trainer import fit
from paracaption.schemas.errors import IntegrityError
from tests.model_training import ranks
from tests.model_training.toy_corpus import config_of

SAME = ("step", "loss", "norm", "samples", "tokens", "regions", "lr_language")


def course(run: Path) -> list[dict]:
    return [{name: record[name] for name in SAME} for record in metrics.read_metrics(run)]


def weights(run: Path, folder: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path, folder: str = "model") -> None:
    one, other = weights(first, folder), weights(second, folder)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    fit(config_of(run, corpus, steps=40, ema_decay=0.9, checkpoint={"every": 10, "keep": 2}))
    return run


@pytest.mark.soak
def test_forty_steps_are_twenty_a_kill_and_twenty_more_to_the_last_bit(corpus, straight, tmp_path):
    run = tmp_path / "run"
    config = config_of(run, corpus, steps=40, ema_decay=0.9, checkpoint={"every": 10, "keep": 2})
    assert ranks.run(config, after_step=27) == [ranks.KILLED]
    assert names(run) == ["step-00000010", "step-00000020"]
    assert [record["step"] for record in metrics.read_metrics(run)][-1] == 26  # more than was kept
    fit(config)
    assert course(run) == course(straight)
    assert_same_weights(run, straight)
    assert_same_weights(run, straight, "model-average")
    assert names(run) == ["step-00000030", "step-00000040"]


@pytest.mark.parametrize("at", ["files", "name"])
@pytest.mark.soak(keep=1)
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(corpus, straight, tmp_path, at):
    run = tmp_path / "run"
    config = config_of(run, corpus, steps=40, ema_decay=0.9, checkpoint={"every": 10, "keep": 2})
    assert ranks.run(config, in_step=20, at=at) == [ranks.KILLED]
    assert names(run) == [".step-00000020.partial", "step-00000010"]
    assert checkpoints.latest_checkpoint(run / "checkpoints") == run / "checkpoints/step-00000010"
    fit(config)
    assert course(run) == course(straight)
    assert_same_weights(run, straight)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.soak
def test_kills_at_any_moment_change_nothing(corpus, straight, tmp_path):
    run, dice = tmp_path / "run", random.Random(0)
    config = config_of(run, corpus, steps=40, ema_decay=0.9, checkpoint={"every": 2, "keep": 2})
    for _ in range(3):
        (process,) = ranks.start(config)
        seen = checkpoints.latest_checkpoint(run / "checkpoints")
        end = time.monotonic() + 30
        while process.is_alive() and checkpoints.latest_checkpoint(run / "checkpoints") == seen:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.4))
        process.kill()
        process.join()
    fit(config)
    assert course(run) == course(straight)
    assert_same_weights(run, straight)


@pytest.fixture(scope="module")
def pair(corpus, tmp_path_factory):
    """Two ranks, straight."""
    run = tmp_path_factory.mktemp("pair") / "run"
    assert ranks.run(config_of(run, corpus, steps=20), 2) == [0, 0]
    return run


@pytest.fixture(scope="module")
def killed_pair(corpus, tmp_path_factory):
    """Two ranks, one of them killed after step 11; the last checkpoint is of step 8."""
    run = tmp_path_factory.mktemp("killed") / "run"
    codes = ranks.run(config_of(run, corpus, steps=20), 2, after_step=11)
    assert codes[1] == ranks.KILLED and codes[0] != 0
    assert names(run)[-1] == "step-00000008"
    return run


@pytest.mark.soak
def test_two_ranks_go_on_after_a_kill_to_the_last_bit(corpus, pair, killed_pair, tmp_path):
    run = shutil.copytree(killed_pair, tmp_path / "run")
    assert ranks.run(config_of(run, corpus, steps=20), 2) == [0, 0]
    assert course(run) == course(pair)
    assert_same_weights(run, pair)


@pytest.mark.soak
def test_two_ranks_go_on_as_one_with_the_same_samples_and_losses(corpus, pair, killed_pair, tmp_path):
    run = shutil.copytree(killed_pair, tmp_path / "run")
    fit(config_of(run, corpus, steps=20, gradient_accumulation_steps=2))
    assert course(run) == course(pair)
    assert_same_weights(run, pair)


@pytest.mark.soak
def test_sharded_ranks_learn_the_same_and_their_checkpoint_is_read_by_one(corpus, pair, tmp_path):
    run = tmp_path / "run"
    assert ranks.run(config_of(run, corpus, steps=12, shard="full", ema_decay=0.9), 2) == [0, 0]
    for record, other in zip(course(run), course(pair)[:12], strict=True):
        assert record["samples"] == other["samples"]
    first = metrics.read_metrics(run)[0], metrics.read_metrics(pair)[0]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    fit(config_of(run, corpus, steps=16, gradient_accumulation_steps=2, ema_decay=0.9))
    assert [record["step"] for record in metrics.read_metrics(run)] == list(range(1, 17))
    assert [record["samples"] for record in metrics.read_metrics(run)] == [
        record["samples"] for record in metrics.read_metrics(pair)[:16]
    ]


def test_only_the_last_ones_are_kept_and_only_whole_ones_are_found(straight, tmp_path):
    assert names(straight) == ["step-00000030", "step-00000040"]
    folder = tmp_path / "checkpoints"
    assert checkpoints.latest_checkpoint(folder) is None
    (folder / "step-00000007").mkdir(parents=True)
    (folder / ".step-00000009.partial").mkdir()
    assert checkpoints.latest_checkpoint(folder) is None


def test_a_damaged_checkpoint_is_named_with_the_mend(corpus, straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    (newest,) = (run / "checkpoints/step-00000040").glob("*.distcp")
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(
        IntegrityError, match=r"step-00000040: does not load .*delete the folder of this checkpoint"
    ):
        fit(config_of(run, corpus, steps=60, ema_decay=0.9))


def test_a_checkpoint_of_another_model_or_other_data_is_refused(corpus, straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(IntegrityError, match="does not load"):
        fit(config_of(run, corpus, steps=60, ema_decay=0.9, lora={"rank": 2}))
    with pytest.raises(IntegrityError, match="the training data are not those of the checkpoint"):
        fit(config_of(run, corpus, steps=60, ema_decay=0.9, seed=1))


@pytest.mark.soak
def test_what_changed_since_the_checkpoint_is_said(corpus, straight, tmp_path, caplog):
    run = shutil.copytree(straight, tmp_path / "run")
    fit(config_of(run, corpus, steps=41, ema_decay=0.9, max_grad_norm=0.5, gradient_accumulation_steps=2))
    assert (
        "have changed since the checkpoint: steps, gradient_accumulation_steps, max_grad_norm" in caplog.text
    )
    assert "a step now has 2 batches, but before the checkpoint it had 1" in caplog.text


def test_a_checkpoint_whose_replacement_was_killed_between_its_two_renames_is_put_back(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000002.old.partial").mkdir(parents=True)
    (folder / ".step-00000002.old.partial" / "progress.json").write_text("{}")
    (folder / ".step-00000002.partial").mkdir()
    checkpoints.Checkpoints(folder, SimpleNamespace(rank=0, has_process_group=False, barrier=lambda: None))
    assert names(tmp_path) == ["step-00000002"]
    assert checkpoints.latest_checkpoint(folder) == folder / "step-00000002"
