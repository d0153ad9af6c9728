"""Sources without masks, and the stage that makes them: what a recipe then is, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from paracaption.filters import rle
from paracaption.filters.verdict import Verdict
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import merge, reader, verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.sources import registry
from paracaption.pipeline.sources.clean import clean_image
from paracaption.pipeline.stages.base import FilterStage, ModelStage
from paracaption.pipeline.stages.recipes import RECIPES, recipe_digest, recipe_of, shown_stages
from paracaption.pipeline.stages.registry import STAGES, configured_kinds
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Blob, ImageRecord, Region
from tests.building import config_of
from tests.rectangles import Rectangles
from tests.synthetic import jpeg, scene, write_coconut

COCONUT = {"source": "coconut", "annotations": ["a.json"], "labels": "labels", "photos": ["photos"]}
VERIFY = ["filled_box", *RECIPES["verify"]]


class Outlines(Rectangles):
    """The same table, read as boxes without masks."""

    mask_stage = "filled_box"

    def fill(self, image, entry, limits, notes):
        super().fill(image, entry, limits, notes)
        for region in image.regions:
            region.rle, region.area = None, 0


class Circles(Outlines):
    mask_stage = "circle"


class FilledBox(FilterStage):
    """All pixels of the box."""

    name, gives = "filled_box", ("mask",)

    def decide(self, image: ImageRecord) -> list[Verdict]:
        for region in image.live():
            dense = np.zeros((image.height, image.width), bool)
            x, y, width, height = region.bbox
            dense[y : y + height, x : x + width] = True
            region.rle, region.area, region.bbox = rle.from_mask(dense)
        return [Verdict() for _ in image.live()]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(STAGES, "filled_box", FilledBox)
    for name, kind in (("rectangles", Rectangles), ("outlines", Outlines), ("circles", Circles)):
        monkeypatch.setitem(registry.SOURCES, name, f"{kind.__module__}:{kind.__name__}")


def table(kind: str) -> dict[str, Any]:
    return {"source": kind, "table": "table.csv", "photos": "photos"}


def load(*sources: dict[str, Any], recipe: Any = None):
    return load_config({"out": "out", "subsets": {"mine": {"sources": list(sources), "recipe": recipe}}})


def refused(*sources: dict[str, Any], recipe: Any = None) -> str:
    with pytest.raises(ConfigError) as error:
        load(*sources, recipe=recipe)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("recipe", [None, "verify"])
def test_in_a_recipe_that_is_a_name_the_stage_that_makes_masks_comes_first(recipe):
    config = load(table("outlines"), recipe=recipe)
    assert [stage.name for stage in recipe_of(config, "mine")] == VERIFY == list(shown_stages(config, "mine"))
    assert list(configured_kinds(config, "mine").values()) == VERIFY
    assert load(table("rectangles"), recipe=recipe).subsets["mine"].recipe == "verify"


def test_a_name_means_the_same_as_its_list():
    named, listed = (load(table("outlines"), recipe=each) for each in ("verify", VERIFY))
    assert named == listed
    assert recipe_digest(recipe_of(named, "mine"), named) == recipe_digest(recipe_of(listed, "mine"), listed)


def test_where_a_filter_makes_the_masks_the_captions_are_the_same_evidence_as_before():
    made, given = (recipe_of(load(table(kind)), "mine") for kind in ("outlines", "rectangles"))
    assert [stage.evidence_digest for stage in made if isinstance(stage, ModelStage)] == [
        stage.evidence_digest for stage in given if isinstance(stage, ModelStage)
    ]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            list(RECIPES["verify"]),
            ("`usable_masks` needs the mask", "`outlines` brings none", "`filled_box`"),
        ),
        (["caption", "filled_box"], ("recipe.caption: `caption` needs the mask",)),
        (
            [{"stage": "caption", "id": "again"}],
            ("`again` (caption) needs the mask", "put `filled_box`, which makes them, before it"),
        ),
        ([*VERIFY, {"stage": "filled_box", "id": "more"}], ("`more` makes masks", "leave the stage out")),
        (
            [{"fallback": [["filled_box", "caption"], "clean_text"]}],
            ("recipe.fallback: `filled_box` makes masks", "put it before the fallback"),
        ),
    ],
)
def test_a_recipe_that_does_not_make_masks_once_and_first_is_refused(recipe, words):
    said = refused(table("outlines"), recipe=recipe)
    assert "subsets.mine.recipe" in said
    for word in words:
        assert word in said, said


def test_making_masks_where_there_are_some_is_refused():
    assert "`filled_box` makes masks, and every region has one" in refused(COCONUT, recipe=VERIFY)


def test_a_stage_that_looks_at_no_mask_may_come_first():
    config = load(table("outlines"), recipe=[{"stage": "filled_box", "id": "made"}, "caption", "clean_text"])
    assert [stage.name for stage in recipe_of(config, "mine")] == ["made", "caption", "clean_text"]


def test_sources_of_one_subset_agree_on_masks():
    for recipe in (None, "verify", VERIFY):
        assert "subsets.mine.sources: `coconut` brings masks and `outlines` gets them from `filled_box`" in (
            refused(COCONUT, table("outlines"), recipe=recipe)
        )
    said = refused(table("outlines"), table("circles"))
    assert "`circles` gets them from `circle` and `outlines` gets them from `filled_box`; give each" in said


def test_regions_without_masks_pass_to_the_stage_that_makes_them(tmp_path, monkeypatch):
    config = config_of(tmp_path / "out", coconut=write_coconut(tmp_path / "source", 1))
    values = config.model_dump(mode="json")
    (tmp_path / "photos").mkdir()
    for number in range(4):
        (tmp_path / "photos" / f"photo-{number}.jpg").write_bytes(jpeg(scene(number)[0]))
    rows = [f"photo-{number}.jpg,{x},8,40,32,cat" for number in range(4) for x in (4, 100)]
    (tmp_path / "table.csv").write_text("\n".join([*rows, "photo-0.jpg,500,8,40,32,cat"]))
    given = {"table": str(tmp_path / "table.csv"), "photos": str(tmp_path / "photos")}
    values["subsets"] = {kind: {"sources": {"source": kind, **given}} for kind in ("outlines", "rectangles")}
    (tmp_path / "build.yaml").write_text(json.dumps(values))
    driver.build(load_config(tmp_path / "build.yaml"), LocalEngine())
    monkeypatch.delitem(registry.SOURCES, "outlines")  # whoever reads the corpus need not have the class
    corpus = reader.open_corpus(tmp_path / "out")
    made, masks = (
        [row | {"unit": "", "subset": "", "drop_detail": ""} for row in ledger_rows(corpus, subset)]
        for subset in ("outlines", "rectangles")
    )
    assert made == masks and [row["kept"] for row in made].count(True) == 8
    assert verify.verify(tmp_path / "out").ok
    assert [step.stage for step in merge.count_subset(corpus, "outlines").funnel] == ["source", *VERIFY]


def ledger_rows(corpus, subset: str) -> list[dict[str, Any]]:
    columns = {"shard", "photo_offset", "json_offset", "json_length", "credit"}
    rows = [row for ledger in corpus.ledgers(subset) for row in ledger.to_pylist()]
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


@pytest.mark.parametrize(
    ("box", "is_usable"),
    [
        ((0, 0, 6, 4), True),
        ((5, 3, 1, 1), True),
        ((0, 0, 0, 4), False),
        ((-1, 0, 3, 3), False),
        ((4, 0, 3, 3), False),
        ((0, 0), False),
        (None, False),
        ("abcd", False),
        ((1 << 70, 0, 1, 1), False),
    ],
)
@pytest.mark.parametrize("are_checked", [True, False])
def test_a_region_without_a_mask_has_a_box_inside_its_photo(box, is_usable, are_checked):
    image = ImageRecord("a", "own", Blob("a.jpg"), 6, 4, regions=[Region(0, None, box)])
    clean_image(image, "source", are_checked, are_masks_made_later=True)
    (region,) = image.regions
    if is_usable:
        assert region.drop is None and region.bbox == box
    else:
        assert region.drop is not None and region.drop.reason is Reason.BOX_EMPTY
        assert region.bbox == (0, 0, 0, 0)


def test_a_region_without_a_mask_is_dropped_where_nothing_makes_it():
    image = ImageRecord("a", "own", Blob("a.jpg"), 6, 4, regions=[Region(0, None, (0, 0, 6, 4))])
    clean_image(image, "source", False)
    assert image.regions[0].drop is not None
    assert image.regions[0].drop.reason is Reason.MASK_UNDECODABLE
