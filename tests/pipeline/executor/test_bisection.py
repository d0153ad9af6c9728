import math

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
        return [[each.key] * len(each.live()) for each in batch]


def bisect(ask, batch, folder):
    with InFlight(folder, "u", 3) as in_flight:
        return {each.key: outcome for each, outcome in Bisection(ask, in_flight).run(batch)}


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


@pytest.mark.parametrize(
    "answer", [[], [["a"]], [["a"], ["b"], ["c"]], [["a", "b"], []], [["a"], ["b", "c"]]]
)
def test_a_wrong_number_of_answers_is_an_error_and_never_matched(tmp_path, answer):
    found = bisect(lambda batch: answer if len(batch) == 2 else [[]], images(2), tmp_path)
    assert all(reason is Reason.MODEL_ERROR for reason, _, _ in found.values())
    assert all("asked about [1] regions of 1 images" in each.detail for each in found.values())


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
