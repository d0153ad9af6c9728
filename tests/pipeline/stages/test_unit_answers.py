"""One model stage on one unit: what is asked about, and how answers and failures are applied."""

import pytest

from paracaption.pipeline.stages.base import Failure, UnitAnswers
from paracaption.pipeline.stages.caption import Caption, Captioned
from paracaption.pipeline.stages.evidence import Answered, fingerprint
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Drop
from tests.pipeline.executor.images import image


@pytest.fixture
def stage() -> Caption:
    return Caption(BuildConfig.model_validate({"out": "out", "sa1b": [{"paths": ["x.tar"]}]}))


def known(stage, image, regions, caption="A red car.", photo=""):
    """Evidence of some regions as it is stored."""
    return {
        (image.key, region.id): Answered(fingerprint(*stage.question(region)), Captioned(caption), photo)
        for region in image.regions
        if region.id in regions
    }


def test_only_live_regions_without_evidence_are_missing(stage):
    first, second = image("i0", 3), image("i1", 2)
    first.regions[2].drop = Drop("usable_masks", Reason.MASK_PART)
    answers = UnitAnswers(stage, [first, second], known(stage, first, {0}) | known(stage, second, {0, 1}))
    assert [(each.key, [region.id for region in each.regions]) for each in answers.missing] == [("i0", [1])]
    assert (answers.num_missing, answers.num_known) == (1, 3)


def test_evidence_of_another_question_is_missing_and_replaced(stage):
    one = image("i0")
    stored = {("i0", 0): Answered(fingerprint("another mask"), Captioned("A blue bus."))}
    answers = UnitAnswers(stage, [one], stored)
    assert answers.num_missing == 1
    answers.add(answers.missing[0], [Captioned("A red car.")])
    answers.apply()
    assert one.regions[0].caption == "A red car."
    assert answers.known == known(stage, one, {0})


def test_stored_and_new_answers_decide_alike(stage):
    one = image("i0", 2)
    answers = UnitAnswers(stage, [one], known(stage, one, {0}))
    answers.add(answers.missing[0], [Captioned(None)])
    answers.apply()
    assert one.regions[0].caption == "A red car." and one.regions[0].drop is None
    assert one.regions[1].drop == Drop("caption", Reason.CAPTION_NONE, "the captioner returned nothing")


def test_a_failure_of_a_region_and_one_of_an_image_drop_and_are_not_stored(stage):
    first, second = image("i0", 2), image("i1", 2)
    answers = UnitAnswers(stage, [first, second], {})
    answers.add(answers.missing[0], [Captioned("A red car."), BadRecord(Reason.ANSWER_INVALID, "no text")])
    answers.add(answers.missing[1], Failure(Reason.PHOTO_UNREADABLE, "cut short"))
    answers.apply()
    drops = [region.drop for each in (first, second) for region in each.regions]
    unreadable = Drop("caption", Reason.PHOTO_UNREADABLE, "cut short")
    assert drops == [None, Drop("caption", Reason.ANSWER_INVALID, "no text"), unreadable, unreadable]
    assert set(answers.known) == {("i0", 0)}
