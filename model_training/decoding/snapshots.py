"""How captions and answers come to be: what their tokens are between two decoding steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..model.processor import PerceptionDLMProcessor
    from .grouping import Group
    from .sampler import DecodeState


class Slot(NamedTuple):
    """The place of one token in a caption that is being decoded.

    Attributes:
        text: the token as text; None while it is masked.
        token: its id.
        confidence: probability of the latest prediction for this place; NaN before the first one.
    """

    text: str | None
    token: int
    confidence: float


class Snapshot(NamedTuple):
    """The captions of a photo between two decoding steps.

    Attributes:
        forwards: forward passes of the language model so far, of the group that has had most.
        slots: for each region, in the caller's order, its tokens.
        captions: the captions as they read now, without what is still masked.
    """

    forwards: int
    slots: list[list[Slot]]
    captions: list[str]


def of_groups(
    processor: PerceptionDLMProcessor, groups: Sequence[Group], state: DecodeState
) -> list[Snapshot]:
    """What each row of a batch has: its group's regions in the order of `Group.regions`."""
    shots = []
    for row, group in enumerate(groups):
        slots: list[list[Slot]] = [[] for _ in group.regions]
        for place, number in enumerate(group.example.order):
            parts = (state.tokens_BNS, state.open_BNS, state.confidence_BNS)
            rows = zip(*(part[row, place].tolist() for part in parts), strict=True)
            slots[number] = [
                Slot(None if masked else processor.tokenizer.decode([token]), token, confidence)
                for token, masked, confidence in rows
            ]
        tokens_NS = state.tokens_BNS[row, : len(group.regions)].numpy()
        captions = processor.read_captions(tokens_NS, group.example.order)
        shots.append(Snapshot(int(state.forwards_B[row]), slots, captions))
    return shots


def join(groups: Sequence[Group], shots: Sequence[Snapshot]) -> Snapshot:
    """The snapshot of a photo from those of its groups."""
    total = sum(len(group.regions) for group in groups)
    slots: list[list[Slot]] = [[] for _ in range(total)]
    captions = [""] * total
    for group, shot in zip(groups, shots, strict=True):
        for place, region in enumerate(group.regions):
            slots[region], captions[region] = shot.slots[place], shot.captions[place]
    return Snapshot(max(shot.forwards for shot in shots), slots, captions)
