"""Which photo a model saw: by the SHA-256 of its bytes, taken where the whole photo is read anyway.

`photos.read_pixels` notes the digest on the record that a model is given. For a model that reads photos by
other means, or none, they are hashed before it is asked: a photo that changes later is then found out. Stored
answers name the photo that they are about, so an image that has some is hashed once before they are believed.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any

from ...schemas.errors import BadRecord
from ...schemas.records import ImageRecord
from ..io import photos
from ..io.activity import NOW
from ..stages.base import ModelStage, photos_claimed
from ..stages.evidence import Evidence

log = logging.getLogger(__name__)


def check_photos(stage: ModelStage, images: list[ImageRecord], known: Evidence) -> None:
    """Find out of which photo the images are today, where stored answers say of which one they speak.

    A photo that cannot be read now is taken to be that one: that is no verdict, and whoever reads the photo
    next (a model, or the writer) finds the failure, or another photo.

    Args:
        stage: the answers are its.
        images: of a unit; they get a `photo_digest`.
        known: the stored answers.
    """
    claimed = photos_claimed(stage, images, known)
    for image in images:
        if image.key not in claimed or image.photo is None:
            continue
        NOW.at(image.key)
        try:
            image.photo_digest = photos.hash_photo(image.photo, image.removed_orientation)
        except BadRecord as bad:
            log.debug("%s: %s", image.key, bad)
            image.photo_digest = claimed[image.key]


class PhotoWatch:
    """Asks models about images, and sees to it that each image names the photo that was seen."""

    def __init__(self) -> None:
        self._readers: set[str] = set()
        """Stages whose model has read a photo through `read_pixels`."""

    def ask(
        self, stage: ModelStage, model: Any, batch: list[ImageRecord]
    ) -> Generator[tuple[int, list[Any]]]:
        """(place of the image, its evidence) as it is ready; the image has a `photo_digest` then.

        Raises:
            BadRecord: a photo cannot be read.
            ValueError: the model gave another number of answers than it was asked for.
            Exception: whatever the model raises.
        """
        hashed = {} if stage.name in self._readers or not stage.sees_photo else _hash(batch)
        try:
            for place, answers in _asked(stage, model, batch):
                if stage.sees_photo:
                    self._name_photo(stage, batch[place], hashed)
                yield place, answers
        finally:
            for image in batch:
                image.photo_digest = image.photo_digest or hashed.get(image.key, "")

    def _name_photo(self, stage: ModelStage, image: ImageRecord, hashed: dict[str, str]) -> None:
        if image.photo_digest and image.key in hashed:
            self._readers.add(stage.name)
        image.photo_digest = image.photo_digest or hashed.get(image.key, "")
        if not image.photo_digest and image.photo is not None:  # the model had no need to look at it
            with suppress(BadRecord):
                image.photo_digest = photos.hash_photo(image.photo, image.removed_orientation)


def _asked(stage: ModelStage, model: Any, batch: list[ImageRecord]) -> Iterator[tuple[int, list[Any]]]:
    expected = [len(image.live()) for image in batch]  # a backend may change what it is given
    if stage.batches_itself:
        for place, answers in stage.ask_each(model, batch):
            _check_counts([expected[place]], [answers])
            yield place, answers
        return
    answers = stage.ask(model, batch)
    _check_counts(expected, answers)
    yield from enumerate(answers)


def _check_counts(expected: list[int], answers: list[list[Any]]) -> None:
    """Refuse another number of answers than regions were asked about: never match them by luck."""
    found = [len(answer) for answer in answers]
    if expected != found:
        raise ValueError(
            f"the backend was asked about {expected} regions of {len(expected)} images and returned {found} "
            "answers; it has to return one for each region, in their order"
        )


def _hash(batch: list[ImageRecord]) -> dict[str, str]:
    """Digests of the photos that nobody has read yet, by key."""
    waiting = [image for image in batch if not image.photo_digest]
    return {
        image.key: photos.hash_photo(image.photo, image.removed_orientation)
        for image in waiting
        if image.photo is not None
    }
