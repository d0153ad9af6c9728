"""The engine on Ray builds into a bucket: driver and workers have nothing in common but that bucket.

The scratch of the driver is another folder than that of the workers. Nodes whose file systems are apart are
in `tests/test_cluster_without_shared_folder.py`.
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import utilization
from paracaption.pipeline.corpus.verify import verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.executor.ray_data import RayEngine
from paracaption.pipeline.io import scratch
from paracaption.schemas.errors import ConfigError
from tests.buckets import committed_in_bucket
from tests.building import build, config_of
from tests.object_server import serving

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture
def engine(ray_cluster):
    return RayEngine()


@pytest.fixture
def out(ray_buckets, monkeypatch, tmp_path) -> str:
    for name, value in ray_buckets.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path / "scratch"))
    return f"s3://corpus/{uuid.uuid4().hex[:12]}"


def keys(ray_buckets, out: str) -> list[str]:
    """Names of the objects of a corpus."""
    prefix = out.removeprefix("s3://corpus/")
    return [key.removeprefix(f"{prefix}/") for key in ray_buckets.objects(prefix=prefix)]


def test_both_subsets_are_the_files_of_a_folder_and_nothing_else_is_left(
    engine, out, ray_buckets, tmp_path, coconut, sa1b
):
    here = config_of(f"memory://{uuid.uuid4().hex}/out", beside=tmp_path, coconut=coconut, sa1b=sa1b)
    driver.build(here, LocalEngine())
    driver.build(config_of(out, beside=tmp_path, coconut=coconut, sa1b=sa1b), engine)
    assert committed_in_bucket(out) == committed_in_bucket(here.out)
    report = verify(out)
    assert not report.problems and not report.notes
    runs = utilization.list_runs(out)
    assert {name: len(found) for name, found in runs.items()} == {"coconut": 1, "sa1b": 1}
    asked = utilization.read_utilization(out, "coconut")["caption"].asked
    assert asked == 40, "the events of the workers have come, up to the last"
    left = keys(ray_buckets, out)
    assert not [key for key in left if "/journal/" in key or "check-" in key or "stack-" in key]


def with_python(config, tmp_path: Path, *arguments: str):
    """The judge in processes of its own, whose Python is started by `env ARGUMENTS`."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec env {" ".join(arguments)} {sys.executable} "$@"\n')
    python.chmod(0o755)
    return config.model_copy(
        update={"judge": config.judge.model_copy(update={"runtime_env": {"py_executable": str(python)}})}
    )


def test_a_worker_without_credentials_ends_the_build_with_its_node_and_the_variables(
    engine, out, tmp_path, coconut
):
    config = config_of(out, beside=tmp_path, coconut=coconut)
    bare = with_python(config, tmp_path, "-u AWS_ACCESS_KEY_ID", "-u AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError) as raised:
        build(bare, engine)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"node {ray_host()}: {out}/events/") and "no credentials" in line
    assert "not on this node: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)" in line and "S3RVER" not in line
    assert build(config, engine)["coconut"].kept == 40


def test_a_worker_that_is_led_to_another_store_writes_nothing_there(engine, out, tmp_path, coconut):
    with serving() as other:
        config = config_of(out, beside=tmp_path, coconut=coconut)
        config = with_python(config, tmp_path, f"AWS_ENDPOINT_URL={other.address}")
        with pytest.raises(ConfigError, match=rf"^node {ray_host()}: {out}/events/.*it is not there; let"):
            build(config, engine)
        assert not other.objects()


def ray_host() -> str:
    import socket

    return socket.gethostname()


def test_memory_of_this_process_is_refused(engine, tmp_path, coconut):
    with pytest.raises(ConfigError, match="memory://b/out: is the memory of one process.*--local"):
        driver.build(config_of("memory://b/out", beside=tmp_path, coconut=coconut), engine)
