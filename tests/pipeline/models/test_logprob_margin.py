"""The margin counts every spelling of a choice, at the token that decides."""

import math

import pytest

from paracaption.pipeline.models.logprob_margin import ChoiceTokens, margin_of_text
from paracaption.schemas.errors import StageFailed


def logsum(*values: float) -> float:
    return math.log(sum(math.exp(value) for value in values))


def test_one_token_each_is_the_difference_of_the_two():
    tokens = ChoiceTokens(["yes", "no"], {"yes": 1, "no": 2})
    assert tokens.margin([2], [{1: -2.0, 2: -0.5}]) == pytest.approx(-1.5)


def test_all_spellings_of_a_choice_count_together():
    tokens = ChoiceTokens(["yes", "no"], {"yes": 1, "no": 2, "y": 3, "ye": 4, "n": 5, "yesterday": 6})
    row = {1: -1.0, 2: -2.0, 3: -3.0, 4: -4.0, 5: -5.0}
    assert tokens.ids == [1, 2, 3, 4, 5]
    assert tokens.margin([1], [row]) == pytest.approx(logsum(-1, -3, -4) - logsum(-2, -5))


def test_a_shared_first_piece_decides_nothing():
    tokens = ChoiceTokens(["agree", "against"], {"ag": 1, "ree": 2, "ainst": 3, "a": 4, "g": 5})
    rows = [{1: -0.1, 4: -3.0}, {2: -2.0, 3: -0.25}, {}]
    assert tokens.margin([1, 3], rows) == pytest.approx(-1.75)


def test_tokens_that_spell_neither_choice_have_no_margin():
    tokens = ChoiceTokens(["yes", "no"], {"yes": 1, "no": 2})
    assert tokens.margin([7], [{1: -1.0, 2: -2.0, 7: 0.0}]) is None
    assert tokens.margin([], []) is None


def test_a_scale_that_all_tokens_share_drops_out():
    tokens = ChoiceTokens(["yes", "no"], {"yes": 1, "no": 2})
    masked, raw = {1: -0.2, 2: -1.7}, {1: -9.2, 2: -10.7}
    assert tokens.margin([1], [masked]) == pytest.approx(tokens.margin([1], [raw]))


def test_a_choice_that_cannot_be_spelt_is_refused():
    with pytest.raises(ValueError, match="'no'"):
        ChoiceTokens(["yes", "no"], {"yes": 1})


def test_a_choice_that_is_not_listed_counts_as_the_least_likely():
    assert margin_of_text(["yes", "no"], "", [("yes", -0.1), ("Yes", -4.0)]) == pytest.approx(3.9)


def test_forbidden_tokens_do_not_count_as_listed():
    listed = [("yes", -0.1), ("no", -2.1), ("maybe", -9999.0)]
    assert margin_of_text(["yes", "no"], "", listed) == pytest.approx(2.0)


def test_a_token_may_end_the_string():
    assert margin_of_text(["yes", "no"], "", [('yes"}', -0.5), ('no"', -1.0)]) == pytest.approx(0.5)


def test_a_position_that_fits_neither_has_no_margin():
    assert margin_of_text(["yes", "no"], "", [("{", -0.1), ('"', -2.0)]) is None


def test_a_model_that_says_nan_is_an_error_and_no_verdict():
    tokens = ChoiceTokens(["yes", "no"], {"yes": 1, "no": 2})
    for row in ({1: math.nan, 2: -1.0}, {1: -1.0, 2: math.nan}):
        with pytest.raises(StageFailed, match="a log-probability is NaN"):
            tokens.margin([1], [row])
    for listed in ([("yes", math.nan), ("no", -1.0)], [("yes", -1.0), ("maybe", math.nan)]):
        with pytest.raises(StageFailed, match="a log-probability is NaN"):
            margin_of_text(["yes", "no"], "", listed)
    assert margin_of_text(["yes", "no"], "", [("yes", -0.1), ("no", -math.inf)]) == pytest.approx(0.0)
