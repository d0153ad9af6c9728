"""`docs/cluster.md`: its commands, its YAML, and what it says about a job of Ray."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner as ClickRunner
from typer.testing import CliRunner as TyperRunner

from paracaption.flows.cli.app import app
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import verify
from paracaption.pipeline.io import scratch
from tests.building import config_of
from tests.machinery import alone
from tests.synthetic import write_coconut
from tests.test_cluster import free_ports

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
MANIFESTS = [ROOT / "configs" / "cluster" / name for name in ("rayjob.yaml", "rayjob-bucket.yaml")]

# The names of KubeRay 1.7's `ray.io_rayjobs.yaml`, as far as the manifest may need them.
RAY_JOB = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "entrypoint",
    "entrypointNumCpus",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
}
RAY_CLUSTER = {"authOptions", "enableInTreeAutoscaling", "headGroupSpec", "rayVersion", "workerGroupSpecs"}
HEAD = {"labels", "rayStartParams", "resources", "serviceType", "template"}
WORKER = {"groupName", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas", "template"}
POD = {"containers", "initContainers", "nodeSelector", "securityContext", "tolerations", "volumes"}
CONTAINER = {"env", "envFrom", "image", "imagePullPolicy", "name", "ports", "resources", "volumeMounts"}


def bash_lines() -> list[str]:
    """Every command of the page, with continued lines joined and comments cut off."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [stripped for line in lines if (stripped := re.sub(r"\s+#.*", "", line).strip())]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own configuration
def test_every_option_of_a_command_on_the_page_exists():
    """Of our command and of Ray's, by their own help."""
    asked: dict[tuple[str, ...], set[str]] = {}
    for line in bash_lines():
        for part in re.split(r" -- ", line):
            words = shlex.split(part.replace("...", "x"))
            while words and "=" in words[0]:
                words.pop(0)
            if words and words[0] in ("paracaption", "ray"):
                command = tuple(words[: 3 if words[1] == "job" else 2])
                asked.setdefault(command, set()).update(w.split("=")[0] for w in words if w.startswith("--"))
    assert {("ray", "start"), ("ray", "job", "submit"), ("paracaption", "build")} <= set(asked)
    from ray.scripts.scripts import cli as ray_app

    for (program, *command), options in asked.items():
        runner, given = (TyperRunner(), app) if program == "paracaption" else (ClickRunner(), ray_app)
        shown = runner.invoke(given, [*command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0, (program, command, shown.output)
        missing = [each for each in options if not re.search(rf"{each}\b", shown.output)]
        assert missing == [], (program, command)


def test_the_configurations_of_the_page_are_valid():
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    assert len(blocks) == 3
    for block in blocks:
        load_config({"out": "out", "sa1b": [{"paths": ["a.tar"]}], **block})


def test_the_manifest_for_a_bucket_gives_each_pod_credentials_and_bounded_scratch_and_shares_no_volume():
    job = yaml.safe_load(MANIFESTS[1].read_text())
    cluster = job["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    assert len(pods) == 2
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        kinds = {kind for volume in volumes.values() for kind in volume} - {"name"}
        assert kinds <= {"emptyDir", "configMap"}
        (container,) = pod["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}]
        (variable,) = container["env"]
        assert variable["name"] == scratch.VARIABLE
        (name,) = [
            each["name"] for each in container["volumeMounts"] if each["mountPath"] == variable["value"]
        ]
        size = volumes[name]["emptyDir"]["sizeLimit"]
        room = container["resources"]["limits"]["ephemeral-storage"]
        assert size.endswith("Gi") and room.endswith("Gi") and 0 < int(size[:-2]) < int(room[:-2])


def test_ray_is_not_told_to_report_in_any_command_that_starts_something():
    for line in bash_lines():
        assert "ray start" not in line or "--disable-usage-stats" in line
        assert "prefect server start" not in line or "PREFECT_SERVER_ANALYTICS_ENABLED=false" in line
    first_start = PAGE.index("ray start --head")
    assert PAGE.index("export RAY_AUTH_MODE=token") < first_start, "the token comes before the first command"


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_the_manifest_has_only_fields_that_kuberay_knows_and_this_release_of_ray(manifest):
    job = yaml.safe_load(manifest.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and set(job["spec"]) <= RAY_JOB
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) <= RAY_CLUSTER and set(cluster["headGroupSpec"]) <= HEAD
    assert f'"ray[data,default]=={cluster["rayVersion"]}"' in (ROOT / "pyproject.toml").read_text()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups[1:]:
        assert {"groupName", "minReplicas", "maxReplicas", "template"} <= set(group) <= WORKER
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert set(pod) <= POD and pod["securityContext"]["runAsNonRoot"] is True
        mounted = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert set(container) <= CONTAINER
            assert {mount["name"] for mount in container["volumeMounts"]} == mounted
            assert {"requests", "limits"} == set(container["resources"])
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    assert version and images == {f"registry.example/paracaption-gpu:{version[1]}"}
    entry = shlex.split(job["spec"]["entrypoint"])
    assert entry[:2] == ["paracaption", "build"] and entry[-2:] == ["--ray-address", "auto"]


class Head:
    """A Ray with its dashboard, started by the page's command; jobs are sent by the page's commands."""

    def __init__(self, folder: Path):
        self.port, self.dashboard, agent = free_ports(3)
        self.temporary = tempfile.mkdtemp(prefix="rj-")
        bin_folder = Path(sys.executable).parent
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(folder / "prefect"),
        }
        self.env.pop("PREFECT_API_URL", None)
        (start,) = [line for line in bash_lines() if line.startswith("ray start --head")]
        command = start.replace("6379", str(self.port))
        command += f" --dashboard-port {self.dashboard} --temp-dir {self.temporary} --num-cpus 4 --block"
        command += f" --dashboard-agent-listen-port {agent}"  # another Ray here may have the usual one
        self.log = open(folder / "head.log", "wb")
        self.process = subprocess.Popen(shlex.split(command), env=self.env, stdout=self.log, stderr=self.log)

    def is_up(self, folder: Path) -> bool:
        """Wait until the node is up and takes jobs; whether it is."""
        end = time.monotonic() + 400
        while time.monotonic() < end and self.process.poll() is None:
            text = (folder / "head.log").read_text()
            if "Ray runtime started" in text and not self.run("ray job list", folder).returncode:
                return True
            time.sleep(1)
        return False

    def run(self, command: str, folder: Path, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            shlex.split(command), cwd=folder, env=self.env, capture_output=True, text=True, timeout=timeout_s
        )

    def wait_until_done(self, job: str, timeout_s: float = 600) -> str:
        """The status of a job that has ended, as the jobs API says it."""
        request = urllib.request.Request(
            f"{self.env['RAY_API_SERVER_ADDRESS']}/api/jobs/{job}",
            headers={"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"},
        )
        end = time.monotonic() + timeout_s
        while True:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status = json.load(answer)["status"]
            if status not in ("PENDING", "RUNNING"):
                return status
            assert time.monotonic() < end, status
            time.sleep(1)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    with alone():
        for _ in range(3):  # on a busy machine Ray may give up: a node has 30 s to start
            started = Head(folder)
            if started.is_up(folder):
                break
            started.stop()
    yield started
    started.stop()


def submit(job: str, with_folder: bool) -> str:
    """The page's command that submits a job, with or without a folder."""
    (found,) = [
        line
        for line in bash_lines()
        if line.startswith("ray job submit") and ("--working-dir" in line) == with_folder
    ]
    return found.replace("mine", job)


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_jobs_of_ray_behave_as_the_page_says(head, tmp_path):
    source = write_coconut(tmp_path / "coconut", 12)
    config = config_of(tmp_path / "out", coconut=source, images_per_shard=2)
    slow = config_of(
        tmp_path / "slow", coconut=source, images_per_shard=2, captioner={"delay_s": 5.0, "batch_images": 1}
    )
    work = tmp_path / "work"
    work.mkdir()
    (work / "corpus.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    shared = tmp_path / "shared.yaml"
    shared.write_text(yaml.safe_dump(slow.model_dump(mode="json")))

    bare = submit("bare", with_folder=True).replace("--working-dir . ", "")
    assert head.run(bare, work).returncode == 0
    assert head.wait_until_done("bare") == "FAILED"
    assert "corpus.yaml: no such file" in head.run("ray job logs bare", work).stdout

    assert head.run(submit("whole", with_folder=True), work).returncode == 0
    state = head.wait_until_done("whole")
    assert state == "SUCCEEDED", head.run("ray job logs whole", work).stdout[-3000:]
    assert verify.verify(tmp_path / "out").ok
    assert list(Path(head.temporary).glob("session_*/logs/job-driver-whole.log"))

    command = submit("stopped", with_folder=False).replace("/shared/corpus.yaml", str(shared))
    assert head.run(command, tmp_path).returncode == 0
    end = time.monotonic() + 600
    while not list((tmp_path / "slow" / "events").glob("*/driver-*.jsonl")):
        assert time.monotonic() < end, head.run("ray job logs stopped", work).stdout[-3000:]
        time.sleep(1)
    assert head.run("ray job stop stopped", work).returncode == 0
    assert head.wait_until_done("stopped") == "STOPPED"
    said = head.run("ray job logs stopped", work).stdout
    assert "run the same command" in said, said[-3000:]
