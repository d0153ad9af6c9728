import math

import msgspec
import pytest

from paracaption.pipeline.executor.bisection import GIVE_UP_AFTER, Bisection
from paracaption.pipeline.executor.in_flight import InFlight
from paracaption.pipeline.stages.base import Failure
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason
from tests.pipeline.executor.images import die, images


class Asked:
    """A model that fails on some images, and remembers which batches it saw."""

    def __init__(self, **errors):
        self.errors, self.batches = errors, []

    def __call__(self, batch):
        self.batches.append([each.key for each in batch])
        for each in batch:
            if each.key in self.errors:
                raise self.errors[each.key]
        return enumerate([each.key] * len(each.live()) for each in batch)


class OneByOne(Asked):
    """A model that batches by itself: it has answered what comes before an image on which it fails."""

    def __call__(self, batch):
        self.batches.append([each.key for each in batch])
        for place, each in enumerate(batch):
            if each.key in self.errors:
                raise self.errors[each.key]
            yield place, [each.key] * len(each.live())


def bisect(ask, batch, folder, noted=None):
    with InFlight(folder, "u", 3) as in_flight:
        return {each.key: outcome for each, outcome in Bisection(ask, in_flight, noted).run(batch)}


def test_a_failing_image_is_found_by_halves_and_the_others_are_answered(tmp_path):
    ask = Asked(i1=RuntimeError("no"))
    found = bisect(ask, images(4), tmp_path)
    assert ask.batches == [["i0", "i1", "i2", "i3"], ["i0", "i1"], ["i0"], ["i1"], ["i2", "i3"]]
    assert found == {
        "i0": ["i0"],
        "i1": Failure(Reason.MODEL_ERROR, "RuntimeError: no"),
        "i2": ["i2"],
        "i3": ["i3"],
    }


@pytest.mark.parametrize("where", [0, 63, 127])
def test_one_failing_image_in_a_large_batch_costs_logarithmically_many_calls(tmp_path, where):
    ask = Asked(**{f"i{where}": RuntimeError("no")})
    found = bisect(ask, images(128), tmp_path)
    assert len(ask.batches) <= 2 * math.log2(128) + 1
    assert [key for key, outcome in found.items() if isinstance(outcome, tuple)] == [f"i{where}"]


def test_a_model_that_never_succeeds_is_given_up_on_and_every_image_has_its_error(tmp_path):
    everything = {f"i{number}": RuntimeError("no") for number in range(64)}
    ask = Asked(**everything)
    found = bisect(ask, images(64), tmp_path)
    assert sum(len(batch) == 1 for batch in ask.batches) == GIVE_UP_AFTER
    assert set(found) == set(everything)
    assert set(found.values()) == {Failure(Reason.MODEL_ERROR, "RuntimeError: no")}


def test_a_model_that_succeeded_once_is_not_given_up_on(tmp_path):
    most = {f"i{number}": RuntimeError("no") for number in range(1, 64)}
    ask = Asked(**most)
    found = bisect(ask, images(64), tmp_path)
    assert sum(len(batch) == 1 for batch in ask.batches) == 64
    assert found["i0"] == ["i0"]


def test_what_a_model_that_batches_by_itself_has_answered_is_not_asked_again(tmp_path):
    ask = OneByOne(i2=RuntimeError("no"))
    found = bisect(ask, images(6), tmp_path, noted=2)
    assert ask.batches == [["i0", "i1", "i2", "i3", "i4", "i5"], ["i2", "i3"], ["i2"], ["i3"], ["i4", "i5"]]
    assert found.pop("i2") == Failure(Reason.MODEL_ERROR, "RuntimeError: no")
    assert found == {key: [key] for key in ("i0", "i1", "i3", "i4", "i5")}


def test_of_a_model_that_batches_by_itself_only_the_images_at_work_are_noted(tmp_path):
    with InFlight(tmp_path, "u", 3) as in_flight:
        noted = [
            msgspec.json.decode(in_flight.path.read_bytes())["working"]
            for _ in Bisection(OneByOne(), in_flight, 2).run(images(4))
        ]
    assert noted == [["i1", "i2"], ["i2", "i3"], ["i3"], []]


def test_an_image_without_an_answer_is_an_error_and_asked_about_alone(tmp_path):
    found = bisect(lambda batch: [(0, ["a"])] if len(batch) == 2 else [], images(2), tmp_path)
    assert found == {
        "i0": ["a"],
        "i1": Failure(Reason.MODEL_ERROR, "ValueError: 1 of 1 images have no answer"),
    }


def test_a_bad_record_keeps_its_reason_and_speaks_not_against_the_model(tmp_path):
    bad = BadRecord(Reason.PHOTO_UNREADABLE, "cut short")
    ask = Asked(**{f"i{number}": bad for number in range(15)})
    found = bisect(ask, images(16), tmp_path)
    assert found["i0"] == Failure(Reason.PHOTO_UNREADABLE, "cut short")
    assert found["i15"] == ["i15"], "bad records alone are no cause to give up"


def test_a_poison_image_is_never_asked_about(tmp_path):
    for _ in range(3):
        die(tmp_path, ["i1"])
    ask = Asked()
    found = bisect(ask, images(3), tmp_path)
    assert ask.batches == [["i0", "i2"]]
    assert found["i1"] == Failure(
        Reason.WORKER_CRASHED, "the worker died 3 times while it had only this image"
    )
