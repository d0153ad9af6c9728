"""Answers about whole images: what counts as one answer, whoever has saved which of its rows."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from paracaption.filters import rle
from paracaption.pipeline.models.protocols import Candidate
from paracaption.pipeline.stages.automatic_masks import WHOLE_IMAGE, AutomaticMasks, GeneratedMask
from paracaption.pipeline.stages.base import photos_claimed
from paracaption.pipeline.stages.evidence import EvidenceStore
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Blob, Drop, ImageRecord, Region, Rle


@pytest.fixture
def stage() -> AutomaticMasks:
    return AutomaticMasks(BuildConfig.model_validate({"out": "out", "sa1b": [{"paths": ["x.tar"]}]}))


@pytest.fixture
def store(tmp_path) -> EvidenceStore:
    return EvidenceStore(tmp_path / "evidence", GeneratedMask)


def image(key: str = "a", digest: str = "") -> ImageRecord:
    return ImageRecord(key, "mine", Blob("a.png"), 10, 8, photo_digest=digest)


def masks(count: int, width: int = 10) -> list[GeneratedMask]:
    """Rows of the image, the first one the tallest."""
    found = []
    for number in range(count):
        dense = np.zeros((8, width), bool)
        dense[: 8 - number] = True
        found.append(GeneratedMask(count, rle.from_mask(dense).rle.counts, 0.5))
    return found


def answer(stage, given: ImageRecord, count: int, digest: str, known: dict) -> dict:
    """Evidence after the image was asked about, and was found to have so many masks."""
    answers = stage.answers([given], known)
    [asked] = answers.missing
    assert [region.id for region in asked.regions] == [WHOLE_IMAGE] and given.regions == []
    asked.photo_digest = digest
    answers.add(asked, [masks(count)])
    answers.apply()
    assert len(given.regions) == count and answers.num_asked == count
    return answers.known


def regions_from(stage, known: dict, digest: str = "") -> list[Region] | None:
    """What stored evidence gives an image; None if it has to be asked about."""
    given = image(digest=digest)
    answers = stage.answers([given], known)
    if answers.missing:
        return None
    answers.apply()
    return given.regions


@pytest.mark.parametrize("count", [0, 1, 4])
def test_what_is_saved_gives_the_same_regions(stage, store, count):
    given = image()
    known = answer(stage, given, count, "p", {})
    store.save("u", known)
    assert regions_from(stage, store.load("u"), "p") == given.regions
    assert [region.id for region in given.regions] == list(range(count))
    assert (given.drop is not None) == (count == 0)


@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (0, 3), (3, 0)])
def test_of_two_workers_that_made_other_masks_one_is_believed_whole(stage, store, first, second):
    mine = answer(stage, image(), first, "p", {})
    other = answer(stage, image(), second, "p", {})
    store.save("u", mine)
    assert store.save("u", other).keys() >= mine.keys()
    found = regions_from(stage, store.load("u"), "p")
    assert found is not None and len(found) == first, "the answer that was saved first stays"


@pytest.mark.parametrize(("before", "now"), [(4, 2), (2, 4), (0, 3), (3, 0)])
def test_of_a_photo_that_was_another_one_only_the_new_masks_count(stage, store, before, now):
    store.save("u", answer(stage, image(), before, "old", {}))
    known = store.load("u")
    assert regions_from(stage, known, "new") is None
    store.save("u", answer(stage, image(digest="new"), now, "new", known))
    saved = store.load("u")
    found = regions_from(stage, saved, "new")
    assert found is not None and len(found) == now
    assert photos_claimed(stage, [image()], saved) == {"a": "new"}


def test_an_image_of_which_a_row_is_missing_is_asked_about_again(stage):
    known = answer(stage, image(), 3, "p", {})
    for place in list(known):
        assert regions_from(stage, {at: row for at, row in known.items() if at != place}, "p") is None


def test_images_with_regions_or_with_a_drop_are_passed_by(stage):
    with_regions, dropped = image("b"), image("c")
    with_regions.regions = [Region(7, Rle((8, 10), "0h2"))]
    dropped.drop = Drop("source", Reason.PHOTO_UNREADABLE)
    answers = stage.answers([with_regions, dropped], {})
    assert answers.missing == [] and answers.num_missing == 0
    answers.apply()
    assert [region.id for region in with_regions.regions] == [7] and dropped.regions == []


def test_stored_masks_that_do_not_fit_the_image_are_an_error_of_the_image(stage):
    given = image()
    answers = stage.answers([given], {})
    answers.add(msgspec.structs.replace(answers.missing[0], photo_digest="p"), [masks(2, width=11)])
    answers.apply()
    assert given.drop is not None and given.drop.reason is Reason.MASK_UNDECODABLE and given.regions == []


def test_a_generators_own_refusal_is_the_images_drop(stage, tmp_path, monkeypatch):
    class Refusing:
        def generate(self, photo):
            return BadRecord(Reason.ANSWER_INVALID, "not today")

    class Plain:
        def generate(self, photo):
            return [Candidate(rle.from_mask(np.ones(photo.shape[:2], bool)).rle, 0.5)]

    from PIL import Image

    Image.new("RGB", (10, 8)).save(tmp_path / "a.png")
    given = image()
    given.photo = Blob(str(tmp_path / "a.png"))
    answers = stage.answers([given], {})
    [[found]] = stage.ask(Refusing(), answers.missing)
    answers.add(answers.missing[0], [found])
    answers.apply()
    assert given.drop == Drop("automatic_masks", Reason.ANSWER_INVALID, "not today")
    assert stage.ask(Plain(), answers.missing)[0][0][0].num_masks == 1
