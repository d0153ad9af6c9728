"""The Prefect flow end to end, with the embedded server and test backends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paracaption.pipeline.corpus import plots, verify
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.schemas.errors import ConfigError, EngineLost, IntegrityError
from tests.building import calls, committed, config_of
from tests.synthetic import write_coconut, write_sa1b

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def machinery(prefect_server, ray_cluster):
    """Prefect's server on a database of its own, and one local Ray."""


@pytest.fixture
def local_engine():
    """The flow with the engine of this process, where Ray is not the point."""
    from paracaption.flows import callbacks

    token = callbacks.engine.set(LocalEngine())
    yield
    callbacks.engine.reset(token)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    return {"coconut": write_coconut(root / "coconut", 8), "sa1b": write_sa1b(root / "sa1b", 4)}


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory):
    """A configuration whose corpus the flow has built, and what the flow returned."""
    from paracaption.flows.build import build_corpus

    config = config_of(tmp_path_factory.mktemp("built") / "out", **sources)
    return config, build_corpus(config)


def artifacts(key: str) -> list:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        return client.read_artifacts(artifact_filter=wanted)


def test_the_flow_builds_merges_and_returns_the_statistics(built, tmp_path):
    config, summary = built
    out = Path(config.out)
    assert verify.verify(out).ok, verify.verify(out).text()
    assert json.loads((out / "stats.json").read_text()) == json.loads(json.dumps(summary))
    assert (out / "README.md").exists() and (out / "config.yaml").exists()


def test_the_live_view_and_the_card_are_artifacts(built):
    for subset, units in (("coconut", 2), ("sa1b", 1)):
        progress = artifacts(f"{subset}-units")
        assert progress and progress[0].type == "progress" and float(progress[0].data) == 100.0
        rows = json.loads(artifacts(f"{subset}-stages")[0].data)
        assert rows[0]["stage"] == "source" and rows[-1]["stage"] == "write"
        assert {row["units"] for row in rows} == {units}
    assert "coconut" in artifacts("dataset-card")[0].data


@pytest.mark.soak
def test_the_card_of_a_corpus_in_a_bucket_shows_its_plots(tmp_path, sources, local_engine, memory_out):
    from paracaption.flows.build import build_corpus

    summary = build_corpus(config_of(memory_out, beside=tmp_path, coconut=sources["coconut"]))
    assert summary["kept"] == 32 and verify.verify(memory_out).ok
    newest = max(artifacts("dataset-card"), key=lambda artifact: artifact.created)
    assert newest.data.count("](data:image/png;base64,") == len(plots.NAMES)
    assert float(max(artifacts("coconut-units"), key=lambda artifact: artifact.updated).data) == 100.0


def test_a_second_run_has_nothing_to_do(built):
    from paracaption.flows.build import build_corpus

    config, _ = built
    out = Path(config.out)
    before, paid = committed(out), len(calls(out.parent / "captioner.log"))
    build_corpus(config)
    assert committed(out) == before
    assert len(calls(out.parent / "captioner.log")) == paid


@pytest.mark.soak
def test_limit_images_plans_so_many_and_another_limit_is_refused_with_both_numbers(
    tmp_path, sources, local_engine
):
    from paracaption.flows.build import build_corpus

    config = config_of(tmp_path / "out", coconut=sources["coconut"])
    build_corpus(config, limit_images=3)
    manifest = json.loads((tmp_path / "out/coconut/manifests/coconut-000000.json").read_text())
    assert len(manifest["images"]) == 3
    assert len(calls(tmp_path / "captioner.log")) == 12
    before = committed(tmp_path / "out")
    with pytest.raises((ConfigError, IntegrityError), match="limit of images was 3, is now 5; "):
        build_corpus(config, limit_images=5)
    assert committed(tmp_path / "out") == before


@pytest.mark.soak
def test_retry_failed_builds_units_with_errors_again(tmp_path, sources, local_engine):
    from paracaption.flows.build import build_corpus

    fixed = tmp_path / "fixed"
    misbehave = {"000000000005": f"raise-unless:{fixed}"}
    config = config_of(tmp_path / "out", coconut=sources["coconut"], captioner={"misbehave": misbehave})
    first = build_corpus(config)
    assert first["subsets"]["coconut"]["counts"]["kept"] == 28
    fixed.touch()
    assert build_corpus(config)["subsets"]["coconut"]["counts"]["kept"] == 28
    again = build_corpus(config, retry_failed=True)
    assert again["subsets"]["coconut"]["counts"]["kept"] == 32
    assert len(calls(tmp_path / "captioner.log")) == 28 + 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit_imags": 3},
        {"limit_images": "many"},
        {"retry_failed": "perhaps"},
        {"config": {"out": "x", "coconut": [], "min_iuo": 1}},
        {"config": "build.yaml"},
    ],
)
def test_wrong_parameters_are_refused_before_the_run(tmp_path, sources, wrong):
    from paracaption.flows.build import build_corpus

    config = config_of(tmp_path / "out", **sources)
    right = {"config": config.model_dump(mode="json")}
    build_corpus.validate_parameters(right)
    with pytest.raises(Exception, match=r"(?i)valid|unexpected|permitted|parameter"):
        build_corpus.validate_parameters({**right, **wrong})


@pytest.mark.soak
def test_a_served_flow_checks_its_parameters_in_a_process_of_its_own(tmp_path, sources):
    """`serve` pickles the flow for the process of each run; what it does not take along is missing there."""
    import cloudpickle

    from paracaption.flows.build import build_corpus

    config = config_of(tmp_path / "out", **sources)
    parameters = {"config": config.model_dump(mode="json"), "limit_images": "3"}
    (tmp_path / "flow.pickle").write_bytes(cloudpickle.dumps((build_corpus, parameters)))
    script = """
import pickle, sys
flow, parameters = pickle.load(open(sys.argv[1], "rb"))
checked = flow.validate_parameters(parameters)
print(type(checked["config"]).__name__, checked["limit_images"])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "flow.pickle")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["BuildConfig", "3"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (ConfigError("no such folder"), 1),
        (IntegrityError("another plan"), 1),
        (EngineLost("the engine died"), 3),
        (ConnectionError("the server is away"), 3),
        (OSError("the file system is away"), 1),
    ],
)
@pytest.mark.soak(keep=1)
def test_what_a_retry_can_mend_is_tried_three_times_and_a_mistake_once(error, attempts):
    from prefect import flow

    from paracaption.flows.steps import step

    tried = []

    @step
    def failing():
        tried.append(1)
        raise error

    @flow
    def trial():
        failing.with_options(retry_delay_seconds=0)()

    with pytest.raises(type(error)):
        trial()
    assert len(tried) == attempts


@pytest.mark.soak
def test_a_subset_may_have_a_name_that_is_no_key_of_prefect(sources, tmp_path, local_engine):
    from paracaption.flows.build import build_corpus

    subsets = {"My_photos.v1": {"sources": [{"source": "sa1b", **sources["sa1b"]}]}}
    summary = build_corpus(config_of(tmp_path / "out", subsets=subsets))
    assert summary["subsets"]["My_photos.v1"]["counts"]["images"] == 4
    assert artifacts("my-photos-v1-units") and artifacts("my-photos-v1-stages")
