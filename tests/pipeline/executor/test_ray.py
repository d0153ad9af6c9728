"""The engine on Ray Data: what every engine does, and what only processes of their own can show."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import utilization
from paracaption.pipeline.corpus.events import EventReader
from paracaption.pipeline.executor import ray_data
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.executor.operators import steps_of
from paracaption.pipeline.executor.ray_data import RayEngine
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.recipes import recipe_of
from paracaption.schemas.errors import ConfigError, Retryable, StageStalled
from tests.building import build, calls, committed, config_of, drops
from tests.pipeline.executor.conformance import Conformance
from tests.pipeline.executor.test_side_by_side import RECIPES, mixed

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def engine(ray_cluster):
    return RayEngine()


class TestRay(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, ray_cluster):
        return RayEngine()

    @pytest.mark.soak
    def test_the_sample_by_the_embedded_backends_is_equal_to_the_last_byte(self, engine, tmp_path):
        super().test_the_sample_by_the_embedded_backends_is_equal_to_the_last_byte(engine, tmp_path)

    @pytest.mark.soak
    def test_records_that_fail_are_dropped_with_their_errors_and_tried_again_on_request(
        self, engine, sources, reference, tmp_path
    ):
        super().test_records_that_fail_are_dropped_with_their_errors_and_tried_again_on_request(
            engine, sources, reference, tmp_path
        )

    @pytest.mark.soak
    def test_a_stage_that_fails_on_everything_stops_the_build_and_nothing_of_it_is_committed(
        self, engine, sources, tmp_path
    ):
        super().test_a_stage_that_fails_on_everything_stops_the_build_and_nothing_of_it_is_committed(
            engine, sources, tmp_path
        )

    @pytest.mark.soak
    def test_each_region_is_asked_about_once_and_other_thresholds_load_no_model(
        self, engine, sources, reference, tmp_path
    ):
        super().test_each_region_is_asked_about_once_and_other_thresholds_load_no_model(
            engine, sources, reference, tmp_path
        )


# Deaths and a hang.


def test_an_image_that_kills_its_worker_is_dropped_and_the_rest_finishes(engine, tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut, captioner={"misbehave": {"000000000005": "die"}})
    done = build(config, engine)["coconut"]
    assert done.dropped == {"caption/worker_crashed": 4}
    detail = drops(tmp_path / "out", "coconut")["000000000005", 0][2]
    assert detail == "the worker died 3 times while it had only this image"
    assert not (tmp_path / "out" / "coconut" / "journal").exists()


@pytest.mark.soak
def test_a_worker_that_dies_once_costs_no_record(engine, tmp_path, coconut):
    mark = tmp_path / "died"
    config = config_of(
        tmp_path / "out", coconut=coconut, captioner={"misbehave": {"000000000005": f"once:{mark}"}}
    )
    assert build(config, engine)["coconut"].kept == 40
    assert mark.exists()


@pytest.mark.parametrize(
    ("where", "words", "function"),
    [
        ("call", r"caption, unit coconut-\d{6}, at \d{12} and \d more", "caption"),
        ("filter", r"clean_text, unit coconut-\d{6}, at \d{12}", "run"),
        (
            "output",
            r"write, unit coconut-(\d{6}), at its ledger, waiting for .*/out/coconut/ledger/.tmp-coconut-\1",
            "close",
        ),
    ],
)
@pytest.mark.soak
def test_what_hangs_is_one_line_with_its_record_and_the_place_of_its_stack(
    engine, tmp_path, coconut, where, words, function
):
    config = config_of(tmp_path / "out", coconut=coconut, failures={"stall_s": 15.0})
    name = "tests.odd_backends:HangingCaptioner"
    config = with_backend(config, "captioner", name, {"where": where})
    told = rf"^{words}[^\n]*: no progress for 15 s \(failures.stall_s\); the stack is in [^\n]*$"
    with pytest.raises(StageStalled, match=told) as raised:
        build(config, engine)
    stack = Path(str(raised.value).partition("the stack is in ")[2].partition(";")[0])
    assert f" in {function}\n" in stack.read_text()
    # A thread of Ray Data that outlived Ray would end this process.
    assert [t.name for t in threading.enumerate() if t.name.startswith(("StreamingExecutor", "stream"))] == []


# Who shares an actor.


def test_each_model_has_its_own_operator_and_filters_ride_along(tmp_path, sa1b):
    config = config_of(tmp_path / "out", sa1b=sa1b, apart=True)
    steps = steps_of(recipe_of(config, "sa1b"), config)
    assert [[s if isinstance(s, str) else s.name for s in step] for step in steps] == [
        ["source", "usable_masks", "whole_objects"],
        ["caption"],
        ["extract_category"],
        ["agree_with_segmenter"],
        ["clean_text", "write"],
    ]
    assert sum(isinstance(stage, ModelStage) for step in steps for stage in step) == 3


def test_models_on_cpus_share_their_actors_and_models_on_gpus_do_not(tmp_path, sa1b):
    config = config_of(tmp_path / "out", sa1b=sa1b)
    assert len(steps_of(recipe_of(config, "sa1b"), config)) == 1
    gpu = config.model_copy(update={"judge": config.judge.model_copy(update={"num_gpus": 1})})
    assert len(steps_of(recipe_of(gpu, "sa1b"), gpu)) == 3


@pytest.mark.soak
def test_each_stage_in_its_own_actors_asks_once_and_tells_its_start_and_its_share_of_time_in_calls(
    engine, tmp_path, sa1b
):
    config = config_of(tmp_path / "out", sa1b=sa1b, apart=True, captioner={"delay_s": 0.1})
    done = build(config, engine)["sa1b"]
    assert done.regions == 24 == done.kept + sum(done.dropped.values())
    asked = calls(tmp_path / "captioner.log")
    assert len(asked) == len(set(asked)) == 24
    models = ("caption", "extract_category", "agree_with_segmenter")
    caption, judge, segmenter = (done.utilization[name] for name in models)
    assert (caption.actors, judge.actors, segmenter.actors, caption.asked) == (1, 1, 1, 24)
    assert caption.busy_s >= 6 * 0.1 > judge.busy_s
    assert caption.busy_share and judge.busy_share and judge.busy_share < caption.busy_share <= 1
    assert utilization.read_utilization(tmp_path / "out", "sa1b")["caption"].asked == 24
    (run,) = utilization.list_runs(tmp_path / "out")["sa1b"]
    driver = [event.what for event in EventReader(run).new() if event.what in ("begun", "ended")]
    assert driver == ["begun", "ended"]
    processes = {path.stem.rpartition("-")[2] for path in run.glob("*.jsonl")}
    assert len(processes) == 1 + 5


@pytest.mark.soak
def test_subsets_side_by_side_share_their_pools_and_are_equal_to_the_last_byte(
    engine, tmp_path, coconut, sa1b
):
    """The captioner comes before the judge in one recipe and after it in the other."""
    found = {}
    for name, chosen in (("one", LocalEngine()), ("other", engine)):
        config = mixed(tmp_path / name, coconut, sa1b, RECIPES["in another order"](tmp_path / name))
        build(config, chosen)
        found[name] = committed(tmp_path / name / "out")
    assert found["one"] == found["other"] and len(found["one"]) == 3 * (3 + 2)
    runs = {subset: run for subset, (run,) in utilization.list_runs(tmp_path / "other" / "out").items()}
    told = {subset: list(EventReader(run).new()) for subset, run in runs.items()}
    times = {
        (subset, event.what): event.time_s
        for subset, events in told.items()
        for event in events
        if event.what in ("begun", "ended")
    }
    assert max(times[each, "begun"] for each in runs) < min(times[each, "ended"] for each in runs)
    workers = [path.stem for run in runs.values() for path in run.glob("*.jsonl")]
    pools = {worker.rpartition("-")[2] for worker in workers if not worker.startswith(("driver", "ray"))}
    assert len(pools) == 7  # source, caption, other, judge, caption, segmenter, write; alone they are 5 and 5
    judges = [worker.partition("-") for worker in workers if "_category-" in worker]
    assert {judge for judge, _, _ in judges} == {"verify_category", "extract_category"}
    assert len({process for _, _, process in judges}) == 1, "one judge has worked for both"


@pytest.mark.soak
def test_the_actors_of_each_stage_have_its_name_and_its_counters_are_metrics_of_ray(
    engine, ray_cluster, tmp_path, sa1b
):
    """What Ray's dashboard and Prometheus read."""
    import httpx
    from ray._private.state import actors

    earlier = set(actors())
    build(config_of(tmp_path / "out", subsets=under_another_name(sa1b), apart=True), engine)
    names = {each["ActorClassName"] for key, each in actors().items() if key not in earlier}
    models = ("caption", "extract_category", "agree_with_segmenter")
    assert {f"MapWorker(Map({name}))" for name in ("source", *models, "write")} <= names

    [node] = ray_cluster.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        **{f'stage_asked_total stage="{name}"': 24 for name in ("caption", "agree_with_segmenter")},
        'stage_regions_total stage="source"': 24,
        'stage_starts_total stage="caption"': 1,
        "regions_kept_total": 24,
    }
    deadline = time.monotonic() + 60  # Ray hands metrics on every ten seconds
    while not (wanted.items() <= (found := our_metrics(httpx.get(address).text)).items()):
        assert time.monotonic() < deadline, found
        time.sleep(1)


def under_another_name(sa1b: dict) -> dict:
    """Other tests of this process count, too."""
    return {"counted": {"sources": [{"source": "sa1b", **sa1b}]}}


def our_metrics(page: str) -> dict[str, float]:
    """Name and stage -> value of our counters of that subset, summed over the processes."""
    found: dict[str, float] = {}
    for line in page.splitlines():
        if line.startswith("ray_paracaption_") and 'subset="counted"' in line:
            name, _, labels = line.removeprefix("ray_paracaption_").partition("{")
            stage = next((label for label in labels.split(",") if label.startswith("stage=")), "")
            key = f"{name} {stage}".rstrip()
            found[key] = found.get(key, 0.0) + float(line.rpartition(" ")[2])
    return found


def with_backend(config, protocol, name, options, **changes):
    backend = getattr(config, protocol).model_copy(update={"name": name, "options": options, **changes})
    return config.model_copy(update={protocol: backend})


@pytest.mark.soak
def test_an_environment_is_of_its_stage_alone_and_changes_no_evidence(engine, tmp_path, coconut):
    plain = with_backend(
        config_of(tmp_path / "out", coconut=coconut),
        "captioner",
        "tests.odd_backends:WhereCaptioner",
        {"where": str(tmp_path / "captioner.where")},
    )
    judge = ("judge", "tests.odd_backends:WhereJudge", {"where": str(tmp_path / "judge.where")})
    plain = with_backend(plain, *judge)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nBY_PYTHON=yes exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    own = {"env_vars": {"ONLY_HERE": "yes"}, "py_executable": str(python)}
    apart = with_backend(plain, *judge, runtime_env=own)
    assert [len(steps_of(recipe_of(config, "coconut"), config)) for config in (plain, apart)] == [
        1,
        3,
    ]
    digests = [[s.digest() for s in recipe_of(config, "coconut")] for config in (plain, apart)]
    assert digests[0] == digests[1]
    build(apart, engine)
    (captioner,), (judge,) = (
        [line.split(" ") for line in (tmp_path / f"{name}.where").read_text().splitlines()]
        for name in ("captioner", "judge")
    )
    assert captioner[1:] == ["None", "None"] and judge[1:] == ["yes", "yes"]
    assert captioner[0] != judge[0]


# What is refused.


def test_too_few_resources_are_an_error_before_the_start(engine, tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut, captioner={"concurrency": [1000, 1000]})
    with pytest.raises(
        ConfigError, match=r"need 100\.2 CPU at once .*caption: 1000 x 0.1.*the cluster has 4"
    ):
        build(config, engine)


def test_a_client_address_is_refused_with_the_way_that_works(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    with pytest.raises(ConfigError, match=r"ray://head:10001.*ray job submit"):
        build(config, RayEngine("ray://head:10001"))
    assert not (tmp_path / "out").exists()


def test_an_address_where_nobody_listens_is_refused_at_once(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"{address}: no cluster answers"):
            RayEngine(address).check(config)
        free.listen()
        RayEngine(address).check(config)
    RayEngine("auto").check(config)


def test_a_ray_that_does_not_start_is_one_line(tmp_path, coconut, monkeypatch):
    def fails(*_):
        raise Exception("timed out during startup\nand more")

    monkeypatch.setattr(ray_data, "_connect", fails)
    with pytest.raises(
        Retryable,
        match=r"^Ray does not start: Exception: timed out during startup; run the same command.*--local",
    ):
        RayEngine().start(config_of(tmp_path / "out", coconut=coconut))
