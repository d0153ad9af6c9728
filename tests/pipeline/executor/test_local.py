"""The engine in this process: what every engine does, and what one process cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from paracaption.pipeline.executor import gpus
from paracaption.pipeline.executor.gpus import Gpu
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from tests.building import build, calls, committed, config_of, drops
from tests.pipeline.executor.conformance import Conformance, Interrupted
from tests.synthetic import write_coconut, write_sa1b

ROOT = Path(__file__).resolve().parents[3]
H200 = Gpu("NVIDIA H200", 150 * 10**9, 149 * 10**9)


class TestLocal(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        return LocalEngine()


@pytest.fixture(scope="module")
def coconut(tmp_path_factory):
    return write_coconut(tmp_path_factory.mktemp("source") / "coconut", 10)


@pytest.fixture(scope="module")
def sa1b(tmp_path_factory):
    return write_sa1b(tmp_path_factory.mktemp("source") / "sa1b", 3)


def with_backend(config: BuildConfig, protocol: str, **changes) -> BuildConfig:
    backend = getattr(config, protocol).model_copy(update=changes)
    return config.model_copy(update={protocol: backend})


def test_it_imports_no_ray(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = """
import sys
from pathlib import Path
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.schemas.config import BuildConfig
driver.build(BuildConfig.model_validate_json(Path(sys.argv[1]).read_text()), LocalEngine())
print(*sorted({"ray", "prefect", "torch"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "config.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr[-2000:]
    assert len(list((tmp_path / "out" / "coconut" / "manifests").iterdir())) == 3


def test_models_run_in_the_thread_of_the_caller_so_that_a_debugger_stops_in_them(tmp_path, coconut):
    where = tmp_path / "where"
    config = config_of(tmp_path / "out", coconut=coconut)
    config = with_backend(
        config, "captioner", name="tests.odd_backends:ThreadCaptioner", options={"where": str(where)}
    )
    build(config)
    assert set(where.read_text().splitlines()) == {f"{os.getpid()} {threading.get_ident()}"}


@pytest.mark.soak
def test_backends_that_batch_by_themselves_are_asked_about_whole_units_and_give_the_same_shards(
    tmp_path, coconut
):
    config = config_of(tmp_path / "a" / "out", coconut=coconut, captioner={"batch_images": 2})
    (tmp_path / "a").mkdir()
    build(config)
    (tmp_path / "b").mkdir()
    by_itself = config_of(tmp_path / "b" / "out", coconut=coconut, captioner={"batch_images": 2})
    for protocol, name in (("captioner", "OneByOneCaptioner"), ("judge", "LastFirstJudge")):
        by_itself = with_backend(by_itself, protocol, name=f"tests.backends:{name}")
    build(by_itself)
    assert calls(tmp_path / "b" / "captioner.log.calls") == ["4", "4", "2"]
    shards = [
        {path: digest for path, digest in committed(tmp_path / name / "out").items() if "/shards/" in path}
        for name in "ab"
    ]
    assert shards[0] == shards[1] and len(shards[0]) == 3


def test_an_environment_of_a_stages_own_is_refused_with_its_key(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    config = with_backend(config, "judge", runtime_env={"env_vars": {"A": "b"}})
    with pytest.raises(ConfigError, match=r"^judge\.runtime_env: .*build without --local"):
        build(config)
    assert not (tmp_path / "out").exists()


def test_an_environment_of_a_stage_that_no_subset_uses_is_none_of_its_business(tmp_path, coconut):
    config = config_of(tmp_path / "out", coconut=coconut)
    LocalEngine().check(with_backend(config, "segmenter", runtime_env={"env_vars": {"A": "b"}}))


def test_more_gpus_than_one_are_refused_with_each_stages_share(tmp_path, coconut, monkeypatch):
    monkeypatch.setattr(gpus, "list_gpus", lambda: [H200, H200])
    config = config_of(tmp_path / "out", coconut=coconut)
    config = with_backend(config, "captioner", num_gpus=0.7)
    LocalEngine().check(with_backend(config, "judge", num_gpus=0.3))
    told = r"ask for 1\.2 GPUs together \(caption 0\.7, verify_category 0\.5\), the local engine has 1; give"
    with pytest.raises(ConfigError, match=told):
        build(with_backend(config, "judge", num_gpus=0.5))
    assert not (tmp_path / "out").exists()


def test_a_gpu_where_there_is_none_is_refused(tmp_path, coconut, monkeypatch):
    monkeypatch.setattr(gpus, "list_gpus", lambda: [])
    config = with_backend(config_of(tmp_path / "out", coconut=coconut), "captioner", num_gpus=1)
    with pytest.raises(ConfigError, match=r"1 GPUs together \(caption 1, verify_category 0\).* has 0;"):
        build(config)


@pytest.mark.soak
def test_a_call_that_stalls_is_told_with_its_records_and_where_its_stack_lies_and_the_build_goes_on(
    tmp_path, coconut, caplog
):
    slow = {"misbehave": {"000000000005": "sleep:1.5"}}
    config = config_of(tmp_path / "out", coconut=coconut, captioner=slow, failures={"stall_s": 0.5})
    with caplog.at_level("ERROR"):
        assert build(config)["coconut"].kept == 40
    (told,) = [message for message in caplog.messages if message.startswith("caption")]
    assert told.startswith("caption, unit coconut-000001, at 000000000004 and 3 more: no progress for 1 s (f")
    assert told.endswith(
        "; if the step is only slow, raise failures.stall_s; else press Ctrl-C: what is committed stays"
    )
    stack = Path(told.partition("the stack is in ")[2].partition(";")[0])
    assert "backends.py" in stack.read_text() and " in caption\n" in stack.read_text()
    stack.unlink()


@pytest.mark.soak
def test_a_model_that_has_to_be_closed_is_closed_at_the_end_of_its_subset(tmp_path, coconut, sa1b):
    seen = tmp_path / "seen"
    config = config_of(tmp_path / "out", coconut=coconut, sa1b=sa1b)
    name = "tests.odd_backends:ClosedCaptioner"
    config = with_backend(config, "captioner", name=name, options={"seen": str(seen)})
    build(config)
    assert seen.read_text().split() == ["opened", "closed", "opened", "closed"]


def test_a_model_is_closed_when_the_build_is_stopped(tmp_path, coconut):
    seen = tmp_path / "seen"
    name = "tests.odd_backends:ClosedCaptioner"
    config = with_backend(
        config_of(tmp_path / "out", coconut=coconut), "captioner", name=name, options={"seen": str(seen)}
    )

    def stop(progress) -> None:
        if progress.done:
            raise Interrupted

    with pytest.raises(Interrupted):
        build(config, on_progress=stop)
    assert seen.read_text().split() == ["opened", "closed"]
    assert not [thread for thread in threading.enumerate() if thread.name == "stalls"]


@pytest.mark.soak
def test_an_image_that_takes_the_process_down_is_found_by_the_next_runs_and_dropped(tmp_path, coconut):
    config = config_of(
        tmp_path / "out",
        coconut=coconut,
        captioner={"misbehave": {"000000000005": "die"}},
        failures={"crash_attempts": 2},
    )
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "tests.building", str(tmp_path / "config.json")]
    codes = [subprocess.run(command, cwd=ROOT, capture_output=True).returncode for _ in range(4)]
    assert codes == [-signal.SIGKILL] * 3 + [0]
    found = drops(tmp_path / "out", "coconut")
    assert found.keys() == {("000000000005", number) for number in range(4)}
    assert set(found.values()) == {
        ("caption", "worker_crashed", "the worker died 2 times while it had only this image")
    }
    assert not (tmp_path / "out" / "coconut" / "journal").exists()
    asked = calls(tmp_path / "captioner.log")
    assert {line.partition("/")[0] for line in asked} == {f"{i:012d}" for i in range(10) if i != 5}
    undisturbed = config_of(tmp_path / "whole" / "out", coconut=coconut)
    build(undisturbed)
    one, other = committed(tmp_path / "out"), committed(tmp_path / "whole" / "out")
    assert {path for path in one if one[path] != other[path]} == {
        f"coconut/{kind}" for kind in (
            "shards/coconut-000001.tar", "ledger/coconut-000001.parquet", "manifests/coconut-000001.json"
        )
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes")
@pytest.mark.soak
def test_it_leaves_no_process_behind(tmp_path, coconut):
    import psutil

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    build(config_of(tmp_path / "out", coconut=coconut))
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
