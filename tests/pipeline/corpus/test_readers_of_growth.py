"""Whoever reads a corpus follows it: what it has grown by is there, and what was removed is not."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.pipeline.corpus import contact_sheet, export, inspect, plots, reader, removal
from paracaption.pipeline.executor.estimate import rates
from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.catalog import Catalog
from paracaption.pipeline.explorer.context import Explorer
from paracaption.pipeline.explorer.query import Query
from paracaption.schemas.errors import ConfigError, IntegrityError
from paracaption.schemas.training import CorpusSource
from tests.building import config_of
from tests.model_training.corpora import loader, regions_of
from tests.pipeline.corpus.test_growth import SIZE, finish, grow, records
from tests.synthetic import write_sa1b

GONE = ["coconut/000000000001", "sa1b/sa_0", "sa1b/sa_1", "sa1b/sa_2"]


class Corpora:
    """A corpus in two states of its growth, one built at once, and one of which images were removed.

    Attributes:
        first, grown, at_once, reduced: their folders. Tests that write copy one of them.
    """

    def __init__(self, root: Path):
        names = ("first", "grown", "at_once", "reduced")
        self.first, self.grown, self.at_once, self.reduced = (root / name for name in names)
        subsets: dict[str, Any] = {
            "coconut": {"sources": [{"source": "coconut", **grow(root / "source", 5)}]}
        }
        finish(config_of(self.first, subsets=subsets))
        shutil.copytree(self.first, self.grown)
        grow(root / "source", 9)
        subsets["sa1b"] = {"sources": [{"source": "sa1b", **write_sa1b(root / "tars", 3, 2, SIZE)}]}
        self.config = config_of(self.grown, subsets=subsets)
        finish(self.config)
        finish(config_of(self.at_once, subsets=subsets))
        shutil.copytree(self.grown, self.reduced)
        removal.remove(str(self.reduced), GONE)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Corpora:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_plots", lambda _: {})
        return Corpora(tmp_path_factory.mktemp("growth"))


def names_of(out: Path) -> set[str]:
    return {f"{sample.subset}/{sample.key}" for sample, _ in reader.open_corpus(out).samples()}


def exported(out: Path, format: str, to: Path) -> list[str]:
    """What an export has, with no order: records or rows, and bytes of photos."""
    written = export.export(out, format, to)
    if format == "parquet":
        rows = [row for path in written for row in pq.read_table(path).to_pylist()]
        return sorted(repr(sorted(row.items())) for row in rows)
    text = json.loads(written[0].read_text())
    photos = [f"{path.name} {path.read_bytes()!r}" for path in written[1].rglob("*") if path.is_file()]
    if format == "perceptiondlm-json":
        return sorted([json.dumps(record) for record in text] + photos)
    images = {each["id"]: each["file_name"] for each in text["images"]}
    regions = [{**each, "id": 0, "image_id": images[each["image_id"]]} for each in text["annotations"]]
    return sorted([json.dumps(each) for each in regions] + photos)


@pytest.mark.parametrize("format", export.FORMATS)
@pytest.mark.soak
def test_an_export_has_what_has_come_and_not_what_was_removed(corpora, tmp_path, format):
    grown = exported(corpora.grown, format, tmp_path / "grown")
    assert grown == exported(corpora.at_once, format, tmp_path / "at once")
    reduced = exported(corpora.reduced, format, tmp_path / "reduced")
    left = Counter(grown)
    left.subtract(Counter(reduced))
    assert min(left.values()) == 0 and sum(left.values()) > 0
    assert names_of(corpora.grown) - names_of(corpora.reduced) == set(GONE)


def counts_of(catalog: Catalog, subset: str) -> tuple[Any, ...]:
    counts = catalog.counts(subset)
    return (counts.images, counts.images_captioned, counts.regions, counts.kept, counts.funnel)


@pytest.mark.soak
def test_an_open_explorer_shows_what_comes_and_what_goes(corpora, tmp_path):
    out = shutil.copytree(corpora.first, tmp_path / "out")
    client = TestClient(make_app(Explorer(out)), base_url="http://localhost:8080")
    catalog = Catalog(out)
    new, gone = "coconut/000000000008", "coconut/000000000001"
    assert catalog.subsets() == ["coconut"] and catalog.total(Query()) == (10, 5)
    assert client.get(f"/image/{new}").status_code == 404
    finish(corpora.config.model_copy(update={"out": str(out)}))
    at_once = Catalog(corpora.at_once)
    assert catalog.subsets() == ["coconut", "sa1b"] and catalog.total(Query()) == (24, 12)
    for subset in ("coconut", "sa1b"):
        assert counts_of(catalog, subset) == counts_of(at_once, subset)
    assert client.get(f"/image/{new}").status_code == client.get(f"/photo/{gone}").status_code == 200
    removal.remove(str(out), GONE)
    assert catalog.total(Query(outcome="kept")) == (16, 8)
    assert catalog.counts("sa1b").images_dropped == {"removed": 3}
    assert "removed" in client.get(f"/image/{gone}").text
    assert client.get(f"/photo/{new}").headers["content-type"] == "image/jpeg"
    for picture in (client.get(f"/photo/{gone}"), client.get(f"/thumb/{gone}?r=0")):
        assert picture.headers["content-type"].startswith("image/svg"), picture.text
    for page in ("/", "/browse", "/browse?subset=sa1b", "/whatif", "/review", "/?distributions=1"):
        assert client.get(page).status_code == 200, page
    listed = [place.key for place in catalog.page(Query(subset="coconut", outcome="kept")).images]
    assert listed == [f"{number:012d}" for number in range(9) if number != 1]


def test_the_tables_of_the_terminal_count_it(corpora):
    grown, at_once = (inspect.inspect_values(out, 0, 0) for out in (corpora.grown, corpora.at_once))
    assert grown.keys() == at_once.keys() == {"coconut", "sa1b"}
    assert all(grown[name]["counts"].funnel == at_once[name]["counts"].funnel for name in grown)
    assert len(grown["coconut"]["counts"].plans) == 2


@pytest.mark.soak
def test_the_commands_that_read_a_corpus_follow(corpora, tmp_path):
    def run(*args: Any) -> str:
        done = CliRunner().invoke(app, [str(arg) for arg in args])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    versions = run("versions", corpora.reduced)
    assert "coconut: 9 images in 3 units; of these images 4 new" in versions
    assert "coconut: 9 images in 3 units; of these images 1 removed on request" in versions
    assert "sa1b: 3 images in 1 unit; of these images 3 removed on request" in versions
    shown = run("inspect", corpora.reduced)
    assert "9 images (8 with captions), 16 regions declared" in shown and "removed 3" in shown
    run("show", corpora.grown, "000000000008", "--out", tmp_path / "new.png")
    assert (tmp_path / "new.png").exists()
    with pytest.raises(ConfigError, match=r"^coconut/000000000001: .* was kept \(removed on request\)"):
        contact_sheet.draw_corpus_image(corpora.reduced, GONE[0], tmp_path / "gone.png")
    run("report", corpora.reduced, "--to", tmp_path / "report.html")
    report = (tmp_path / "report.html").read_text()
    assert "9 images" in report and "removed" in report


def test_an_estimate_measures_the_runs_of_every_step(corpora):
    first, grown = rates.measure_rates(corpora.first), rates.measure_rates(corpora.grown)
    assert (first.subsets["coconut"].images, grown.subsets["coconut"].images) == (5, 9)
    assert grown.subsets["sa1b"].images == 3


@pytest.mark.soak
def test_a_trainer_sees_what_has_come_and_does_not_go_on_in_other_data(corpora, tmp_path):
    batches = {}
    for out in (corpora.grown, corpora.at_once, corpora.reduced):
        with_cache = loader(out, cache=str(tmp_path / out.name), max_tokens=2000)
        batches[out] = regions_of(with_cache)
        assert batches[out].keys() == {
            f"{subset}/{key}#{region}" for (subset, key, region), row in records(out).items() if row["kept"]
        }
    assert batches[corpora.grown] == batches[corpora.at_once]
    out = shutil.copytree(corpora.first, tmp_path / "out")
    sources = [CorpusSource(corpus=str(out))]
    before = loader(out, sources=sources, max_tokens=2000)
    next(iter(before))
    state = before.state_dict()
    finish(corpora.config.model_copy(update={"out": str(out)}))
    for change in (lambda: None, lambda: removal.remove(str(out), GONE)):
        change()
        now = loader(out, sources=sources, max_tokens=2000)
        with pytest.raises(IntegrityError, match=r"has grown.*another `out`.*OUT/model"):
            now.load_state_dict(state)
