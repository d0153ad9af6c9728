"""The stream on a real local Ray cluster, with backends that answer at once or misbehave."""

import json
import os
import shutil
import socket
import sys
import time

import pytest

from pipeline import activity, shards, stages
from pipeline.events import EventReader
from pipeline.executor import driver, ray_data
from pipeline.executor.ray_data import steps_of
from pipeline.stages import ModelStage
from schemas.errors import ConfigError, IntegrityError, Retryable, StageFailed, StageStalled
from tests.building import build, calls, committed, config_of, drops
from tests.synthetic import write_coconut, write_sa1b

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def coconut(tmp_path_factory):
    return write_coconut(tmp_path_factory.mktemp("source") / "coconut", num_images=10)


@pytest.fixture(scope="module")
def sa1b(tmp_path_factory):
    return write_sa1b(tmp_path_factory.mktemp("source") / "sa1b", num_images=6)


def test_every_region_is_kept_or_dropped_and_asked_about_once(tmp_path, coconut, sa1b):
    config = config_of(tmp_path / "out", coconut=coconut, sa1b=sa1b, apart=True)
    done = build(config)
    assert done["coconut"].regions == 40 == done["coconut"].kept + sum(done["coconut"].dropped.values())
    assert done["sa1b"].regions == 24
    asked = calls(tmp_path / "captioner.log")
    assert len(asked) == len(set(asked)) == 64
    names = [path.name for path in sorted((tmp_path / "out" / "coconut" / "manifests").iterdir())]
    assert names == ["coconut-000000.json", "coconut-000001.json", "coconut-000002.json"]


def test_two_builds_of_the_same_source_are_equal_to_the_last_byte(tmp_path, coconut, sa1b):
    for name in ("one", "two"):
        build(config_of(tmp_path / name, coconut=coconut, sa1b=sa1b))
    assert committed(tmp_path / "one") == committed(tmp_path / "two")
    assert len(committed(tmp_path / "one")) == 3 * (3 + 2)


def test_a_second_build_has_nothing_to_do(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    build(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "coconut").rglob("*.tar")}
    assert build(config)["coconut"].pending == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def started(out):
    """The models that were loaded in each run."""
    return [
        {event.stage for event in EventReader(run).new() if event.what == "started"}
        for run in sorted((out / "events").iterdir())
    ]


def test_a_changed_threshold_rebuilds_the_shards_and_loads_no_model(tmp_path, sa1b):
    out = tmp_path / "out"
    loose = config_of(out, sa1b=sa1b, min_iou=0.5)
    build(loose)
    paid = {name: len(calls(tmp_path / f"{name}.log")) for name in ("captioner", "judge", "segmenter")}
    assert paid == {"captioner": 24, "judge": 24, "segmenter": 24}
    loose_files = committed(out)
    strict = loose.model_copy(
        update={"min_iou": 1.0, "text": loose.text.model_copy(update={"min_words": 60})}
    )
    assert build(strict)["sa1b"].dropped == {"clean_text/text_too_short": 24}
    assert started(out) == [{"caption", "extract_category", "agree_with_segmenter"}, set()]
    assert {name: len(calls(tmp_path / f"{name}.log")) for name in paid} == paid
    build(loose)
    assert committed(out) == loose_files


def test_another_model_is_asked_anew_and_the_old_evidence_stays(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    build(config)
    other = config.captioner.model_copy(update={"options": {**config.captioner.options, "version": "2"}})
    build(config.model_copy(update={"captioner": other}))
    assert len(calls(tmp_path / "captioner.log")) == 80
    folders = {path.name.partition("-")[0] for path in (tmp_path / "out" / "coconut" / "evidence").iterdir()}
    assert folders == {"caption", "verify_category"}
    assert len(list((tmp_path / "out" / "coconut" / "evidence").iterdir())) == 4


def test_a_record_that_fails_is_found_in_its_batch_and_dropped_with_its_error(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut, captioner={"misbehave": {"000000000005": "raise"}})
    done = build(config)["coconut"]
    assert done.dropped == {"caption/model_error": 4}
    assert drops(tmp_path / "out", "coconut")["000000000005", 0] == (
        "caption", "model_error", "RuntimeError: cannot caption 000000000005",
    )  # fmt: skip


def test_a_bad_record_keeps_its_own_reason(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut, captioner={"misbehave": {"000000000005": "bad"}})
    assert build(config)["coconut"].dropped == {"caption/photo_unreadable": 4}


def test_retry_failed_builds_only_units_with_errors_and_asks_only_about_those(tmp_path, coconut):
    out = tmp_path / "out"
    mark = tmp_path / "mend"
    config = config_of(
        out, coconut=coconut, captioner={"misbehave": {"000000000005": f"raise-unless:{mark}"}}
    )
    assert build(config)["coconut"].dropped == {"caption/model_error": 4}
    paid = len(calls(tmp_path / "captioner.log"))
    mark.touch()
    assert build(config)["coconut"].pending == 0
    again = build(config, retry_failed=True)["coconut"]
    assert (again.pending, again.regions, again.kept) == (1, 16, 16)
    assert sorted(calls(tmp_path / "captioner.log")[paid:]) == [f"000000000005/{i}" for i in range(4)]


def test_an_image_that_kills_its_worker_is_dropped_and_the_rest_finishes(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut, captioner={"misbehave": {"000000000005": "die"}})
    done = build(config)["coconut"]
    assert done.dropped == {"caption/worker_crashed": 4}
    detail = drops(tmp_path / "out", "coconut")["000000000005", 0][2]
    assert detail == "the worker died 3 times on this image alone"
    assert not (tmp_path / "out" / "coconut" / "journal").exists()


def test_a_worker_that_dies_once_costs_no_record(tmp_path, coconut):
    mark = tmp_path / "died"
    config = config_of(
        tmp_path / "out", coconut=coconut, captioner={"misbehave": {"000000000005": f"once:{mark}"}}
    )
    assert build(config)["coconut"].kept == 40
    assert mark.exists()


def test_a_stage_that_always_fails_stops_the_build_and_commits_nothing_of_it(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut, captioner={"misbehave": {"*": "raise"}})
    with pytest.raises(
        StageFailed, match=r"caption: failed on every image of 3 units in a row.*cannot caption"
    ):
        build(config)
    assert committed(tmp_path / "out") == {}


def test_a_backend_that_cannot_start_is_one_clear_error(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut, captioner={"no_such_option": 1})
    with pytest.raises(StageFailed, match=r"caption: the backend cannot start: TypeError.*no_such_option"):
        build(config)


def test_a_stage_that_hangs_is_an_error_with_its_stack(tmp_path, coconut):
    config = config_of(
        tmp_path / "out", coconut=coconut, captioner={"misbehave": {"*": "hang"}}, failures={"stall_s": 15.0}
    )
    start = time.monotonic()
    with pytest.raises(StageStalled, match=r"(?s)no progress for 15 s.*caption, at \d{12}.*backends.py"):
        build(config)
    assert time.monotonic() - start < 60


def test_a_changed_source_is_refused_with_the_difference(tmp_path):
    source = write_coconut(tmp_path / "source", num_images=4)
    config = config_of(tmp_path / "out", coconut=source)
    build(config)
    path = tmp_path / "source" / "panoptic.json"
    content = json.loads(path.read_text())
    content["images"], content["annotations"] = content["images"][:3], content["annotations"][:3]
    path.write_text(json.dumps(content))
    os.remove(tmp_path / "source" / "labels" / "000000000003.png")
    with pytest.raises(IntegrityError, match="000000000003"):
        build(config)


def test_two_drivers_cannot_write_to_the_same_folder(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    with driver.locked(tmp_path / "out"), pytest.raises(ConfigError, match="another build"):
        build(config)


def test_a_read_only_output_is_one_clear_error(tmp_path, coconut):
    target = tmp_path / "out" / "coconut"
    target.mkdir(parents=True)
    (target / "shards").write_text("a file where the folder should be")
    with pytest.raises(StageFailed, match=r"shards: "):
        build(config_of(tmp_path / "out", coconut=coconut))


def test_lost_evidence_is_paid_for_again_and_only_that(tmp_path, coconut):
    out = tmp_path / "out"
    config = config_of(out, coconut=coconut)
    build(config)
    before = committed(out)
    shutil.rmtree(out / "coconut" / "manifests")
    lost = next((out / "coconut" / "evidence").glob("caption-*/coconut-000001.parquet"))
    lost.unlink()
    paid = len(calls(tmp_path / "captioner.log"))
    build(config)
    assert committed(out) == before
    assert len(calls(tmp_path / "captioner.log")) - paid == 16


def test_temporary_files_are_swept(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    shards.prepare(tmp_path / "out" / "coconut")
    stray = tmp_path / "out" / "coconut" / "shards" / ".tmp-coconut-000000-dead.tar"
    stray.write_bytes(b"half a shard")
    late = stray.with_name(".tmp-coconut-000001-late.tar")  # by a dying worker of the run before
    build(config, on_progress=lambda _: late.write_bytes(b"half a shard"))
    assert not stray.exists()
    assert not late.exists()


def test_too_few_resources_are_an_error_before_the_start(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut, captioner={"concurrency": [1000, 1000]})
    with pytest.raises(
        ConfigError, match=r"need 100\.2 CPU at once .*caption: 1000 x 0.1.*the cluster has 4"
    ):
        build(config)


def test_each_model_has_its_own_operator_and_filters_ride_along(tmp_path, sa1b):
    config = config_of(tmp_path / "out", sa1b=sa1b, apart=True)
    steps = steps_of(stages.sa1b(config), config)
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
    assert len(steps_of(stages.sa1b(config), config)) == 1
    gpu = config.model_copy(update={"judge": config.judge.model_copy(update={"num_gpus": 1})})
    assert len(steps_of(stages.sa1b(gpu), gpu)) == 3


def test_a_client_address_is_refused_with_the_way_that_works(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    with pytest.raises(ConfigError, match=r"ray://head:10001.*ray job submit"):
        ray_data.RayEngine("ray://head:10001").check(config)


def test_an_address_where_nobody_listens_is_refused_at_once(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"{address}: no cluster answers"):
            ray_data.RayEngine(address).check(config)
        free.listen()
        ray_data.RayEngine(address).check(config)
    ray_data.RayEngine("auto").check(config)


def test_a_ray_that_does_not_start_is_one_line(tmp_path, coconut, monkeypatch):
    def fails(*_):
        raise Exception("timed out during startup\nand more")

    monkeypatch.setattr(ray_data, "_connect", fails)
    with pytest.raises(
        Retryable, match=r"^Ray cannot be had: timed out during startup; run it again.*--local"
    ):
        ray_data.RayEngine().start(config_of(tmp_path / "out", coconut=coconut))


def with_backend(config, protocol, name, options, **changes):
    backend = getattr(config, protocol).model_copy(update={"name": name, "options": options, **changes})
    return config.model_copy(update={protocol: backend})


def test_an_environment_is_of_its_stage_alone_and_changes_no_evidence(tmp_path, coconut):
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
    assert [len(steps_of(stages.coconut(config), config)) for config in (plain, apart)] == [1, 3]
    digests = [[s.digest() for s in stages.coconut(config)] for config in (plain, apart)]
    assert digests[0] == digests[1]
    build(apart)
    (captioner,), (judge,) = (
        [line.split(" ") for line in (tmp_path / f"{name}.where").read_text().splitlines()]
        for name in ("captioner", "judge")
    )
    assert captioner[1:] == ["None", "None"] and judge[1:] == ["yes", "yes"]
    assert captioner[0] != judge[0]


def test_the_run_tells_its_actors_their_start_and_their_share_of_time_in_calls(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut, apart=True, captioner={"delay_s": 0.1})
    done = build(config)["coconut"]
    caption, judge = done.activity["caption"], done.activity["verify_category"]
    assert (caption.actors, judge.actors, caption.asked) == (1, 1, 40)
    assert caption.busy_s >= 1.0 > judge.busy_s
    assert caption.busy_share and judge.busy_share and judge.busy_share < caption.busy_share <= 1
    assert activity.of_runs(tmp_path / "out", "coconut")["caption"].asked == 40
    (run,) = activity.run_folders(tmp_path / "out", "coconut")
    driver = [event.what for event in EventReader(run).new() if event.what in ("begun", "ended")]
    assert driver == ["begun", "ended"]
