"""`configs/cluster/slurm.sbatch` with stand-ins for Slurm's commands, which say what they were asked."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from paracaption.pipeline.corpus import verify
from tests.building import calls, config_of
from tests.machinery import alone
from tests.synthetic import write_coconut

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "configs" / "cluster" / "slurm.sbatch"
NUM_IMAGES = 24

SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
while [[ $1 == -* ]]; do [ "$1" = -w ] && shift; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
[ "$2" != hostnames ] || printf 'node-1\\nnode-2\\nnode-3\\n' | head -n "$SLURM_JOB_NUM_NODES"
"""
HOSTNAME = """#!/bin/bash
echo "${ADDRESS:-10.1.2.3 10.9.9.9}"
"""
RAY = """#!/bin/bash
trap 'echo "ray ended" >> "$CALLS"; exit 0' TERM
echo "ray $* token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE usage $RAY_USAGE_STATS_ENABLED" >> "$CALLS"
while true; do sleep 0.05; done
"""
PARACAPTION = """#!/bin/bash
trap 'echo "build stopped" >> "$CALLS"; exit 143' TERM
echo "paracaption $* address ${RAY_ADDRESS:-none}" >> "$CALLS"
[ -z "$BUILD_ENDS" ] || exit "$BUILD_ENDS"
while true; do sleep 0.05; done
"""
PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then echo 0123456789abcdef; exit 0; fi
while [ "$(grep -c '^ray start' "$CALLS")" -lt "$3" ]; do sleep 0.05; done
echo "wait for $3 at $2" >> "$CALLS"
exit "${NODES_FAIL:-0}"
"""


class Job:
    """An allocation: its environment, and what Slurm's and other commands were asked in it."""

    def __init__(self, folder: Path, stubs: dict[str, str], num_nodes: int = 3, **env: str):
        (folder / "bin").mkdir(parents=True)
        for name, text in stubs.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "bin" / "activate").write_text(f'export PATH="{folder / "bin"}:$PATH"\n')
        self.calls = folder / "calls"
        self.calls.touch()
        self.number = str(random.randrange(10**6, 10**7))
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))},
            "CALLS": str(self.calls),
            "PARACAPTION_VENV": str(folder),
            "RAY_ADDRESS": "elsewhere:1",
            "SLURM_JOB_ID": self.number,
            "SLURM_JOB_NODELIST": f"node-[1-{num_nodes}]",
            "SLURM_JOB_NUM_NODES": str(num_nodes),
            "SLURM_CPUS_PER_TASK": "2",
            **env,
        }
        self.port = 20000 + int(self.number) % 12000
        self.scratch = Path(f"/tmp/paracaption-{self.number}")

    def start(self, *arguments: str, output: int = subprocess.PIPE) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments], env=self.env, cwd=ROOT, text=True, stdout=output, stderr=output
        )

    def wait_for(self, line: str, process: subprocess.Popen, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while line not in self.calls.read_text():
            assert process.poll() is None and time.monotonic() < end, self.calls.read_text()
            time.sleep(0.02)

    def asked(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def job(tmp_path):
    stubs = {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME, "ray": RAY}
    return lambda **env: Job(tmp_path / "job", {**stubs, "paracaption": PARACAPTION, "python": PYTHON}, **env)


def test_the_head_is_up_before_the_other_nodes_and_all_are_before_the_build(job):
    job = job(BUILD_ENDS="0")
    process = job.start("corpus.yaml", "--retry-failed")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    address, secret = f"10.1.2.3:{job.port}", "token 16 token usage 0"
    common = f"ray start --block --disable-usage-stats --temp-dir={job.scratch} --num-cpus=2"
    head = f"--head --node-ip-address=10.1.2.3 --port={job.port} --include-dashboard=false"
    assert [line for line in job.asked() if not line.startswith(("srun", "scontrol"))] == [
        f"{common} {head} {secret}",
        f"wait for 1 at {address}",
        *[f"{common} --address={address} {secret}"] * 2,
        f"wait for 3 at {address}",
        f"paracaption build corpus.yaml --retry-failed --ray-address {address} address none",
        *["ray ended"] * 3,
    ]
    assert 19_999 < job.port < 32_768, "between the ports of Ray's workers and those of outgoing connections"


def test_each_node_is_one_step_of_its_own_with_all_cores_of_its_task(job):
    job = job(BUILD_ENDS="0")
    job.start("corpus.yaml").communicate(timeout=60)
    step = "srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=2 -w"
    steps = [line for line in job.asked() if line.startswith("srun")]
    started = [line.partition(" ray start")[0] for line in steps if " ray start" in line]
    assert sorted(started) == [f"{step} node-1", f"{step} node-2", f"{step} node-3"]
    assert f"{step} node-1 hostname --ip-address" in steps
    assert [line for line in steps if " rm " in line] == [
        f"{step} node-{number} rm -rf {job.scratch}" for number in (1, 2, 3)
    ]
    assert job.asked()[0] == "scontrol show hostnames node-[1-3]"


def test_near_the_time_limit_the_build_is_stopped_then_ray_and_the_job_is_requeued(job):
    job = job(BUILD_ENDS="")
    process = job.start("corpus.yaml")
    job.wait_for("paracaption build", process)
    process.send_signal(signal.SIGUSR1)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    ends = ["build stopped", "ray ended", "ray ended", "ray ended", f"scontrol requeue {job.number}"]
    assert [line for line in job.asked() if "ended" in line or "stopped" in line or "requeue" in line] == ends
    assert "goes back into the queue" in out and not any(" rm " in line for line in job.asked())


def test_a_cancelled_job_is_stopped_and_not_requeued(job):
    job = job(BUILD_ENDS="")
    process = job.start("corpus.yaml")
    job.wait_for("paracaption build", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert [line for line in job.asked() if "ended" in line or "stopped" in line or "requeue" in line] == [
        "build stopped",
        *["ray ended"] * 3,
    ]


def test_a_build_that_ends_as_the_limit_comes_is_not_requeued(job):
    job = job(BUILD_ENDS="")
    stub = Path(job.env["PARACAPTION_VENV"]) / "bin" / "paracaption"
    stub.write_text(PARACAPTION.replace("exit 143", "exit 0"))
    process = job.start("corpus.yaml")
    job.wait_for("paracaption build", process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 0 and not any("requeue" in line for line in job.asked())


@pytest.mark.parametrize("code", [1, 2])
def test_an_error_of_the_build_is_the_code_of_the_job_which_is_not_requeued(job, code):
    job = job(BUILD_ENDS=str(code))
    process = job.start("corpus.yaml")
    process.communicate(timeout=60)
    assert process.returncode == code and job.asked().count("ray ended") == 3
    assert not any("requeue" in line for line in job.asked())


def test_a_job_that_was_restarted_too_often_ends_and_says_how_to_go_on(job):
    job = job(BUILD_ENDS="", SLURM_RESTART_COUNT="5", MAX_RESTARTS="5")
    process = job.start("corpus.yaml")
    job.wait_for("paracaption build", process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "submit it again to continue" in errors
    assert not any("requeue" in line for line in job.asked())


def test_nodes_that_do_not_come_up_end_the_job_before_the_build(job):
    job = job(NODES_FAIL="1")
    process = job.start("corpus.yaml")
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert not any(line.startswith("paracaption") for line in job.asked())
    assert job.asked().count("ray ended") == 1 and not any("node-2 ray" in line for line in job.asked())


def test_a_name_that_leads_to_loopback_is_refused_unless_the_address_is_given(job, tmp_path):
    process = job(ADDRESS="127.0.1.1", BUILD_ENDS="0").start("corpus.yaml")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "set HEAD_IP to its address" in errors


def test_a_node_on_which_ray_does_not_start_ends_the_job_at_once(job):
    job = job()
    stubs = Path(job.env["PARACAPTION_VENV"]) / "bin"
    (stubs / "ray").write_text("#!/bin/bash\necho 'the port is taken' >&2\nexit 1\n")
    (stubs / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    process = job.start("corpus.yaml")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "the port is taken" in errors
    assert "Ray did not start on one of the nodes; see above" in errors


def test_without_a_configuration_the_script_says_how_it_is_called(job):
    process = job().start()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.startswith("usage: sbatch slurm.sbatch CONFIG")


def test_without_an_allocation_the_script_says_that_it_is_for_sbatch(job):
    job = job()
    job.env.pop("SLURM_JOB_ID")
    process = job.start("corpus.yaml")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "submit it with sbatch" in errors and job.asked() == []


def test_slurm_is_asked_for_a_signal_a_requeue_and_a_log_that_is_kept():
    lines = SCRIPT.read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    last_request = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last_request < first_command, "Slurm reads no #SBATCH after the first command"
    assert {"--signal=B:USR1@180", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(asked)


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_on_two_nodes_a_stopped_build_is_continued_by_the_next_run(tmp_path):
    job = Job(
        tmp_path / "job",
        {"srun": SRUN, "scontrol": SCONTROL},
        num_nodes=2,
        HEAD_IP="127.0.0.1",
        PYTHONPATH=str(ROOT),
        PREFECT_HOME=str(tmp_path / "prefect"),
    )
    job.env.pop("PREFECT_API_URL", None)
    activate = tmp_path / "job" / "bin" / "activate"
    activate.write_text(f'export PATH="{tmp_path / "job" / "bin"}:{Path(sys.executable).parent}:$PATH"\n')
    config = config_of(
        tmp_path / "out",
        coconut=write_coconut(tmp_path / "coconut", NUM_IMAGES),
        images_per_shard=2,
        captioner={"delay_s": 1.0, "concurrency": [2, 2]},
        judge={"concurrency": [2, 2]},
        segmenter={"concurrency": [2, 2]},
        io={"concurrency": [2, 2]},
    )
    path = tmp_path / "corpus.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    manifests = tmp_path / "out" / "coconut" / "manifests"
    log = tmp_path / "job.log"
    with alone(), open(log, "w") as output:
        process = job.start(str(path), output=output.fileno())
        end = time.monotonic() + 400
        while process.poll() is None and len(list(manifests.glob("coconut-*.json"))) < 2:
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == 0, log.read_text()[-3000:]
        assert f"scontrol requeue {job.number}" in job.asked(), log.read_text()[-3000:]
        assert "of 12 units are committed" in log.read_text() and left(job) == []
        job.env["SLURM_RESTART_COUNT"] = "1"
        process = job.start(str(path), output=output.fileno())
        assert process.wait(400) == 0, log.read_text()[-3000:]
    assert left(job) == [] and not job.scratch.exists()
    assert job.asked().count(f"scontrol requeue {job.number}") == 1
    report = verify.verify(tmp_path / "out")
    assert report.ok, report.text()
    assert report.regions == 4 * NUM_IMAGES
    assert len(set(calls(tmp_path / "captioner.log"))) == 4 * NUM_IMAGES


def left(job: Job) -> list[str]:
    """Processes of the job that are still there a moment later."""
    for _ in range(50):
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if str(job.scratch) in line or f"127.0.0.1:{job.port}" in line:
                found.append(line)
        if not found:
            break
        time.sleep(0.2)
    return found
