"""What strangers say, made plain: texts that UTF-8 holds, details of fair length."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paracaption.schemas.errors import BadRecord
from paracaption.schemas.plain import MAX_DETAIL, fits_int64, plain_detail, plain_text, words_of
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Drop

anything = st.text(st.characters(exclude_categories=()), max_size=40)


@given(anything)
def test_any_text_becomes_one_that_utf8_holds_and_stays_it(text):
    found = plain_text(text)
    assert found.encode("utf-8").decode("utf-8") == found == plain_text(found)


@given(st.text())
def test_a_text_of_unicode_stays_as_it_is(text):
    assert plain_text(text) == text


@pytest.mark.parametrize(
    ("text", "plain"),
    [("a \ud83d b", "a \\ud83d b"), ("\ud83d\ude00", "\U0001f600"), ("\ude00\ud83d", "\\ude00\\ud83d")],
)
def test_half_a_character_is_escaped_and_two_halves_are_the_character(text, plain):
    assert plain_text(text) == plain


def test_a_text_of_another_class_becomes_an_exact_one():
    class Loud(str):
        __slots__ = ()

        def __str__(self):
            raise RuntimeError

    assert [type(plain_text(text)) for text in (Loud("a"), np.str_("a"))] == [str, str]


@given(st.integers(0, 3), anything)
def test_a_detail_that_was_made_plain_is_not_changed_by_the_way_to_another_process(times, text):
    detail = plain_detail(text * 10**times)
    assert len(detail) <= MAX_DETAIL
    drop = Drop("source", Reason.MODEL_ERROR, text * 10**times)
    assert drop.detail == detail
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(drop), type=Drop) == drop


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def test_an_error_without_a_text_has_words():
    assert words_of(Mute()) == "Mute: a Mute without a text (ValueError)"
    assert words_of(RuntimeError("bad \ud83d text")) == "RuntimeError: bad \\ud83d text"
    assert len(words_of(RuntimeError("x" * 10**6))) == MAX_DETAIL


def test_a_bad_record_has_a_reason_of_the_list_and_a_plain_detail():
    assert BadRecord(Reason.MODEL_ERROR, "\ud83d" * 999).detail.isascii()
    with pytest.raises(ValueError, match="odd"):
        BadRecord("odd", "")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("value", "fits"), [(2**63 - 1, True), (2**63, False), (-(2**63), True), (None, False), (True, False)]
)
def test_whole_numbers_fit_64_bits_or_not(value, fits):
    assert fits_int64(value) is fits
