"""The questions that `record.py` asks the released code, and the tests ask ours."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """A question to the tiny Base.

    Attributes:
        question: as the released code takes it: `<image>` stands for a photo; without any, all stand before
            it.
        photos: (seed, width, height) of each photo of the conversation.
        turns: (question, answer) of the turns before this one.
        length, steps, block: of the answer; `block` tokens are decided before the next ones are begun.
        stop: strings that end the answer.
    """

    question: str
    photos: tuple[tuple[int, int, int], ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    length: int = 16
    steps: int = 16
    block: int = 16
    stop: tuple[str, ...] = ()


SQUARE, WIDE, TALL = (1, 30, 30), (2, 96, 60), (3, 33, 100)
"""Photos of one tile, of 3 x 2 tiles, and of 1 x 3, the last two with a thumbnail."""

CASES = {
    "one image": Case("what is it?", (SQUARE,)),
    "one image of many tiles": Case("Describe the image.", (WIDE,), length=32, steps=32, block=8),
    "the image in the question": Case("Look: <image>\nWhat color?", (TALL,), steps=8),
    "two images": Case(
        "Image-1: <image>\nImage-2: <image>\nWhich is larger?", (SQUARE, TALL), length=24, steps=12, block=8
    ),
    "three images": Case(
        "<image> or <image>, not <image>?", (WIDE, SQUARE, TALL), length=8, steps=8, block=8
    ),
    "text alone": Case("Say something.", length=24, steps=24, block=24),
    "text alone by blocks": Case("Say something.", length=24, steps=12, block=4),
    "second turn": Case("And why?", (SQUARE,), (("<image>\nwhat is it?", "A cat."),), steps=8, block=4),
    "third turn": Case("Sure?", (WIDE,), (("<image>\nname it", "dog"), ("And why?", "It barks.")), block=8),
    "second turn with an image of its own": Case(
        "<image>\nAnd this?", (SQUARE, TALL), (("<image>\nwhat is it?", "A cat."),), steps=8
    ),
    "second turn of text": Case("Go on.", (), (("Count.", "one two"),), length=12, steps=6, block=6),
    "two steps for two tokens": Case("A. cat\nB. dog\nAnswer A or B.", (SQUARE,), length=2, steps=2, block=2),
    "one step": Case("what is it?", (SQUARE,), length=8, steps=1, block=8),
    "steps do not divide the block": Case("what is it?", (SQUARE,), length=10, steps=4, block=10),
    "steps do not divide the blocks": Case("what is it?", (TALL,), length=21, steps=6, block=7),
    "more steps than tokens": Case("what is it?", (SQUARE,), length=8, steps=20, block=4),
    "left to right": Case("Reason step by step.", (WIDE,), length=24, steps=24, block=1),
    "left to right, text alone": Case("Reason step by step.", length=32, steps=32, block=1),
    "a stop string": Case("Say something.", length=24, steps=12, block=4, stop=("he",)),
    "a stop string across blocks": Case("Say something.", length=24, steps=12, block=4, stop=("hqh",)),
    "a stop string seen before what it ends": Case(
        "Say something.", length=24, steps=24, block=24, stop=("wq",)
    ),
    "a stop string seen late first": Case("Say something.", length=24, steps=12, block=24, stop=("qh",)),
    "two stop strings": Case("Say something.", length=24, steps=12, block=4, stop=("ok", "tq")),
    "a stop string that is not said": Case("what is it?", (SQUARE,), stop=("never said",)),
    "a stop string from left to right": Case(
        "Reason step by step.", length=32, steps=32, block=1, stop=("kq",)
    ),
    "a stop string about an image": Case("what is it?", (SQUARE,), steps=8, stop=("fo",)),
}
