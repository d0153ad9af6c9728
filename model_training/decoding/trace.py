"""How captions came to be: what each place of each caption held after every decoding step.

`trace_gif` and `trace_page` show a trace. In both, a masked place is a gray box, a token written in this
step is marked, and a dot is an end of text. What stands after the first end is pale: the caption does not
have it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...pipeline.io import draw

if TYPE_CHECKING:
    from .snapshots import Slot, Snapshot

OPEN, FRESH, KEPT, END, AFTER = "open", "fresh", "kept", "end", "after"
"""States of a slot: masked, written in this step, written before, an end of text, after the first end."""


class Piece(NamedTuple):
    """A slot as it is shown.

    Attributes:
        text: the text of its token; "" while it is masked.
        state: one of the states above.
        confidence: probability of the latest prediction; NaN before the first one.
    """

    text: str
    state: str
    confidence: float = math.nan


class Trace(NamedTuple):
    """The captions of a photo over all decoding steps, ready to be shown.

    Attributes:
        photo: (H, W, 3) uint8 RGB.
        overlays: the regions; their captions are not used.
        snapshots: the captions before the first step and after every one.
        eot: id of the token that ends a caption.
        title: a line above everything, such as the name of the photo.
    """

    photo: np.ndarray
    overlays: Sequence[draw.Overlay]
    snapshots: Sequence[Snapshot]
    eot: int | None = None
    title: str = ""

    def pieces(self, step: int) -> list[list[Piece]]:
        """For each region, its slots as they are shown after a step; step 0 is before the first one."""
        now, before = self.snapshots[step].slots, self.snapshots[max(0, step - 1)].slots
        return [list(_pieces(slots, earlier, self.eot)) for slots, earlier in zip(now, before, strict=True)]

    def progress(self, step: int) -> tuple[int, int]:
        """How many slots are written after a step, and how many there are."""
        slots = [slot for region in self.snapshots[step].slots for slot in region]
        return sum(slot.text is not None for slot in slots), len(slots)

    def line(self, step: int) -> str:
        """The progress after a step, in words."""
        written, total = self.progress(step)
        return f"step {step} of {len(self.snapshots) - 1}, {written} of {total} tokens"


def _pieces(slots: Sequence[Slot], before: Sequence[Slot], eot: int | None) -> Iterator[Piece]:
    ended = False
    for place, (slot, earlier) in enumerate(zip(slots, before, strict=True)):
        if slot.text is None:
            yield Piece("", OPEN, slot.confidence)
        elif slot.token == eot:
            ended = True
            yield Piece("\N{MIDDLE DOT}", END, slot.confidence)
        else:
            fresh = earlier.text is None or earlier.token != slot.token
            text = slot.text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
            text = text if place else text.lstrip()
            yield Piece(text, AFTER if ended else FRESH if fresh else KEPT, slot.confidence)
