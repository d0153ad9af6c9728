"""The command on a real cluster of two nodes, and the loss of one in mid-build."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml

from paracaption.pipeline.corpus import verify
from tests.building import calls, config_of
from tests.machinery import alone
from tests.synthetic import write_coconut

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES = 40


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """Nodes started with `ray start --block`, each a tree of processes of our own."""

    def __init__(self, folder: Path):
        (self.port,) = free_ports(1)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.env = {**os.environ, **token, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(folder / "prefect")}
        for name in ("PREFECT_API_URL", "RAY_ADDRESS"):
            self.env.pop(name, None)
        self.log = open(folder / "nodes.log", "wb")
        self.temporary = tempfile.mkdtemp(prefix="rc-")  # sockets' paths must be short
        head = ["--head", "--port", self.port]
        self.nodes = [self._node(*head, "--temp-dir", self.temporary, "--include-dashboard", "false")]
        self._wait_for(1)
        self.add()

    def _node(self, *args: object) -> psutil.Popen:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *map(str, args), "--num-cpus", "2"]
        command += ["--block", "--disable-usage-stats"]
        return psutil.Popen(command, cwd=ROOT, env=self.env, stdout=self.log, stderr=self.log)

    def add(self) -> None:
        self.nodes.append(self._node("--address", f"127.0.0.1:{self.port}"))
        self._wait_for(2)

    def _wait_for(self, count: int) -> None:
        script = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR'); "
        script += "print(sum(node['Alive'] for node in ray.nodes()))"
        command = [sys.executable, "-c", script, f"127.0.0.1:{self.port}"]
        for _ in range(20):
            done = subprocess.run(command, env=self.env, capture_output=True, text=True)
            if done.stdout.strip() == str(count):
                return
            time.sleep(1)
        raise AssertionError(
            f"no {count} nodes: {done.stderr[-2000:]}\n{Path(self.log.name).read_text()[-3000:]}"
        )

    def actors(self, number: int) -> int:
        """Ray Data's actors on a node."""
        children = self.nodes[number].children(recursive=True)
        return sum("MapWorker" in " ".join(_command(child)) for child in children)

    def kill(self, number: int) -> None:
        """What a power cut does to a node."""
        for process in [*self.nodes[number].children(recursive=True), self.nodes[number]]:
            if process.is_running():
                process.kill()
        self.nodes[number].wait()

    def stop(self) -> None:
        for number, node in enumerate(self.nodes):
            if node.is_running():
                self.kill(number)
        self.log.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with alone():
        two = Cluster(tmp_path_factory.mktemp("cluster"))
    yield two
    two.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_coconut(tmp_path_factory.mktemp("source") / "coconut", NUM_IMAGES)


def build(cluster: Cluster, folder: Path, source: dict, address: str, delay_s: float) -> subprocess.Popen:
    four = {"concurrency": [4, 4]}
    config = config_of(
        folder / "out",
        coconut=source,
        images_per_shard=2,
        captioner={"delay_s": delay_s, "batch_images": 1, **four},
        judge=dict(four),
        segmenter=dict(four),
        io=four,
    )
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "paracaption.flows.cli", "build", str(path), "--ray-address", address]
    log = open(folder / "build.log", "wb")
    return subprocess.Popen(command, cwd=ROOT, env=cluster.env, stdout=log, stderr=log)


def until(what, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


OWN = """
import os, ray
from word_of_mine import word

class MyCap:
    def __init__(self, log):
        self.log = log

    def caption(self, images):
        with open(self.log, "a") as file:
            print(ray.get_runtime_context().get_node_id(), __file__, os.environ["OF_MINE"], word, file=file)
        return [["a thing"] * len(image.live()) for image in images]
"""

DRIVER = """
import os, sys
from pathlib import Path
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.executor import driver, ray_data
from paracaption.pipeline.models import registry

config = load_config(sys.argv[1])
registry.find_backend("captioner", config.captioner)
Path(sys.argv[1]).with_name("mycap.py").unlink()
Path(sys.argv[1]).with_name("word_of_mine.py").write_text("raise RuntimeError('half edited')")
driver.build(config, ray_data.RayEngine(sys.argv[2]))
"""


@pytest.mark.soak
def test_each_node_imports_the_drivers_version_of_a_captioner_beside_the_configuration(
    tmp_path, cluster, source
):
    """The files are gone before a worker starts; the captioner has a `runtime_env` of its own, too."""
    config = config_of(tmp_path / "out", coconut=source, images_per_shard=2)
    values = config.model_dump(mode="json")
    values["captioner"] |= {"name": "mycap:MyCap", "options": {"log": str(tmp_path / "asked.log")}}
    values["captioner"] |= {"num_cpus": 0.9, "concurrency": [3, 3], "batch_images": 1}
    values["captioner"]["runtime_env"] = {"env_vars": {"OF_MINE": "set"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "mycap.py").write_text(OWN)
    (tmp_path / "word_of_mine.py").write_text("word = 'first'")
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "c.yaml"), f"127.0.0.1:{cluster.port}"]
    done = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=cluster.env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = verify.verify(tmp_path / "out")
    assert report.ok and report.regions == 4 * NUM_IMAGES, report.text()
    asked = [line.split() for line in (tmp_path / "asked.log").read_text().splitlines()]
    assert len({node for node, *_ in asked}) == 2
    assert {tuple(rest) for _, _, *rest in asked} == {("set", "first")}
    assert not any(file.startswith(str(tmp_path)) for _, file, *_ in asked)


@pytest.mark.soak
def test_a_build_runs_on_both_nodes_and_outlives_the_loss_of_one(tmp_path, cluster, source):
    driver = build(cluster, tmp_path, source, f"127.0.0.1:{cluster.port}", delay_s=1.0)
    try:
        manifests = tmp_path / "out" / "coconut" / "manifests"
        until(lambda: driver.poll() is not None or len(list(manifests.glob("coconut-*.json"))) >= 3)
        assert driver.poll() is None, (tmp_path / "build.log").read_text()[-3000:]
        assert cluster.actors(0) and cluster.actors(1)
        cluster.kill(1)
        assert driver.wait(200) == 0, (tmp_path / "build.log").read_text()[-3000:]
    finally:
        driver.kill()
    report = verify.verify(tmp_path / "out")
    assert report.ok, report.text()
    assert report.regions == 4 * NUM_IMAGES
    assert len(set(calls(tmp_path / "captioner.log"))) == 4 * NUM_IMAGES
