"""Texts and numbers of strangers, as far as every format of ours can hold them.

Sources and models say what they like: half an emoji, a number of 400 digits, an error without a text.
What is stored goes through here once, at the border, so that nothing later has to fear it.
"""

from __future__ import annotations

from typing import Any

from .secrets import shorten

MAX_DETAIL = 1_000
"""Most characters of what a person reads about one drop or failure."""

_INT64 = (-(1 << 63), 1 << 63)


def plain_text(text: str) -> str:
    """A text as an exact `str` that UTF-8 can hold.

    Two halves of a character side by side become that character. A half alone becomes its escape: a
    backslash, `u`, and four digits.
    """
    text = str.__str__(text)
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return joined.encode("utf-8", "backslashreplace").decode("utf-8")
    return text


def plain_detail(value: Any) -> str:
    """Words for a person, whatever they are made of: plain, and cut if they are too long."""
    try:
        text = value if isinstance(value, str) else str(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - the text of a stranger's object
        text = f"a {type(value).__name__} without a text ({type(error).__name__})"
    text = plain_text(text[: MAX_DETAIL + 1])
    return text if len(text) <= MAX_DETAIL else f"{text[: MAX_DETAIL - 3]}..."


def words_of(error: BaseException) -> str:
    """An error's type and text, without secrets; never raises, also if the text cannot be made."""
    return plain_detail(shorten(f"{type(error).__name__}: {plain_detail(error)}"))


def fits_int64(value: Any) -> bool:
    """Whether a value is a whole number, no truth value, that 64 bits hold."""
    return type(value) is int and _INT64[0] <= value < _INT64[1]
