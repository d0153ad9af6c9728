"""What release 0.1.0 wrote is read, resumed and verified by this one, and no model is asked again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import export, reader, verify, work_list
from paracaption.pipeline.corpus.events import EventReader
from paracaption.pipeline.corpus.pending import find_pending_units
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.explorer.catalog import Catalog
from paracaption.pipeline.explorer.reviews import Reviews
from paracaption.pipeline.sources.registry import open_source
from paracaption.pipeline.stages import recipes
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.evidence import EvidenceStore

# Its configuration has the names of its time.
pytestmark = pytest.mark.filterwarnings("default::paracaption.schemas.renames.RenamedWarning")

HERE = Path(__file__).parent / "v0_1"
SAMPLES = Path(__file__).resolve().parents[2] / "samples"
REGIONS = {"coconut": 24, "sa1b": 16}

EVIDENCE = {
    "coconut": {"caption": "5cbf6a8695e844f9", "verify_category": "127d033c6a5e8790"},
    "sa1b": {
        "caption": "5cbf6a8695e844f9",
        "extract_category": "266b56d61029a0bb",
        "agree_with_segmenter": "87be0d78ce0c0f70",
    },
}
"""Digests of the demo's model stages. They never change: evidence that was paid for is found by them."""

RECIPES = {"coconut": "d1f1dad032c90c0b", "sa1b": "929a824ad1514a63"}
"""Digests of the demo's recipes. They change only with `RECIPE_VERSION`, and units are then rebuilt."""


@pytest.fixture
def home(tmp_path) -> Path:
    """A copy that may be changed, at another place than where it was written."""
    return shutil.copytree(HERE, tmp_path / "v0_1")


def test_the_demos_recipe_and_evidence_digests_are_those_of_release_0_1():
    config = load_config(SAMPLES / "build.yaml")
    for subset in config.subsets:
        recipe = recipes.recipe_of(config, subset)
        models = [stage for stage in recipe if isinstance(stage, ModelStage)]
        assert {stage.name: stage.evidence_digest for stage in models} == EVIDENCE[subset]
        assert recipes.recipe_digest(recipe, config) == RECIPES[subset]


def test_the_corpus_verifies(home):
    report = verify.verify(home / "corpus")
    assert report.ok, report.text()


def test_every_region_of_the_ledgers_and_the_index_is_read():
    for subset, regions in REGIONS.items():
        corpus = reader.open_corpus(HERE / "corpus")
        assert len(list(corpus.manifests(subset))) == 2
        assert sum(each.num_rows for each in corpus.ledgers(subset)) == regions
    assert pq.read_metadata(HERE / "corpus" / "index.parquet").num_rows == 40


def test_evidence_is_read(home):
    config = load_config(home / "build.yaml")
    for subset in config.subsets:
        for stage in recipes.recipe_of(config, subset):
            if isinstance(stage, ModelStage):
                store = stage.store(home / "corpus" / subset)
                assert isinstance(store, EvidenceStore)
                found = store.load(f"{subset}-000000") | store.load(f"{subset}-000001")
                assert len(found) == REGIONS[subset], stage.name


def test_no_unit_is_pending_at_another_place(home):
    config = load_config(home / "build.yaml")
    for subset in config.subsets:
        folder = home / "corpus" / subset
        planned = work_list.make_work_list(open_source(config, subset), config, folder)
        recipe = recipes.recipe_digest(recipes.recipe_of(config, subset), config)
        assert find_pending_units(planned, recipe) == []


def files(corpus: Path) -> dict[str, bytes]:
    """Every committed file by its path, and the index."""
    folders = [corpus / subset / name for subset in REGIONS for name in ("shards", "ledger", "manifests")]
    found = [corpus / "index.parquet", *(path for folder in folders for path in folder.iterdir())]
    return {str(path.relative_to(corpus)): path.read_bytes() for path in found}


def models_started(corpus: Path) -> set[str]:
    """The models that were loaded after the corpus was copied."""
    runs = {run.name for run in (HERE / "corpus" / "events").iterdir()}
    later = [run for run in (corpus / "events").iterdir() if run.name not in runs]
    return {event.stage for run in later for event in EventReader(run).new() if event.what == "started"}


def test_a_resume_changes_nothing_and_asks_no_model(home):
    before = files(home / "corpus")
    driver.build(load_config(home / "build.yaml"), LocalEngine())
    assert files(home / "corpus") == before
    assert models_started(home / "corpus") == set()


@pytest.mark.soak
def test_the_command_needs_neither_ray_nor_prefect_to_resume_it(home):
    script = """
import sys
from typer.testing import CliRunner
from paracaption.flows.cli.app import app
done = CliRunner().invoke(app, ["build", sys.argv[1]])
assert done.exit_code == 0, done.exception
print(*sorted({"ray", "prefect", "torch"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script, str(home / "build.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_units_are_rebuilt_from_their_evidence_to_the_last_byte(home):
    before = files(home / "corpus")
    for path in (home / "corpus").glob("*/manifests/*-000001.json"):
        path.unlink()
    driver.build(load_config(home / "build.yaml"), LocalEngine())
    assert files(home / "corpus") == before
    assert models_started(home / "corpus") == set()


@pytest.mark.soak
def test_a_changed_threshold_drops_from_stored_evidence(home):
    config = load_config(home / "build.yaml").model_copy(update={"min_iou": 1.0})
    driver.build(config, LocalEngine())
    assert models_started(home / "corpus") == set()
    kept = reader.read_ledger(home / "corpus" / "sa1b" / "ledger" / "sa1b-000000.parquet")["kept"]
    assert sum(kept.to_pylist()) < len(kept)


@pytest.mark.parametrize(
    ("form", "file"),
    [("perceptiondlm-json", "annotations.json"), ("coco", "instances.json")],
)
def test_exports_hold_the_same_regions(home, tmp_path, form, file):
    export.export(home / "corpus", form, tmp_path / "export")
    then = json.loads((HERE / "exports" / form / file).read_text())
    now = json.loads((tmp_path / "export" / file).read_text())
    if form == "coco":  # later releases add the annotation's id in its source
        assert all(isinstance(each.pop("source_id"), int) for each in now["annotations"])
    assert now == then


def test_an_export_to_parquet_holds_the_same_rows(home, tmp_path):
    export.export(home / "corpus", "parquet", tmp_path / "export")
    for path in (HERE / "exports" / "parquet" / "data").iterdir():
        now = pq.read_table(tmp_path / "export" / "data" / path.name)
        assert now.equals(pq.read_table(path))


def test_reviews_are_read(home):
    reviews = Reviews(Catalog(home / "corpus"))
    assert [(each.subset, each.key, each.region, each.right) for each in reviews.read_all()] == [
        ("coconut", "000000000000", 0, True),
        ("sa1b", "sa_1", 2, False),
    ]
    assert reviews.precision()[1] == 0  # none of them is void
