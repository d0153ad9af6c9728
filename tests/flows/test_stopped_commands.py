"""Ctrl-C and SIGTERM at random moments of builds, of training and of an evaluation.

`make soak ONLY=tests/flows/test_stopped_commands.py` prints how long each took to end. PARACAPTION_STOPS says
how often each command is stopped.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import log
from tests.building import build, committed, config_of
from tests.model_training import toy_corpus
from tests.model_training.evaluation import test_run_benchmark as benchmarks
from tests.stopped import run_and_stop
from tests.synthetic import write_coconut, write_sa1b

STOPS = int(os.environ.get("PARACAPTION_STOPS", "13"))
pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(3600)]


def stop_at_random(command: list[str], seed: int, allowed_s: float, undo: Callable[[], object]) -> None:
    """Stop a command again and again, then let it end well.

    Args:
        command: arguments of `paracaption`.
        seed: of the moments.
        allowed_s: how long it may take to end, on an idle machine.
        undo: makes a command that ended before it was stopped have work again.
    """
    program = [sys.executable, "-m", "paracaption.flows.cli", *command]
    draw, took = random.Random(seed), []
    start = time.monotonic()
    whole = run_and_stop(program, (), 0)
    whole_s = time.monotonic() - start
    assert whole.code == 0, whole.errors[-3000:]
    undo()
    while len(took) < STOPS:
        number = draw.choice([signal.SIGINT, signal.SIGTERM])
        found = run_and_stop(
            program, (number,), draw.uniform(0.3, 1.1 * whole_s), to_all=number == signal.SIGINT
        )
        said = found.errors.splitlines()
        assert found.left == [] and "Traceback" not in found.errors, found
        if found.code == 0:
            undo()
            continue
        assert found.code == 128 + number and said[-1].startswith("stopped"), found
        assert sum(line.startswith("stopped") for line in said) == 1
        took.append(found.seconds)
    median_s = statistics.median(took)
    times = f"median {median_s:.1f} s, longest {max(took):.1f} s, whole run {whole_s:.1f} s"
    print(f"\n{' '.join(command[:1])}: stopped {len(took)} times; {times}")  # noqa: T201 - the measurement
    assert median_s < allowed_s
    last = run_and_stop(program, (), 0)
    assert last.code == 0, last.errors[-3000:]


@pytest.mark.parametrize("engine", ["--local", pytest.param("", marks=pytest.mark.ray)])
def test_a_build_that_is_stopped_is_whole_in_the_end(tmp_path, engine):
    source = {"coconut": write_coconut(tmp_path / "coconut", 24), "sa1b": write_sa1b(tmp_path / "sa1b", 12)}
    slow = {"images_per_shard": 3, "captioner": {"delay_s": 0.05}, "judge": {"delay_s": 0.05}}
    undisturbed = config_of(tmp_path / "undisturbed" / "out", **source, **json.loads(json.dumps(slow)))
    (tmp_path / "undisturbed").mkdir()
    build(undisturbed)
    (tmp_path / "stopped").mkdir()
    config = config_of(tmp_path / "stopped" / "out", **source, **slow)
    path = tmp_path / "build.yaml"
    path.write_text(config.model_dump_json())
    out = Path(config.out)

    def forget() -> None:
        for subset in config.subsets:
            for manifest in (out / subset / "manifests").glob("*.json"):
                manifest.unlink()
            for evidence in (out / subset / "evidence").glob("*/*.parquet"):
                evidence.unlink()

    stop_at_random(["build", str(path), *engine.split()], 3, 10 if not engine else 5, forget)
    assert committed(out) == committed(Path(undisturbed.out))
    state = log.read_state(str(out))
    assert state.released and all(log.is_whole(str(out), each.unit) for each in state.units.values())


def test_a_training_that_is_stopped_goes_on_to_the_last_bit(tmp_path):
    corpus = toy_corpus.write_corpus(tmp_path / "toy", 24)
    models = []
    for name in ("undisturbed", "stopped"):
        config = toy_corpus.config_of(tmp_path / name, corpus, steps=16)
        path = tmp_path / f"{name}.yaml"
        path.write_text(config.model_dump_json())
        models.append(tmp_path / name / "model" / "model.safetensors")

    def forget() -> None:
        for step in sorted((tmp_path / "stopped" / "checkpoints").glob("step-*"))[1:]:
            (step / "progress.json").unlink(missing_ok=True)

    done = run_and_stop(
        [sys.executable, "-m", "paracaption.flows.cli", "train", str(tmp_path / "undisturbed.yaml")], (), 0
    )
    assert done.code == 0, done.errors[-3000:]
    stop_at_random(["train", str(tmp_path / "stopped.yaml")], 5, 5, forget)
    assert models[0].read_bytes() == models[1].read_bytes()


def test_an_evaluation_that_is_stopped_ends_with_the_same_scores(tmp_path):
    with benchmarks.served(benchmarks.honest) as server:
        judge = benchmarks.judge_of(server)
        said = benchmarks.predictions(tmp_path, benchmarks.SAID)
        config = benchmarks.config_of(tmp_path, said, judge)
        path = tmp_path / "evaluate.yaml"
        path.write_text(config.model_dump_json())
        folder = Path(config.out) / config.label / "ours"

        def forget() -> None:
            for each in folder.glob("*.json*"):
                each.unlink()

        stop_at_random(["evaluate", str(path)], 7, 5, forget)
    assert json.loads((folder / "predictions.json").read_text()) == benchmarks.SAID
