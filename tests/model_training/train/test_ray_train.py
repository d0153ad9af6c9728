"""Ray Train's workers: a killed one is started anew, and the run goes on from its last checkpoint."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest

from paracaption.model_training.train import checkpoints, metrics, ray_train
from paracaption.schemas.errors import ConfigError
from tests.model_training.toy_corpus import config_of, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


def workers() -> list[psutil.Process]:
    """The processes that train on this machine, ours only."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_one_after_a_checkpoint(run: Path, killed: list[int], ended: threading.Event) -> None:
    while not ended.is_set():
        if checkpoints.latest_checkpoint(run / "checkpoints") and (found := workers()):
            killed.append(metrics.read_metrics(run)[-1]["step"])
            found[-1].kill()
            return
        time.sleep(0.02)


@pytest.mark.soak
def test_a_killed_worker_is_started_anew_and_the_run_goes_on_from_its_checkpoint(ray_cluster, tmp_path):
    corpus, run = write_corpus(tmp_path / "world"), tmp_path / "run"
    workers_of = {"workers": 2, "gpus": 0, "cpus": 1, "max_failures": 2}
    config = config_of(run, corpus, steps=120, checkpoint={"every": 20}, ray=workers_of)
    killed: list[int] = []
    shown: list[int] = []
    ended = threading.Event()
    killer = threading.Thread(target=kill_one_after_a_checkpoint, args=(run, killed, ended))
    killer.start()
    try:
        outcome = ray_train.train(config, report=lambda record: shown.append(record["step"]))
    finally:
        ended.set()
        killer.join()
    assert killed and killed[0] < 120
    assert outcome.steps == 120 and (outcome.model / "model.safetensors").exists()
    records = metrics.read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, 121))
    assert shown == list(range(1, 121))


@pytest.mark.soak
def test_an_error_in_a_worker_is_shown_as_it_is(ray_cluster, tmp_path):
    corpus = write_corpus(tmp_path / "world", 12)
    changes = {"model": {"path": "/nowhere"}, "ray": {"workers": 1, "gpus": 0, "cpus": 1, "max_failures": 0}}
    with pytest.raises(ConfigError, match="/nowhere: not a saved model"):
        ray_train.train(config_of(tmp_path / "run", corpus, **changes))
