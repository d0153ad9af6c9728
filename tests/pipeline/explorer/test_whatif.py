"""What-if counts are those of a rebuild: the corpus is built again with each threshold, and compared."""

import itertools

import pytest
from starlette.testclient import TestClient

from paracaption.pipeline.corpus import reader
from paracaption.pipeline.explorer import whatif
from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.catalog import Catalog
from paracaption.pipeline.explorer.context import Explorer
from paracaption.pipeline.stages.registry import STAGES
from paracaption.schemas.errors import ConfigError
from tests.building import build, config_of
from tests.pipeline.explorer import corpus
from tests.synthetic import write_coconut, write_sa1b

OTHER = {"name": "tests.backends:InstantJudge", "options": {"version": "2"}}
OTHER_CAPTIONER = {"name": "tests.backends:InstantCaptioner", "options": {"version": "2"}}

CASES = {
    "a lower IoU": {"min_iou": 0.2},
    "a higher IoU": {"min_iou": 0.8},
    "shorter captions": {"text.min_words": 2, "text.min_chars": 3},
    "longer captions": {"text.min_words": 9},
    "fewer characters at most": {"text.max_chars": 60},
    "fewer words at most": {"text.max_words": 8},
    "more repetition": {"text.max_repeat_share": 0.9},
    "less repetition": {"text.max_repeat_share": 0.05},
    "a surer judge": {"min_verdict_margin": 2.0},
    "a lenient judge": {"min_verdict_margin": -1.0},
    "a lower IoU and longer captions": {"min_iou": 0.3, "text.min_words": 8},
    "a higher IoU and shorter captions": {"min_iou": 0.7, "text.min_words": 1, "text.min_chars": 0},
    "all at once": {"min_iou": 0.35, "min_verdict_margin": 0.5, "text.max_words": 14, "text.min_words": 3},
}


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
@pytest.mark.soak
def test_counts_equal_those_of_a_rebuild_with_that_threshold(catalog, out, tmp_path, values):
    config = reader.read_config(out)
    wanted = whatif.change_config(config, values)
    again = corpus.rebuilt(out, tmp_path / "again", wanted)
    moved = 0
    for subset in config.subsets:
        change, examples = whatif.compare(catalog, subset, config, wanted)
        before, after = (
            {(row["key"], row["region"]): row["kept"] for row in corpus.regions(where, subset)}
            for where in (out, again)
        )
        lost = {name for name in before if before[name] and not after[name]}
        gained = {name for name in before if not before[name] and after[name]}
        assert (change.lost, change.gained) == (len(lost), len(gained)) and change.exact
        assert change.then == sum(after.values()) == Catalog(again).counts(subset).kept
        for example in examples:
            assert (example.key, example.region) in (lost if example.side == "lost" else gained)
        moved += len(lost) + len(gained)
    assert moved, "a case in which nothing moves proves nothing"


def test_the_lines_to_copy_give_the_configuration_that_was_counted(out):
    import yaml

    config = reader.read_config(out)
    for values in itertools.islice(CASES.values(), 0, None, 4):
        wanted = whatif.change_config(config, values)
        copied = yaml.safe_load(whatif.changed_lines(config, wanted))
        text = {**config.text.model_dump(), **copied.pop("text", {})}
        assert config.model_validate({**config.model_dump(), **copied, "text": text}) == wanted
    assert whatif.changed_lines(config, config) == ""


def test_of_many_captions_a_sample_is_read_and_said_to_be_one(catalog, out, monkeypatch):
    config = reader.read_config(out)
    wanted = whatif.change_config(config, {"min_iou": 0.1})
    exact, _ = whatif.compare(catalog, "sa1b", config, wanted)
    monkeypatch.setattr(whatif, "_MOST_READ", exact.candidates // 2)
    estimate, _ = whatif.compare(catalog, "sa1b", config, wanted)
    assert not estimate.exact and estimate.checked == exact.candidates // 2 < estimate.candidates
    assert abs(estimate.gained - exact.gained) <= 2 * estimate.error
    whole, _ = whatif.compare(catalog, "sa1b", config, wanted, exact=True)
    assert whole == exact


def test_units_of_another_configuration_are_noticed(catalog, out):
    config = reader.read_config(out)
    assert not any(whatif.contradicts(catalog, subset, config) for subset in config.subsets)
    for values in ({"min_iou": 0.6}, {"min_iou": 0.4}, {"text.min_words": 7}, {"text.max_chars": 90}):
        other = whatif.change_config(config, values)
        assert any(whatif.contradicts(catalog, subset, other) for subset in config.subsets), values


def test_what_is_no_threshold_or_no_value_is_refused(out):
    config = reader.read_config(out)
    with pytest.raises(ConfigError, match="not a threshold"):
        whatif.change_config(config, {"masks.min_area_px": 3})
    with pytest.raises(ConfigError, match="min_iou"):
        whatif.change_config(config, {"min_iou": 7})
    with pytest.raises(ConfigError):
        whatif.change_config(config, {"text.min_words": float("nan")})


def test_what_a_later_model_would_still_have_to_say_is_not_counted(out):
    config = reader.read_config(out)
    wanted = whatif.change_config(config, {"min_verdict_margin": -2.0, "min_iou": 0.1, "text.min_words": 1})
    stages = [STAGES[name](wanted) for name in ("verify_category", "agree_with_segmenter", "clean_text")]
    before = {stage.name: config for stage in stages}
    values = set(whatif._may_pass(stages, before).args.values())
    assert {"agree_with_segmenter", "clean_text"} <= values and "verify_category" not in values


def test_a_subset_that_left_the_configuration_is_left_out_and_said(tmp_path):
    sources = {"mine": write_coconut(tmp_path / "mine", 2), "Other_1": write_sa1b(tmp_path / "other", 2)}
    for names in (["mine", "Other_1"], ["Other_1"]):
        kinds = {"mine": "coconut", "Other_1": "sa1b"}
        subsets = {name: {"sources": [{"source": kinds[name], **sources[name]}]} for name in names}
        build(config_of(tmp_path / "out", subsets=subsets))
    page = TestClient(make_app(Explorer(tmp_path / "out")), base_url="http://localhost:8080").get(
        "/whatif?min_iou=0.6"
    )
    assert page.status_code == 200
    assert "mine: no threshold can be tried for this subset, because it is no longer in the conf" in page.text


RECIPES = {
    "two scores": (
        [*("caption", "verify_category"), {"stage": "verify_category", "id": "again", "judge": OTHER}],
        "because `verify_category` and `again` write the same score",
    ),
    "other captions": (
        ["caption", "clean_text", {"stage": "caption", "id": "second", "captioner": OTHER_CAPTIONER}],
        "because `second` writes other captions than those that `clean_text` has decided about",
    ),
    "a vote": (
        [
            "caption",
            {"vote": ["verify_category", {"stage": "verify_category", "id": "again", "judge": OTHER}]},
        ],
        "because `verify_category` is in a vote or a fallback",
    ),
    "its own": (
        ["caption", "verify_category", {"stage": "clean_text", "min_words": 2}],
        "the recipe of this subset sets text.min_words for itself",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.soak(keep=2)
def test_a_recipe_of_which_the_scores_do_not_tell_is_said_with_its_stages(tmp_path, case):
    recipe, told = RECIPES[case]
    sources = [{"source": "coconut", **write_coconut(tmp_path / "source", 2)}]
    build(config_of(tmp_path / "out", subsets={"mine": {"sources": sources, "recipe": recipe}}))
    client = TestClient(make_app(Explorer(tmp_path / "out")), base_url="http://localhost:8080")
    page = client.get("/whatif?text.min_words=3")
    assert page.status_code == 200 and told in page.text.replace("&#39;", "'")
    assert whatif.set_by_recipe(reader.read_config(tmp_path / "out"), "mine") == (
        ["text.min_words"] if case == "its own" else []
    )
