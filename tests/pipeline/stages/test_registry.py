import pytest

from paracaption.pipeline.stages.base import FilterStage, ModelStage
from paracaption.pipeline.stages.composite import COMPOSITES
from paracaption.pipeline.stages.recipes import RECIPES, build_recipe, recipe_of
from paracaption.pipeline.stages.registry import STAGES, THRESHOLDS, stage_title
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.reasons import ERRORS, Reason
from paracaption.schemas.records import SCORES
from tests.pipeline.explorer import corpus


@pytest.fixture
def config() -> BuildConfig:
    return BuildConfig.model_validate({"out": "out", "sa1b": [{"paths": ["x.tar"]}]})


def test_every_score_is_written_by_a_stage():
    assert {score for stage in STAGES.values() for score in stage.scores} == set(SCORES)


def test_every_reason_that_is_no_error_and_not_the_sources_is_a_stages():
    reasons = {reason for stage in (STAGES | COMPOSITES).values() for reason in stage.reasons}
    reasons.add(Reason.OWN_RULE)
    shared = {Reason.TOO_MANY_MASKS}  # the sources and `automatic_masks` have it
    names = [reason.value for reason in reasons - ERRORS - shared]
    known = [reason.value for reason in Reason]
    assert sorted(names) == sorted(known[known.index("mask_none") : known.index("model_error")])


@pytest.mark.soak
def test_drops_and_scores_of_a_corpus_are_those_that_its_stages_declare(tmp_path):
    config = corpus.config_of(tmp_path)
    corpus.build(config)
    seen = set()
    for subset in config.subsets:
        recipe = [stage.name for stage in recipe_of(config, subset)]
        for row in corpus.regions(tmp_path / "out", subset):
            stage, reason = row["drop_stage"], row["drop_reason"]
            if stage in STAGES:
                assert Reason(reason) in {*STAGES[stage].reasons, *ERRORS}
                seen.add(stage)
            ran = recipe[: recipe.index(stage) + 1] if stage in recipe else [] if stage else recipe
            declared = {score for name in ran for score in STAGES[name].scores}
            assert {score for score in SCORES if row.get(score) is not None} <= declared
    assert len(seen) >= 5


def test_a_threshold_is_a_number_of_the_configuration_and_its_reason_the_stages(config):
    for threshold in THRESHOLDS.values():
        assert threshold.value(config) is None or threshold.value(config) >= 0
    for stage in STAGES.values():
        assert {each.reason for each in stage.thresholds} <= set(stage.reasons)


def test_titles_are_for_people_and_the_ends_of_a_recipe_have_one_too():
    assert (stage_title("agree_with_segmenter"), stage_title("write")) == ("agree with segmenter", "write")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_looked_at_without_its_models(name, config):
    absent = {
        protocol: getattr(config, protocol).model_copy(update={"name": "no.such.module:Model"})
        for protocol in ("captioner", "judge", "segmenter")
    }
    recipe = build_recipe(name, config.model_copy(update=absent))
    assert tuple(stage.name for stage in recipe) == RECIPES[name]
    for stage in recipe:
        if isinstance(stage, ModelStage):
            with pytest.raises(ConfigError, match="cannot be imported"):
                stage.digest()
        else:
            assert isinstance(stage, FilterStage) and stage.digest()


def test_evidence_of_a_stage_depends_on_the_models_whose_answers_it_reads(config):
    other = config.captioner.model_copy(update={"name": "tests.backends:InstantCaptioner"})
    changed = config.model_copy(update={"captioner": other})
    for name in RECIPES:
        for before, after in zip(build_recipe(name, config), build_recipe(name, changed), strict=True):
            if isinstance(before, ModelStage) and isinstance(after, ModelStage):
                assert before.evidence_digest != after.evidence_digest
            else:
                assert before.digest() == after.digest()
