"""Measures of captions that need no judge: emptiness, repetition, variety, naming the right thing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...filters import text
from ...pipeline.models.embedded import lexical


class Quality(NamedTuple):
    """Measures of many captions.

    Attributes:
        captions: number of captions.
        empty: share of captions without a word.
        words: mean number of words of the others.
        repeats: mean share of a caption's 4-grams that occurred earlier in it.
        repetitive: share of captions in which more than a fifth of the 4-grams are repeats.
        distinct_1, distinct_2: number of different words, and of different pairs of words, as a share of all.
        same: share of captions that another region of the same image has as well.
        names_it: share of captions whose subject is the region's category, by the rules of the `lexical`
            judge; None if no category is known.
    """

    captions: int
    empty: float
    words: float
    repeats: float
    repetitive: float
    distinct_1: float
    distinct_2: float
    same: float
    names_it: float | None


class ImageCaptions(NamedTuple):
    """The captions of one image's regions, and the regions' categories; "" where one is not known."""

    captions: Sequence[str]
    categories: Sequence[str]


_REPETITIVE = 0.2


def measure_quality(images: Sequence[ImageCaptions]) -> Quality:
    """Measure the captions of images."""
    captions = [caption for image in images for caption in image.captions]
    prose = [text.read(caption) for caption in captions]
    worded = [each for each in prose if each.words]
    pairs = [pair for each in worded for pair in zip(each.words, each.words[1:], strict=False)]
    words = [word for each in worded for word in each.words]
    known = [
        (caption, category)
        for image in images
        for caption, category in zip(image.captions, image.categories, strict=True)
        if category
    ]
    again = sum(
        bool(caption.strip()) and [*map(str.strip, image.captions)].count(caption.strip()) > 1
        for image in images
        for caption in image.captions
    )
    return Quality(
        captions=len(captions),
        empty=_share(len(prose) - len(worded), prose),
        words=_share(len(words), worded),
        repeats=_share(sum(each.repeat_share for each in worded), worded),
        repetitive=_share(sum(each.repeat_share > _REPETITIVE for each in worded), worded),
        distinct_1=_share(len(set(words)), words),
        distinct_2=_share(len(set(pairs)), pairs),
        same=_share(again, captions),
        names_it=_share(sum(lexical.describes(*each) > 0 for each in known), known) if known else None,
    )


def _share(count: float, of: Sequence[object]) -> float:
    return count / max(1, len(of))
