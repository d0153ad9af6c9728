"""What the captioner said at all, and what a judge said about it."""

from __future__ import annotations

import math
import re
import unicodedata

from ..schemas.reasons import Reason
from .verdict import Verdict

MAX_CATEGORY_WORDS = 5
"""A core category is a short noun phrase ("wooden dining table"); more words are the judge rambling."""

_NO_CATEGORY = frozenset(
    "none|no|null|nil|na|n/a|nothing|unknown|unclear|unsure|not sure|undefined|other|no category|no object"
    "|not applicable|object|objects|thing|things|item|items|stuff|image|picture|photo|region|area|mask"
    "|segment|part|category".split("|")
)

_NO_PHRASE = re.compile(r'[{}<>|\\"\x00-\x1f\x7f-\x9f]')
"""Markup, a text within a text, and control characters."""


def captioned(caption: str | None) -> Verdict:
    """Keep a region that the captioner had something to say about."""
    if caption is None or not caption.strip():
        return Verdict(Reason.CAPTION_NONE, "the captioner returned nothing")
    return Verdict()


def judge_verdict(answer: str, margin: float | None = None, min_margin: float | None = None) -> Verdict:
    """Keep the region if the judge says that the caption describes the annotated category.

    An answer other than yes or no is the judge's failure and never counts as a no.

    Args:
        answer: "yes" or "no", in any case, with or without a full stop or quotes.
        margin: how sure the judge is that it is a yes; None if it has no such number.
        min_margin: if given, a margin decides: at least this is a yes, whatever the word. None to take the
            judge's word.
    """
    scores = {} if margin is None or math.isnan(margin) else {"verdict_margin": margin}
    word = _plain(answer)
    if word not in ("yes", "no"):
        return Verdict(Reason.ANSWER_INVALID, f"neither yes nor no: {answer[:60]!a}", scores)
    if min_margin is not None and scores:
        if scores["verdict_margin"] >= min_margin:
            return Verdict(scores=scores)
        return Verdict(
            Reason.CATEGORY_WRONG, f"margin for yes {margin:.3f}, at least {min_margin:g} needed", scores
        )
    if word == "no":
        return Verdict(Reason.CATEGORY_WRONG, "the judge says no", scores)
    return Verdict(scores=scores)


def core_category(answer: str) -> tuple[str | None, Verdict]:
    """The category that the judge named, made plain for a segmenter's prompt, and whether it is one.

    Returns:
        The phrase in lower case without article, quotes and final full stop, and keep; or None and the drop:
        `CATEGORY_NONE` if the judge named nothing or nothing that could be found in a photo ("object"),
        `ANSWER_INVALID` if it answered with more than a phrase.
    """
    phrase = re.sub(r"^(?:an?|the) (?=\w)", "", _plain(answer))
    if phrase in _NO_CATEGORY or not any(map(str.isalpha, phrase)):
        return None, Verdict(Reason.CATEGORY_NONE, f"the judge's answer names no category: {answer[:60]!a}")
    if len(phrase.split()) > MAX_CATEGORY_WORDS or len(phrase) > 80 or _NO_PHRASE.search(phrase):
        return None, Verdict(
            Reason.ANSWER_INVALID, f"the judge's answer is not a noun phrase: {answer[:60]!a}"
        )
    return phrase, Verdict()


def _plain(answer: str) -> str:
    """Folded, with single spaces, without what surrounds the words."""
    text = unicodedata.normalize("NFKC", answer).casefold().replace("\u2019", "'")
    return " ".join(text.split()).strip(" .,:;!?\"'“”\u2018*`")
