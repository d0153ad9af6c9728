"""Whose fault an error is: one image's, the model's, or nobody's; and what is asked again because of it.

An error of a batch is bisected down to the image that causes it. `BadRecord` is the data's fault: nothing is
asked again. Any other error of an image alone speaks against the model, unless something else of the unit
succeeds. A lost engine may be chance: an image alone is tried again before it is blamed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...schemas.errors import BadRecord, ConfigError, EngineLost, StageFailed
from ...schemas.plain import words_of
from ...schemas.reasons import Reason
from ...schemas.records import ImageRecord
from ...schemas.secrets import shorten
from ..io.failures import kind_of
from ..stages.base import Failure, UnitAnswers
from .in_flight import InFlight

GIVE_UP_AFTER = 8
"""Images that fail alone, without one success, before the rest of the unit is given up."""

_AGAINST_THE_MODEL = {Reason.MODEL_ERROR, Reason.ANSWER_INVALID, Reason.WORKER_CRASHED}
"""Errors that speak against the model if nothing of the unit succeeds; the others are the data's."""

Ask = Callable[[list[ImageRecord]], Iterable[tuple[int, list[Any]]]]
"""Images of one batch -> (place of an image, an answer for each of its live regions), each image once."""


class Bisection:
    """Asks a model about a batch; on an error, about its halves, down to the image that fails.

    Args:
        ask: asks the model; may raise anything.
        in_flight: of the unit; notes each batch, and knows the images that are not to be asked about.
        noted: of a batch whose images are answered one after the other, the most that are noted at a time;
            None notes all of it until it is answered.
    """

    def __init__(self, ask: Ask, in_flight: InFlight, noted: int | None = None):
        self._ask = ask
        self._in_flight = in_flight
        self._noted = noted
        self._failed_alone = 0
        self._succeeded = 0
        self._engines_lost = Counter[str]()
        self._last: Failure | None = None

    def run(self, batch: list[ImageRecord]) -> Iterator[tuple[ImageRecord, list[Any] | Failure]]:
        """(image, its answers or its failure) for each image of the batch.

        Raises:
            ConfigError, StageFailed: the model cannot be asked at all.
        """
        for image in batch:
            if self._in_flight.is_poison(image.key):
                yield image, Failure(Reason.WORKER_CRASHED, self._in_flight.crash_detail(image.key))
        batch = [image for image in batch if not self._in_flight.is_poison(image.key)]
        if not batch:
            return
        if not self._succeeded and self._failed_alone >= GIVE_UP_AFTER and self._last is not None:
            yield from ((image, self._last) for image in batch)
            return
        waiting = dict(enumerate(batch))
        try:
            for place, answers in self._answered(batch):
                image = waiting.pop(place)
                self._succeeded += 1
                yield image, answers
            if waiting:
                raise ValueError(f"{len(waiting)} of {len(batch)} images have no answer")
        except (ConfigError, StageFailed):
            raise
        except Exception as error:  # noqa: BLE001 - a model may raise anything
            if len(batch) == 1 and not (isinstance(error, EngineLost) and self._may_try_again(batch[0])):
                yield batch[0], self._failure(error)
                return
        left = list(waiting.values())
        middle = len(left) // 2  # 0 for an image alone that may be tried again
        if left:
            yield from self.run(left[:middle])
            yield from self.run(left[middle:])

    def _answered(self, batch: list[ImageRecord]) -> Iterator[tuple[int, list[Any]]]:
        keys = [image.key for image in batch]
        if self._noted is None:
            with self._in_flight.batch(keys):
                answers = list(self._ask(batch))
            yield from answers
            return
        with self._in_flight.batch(keys, self._noted) as is_done:
            for place, answer in self._ask(batch):
                is_done(keys[place])
                yield place, answer

    def _may_try_again(self, image: ImageRecord) -> bool:
        """Whether the engine's death may be chance: it has not yet died too often on this image alone."""
        self._engines_lost[image.key] += 1
        return self._engines_lost[image.key] < self._in_flight.attempts

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error, BadRecord):
            return Failure(error.reason, shorten(error.detail), kind_of(error))
        self._failed_alone += 1
        self._last = Failure(Reason.MODEL_ERROR, words_of(error))
        return self._last


def needs_fresh_model(answers: UnitAnswers) -> bool:
    """Whether to ask again with a fresh model: every image failed, and not only by the data's fault."""
    failures = answers.image_failures.values()
    return len(failures) == len(answers.missing) and any(
        each.reason is Reason.MODEL_ERROR for each in failures
    )


def model_failure(answers: UnitAnswers) -> str | None:
    """The error that speaks against the model; None if it succeeded on any region, now or before."""
    failures = [
        each.detail
        for each in [*answers.image_failures.values(), *answers.region_failures.values()]
        if each.reason in _AGAINST_THE_MODEL
    ]
    num_failed = len(answers.region_failures) + sum(
        len(image.regions) for image in answers.missing if image.key in answers.image_failures
    )
    all_failed = num_failed == answers.num_missing and not answers.num_known
    return failures[-1] if failures and all_failed else None
