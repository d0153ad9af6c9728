"""Which photo a model saw: by the SHA-256 of its bytes, taken where the whole photo is read anyway.

`photos.read_pixels` notes the digest on the record that a model is given. For a model that reads photos by
other means, or none, they are hashed before it is asked: a photo that changes later is then found out. Stored
answers name the photo that they are about, so an image that has some is hashed once before they are believed.
"""

from __future__ import annotations

import logging
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

    def ask(self, stage: ModelStage, model: Any, batch: list[ImageRecord]) -> list[list[Any]]:
        """What `stage.ask` returns; the images have a `photo_digest` then.

        Raises:
            BadRecord: a photo cannot be read.
            Exception: whatever the model raises.
        """
        if not stage.sees_photo:
            return stage.ask(model, batch)
        hashed = {} if stage.name in self._readers else _hash(batch)
        try:
            answers = stage.ask(model, batch)
            if any(image.photo_digest for image in batch if image.key in hashed):
                self._readers.add(stage.name)
        finally:
            for image in batch:
                image.photo_digest = image.photo_digest or hashed.get(image.key, "")
        for image in batch:  # one that the model had no need to look at
            if not image.photo_digest and image.photo is not None:
                with suppress(BadRecord):
                    image.photo_digest = photos.hash_photo(image.photo, image.removed_orientation)
        return answers


def _hash(batch: list[ImageRecord]) -> dict[str, str]:
    """Digests of the photos that nobody has read yet, by key."""
    waiting = [image for image in batch if not image.photo_digest]
    return {
        image.key: photos.hash_photo(image.photo, image.removed_orientation)
        for image in waiting
        if image.photo is not None
    }
