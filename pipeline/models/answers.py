"""What a backend answered, made clean at the border: after this, an answer is of its type and of a fair size.

A backend is a stranger's code. What means the same in another type is converted: a `numpy.str_`, a number
of numpy or torch, an array or a generator in the place of a list. Anything else is refused with `MODEL_ERROR`
for the region that it is about; where nobody can tell which answer is whose, for the image. So nothing comes
into evidence or ledger that one of them cannot hold, and no mask reaches pycocotools unchecked.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, Sized
from itertools import islice
from typing import Any, TypeVar

from ...filters import rle
from ...schemas.errors import BadRecord
from ...schemas.plain import plain_text, words_of
from ...schemas.reasons import Reason
from ...schemas.records import Rle
from .protocols import Answer, Candidate, Caption

MAX_CHARS = 100_000
"""Longest caption or answer. `text.max_chars` is far below; more is a model that runs on."""

MAX_CANDIDATES = 10_000
"""Most masks that a segmenter may give for one region, or a mask generator for one photo."""

MAX_MASK_CHARS = 8 << 20
"""Most characters of all RLEs of such an answer. A mask has some hundreds."""

Cleaned = TypeVar("Cleaned")


def listed(answers: Any, count: int, what: str) -> list[Any]:
    """Answers as a list, for the caller to count; of a generator no more than one too many are taken.

    Raises:
        TypeError: it is no list, tuple, array or generator; the letters of a text are no answers.
    """
    if isinstance(answers, str | bytes | Mapping | Set) or not isinstance(answers, Iterable):
        raise TypeError(f"{what} have to be a list, not {_kind(answers)}")
    return list(answers if isinstance(answers, Sized) else islice(answers, count + 1))


def placed(answers: Any, count: int, what: str) -> Iterator[tuple[int, Any]]:
    """(place, answer) pairs as they come, each place once.

    Args:
        answers: what a backend that batches by itself yields.
        count: how many were asked about.
        what: they are, in the plural.

    Raises:
        TypeError: it yields something else than pairs, or nothing can be taken from it.
        ValueError: a place is not asked about or comes twice, or some have no answer at the end.
    """
    if isinstance(answers, str | bytes | Mapping | Set) or not isinstance(answers, Iterable):
        raise TypeError(f"answers to {what} have to be yielded one by one, not given as {_kind(answers)}")
    open_places = set(range(count))
    for each in answers:
        if not isinstance(each, tuple) or len(each) != 2 or not isinstance(each[0], numbers.Integral):
            raise TypeError(f"an answer has to be (place, answer), not {_kind(each)}")
        place = int(each[0])
        if place not in open_places:
            raise ValueError(f"an answer has the place {place} of {count} {what}, or it came twice")
        open_places.remove(place)
        yield place, each[1]
    if open_places:
        raise ValueError(f"{len(open_places)} of {count} {what} have no answer")


def caption(answer: Any) -> str | BadRecord | None:
    """The text of a captioner's answer about one region; None if it has nothing to say."""

    def clean() -> str | None:
        given = answer.text if isinstance(answer, Caption) else answer
        return None if given is None else _text(given, "a caption")

    return _cleaned(clean, answer)


def confidence(answer: Any) -> float | BadRecord | None:
    """How sure a captioner is of its answer; None if it does not say, or says what is not finite."""

    def clean() -> float | None:
        if not isinstance(answer, Caption) or answer.confidence is None:
            return None
        found = _number(answer.confidence, "a confidence")
        if math.isfinite(found) and not 0 <= found <= 1:
            raise _refused(f"a confidence has to be from 0 to 1, not {found}")
        return found if math.isfinite(found) else None

    return _cleaned(clean, answer)


def judgment(answer: Any) -> Answer | BadRecord:
    """A judge's answer to one question. A margin that is not finite counts as none."""

    def clean() -> Answer:
        if not isinstance(answer, Answer):
            raise _refused(f"a judge's answer has to be an `Answer`, not {_kind(answer)}")
        margin = None if answer.margin is None else _number(answer.margin, "a margin")
        if margin is not None and not math.isfinite(margin):
            margin = None
        return Answer(_text(answer.text, "a judge's answer"), margin)

    return _cleaned(clean, answer)


def candidates(given: Any, size: tuple[int, int]) -> list[tuple[Rle | None, float]] | BadRecord:
    """A segmenter's answer about one region.

    Args:
        given: the candidates.
        size: (height, width) of the image in pixels.

    Returns:
        The mask (None if it has no pixel) and the score of each candidate, in order.
    """

    def clean() -> list[tuple[Rle | None, float]]:
        found = _candidates(given, size, "region")
        return [(None if mask is None else mask.rle, score) for mask, score in found]

    return _cleaned(clean, given)


def generated(given: Any, size: tuple[int, int]) -> list[tuple[rle.Mask, float]] | BadRecord:
    """A mask generator's answer about one photo, in an order that does not depend on the generator's.

    Args:
        given: the candidates.
        size: (height, width) of the photo in pixels.

    Returns:
        The masks with their scores, without empty ones: larger ones first, then by the place of their box
        from the top left, then by their counts. Of equal masks the one with the best score stays.
    """

    def clean() -> list[tuple[rle.Mask, float]]:
        best: dict[str, tuple[rle.Mask, float]] = {}
        for mask, score in _candidates(given, size, "photo"):
            if mask is not None:
                counts = mask.rle.counts
                best[counts] = (mask, max(score, best[counts][1]) if counts in best else score)
        return sorted(best.values(), key=lambda each: _place_in_order(each[0]))

    return _cleaned(clean, given)


def _place_in_order(mask: rle.Mask) -> tuple[int, int, int, str]:
    x, y, _, _ = mask.bbox
    return -mask.area, y, x, mask.rle.counts


def _candidates(given: Any, size: tuple[int, int], of: str) -> list[tuple[rle.Mask | None, float]]:
    if isinstance(given, str | bytes | Mapping | Set) or not isinstance(given, Iterable):
        raise _refused(f"a {of}'s candidates have to be a list, not {_kind(given)}")
    read, total = [], 0
    for place, each in enumerate(islice(given, MAX_CANDIDATES + 1)):
        if place == MAX_CANDIDATES:
            raise _refused(f"more than {MAX_CANDIDATES:,} candidates")
        read.append(_candidate(each, f"candidate {place}"))
        total += len(read[-1][0]["counts"])
        if total > MAX_MASK_CHARS:
            raise _refused(f"RLEs of more than {MAX_MASK_CHARS:,} characters for one {of}")
    found: list[tuple[rle.Mask | None, float]] = []
    masks = rle.check_all([code for code, _ in read], *size)
    for place, (mask, (_, score)) in enumerate(zip(masks, read, strict=True)):
        if isinstance(mask, BadRecord) and mask.reason is not Reason.MASK_EMPTY:
            raise _refused(f"the mask of candidate {place}: {mask.detail}")
        found.append((None if isinstance(mask, BadRecord) else mask, score))
    return found


def _candidate(given: Any, name: str) -> tuple[dict[str, Any], float]:
    """The RLE, as `rle.check_all` takes it, and the score."""
    if not isinstance(given, Candidate) or not isinstance(given.rle, Rle):
        raise _refused(f"{name} is not a `Candidate` with an `Rle`")
    score = _number(given.score, f"the score of {name}")
    if not math.isfinite(score):
        raise _refused(f"the score of {name} is {score}, which is not a finite number")
    counts = given.rle.counts
    if not isinstance(counts, str | bytes):
        raise _refused(f"the counts of {name} have to be text, not {_kind(counts)}")
    sides = islice(given.rle.size, 3)  # no more than one too many: it may have no end
    size = [int(side) if isinstance(side, numbers.Integral) else side for side in sides]
    return {"size": size, "counts": counts}, score


def _cleaned(clean: Callable[[], Cleaned], answer: Any) -> Cleaned | BadRecord:
    """What `clean` makes of an answer; or why it cannot be used, even if a class of the user's raises."""
    try:
        return answer if isinstance(answer, BadRecord) else clean()
    except BadRecord as refused:
        return refused
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - an object of a stranger's class
        return _refused(f"the answer cannot be read: {words_of(error)}")


def _text(value: Any, what: str) -> str:
    value = _scalar(value)
    if not isinstance(value, str):
        raise _refused(f"{what} has to be text, not {_kind(value)}")
    value = str.__str__(value)
    if len(value) > MAX_CHARS:
        raise _refused(f"{what} has {len(value):,} characters; at most {MAX_CHARS:,} are allowed")
    return plain_text(value)


def _number(value: Any, what: str) -> float:
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _refused(f"{what} has to be a number, not {_kind(value)}")
    return float(value)


def _scalar(value: Any) -> Any:
    """The one value in a scalar or an array without axes of numpy or torch; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _refused(detail: str) -> BadRecord:
    return BadRecord(Reason.MODEL_ERROR, detail)


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
