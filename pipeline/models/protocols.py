"""What a backend is: a class behind one of four small protocols: `Captioner`, `Judge`, `Segmenter` or
`MaskGenerator`.

The constructor takes the options of the configuration as keywords. Besides the protocol's one method it may
have:

- `identity(**options) -> dict[str, str]`, a class method that names what the answers depend on (versions,
  weights, prompts) without loading any of it. It becomes part of the evidence digest, so options that
  change no answer (batch sizes, devices) stay out of it. A class without one is identified by all its options
  and its attribute `version`.
- `check(**options) -> Checked`, a class method that checks options and checkpoint without loading weights.
- `report() -> dict[str, float]`: numbers since its start that are worth an event, such as the hit rate of a
  prefix cache or the number of retried requests.
- `close()`, which frees what Python would not free by itself.
- `caption_each(images)` of a captioner or `ask_each(questions)` of a judge, if it keeps an engine full by
  itself: yields (place in the list, what `caption` or `ask` gives there), each as soon as it is ready. It is
  asked about a whole unit at once, which `batch_images` does not cut, and what it has answered is saved while
  it works on the rest.

A captioner reads photos with `photos.read_pixels(image)`, which notes on the image which bytes were seen. For
one that reads them by other means they are hashed before each call, which is a second reading.

Answers are checked (`answers.py`): one of another type or without measure is a `model_error` of its
region; what means the same, such as a `numpy.str_`, is taken. A backend may change the records that it gets.

A backend may return a `BadRecord` in the place of one region's answer. That region is dropped with its reason
and nothing is stored for it; the other answers stand.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np

from ...schemas.errors import BadRecord
from ...schemas.records import ImageRecord, Rle


class Caption(msgspec.Struct, frozen=True):
    """A caption of a captioner that can say how sure it is.

    Attributes:
        text: the caption itself.
        confidence: 0 to 1. None if the captioner has no such number. One that is not finite counts as None.
    """

    text: str
    confidence: float | None = None


class Question(msgspec.Struct, frozen=True):
    """What a judge is asked about one region.

    Attributes:
        kind: "verify" (does the caption describe the category? The answer is "yes" or "no") or
            "extract" (which category does the caption describe? The answer is a short noun phrase, or "" if
            it describes none).
        caption: the captioner's text.
        category: plain category name; set for "verify" only.
    """

    kind: str
    caption: str
    category: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """A judge's answer.

    Attributes:
        text: the answer itself.
        margin: how sure the judge is: above 0 it speaks for "yes". None if the judge has no such
            number. One that is not finite counts as None.
    """

    text: str
    margin: float | None = None


class Candidate(msgspec.Struct, frozen=True):
    """One mask that a segmenter or a mask generator predicts.

    Attributes:
        rle: the mask, of the image's size.
        score: the model's own confidence, 0..1.
    """

    rle: Rle
    score: float


class Checked(msgspec.Struct, frozen=True):
    """What `paracaption doctor` learns about a backend without loading it.

    Attributes:
        what: the model in a few words, such as "GAR: vision 47 x 1536, language model 32 x 4096".
        weight_bytes: memory of the weights on the device, in the dtype they will have there.
        notes: facts that are worth knowing and are no error.
    """

    what: str
    weight_bytes: int = 0
    notes: list[str] = []


class Captioner(Protocol):
    """Describes regions. It is given many images at once, so that it can keep its engine full."""

    def caption(self, images: list[ImageRecord]) -> list[list[str | Caption | BadRecord | None]]:
        """One caption for each live region of each image, in the order of `live()`.

        A caption is None if the model has nothing to say about the region.

        Raises:
            BadRecord: an image cannot be read. After any other exception the batch is bisected until the
                failing image is found.
        """
        ...


class Judge(Protocol):
    """Answers questions about captions."""

    def ask(self, questions: list[Question]) -> list[Answer | BadRecord]:
        """One answer for each question, in order; a `BadRecord` where there is no answer."""
        ...


class Segmenter(Protocol):
    """Predicts the masks of a category, or of the object in a box.

    A class that does not read one of the two says so by its attribute `reads_boxes = False` or
    `reads_phrases = False`. Both are True for a class without them.
    """

    def segment(self, photo: np.ndarray, phrases: list[str], boxes: np.ndarray) -> list[list[Candidate]]:
        """Candidates for each region.

        Args:
            photo: (H, W, 3) uint8 RGB.
            phrases: N core categories; in `box_masks` the source's categories, "" for none.
            boxes: (N, 4) float32 x1, y1, x2, y2 in pixels, exclusive at the far edge: the boxes of the masks
                that are compared with the answer, or those in which `box_masks` looks for a mask.

        Returns:
            N lists of candidates, each with the best one first; an empty list if nothing was found.
        """
        ...


class MaskGenerator(Protocol):
    """Finds the masks of a photo that has none."""

    def generate(self, photo: np.ndarray) -> list[Candidate]:
        """The masks of a photo, which may overlap, in any order (`answers.generated` puts them in one).

        Args:
            photo: (H, W, 3) uint8 RGB.

        Returns:
            One candidate for each mask. None at all is an answer: the photo has nothing to mask.
        """
        ...
