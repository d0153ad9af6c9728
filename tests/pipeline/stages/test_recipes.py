"""Recipes that are lists: their form, options of stages, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.pipeline.config_file import describe_recipes, load_config
from paracaption.pipeline.sources.registry import complete
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.recipes import (
    RECIPES,
    build_recipe,
    recipe_digest,
    recipe_of,
    text_rules,
    used_backends,
    write_out,
)
from paracaption.schemas import recipe as recipe_form
from paracaption.schemas.config import BuildConfig, dump_config
from paracaption.schemas.errors import ConfigError

SOURCES = {
    "coconut": {"source": "coconut", "annotations": ["a.json"], "labels": "labels", "photos": ["photos"]},
    "sa1b": {"source": "sa1b", "paths": ["a.tar"]},
}
LEXICAL = {"name": "lexical"}


def load(recipe: Any, source: str = "coconut", **changes: Any) -> BuildConfig:
    subsets = {"mine": {"sources": SOURCES[source], "recipe": recipe}}
    return load_config({"out": "out", "subsets": subsets, **changes})


def refused(recipe: Any, source: str = "coconut") -> str:
    with pytest.raises(ConfigError) as error:
        load(recipe, source)
    assert "\n" not in str(error.value)
    return str(error.value)


def digest_of(config: BuildConfig) -> str:
    return recipe_digest(recipe_of(config, "mine"), config)


@pytest.mark.parametrize(("name", "source"), [("verify", "coconut"), ("identify", "sa1b")])
def test_the_papers_recipes_are_lists_that_can_be_copied_and_mean_the_same(name, source):
    printed = yaml.safe_load(CliRunner().invoke(app, ["config", "--recipes"]).output)
    assert printed == yaml.safe_load(describe_recipes()) == {key: list(each) for key, each in RECIPES.items()}
    assert digest_of(load(printed[name], source)) == digest_of(load(name, source))


def test_every_stage_and_every_option_is_in_what_is_printed():
    text = describe_recipes()
    for word in (
        "min_area_px",
        "min_iou",
        "min_verdict_margin",
        "captioner",
        "max_words",
        "vote:",
        "fallback:",
    ):
        assert word in text, word
    assert max(map(len, text.splitlines())) < 80


FILTERS = {
    "verify": {"usable_masks": "6784e63126ed660c", "clean_text": "149021a93810db7c"},
    "identify": {
        "usable_masks": "6784e63126ed660c",
        "whole_objects": "be266b50496a117b",
        "clean_text": "149021a93810db7c",
    },
}
"""Digests of the filter stages with their defaults, which no version of a library enters."""


@pytest.mark.parametrize("name", RECIPES)
def test_the_digests_of_filters_are_those_of_recipes_that_were_names(name):
    stages = build_recipe(name, load("verify"))
    found = {stage.name: stage.digest() for stage in stages if not isinstance(stage, ModelStage)}
    assert found == FILTERS[name]


def test_a_list_is_written_out_whole_and_read_again_as_it_is():
    config = load(
        [
            "caption",
            {"stage": "caption", "id": "again", "captioner": {"name": "classical", "num_cpus": 2}},
            {"vote": ["verify_category", {"stage": "verify_category", "id": "strict", "judge": LEXICAL}]},
        ]
    )
    [first, again, vote] = config.subsets["mine"].recipe or []
    assert first == {"stage": "caption", "id": "caption"}
    assert again["captioner"]["batch_images"] == 64 and again["captioner"]["num_cpus"] == 2
    assert (vote["id"], vote["at_least"]) == ("vote", 2)
    text = dump_config(config)
    assert dump_config(load_config(yaml.safe_load(text))) == text
    assert dump_config(write_out(complete(config))) == text


def test_a_named_recipe_is_written_as_before():
    assert "recipe: verify\n" in dump_config(load("verify"))


def test_options_of_a_stage_stand_in_the_place_of_those_of_the_configuration():
    stages = {
        stage.name: stage
        for stage in recipe_of(
            load(
                [
                    {"stage": "usable_masks", "min_area_px": 9},
                    "caption",
                    "verify_category",
                    {"stage": "verify_category", "id": "strict", "min_verdict_margin": 2},
                    {"stage": "clean_text", "max_words": 50},
                ],
                masks={"duplicate_iou": 0.8},
                min_verdict_margin=-1,
            ),
            "mine",
        )
    }
    assert (
        stages["usable_masks"].settings["min_area_px"],
        stages["usable_masks"].settings["duplicate_iou"],
    ) == (
        9,
        0.8,
    )
    assert [stages[name].settings for name in ("verify_category", "strict")] == [-1, 2]
    assert stages["clean_text"].settings["max_words"] == 50


def test_an_option_that_is_null_is_not_one_that_is_left_out():
    recipe = ["caption", {"stage": "verify_category", "min_verdict_margin": None}]
    assert recipe_of(load(recipe, min_verdict_margin=3), "mine")[1].settings is None


def test_equal_backends_under_two_ids_have_evidence_of_their_own():
    recipe = ["caption", "verify_category", {"stage": "verify_category", "id": "again"}]
    _, first, again = recipe_of(load(recipe), "mine")
    assert isinstance(first, ModelStage) and isinstance(again, ModelStage)
    assert first.backend == again.backend and first.evidence_digest != again.evidence_digest
    alone = recipe_of(load(["caption", "verify_category"]), "mine")[1]
    assert isinstance(alone, ModelStage) and alone.evidence_digest == first.evidence_digest


def test_a_judge_reads_the_newest_caption_before_it():
    other = {"stage": "caption", "id": "other", "captioner": {"name": "tests.backends:InstantCaptioner"}}
    first, _, judge = recipe_of(load(["caption", other, "verify_category"]), "mine")
    same, early, _ = recipe_of(load(["caption", "verify_category", other]), "mine")
    assert isinstance(judge, ModelStage) and isinstance(early, ModelStage)
    assert first.digest() == same.digest() and judge.evidence_digest != early.evidence_digest
    alone = recipe_of(load([other | {"id": "other"}, "verify_category"]), "mine")[1]
    assert isinstance(alone, ModelStage) and alone.evidence_digest == judge.evidence_digest


def test_after_a_fallback_a_judge_reads_what_any_of_its_members_may_have_said():
    fallback = {"fallback": ["caption", {"stage": "caption", "id": "other"}]}
    *_, judge = recipe_of(load([fallback, "verify_category"]), "mine")
    assert isinstance(judge, ModelStage) and [each.name for each in judge._read] == ["caption", "other"]


def test_backends_are_known_by_their_place():
    own = {"stage": "verify_category", "id": "strict", "judge": LEXICAL}
    used = used_backends(load(["caption", "verify_category", own]))
    assert list(used) == ["captioner", "judge", "subsets.mine.recipe.strict.judge"]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("verfy", ("unknown recipe 'verfy'", "verify, identify")),
        (["usable_masks"], ("no stage gives a caption", "`caption`")),
        (["verify_category", "caption"], ("`verify_category` needs a caption", "put `caption` before it")),
        (["clean_text", "caption"], ("`clean_text` needs a caption",)),
        (
            ["caption", {"stage": "agree_with_segmenter", "id": "again"}],
            ("`again` (agree_with_segmenter) needs a core_category", "`extract_category`"),
        ),
        (["capton"], ("unknown stage 'capton'", "did you mean `caption`?")),
        (["caption", "caption"], ("`caption` is there twice", "id: caption_2")),
        ([{"stage": "caption", "id": "clean_text"}], ("`caption` cannot be the name of another kind",)),
        ([{"stage": "caption", "captionr": {}}], ("captionr: unknown key", "did you mean `captioner`?")),
        ([{"stage": "caption", "min_iou": 0.2}], ("recipe.caption: min_iou: unknown key",)),
        (
            [{"stage": "usable_masks", "min_area_px": -1}, "caption"],
            ("usable_masks: min_area_px: has to be",),
        ),
        ([{"stage": "caption", "captioner": {"num_cpus": 1}}], ("caption: captioner.name: is missing",)),
        (
            [{"stage": "caption", "captioner": {"name": "classical", "num_gpu": 1}}],
            ("captioner.num_gpu: unknown key; did you mean `num_gpus`? the keys of a captioner are name, ",),
        ),
        ([{"vote": ["caption"]}], ("two members or more",)),
        (["caption", {"vote": ["verify_category", "clean_text"], "at_least": 3}], ("from 1 to 2",)),
        (["caption", {"vote": ["verify_category", "clean_text"], "atleast": 1}], ("unknown key",)),
        (
            ["caption", {"vote": ["verify_category", "extract_category"]}],
            ("`extract_category` gives a core_category", "before the vote"),
        ),
        (
            [{"fallback": ["caption", "usable_masks"]}, "verify_category"],
            ("`verify_category` needs a caption",),
        ),
        ([{"stage": "caption", "id": "Big Id"}], ("lower-case letters",)),
        ([{"stage": "caption", "id": "write"}], ("`write` is an end of every recipe",)),
        ([{"caption": {}}], ("one of `stage`, `vote` and `fallback`",)),
        ([["caption"]], ("the name of a stage, or a mapping",)),
        ([], ("the list names no stage",)),
        (7, ("a name or a list of stages",)),
        ([{"stage": "mine:Sharp"}, "caption"], ("'mine:Sharp' cannot be imported", "mine")),
        ([{"stage": "tests.backends:InstantJudge"}], ("is not a stage",)),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_stage_and_what_it_lacks(recipe, words):
    said = refused(recipe)
    assert "subsets.mine.recipe" in said
    for word in words:
        assert word in said, said


def test_a_source_that_names_no_categories_refuses_a_stage_that_needs_one():
    said = refused("verify", "sa1b")
    assert (
        "`verify_category` needs the category of each region, and the source `sa1b` does not name all" in said
    )


def test_deep_nesting_is_refused_and_not_a_traceback():
    recipe: Any = "caption"
    for number in range(400):
        recipe = {"fallback": [recipe, {"stage": "caption", "id": f"c{number}"}]}
    assert "nested too deeply" in refused([recipe])


def test_the_entries_of_a_recipe_run_members_first():
    entries = recipe_form.parse(["a", {"vote": ["b", ["c", {"fallback": ["d", "e"]}]], "id": "v"}])
    assert [each.id for each in recipe_form.walk(entries)] == ["a", "b", "c", "d", "e", "fallback", "v"]
    assert recipe_form.parse(recipe_form.plain(entries)) == entries


def test_the_rules_of_kept_captions_are_those_of_the_last_clean_text():
    assert (rules := text_rules(load(["caption", {"stage": "clean_text", "max_words": 9}]), "mine"))
    assert rules.max_words == 9
    assert text_rules(load(["caption"]), "mine") is None
    assert text_rules(load(["caption", "clean_text", {"stage": "caption", "id": "other"}]), "mine") is None
