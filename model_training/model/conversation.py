"""Questions about whole images, and their answers, as a sequence: for training and for asking.

Shape suffixes: T views, P region prompts, Q patches of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import tiling
from .attention import SHARED
from .batch import Example
from .layout import IMAGE
from .processor import ANSWER, HEAD

if TYPE_CHECKING:
    from PIL import Image

    from .processor import PerceptionDLMProcessor


class Template(NamedTuple):
    """What stands around questions and answers.

    Attributes:
        first: before the first question.
        then: between the end token of an answer and the next question.
        answer: between a question and its answer.
    """

    first: str
    then: str
    answer: str


_USER = "<|start_header_id|>user<|end_header_id|>\n"

TRAINED = Template(HEAD, f"\n{_USER}", ANSWER)
"""What our training writes: a system turn, and a line break after every end token."""

RELEASED = Template(_USER, _USER, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n")
"""What PerceptionDLM's released code asks with. It was trained with another one, which has a system turn."""

TEMPLATES = {"trained": TRAINED, "released": RELEASED}


def lay_out(
    processor: PerceptionDLMProcessor,
    questions: Sequence[str],
    views: Sequence[int],
    template: Template,
    encode: Callable[[str], list[int]],
) -> list[list[int]]:
    """The tokens that come before each answer: those of a question, and of what stands around it.

    Images stand where the questions say `<image>`; if none does, all stand before the first question.

    Args:
        processor: the model's.
        questions: of a conversation, in turn.
        views: number of views of each image. Questions that say `<image>` say it as often as there are
            images.
        template: what stands around questions and answers.
        encode: turns a text into tokens, none of them special.
    """
    tokenize = processor.tokenize
    shown = [
        [
            *tokenize("<img>"),
            *[processor.config.image_token_id] * (count * processor.config.tokens_per_tile),
            *tokenize("</img>"),
        ]
        for count in views
    ]
    asked = []
    if not any(IMAGE in question for question in questions):
        asked = [token for image in shown for token in image]
    parts = []
    for number, question in enumerate(questions):
        first, *rest = question.split(IMAGE)
        asked += encode(first)
        for text in rest:
            asked += [*(shown.pop(0) if shown else ()), *encode(text)]
        parts.append(
            [*tokenize(template.then if number else template.first), *asked, *tokenize(template.answer)]
        )
        asked = []
    return parts


def cut_photos(
    processor: PerceptionDLMProcessor, photos: Sequence[np.ndarray | Image.Image]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The views of photos, (T, 3, S, S) uint8, one photo after the other, and the grid of each."""
    side, most = processor.config.tile_px, processor.config.max_tiles
    grids = [tiling.tile_grid(*_size(photo), side, most) for photo in photos]
    cut = [tiling.cut_image(photo, side, grid) for photo, grid in zip(photos, grids, strict=True)]
    return np.concatenate(cut) if cut else np.zeros((0, 3, side, side), np.uint8), grids


def make_example(
    processor: PerceptionDLMProcessor,
    views: np.ndarray,
    grids: Sequence[tuple[int, int]],
    prefix: Sequence[int],
    answer: Sequence[int],
) -> Example:
    """A conversation without regions as a sequence.

    Args:
        processor: the model's.
        views: of all its images, from `cut_photos`, as `grids`.
        grids: of each image.
        prefix: the tokens before the first answer.
        answer: the tokens from the first answer on, later questions included.
    """
    config = processor.config
    return Example(
        views=views,
        prompts=np.zeros((len(views), config.num_prompts, config.patches_per_side**2), bool),
        grid=grids[0] if grids else None,
        boxes=[],
        order=[],
        prefix=_shared(prefix, 0),
        captions=_shared(answer, len(prefix)),
        more_grids=tuple(grids[1:]),
    )


def _size(photo: np.ndarray | Image.Image) -> tuple[int, int]:
    """(width, height) of a photo."""
    if isinstance(photo, np.ndarray):
        return photo.shape[1], photo.shape[0]
    return photo.size


def _shared(ids: Sequence[int], start: int) -> np.ndarray:
    return np.array([ids, range(start, start + len(ids)), [SHARED] * len(ids)], np.int64)
