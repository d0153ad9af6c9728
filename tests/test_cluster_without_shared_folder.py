"""A cluster of two nodes that share a bucket and no folder.

Each raylet lives in a mount namespace of its own, with file systems of its own over all that two processes of
one machine would share, and has a host name of its own. The driver runs on the first node, as a job does.
Sources, corpus and events are in the bucket.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from paracaption.pipeline.corpus import log, verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io import files
from paracaption.pipeline.io.store import store_of
from tests.buckets import committed_in_bucket
from tests.building import config_of
from tests.machinery import alone
from tests.object_server import control, s3_environment
from tests.synthetic import write_coconut, write_sa1b
from tests.test_cluster import ROOT, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.ray, pytest.mark.timeout(1200)]

NUM_COCONUT, NUM_SA1B = 24, 12
PRIVATE = ("/tmp", "/var/tmp", "/dev/shm")
"""What two processes of one machine share; the project itself is the image that both nodes run."""

_ENTER = """
echo "$1" > /proc/sys/kernel/hostname && shift
mount --make-rprivate /
for folder in /tmp /var/tmp /dev/shm; do mount -t tmpfs -o mode=1777 none "$folder" || exit 1; done
exec "$@"
"""
NODES = ("node-1", "node-2")


def can_unshare() -> bool:
    """Whether this user may make namespaces; root may, and others in some containers may not."""
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        return False
    command = ["unshare", "--mount", "--uts", "sh", "-c", _ENTER, "sh", "probe", "true"]
    return subprocess.run(command, capture_output=True).returncode == 0


class Apart(Cluster):
    """Two nodes without a folder in common; an S3 server on the loopback address is all that both reach."""

    def __init__(self, folder: Path):
        command = [sys.executable, "-m", "tests.object_server"]
        self.server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        self.address = self.server.stdout.readline().strip()
        self.nodes: list[psutil.Popen] = []
        super().__init__(folder)

    def _node(self, *args: object) -> psutil.Popen:
        self.env.update(s3_environment(self.address), PREFECT_HOME="/tmp/prefect", TMPDIR="/tmp")
        name = NODES[len(self.nodes)]
        command = ["unshare", "--mount", "--uts", "sh", "-c", _ENTER, "sh", name]
        command += [sys.executable, "-m", "ray.scripts.scripts", "start", *map(str, args), "--num-cpus", "2"]
        command += ["--node-ip-address", "127.0.0.1", "--block", "--disable-usage-stats"]
        return psutil.Popen(command, cwd=ROOT, env=self.env, stdout=self.log, stderr=self.log)

    def on(self, number: int, *command: str) -> list[str]:
        """A command as it runs on a node."""
        return ["nsenter", "--mount", "--uts", "--target", str(self.nodes[number].pid), "--", *command]

    def run(self, number: int, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.on(number, *command), input=given, cwd=ROOT, env=self.env, capture_output=True, text=True
        )

    def _wait_for(self, count: int) -> None:
        script = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR'); "
        script += "print(sum(node['Alive'] for node in ray.nodes()))"
        for _ in range(30):
            done = self.run(0, sys.executable, "-c", script, f"127.0.0.1:{self.port}")
            if done.stdout.strip() == str(count):
                return
            time.sleep(1)
        raise AssertionError(
            f"no {count} nodes: {done.stderr[-2000:]}\n{Path(self.log.name).read_text()[-3000:]}"
        )

    def stop(self) -> None:
        super().stop()
        self.server.kill()
        self.server.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if not can_unshare():
        pytest.skip("mount namespaces need root, and `unshare` and `nsenter`")
    with alone():
        two = Apart(tmp_path_factory.mktemp("cluster"))
    yield two
    two.stop()


@pytest.fixture(scope="module")
def sources(cluster, tmp_path_factory) -> dict:
    """Both sources, in the bucket; the entries of a configuration name them there."""
    root = tmp_path_factory.mktemp("source")
    found = {
        "coconut": write_coconut(root / "coconut", NUM_COCONUT),
        "sa1b": write_sa1b(root / "sa1b", NUM_SA1B),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(cluster.address).items():
            patch.setenv(name, value)
        for path in (path for path in root.rglob("*") if path.is_file()):
            url = f"s3://corpus/sources/{path.relative_to(root)}"
            store_of(url).put(url, path.read_bytes())
    return {name: _in_bucket(entry, f"{root}/") for name, entry in found.items()}


def _in_bucket(value, root: str):
    if isinstance(value, dict):
        return {name: _in_bucket(each, root) for name, each in value.items()}
    if isinstance(value, list):
        return [_in_bucket(each, root) for each in value]
    return value.replace(root, "s3://corpus/sources/")


@pytest.fixture
def environment(cluster, monkeypatch) -> None:
    """This process, which looks at what was built, reaches the bucket, too."""
    for name, value in s3_environment(cluster.address).items():
        monkeypatch.setenv(name, value)


def configured(out: str, sources: dict, delay_s: float):
    """Two actors of each kind, which two CPUs of a node do not hold alone."""
    two = {"concurrency": [2, 2]}
    config = config_of(
        out,
        **sources,
        beside=Path("/tmp"),
        images_per_shard=2,
        captioner={"delay_s": delay_s, "batch_images": 1, "concurrency": [4, 4]},
        judge=dict(two),
        segmenter=dict(two),
        io=two,
    )
    return config.model_copy(update={"captioner": config.captioner.model_copy(update={"num_cpus": 0.6})})


def start(cluster: Apart, config, log_path: Path) -> subprocess.Popen:
    """What `paracaption build` does, on the first node; without Prefect, which is not what is tested here."""
    name = f"/tmp/{config.out.rpartition('/')[2]}.yaml"
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert cluster.run(0, "tee", name, given=text).returncode == 0
    script = "import sys; from paracaption.pipeline.executor.build import build; "
    script += "build(sys.argv[1], ray_address=sys.argv[2])"
    command = [sys.executable, "-c", script, name, f"127.0.0.1:{cluster.port}"]
    with open(log_path, "wb") as log_file:
        return subprocess.Popen(
            cluster.on(0, *command), cwd=ROOT, env=cluster.env, stdout=log_file, stderr=log_file
        )


def hosts(out: str, worker: str) -> set[str]:
    """The nodes on which workers of a kind have worked, by the names of their events."""
    found = set()
    for run in files.list_names(f"{out}/events"):
        for name in files.list_names(f"{out}/events/{run}"):
            found |= {node for node in NODES if name.startswith(f"{worker}-{node}-")}
    return found


def test_what_one_node_writes_the_other_does_not_see(cluster):
    for number, folder in ((number, folder) for number in (0, 1) for folder in PRIVATE):
        path = f"{folder}/written-by-{NODES[number]}"
        assert cluster.run(number, "touch", path).returncode == 0
        assert cluster.run(number, "test", "-e", path).returncode == 0
        assert cluster.run(1 - number, "test", "-e", path).returncode == 1
        assert not Path(path).exists()
    names = [cluster.run(number, "cat", "/proc/sys/kernel/hostname").stdout.strip() for number in (0, 1)]
    assert names == [*NODES]


def test_the_doctor_looks_at_the_bucket_from_both_nodes(cluster, sources, environment):
    config = configured("s3://corpus/examined", sources, 0.0)
    assert cluster.run(0, "tee", "/tmp/d.yaml", given=yaml.safe_dump(config.model_dump(mode="json"))).stdout
    command = [sys.executable, "-m", "paracaption.flows.cli", "doctor", "/tmp/d.yaml"]
    said = cluster.run(0, *command, "--ray-address", f"127.0.0.1:{cluster.port}")
    assert said.returncode == 0, said.stdout + said.stderr
    for node in NODES:
        assert f"out on {node}" in said.stdout and f"scratch on {node}" in said.stdout
    assert not control(cluster.address, "objects", prefix="examined")


def test_both_nodes_build_both_subsets_and_the_files_are_those_of_a_build_here(
    cluster, sources, environment, tmp_path
):
    out = "s3://corpus/both"
    building = start(cluster, configured(out, sources, 0.3), tmp_path / "build.log")
    assert building.wait(400) == 0, (tmp_path / "build.log").read_text()[-3000:]
    here = configured("memory://here/both", sources, 0.0)
    driver.build(here, LocalEngine())
    assert committed_in_bucket(out) == committed_in_bucket(here.out)
    report = verify.verify(out)
    assert report.ok and report.regions == 4 * (NUM_COCONUT + NUM_SA1B), report.text()
    captions = [cluster.run(number, "cat", "/tmp/captioner.log").stdout.split() for number in (0, 1)]
    assert captions[0] and captions[1], "both nodes have captioned"
    assert len({*captions[0], *captions[1]}) == len(captions[0]) + len(captions[1]) == report.regions
    assert hosts(out, "caption") == {*NODES}
    objects = control(cluster.address, "objects", prefix="both")
    assert not [key for key in objects if "/journal/" in key or "/stack-" in key or "check-" in key]
    for number in (0, 1):
        left = cluster.run(number, "find", "/tmp", "-path", "*staged*", "-type", "f").stdout
        assert left == "", "nothing is left staged"


def test_the_loss_of_a_node_in_mid_build_loses_nothing(cluster, sources, environment, tmp_path):
    out = "s3://corpus/lost"
    building = start(cluster, configured(out, sources, 1.0), tmp_path / "build.log")
    try:
        end = time.monotonic() + 300
        while not (log.exists(out) and len(log.read_state(out).units) >= 2):
            assert building.poll() is None, (tmp_path / "build.log").read_text()[-3000:]
            assert time.monotonic() < end, "nothing was committed"
            time.sleep(0.2)
        assert cluster.actors(0) and cluster.actors(1)
        cluster.kill(1)
        assert building.wait(400) == 0, (tmp_path / "build.log").read_text()[-3000:]
    finally:
        building.kill()
        building.wait()
    report = verify.verify(out)
    assert report.ok and report.regions == 4 * (NUM_COCONUT + NUM_SA1B), report.text()
    assert committed_in_bucket(out) == committed_in_bucket("s3://corpus/both")
