"""Subsets take sources of any registered kind; a kind is one file and one line of the registry."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.pipeline.config_file import describe, load_config
from paracaption.pipeline.corpus import merge, reader, verify, work_list
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.context import Explorer
from paracaption.pipeline.sources import registry
from paracaption.pipeline.sources.protocols import Catalog
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import Limits
from paracaption.schemas.errors import ConfigError
from tests.building import build, committed, config_of, drops
from tests.synthetic import jpeg, scene, write_coconut, write_sa1b

runner = CliRunner()


@pytest.fixture
def rectangles(tmp_path, monkeypatch):
    """A source's entry of a third kind, which is registered by one line."""
    monkeypatch.setitem(registry.SOURCES, "rectangles", "tests.rectangles:Rectangles")
    folder = tmp_path / "rectangles"
    folder.mkdir()
    for number in range(4):
        (folder / f"photo-{number}.jpg").write_bytes(jpeg(scene(number)[0]))
    rows = [f"photo-{number}.jpg,{x},8,40,32,cat" for number in range(4) for x in (4, 100)]
    (folder / "table.csv").write_text(
        "\n".join([*rows, "photo-0.jpg,500,8,40,32,cat", "gone.jpg,0,0,9,9,cat"])
    )
    return {"source": "rectangles", "table": str(folder / "table.csv"), "photos": str(folder)}


@pytest.mark.soak
def test_a_third_kind_is_audited_built_verified_and_shown(rectangles, tmp_path):
    values = config_of(tmp_path / "out", coconut=write_coconut(tmp_path / "source", 1)).model_dump(
        mode="json"
    )
    values["subsets"] = {"shapes": {"sources": rectangles | {"license": "CC0 *or* so"}}}
    (tmp_path / "build.yaml").write_text(json.dumps(values))

    audited = runner.invoke(app, ["audit", str(tmp_path / "build.yaml")])
    assert "shapes: 4 of 5 images and 8 of 10 regions are usable" in audited.output
    assert "outside: 4 x (the part of the rectangle inside the photo counts)" in audited.output

    config = load_config(tmp_path / "build.yaml")
    driver.build(config, LocalEngine())
    assert verify.verify(tmp_path / "out").ok
    counts = reader.read_summary(tmp_path / "out").subsets["shapes"].counts
    assert (counts.images, counts.regions, counts.images_captioned) == (5, 10, 4)
    stages = ["source", "usable_masks", "caption", "verify_category", "clean_text"]
    assert [step.stage for step in counts.funnel] == stages
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## shapes" in card and "| shapes | `.../table.csv` | CC0 \\*or\\* so |" in card

    shown = runner.invoke(app, ["inspect", str(tmp_path / "out")])
    assert shown.exit_code == 0 and "shapes" in shown.output
    client = TestClient(make_app(Explorer(tmp_path / "out")), base_url="http://localhost:8080")
    assert "shapes" in client.get("/").text and client.get("/image/shapes/photo-1").status_code == 200


def test_a_corpus_is_read_where_its_kind_of_source_is_not_registered(rectangles, tmp_path, monkeypatch):
    values = config_of(tmp_path / "out", coconut=write_coconut(tmp_path / "source", 1)).model_dump()
    values["subsets"] = {"shapes": {"sources": rectangles}}
    driver.build(load_config(values), LocalEngine())
    monkeypatch.delitem(registry.SOURCES, "rectangles")
    corpus = reader.open_corpus(tmp_path / "out")
    assert corpus.config.subsets["shapes"].sources == [{**rectangles, "license": "unknown"}]
    assert verify.verify(tmp_path / "out").ok
    assert len(merge.count_subset(corpus, "shapes").funnel) == 5
    merge.merge(tmp_path / "out")
    assert "| shapes | `rectangles` | unknown |" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="unknown kind of source 'rectangles'; choose from coconut, sa1b"):
        open_source(corpus.config, "shapes")


def test_a_third_kind_is_described_and_its_options_are_checked(rectangles, tmp_path):
    assert "#   table: required  # The CSV file." in describe()
    values = {"out": "out", "subsets": {"shapes": {"sources": {**rectangles, "table": "t.csv"}}}}
    (tmp_path / "build.yaml").write_text(json.dumps(values))
    (source,) = load_config(tmp_path / "build.yaml").subsets["shapes"].sources
    assert source == {**rectangles, "table": f"{tmp_path.resolve()}/t.csv", "license": "unknown"}


def test_a_subset_named_after_a_kind_has_its_title_and_any_other_its_own_name():
    assert [registry.subset_title(name) for name in ("coconut", "sa1b", "lvis")] == [
        "COCONut",
        "SA-1B",
        "lvis",
    ]


def short_and_long(out, source, kind):
    """The same subset by the old key and under `subsets`, each with an `out` of its own."""
    short = config_of(out / "short", **{kind: source})
    values = short.model_dump()
    values["subsets"] = {kind: {"sources": [{"source": kind, **source}]}}
    return short, type(short).model_validate(values | {"out": str(out / "long")})


@pytest.mark.parametrize(("kind", "write"), [("coconut", write_coconut), ("sa1b", write_sa1b)])
@pytest.mark.soak
def test_the_old_key_and_subsets_give_the_same_plan_recipe_and_bytes(tmp_path, kind, write):
    source = write(tmp_path / "source", 6)
    short, long = short_and_long(tmp_path, source, kind)
    for config in (short, long):
        build(config)
    assert committed(tmp_path / "short") == committed(tmp_path / "long") != {}


@pytest.mark.soak
def test_subsets_of_one_kind_are_built_beside_each_other_under_their_own_names(tmp_path):
    values = config_of(tmp_path / "out", coconut=write_coconut(tmp_path / "a", 4)).model_dump()
    (first,) = values["subsets"]["coconut"]["sources"]
    second = {"source": "coconut", **write_coconut(tmp_path / "b", 3)}
    values["subsets"] = {"train-1": {"sources": first}, "val.2": {"sources": second, "recipe": "identify"}}
    config = registry.complete(load_config(values))
    driver.build(config, LocalEngine())
    assert reader.open_corpus(tmp_path / "out").subsets == ["train-1", "val.2"]
    assert [path.name for path in sorted((tmp_path / "out").glob("*/shards/*"))] == [
        "train-1-000000.tar",
        "val.2-000000.tar",
    ]
    found = reader.read_summary(tmp_path / "out").subsets
    assert [step.stage for step in found["val.2"].counts.funnel][3:6] == [
        "caption",
        "extract_category",
        "agree_with_segmenter",
    ]
    assert verify.verify(tmp_path / "out").ok


def test_sources_of_several_kinds_share_the_keys_of_their_subset(rectangles, tmp_path):
    twice = {"source": "coconut", **write_coconut(tmp_path / "source", 2)}
    values = config_of(tmp_path / "out", coconut=twice).model_dump()
    values["subsets"] = {"all": {"sources": [twice, rectangles, twice]}}
    source = open_source(load_config(values), "all")
    entries = list(source.catalog())
    assert [entry.source for entry in entries] == [0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert [entry.key for entry in entries if entry.source == 2] == ["000000000000-dup2", "000000000001-dup2"]
    images = [source.read(entry, Limits()) for entry in entries]
    assert [len(image.live()) for image in images] == [4, 4, 2, 2, 2, 2, 0, 0, 0]
    assert {image.subset for image in images} == {"all"}
    assert source.notes == []  # the label maps are claimed by both


def test_a_folder_of_two_sources_is_listed_once(tmp_path, monkeypatch):
    source = write_coconut(tmp_path / "source", 2)
    config = config_of(tmp_path / "out", coconut=source)
    values = config.model_dump()
    values["subsets"]["coconut"]["sources"] *= 2
    opened = open_source(load_config(values), "coconut")
    listed: list[str] = []
    listing = Catalog.list_folder

    def list_folder(catalog, url, setting):
        listed.extend([url] * (url not in catalog._listings))
        return listing(catalog, url, setting)

    monkeypatch.setattr(Catalog, "list_folder", list_folder)
    work_list.make_work_list(opened, config, tmp_path / "plan")
    assert sorted(listed) == sorted([source["labels"], *source["photos"]])


def test_a_dropped_region_says_which_source_it_is_of(rectangles, tmp_path):
    values = config_of(tmp_path / "out", coconut=write_coconut(tmp_path / "source", 1)).model_dump()
    values["subsets"] = {"shapes": {"sources": rectangles}}
    build(load_config(values))
    stage, reason, detail = drops(tmp_path / "out", "shapes")["photo-0", 2]
    assert (stage, reason) == ("source", "mask_empty") and ".../table.csv: photo-0.jpg" in detail
