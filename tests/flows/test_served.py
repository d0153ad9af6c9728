"""Access checks against served flows: whoever reaches Prefect's API chooses parameters, and no code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paracaption.flows import served
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.evaluation import EvaluateConfig
from paracaption.schemas.training import TrainConfig
from tests.machinery import alone
from tests.stopped import HEEDING_SIGNALS
from tests.synthetic import write_coconut

ROOT = Path(__file__).resolve().parents[2]

CODE = (
    *("os:system", "subprocess:Popen", "builtins:exec", "builtins:eval", "importlib:import_module"),
    *("this:s", "antigravity:webbrowser", "pty:spawn", "shutil:rmtree", "runpy:run_path", "code:interact"),
    *("tests.backends:InstantCaptioner", "os.path:join", "classical ", "CLASSICAL", "../classical", "os", ""),
    "paracaption.pipeline.models.embedded.classical:ClassicalCaptioner",
    "model_training.toy:TruthCaptioner",
)
ENVIRONMENTS: tuple[dict[str, Any], ...] = (
    {"py_executable": "touch ran"},
    {"py_executable": "/bin/sh"},
    {"pip": ["evil"]},
    {"pip": {"packages": ["evil"]}},
    {"uv": ["evil"]},
    {"conda": "evil.yaml"},
    {"working_dir": "https://evil.example/code.zip"},
    {"py_modules": ["s3://evil/module.zip"]},
    {"worker_process_setup_hook": "os.abort"},
    {"env_vars": {"LD_PRELOAD": "/evil/evil.so"}},
    {"env_vars": {"PYTHONPATH": "/evil"}},
    {"container": {"image": "evil"}},
    {"image_uri": "evil"},
    {"mpi": {"args": ["-n", "1", "evil"]}},
)
ENGINES: tuple[dict[str, Any], ...] = (
    {"worker_cls": "evil.Worker"},
    {"worker_extension_cls": "evil.Worker"},
    {"scheduler_cls": "evil.Scheduler"},
    {"distributed_executor_backend": "evil.Executor"},
    {"logits_processors": ["evil:Processor"]},
    {"kv_transfer_config": {"kv_connector_module_path": "evil"}},
    {"compilation_config": {"backend": "evil.compile"}},
    {"compilation_config": {"inductor_passes": {"evil.module": {"a": 1}}}},
    {"reasoning_parser_plugin": "/evil/evil.py"},
    {"tokenizer_mode": "custom"},
    {"hf_config_path": "evil/repo"},
    {"dtype": "evil.module:dtype"},
    {"speculative_config": {"model": "evil/repo"}},
)
SERVERS: tuple[dict[str, Any], ...] = (
    {"base_url": "http://evil.example/v1"},
    {"base_url": "http://169.254.169.254/latest"},
    {"api_key_env": "AWS_SECRET_ACCESS_KEY"},
)
ADDRESSES = ("10.9.9.9:6379", "evil.example:6379", "ray://evil.example:10001", "local", "AUTO", "")

BUILDS: list[tuple[dict[str, Any], str]] = [
    *(({"captioner": {"name": name}}, "captioner.name") for name in CODE),
    *(({protocol: {"name": "os:system"}}, f"{protocol}.name") for protocol in ("judge", "segmenter")),
    *(({"judge": {"name": "lexical", "runtime_env": each}}, "judge.runtime_env") for each in ENVIRONMENTS),
    *(
        (
            {"captioner": {"name": "gar", "options": {"model": "x", "engine": each}}},
            "captioner.options.engine",
        )
        for each in ENGINES
    ),
    *(
        ({"judge": {"name": "openai", "options": {"model": "x", **each}}}, "judge.options.")
        for each in SERVERS
    ),
]


def build_config(tmp_path: Path, **changes: Any) -> BuildConfig:
    values = {"out": str(tmp_path / "out"), "coconut": [{"masks": "m", "annotations": "a", "photos": "p"}]}
    return BuildConfig.model_validate({**values, **changes})


@pytest.fixture
def in_a_served_run(monkeypatch):
    """As in the process of a run that a deployment was asked for."""
    monkeypatch.setattr(served, "is_served", lambda: True)
    monkeypatch.delenv(served.ALLOWED, raising=False)


@pytest.mark.parametrize(("changes", "named"), BUILDS)
def test_a_served_build_loads_runs_and_sends_nothing_that_deploy_did_not_allow(
    tmp_path, in_a_served_run, changes, named
):
    from paracaption.flows.build import build_corpus

    before = set(sys.modules)
    with pytest.raises(
        ConfigError, match=r"not allowed in a served flow; to allow it, start `paracaption deploy` again"
    ) as refused:
        build_corpus.fn(build_config(tmp_path, **changes))
    assert str(refused.value).startswith(named)
    assert not {"this", "antigravity", "pty", "evil", "tests.backends"} & (set(sys.modules) - before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("this:Stage", "subsets.mine.recipe.stage.stage"),
        ({"stage": "antigravity:Stage", "id": "a"}, "subsets.mine.recipe.a.stage"),
        (
            {"vote": ["clean_text", ["whole_objects", {"stage": "this:S", "id": "a"}]]},
            "subsets.mine.recipe.a",
        ),
        ({"stage": "caption", "captioner": {"name": "this:C"}}, "subsets.mine.recipe.caption.captioner.name"),
        (
            {"stage": "caption", "id": "b", "captioner": {"name": "gar", "options": {"engine": ENGINES[0]}}},
            "subsets.mine.recipe.b.captioner.options.engine",
        ),
        (
            {"stage": "verify_category", "judge": {"name": "openai", "options": SERVERS[0]}},
            "subsets.mine.recipe.verify_category.judge.options.base_url",
        ),
    ],
)
def test_a_served_build_has_no_stage_and_no_backend_of_a_stage_that_was_not_allowed(
    tmp_path, in_a_served_run, entry, named
):
    from paracaption.flows.build import build_corpus

    before = set(sys.modules)
    subsets = {"mine": {"sources": [{"source": "sa1b", "paths": ["x.tar"]}], "recipe": [entry]}}
    config = BuildConfig.model_validate({"out": str(tmp_path / "out"), "subsets": subsets})
    with pytest.raises(ConfigError, match="not allowed in a served flow") as refused:
        build_corpus.fn(config)
    assert str(refused.value).startswith(named)
    assert not {"this", "antigravity"} & (set(sys.modules) - before)
    allowed = {"this:Stage", "antigravity:Stage", "this:S", "this:C", "evil.Worker", SERVERS[0]["base_url"]}
    served.refuse(config, None, allowed)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_served_run_connects_to_no_cluster_of_its_callers(tmp_path, in_a_served_run, address):
    from paracaption.flows.build import build_corpus
    from paracaption.flows.train import train_captioner

    training = {"out": str(tmp_path / "out"), "model": {"tokenizer": "toy"}, "steps": 1}
    training["corpora"] = [{"corpus": "c"}]
    with pytest.raises(ConfigError, match="ray_address"):
        build_corpus.fn(build_config(tmp_path), ray_address=address)
    with pytest.raises(ConfigError, match="ray_address"):
        train_captioner.fn(TrainConfig.model_validate(training), ray_address=address)


@pytest.mark.parametrize("name", ["os:system", "tests.backends:InstantCaptioner", "sub:process"])
def test_a_served_evaluation_loads_no_code(tmp_path, in_a_served_run, name):
    from paracaption.flows.evaluate import evaluate_captioner

    values = {"out": str(tmp_path / "out"), "label": "x", "captioner": {"name": name}}
    values["benchmarks"] = [{"name": "b", "kind": "dlc", "folder": "f"}]
    with pytest.raises(ConfigError, match=r"^captioner\.name: .* `--allow VALUE`"):
        evaluate_captioner.fn(EvaluateConfig.model_validate(values))
    ours = {**values, "captioner": {"name": "predictions", "options": {"path": "p"}}}
    judge = {"name": "vllm", "options": {"model": "m", "engine": {"worker_cls": "evil.Worker"}}}
    with pytest.raises(ConfigError, match=r"^judge\.options\.engine\.worker_cls"):
        evaluate_captioner.fn(EvaluateConfig.model_validate({**ours, "judge": judge}))


def test_a_served_training_fetches_no_kernel(tmp_path, in_a_served_run):
    from paracaption.flows.train import train_captioner

    model = {"tokenizer": "toy", "config": {"text_config": {"attn_implementation": "evil/kernel"}}}
    values = {"out": str(tmp_path), "model": model, "corpora": [{"corpus": "c"}], "steps": 1}
    with pytest.raises(ConfigError, match="attn_implementation: 'evil/kernel'"):
        train_captioner.fn(TrainConfig.model_validate(values))


def test_what_is_built_in_and_what_deploy_allowed_passes(tmp_path):
    engine = {
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.5,
    }
    gar = {"name": "gar", "options": {"model": "/models/GAR-8B", "engine": engine}, "num_gpus": 1}
    lexical = {"name": "lexical"}
    served.refuse(build_config(tmp_path, captioner=gar, judge=lexical), "auto", ())
    own = {"name": "my_lab.models:Mine", "options": {"engine": {"a": 1}}}
    python = {
        "name": "vllm",
        "options": {"model": "m"},
        "runtime_env": {"py_executable": "/opt/vllm/bin/python"},
    }
    config = build_config(tmp_path, captioner=own, judge=python)
    allowed = {"my_lab.models:Mine", "/opt/vllm/bin/python", "10.0.0.1:6379"}
    served.refuse(config, "10.0.0.1:6379", allowed)
    for one in allowed:
        with pytest.raises(ConfigError):
            served.refuse(config, "10.0.0.1:6379", allowed - {one})


def test_a_flow_that_is_called_and_not_served_may_name_anything(tmp_path, monkeypatch):
    monkeypatch.delenv(served.ALLOWED, raising=False)
    served.check_run(
        build_config(tmp_path, captioner={"name": "tests.backends:InstantCaptioner"}), "10.0.0.1:1"
    )


def test_there_are_fifty_access_checks():
    assert len(BUILDS) + len(ADDRESSES) >= 50


# With a real server, as a stranger who reaches its API.

EVIL = """
def step(*_, **__):
    open({mark!r}, "w").close()

step()
from prefect import flow

@flow
def build_corpus(*_, **__):
    step()
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(500)
@pytest.mark.soak
def test_through_the_api_neither_parameters_nor_an_edited_deployment_run_code(
    tmp_path, prefect_server, monkeypatch
):
    """`deploy` runs as it does for everybody; the API is used as Prefect's own client uses it."""
    import httpx
    from prefect.settings import PREFECT_API_URL

    api = PREFECT_API_URL.value()
    mark = tmp_path / "RAN"
    command = [
        *HEEDING_SIGNALS, sys.executable, "-m", "paracaption.flows.cli", "deploy", "--name", "stranger",
    ]  # fmt: skip
    environment = {**os.environ, "PREFECT_API_URL": api, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with alone(), (tmp_path / "deploy.log").open("w") as log:
        deploy = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)
        try:
            deployment = _eventually(lambda: httpx.get(f"{api}/deployments/name/build-corpus/stranger"))
            source = write_coconut(tmp_path / "source", 2)
            values = {"out": str(tmp_path / "out"), "coconut": [source], "masks": {"min_area_px": 16}}
            asked = {
                "os": {"captioner": {"name": "os:system", "options": {"command": f"touch {mark}"}}},
                "python": {"judge": {"name": "lexical", "runtime_env": {"py_executable": f"touch {mark}"}}},
            }
            (tmp_path / "evil.py").write_text(EVIL.format(mark=str(mark)))
            shell = {"prefect.deployments.steps.run_shell_script": {"script": f"touch {mark}"}}
            edit = {
                "entrypoint": f"{tmp_path}/evil.py:build_corpus",
                "path": str(tmp_path),
                "pull_steps": [shell],
            }
            url = f"{api}/deployments/{deployment['id']}"
            _eventually(lambda: httpx.patch(url, json=edit))
            runs = {}
            for name, changes in asked.items():
                given = {"config": {**values, **changes}}
                body = {"parameters": given, "enforce_parameter_schema": False}
                made = _eventually(lambda body=body: httpx.post(f"{url}/create_flow_run", json=body))
                runs[name] = made["id"]
            for name, run in runs.items():
                found = _eventually(lambda run=run: httpx.get(f"{api}/flow_runs/{run}"), _is_over)
                assert found["state"]["type"] == "FAILED", (name, found["state"])
                assert "`--allow VALUE`" in found["state"]["message"], found["state"]
                assert found["name"] == "out"
        finally:
            deploy.send_signal(signal.SIGINT)
            deploy.wait(60)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def _is_over(found: dict[str, Any]) -> bool:
    return found["state"]["type"] in ("FAILED", "COMPLETED", "CRASHED", "CANCELLED")


def _eventually(ask: Any, wanted: Any = lambda _: True) -> dict[str, Any]:
    """What the API answers as soon as it is wanted; a server on a busy machine is away now and then."""
    import httpx

    deadline = time.monotonic() + 240
    while True:
        try:
            answer = ask()
            if answer.is_success and wanted(found := answer.json() if answer.content else {}):
                return found
            said = answer.text
        except httpx.TransportError as error:
            said = str(error)
        assert time.monotonic() < deadline, said[:2000]
        time.sleep(0.5)
