"""The engine on Ray builds into a bucket: driver and workers have nothing in common but that bucket.

The scratch of the driver is another folder than that of the workers. Nodes whose file systems are apart are
in `tests/test_cluster_without_shared_folder.py`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from paracaption.pipeline.corpus import utilization
from paracaption.pipeline.corpus.verify import verify
from paracaption.pipeline.executor import doctor, driver
from paracaption.pipeline.executor.findings import FAIL, OK
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.executor.ray_data import RayEngine
from paracaption.pipeline.io import scratch
from paracaption.pipeline.io.scratch import IN_MEMORY_BYTES
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.errors import ConfigError, StageStalled
from tests.buckets import committed_in_bucket
from tests.building import build, config_of
from tests.synthetic import jpeg, write_coconut

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.ray]


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
    end = time.monotonic() + 30
    while utilization.read_utilization(out, "coconut")["caption"].asked < 40:
        assert time.monotonic() < end, "an actor that ends uploads its last events"
        time.sleep(0.2)
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
    assert line.startswith(f"node {socket.gethostname()}: {out}/events/") and "no credentials" in line
    assert "not on this node: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)" in line and "S3RVER" not in line
    assert build(config, engine)["coconut"].kept == 40


def test_memory_of_this_process_is_refused(engine, tmp_path, coconut):
    with pytest.raises(ConfigError, match=r"memory://b/out: is the memory of one process.*--local"):
        driver.build(config_of("memory://b/out", beside=tmp_path, coconut=coconut), engine)


def test_the_doctor_looks_at_bucket_and_scratch_from_every_node(engine, out, ray_buckets, tmp_path, coconut):
    config = config_of(out, beside=tmp_path, coconut=coconut)
    nodes = doctor._list_nodes()
    found = list(doctor.check_output_on_nodes(config, nodes))
    on_node = [f"out on {nodes[0].host}", f"scratch on {nodes[0].host}"]
    assert [(each.subject, each.state) for each in found] == [
        (subject, OK) for subject in ("out", "scratch", *on_node)
    ]
    assert str(tmp_path) in found[1].found and "scratch-of-workers" in found[3].found
    assert not keys(ray_buckets, out)
    ray_buckets.make_bucket("careless")
    ray_buckets.set_faults(ignores_conditions=True)
    try:
        config = config.model_copy(update={"out": "s3://careless/out"})
        told = [each for each in doctor.check_output_on_nodes(config, nodes) if each.state == FAIL]
    finally:
        ray_buckets.set_faults(ignores_conditions=False)
    assert [each.subject for each in told] == ["out", on_node[0]]
    assert all("the store ignores `If-None-Match" in each.found and each.fix for each in told)


# Deaths and a hang.


@pytest.mark.soak
def test_an_image_that_kills_its_worker_is_dropped_and_no_note_is_left(
    engine, out, ray_buckets, tmp_path, coconut
):
    misbehave = {"misbehave": {"000000000005": "die"}}
    done = build(config_of(out, beside=tmp_path, coconut=coconut, captioner=misbehave), engine)["coconut"]
    assert done.dropped == {"caption/worker_crashed": 4} and done.kept == 36
    assert not [key for key in keys(ray_buckets, out) if "/journal/" in key]


@pytest.mark.soak
@pytest.mark.parametrize("where", ["call", "filter"])
def test_the_stack_of_a_worker_that_hangs_is_in_the_bucket_and_named(engine, out, tmp_path, coconut, where):
    config = config_of(out, beside=tmp_path, coconut=coconut, failures={"stall_s": 30.0})
    hanging = {"name": "tests.odd_backends:HangingCaptioner", "options": {"where": where}}
    config = config.model_copy(update={"captioner": config.captioner.model_copy(update=hanging)})
    with pytest.raises(StageStalled, match=rf"the stack is in {out}/events/.*/stack-.*\.txt;") as raised:
        build(config, engine)
    stack = str(raised.value).partition("the stack is in ")[2].partition(";")[0]
    text = store_of(stack).read(stack).decode()
    assert f" in {'caption' if where == 'call' else 'run'}\n" in text


@pytest.mark.soak
def test_a_worker_that_dies_while_it_uploads_a_shard_leaves_nothing_staged(
    engine, out, ray_buckets, ray_scratch, tmp_path
):
    """A shard of more than `IN_MEMORY_BYTES` is on scratch; the next worker of the node removes it."""
    size = (1400, 1400)
    source = write_coconut(tmp_path / "source", 4, size=size)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    for path in Path(source["photos"][0]).iterdir():
        path.write_bytes(jpeg(noise))
        assert path.stat().st_size > IN_MEMORY_BYTES / 4
    gate = ray_buckets.gate("PUT", f"{out.removeprefix('s3://corpus/')}/coconut/shards/*")
    building = ThreadPoolExecutor(1).submit(build, config_of(out, beside=tmp_path, coconut=source), engine)
    ray_buckets.held(gate, wait_s=120)
    (staged,) = [path for path in ray_scratch.rglob("staged~*/*") if path.is_file()]
    assert staged.stat().st_size > IN_MEMORY_BYTES
    os.kill(int(staged.parent.name.split("~")[1]), signal.SIGKILL)
    ray_buckets.release(gate)
    assert building.result(300)["coconut"].kept == 16
    assert not [path for path in ray_scratch.rglob("staged~*/*") if path.is_file()]
