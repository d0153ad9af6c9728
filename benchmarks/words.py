"""Captions made from lists of words: as long as real ones, different each time, the same in every run."""

from __future__ import annotations

import random
from collections.abc import Iterator

_COLOURS = "black white red blue green brown grey orange yellow pink".split()
_STUFF = "wooden metal plastic glass leather woollen ceramic stone paper cotton".split()
_NOUNS = "dog cat person car bench tree cup lamp boat bird chair table bicycle horse bus clock".split()
_PARTS = "handle edge surface wheel leg collar seat frame base corner stripe pattern".split()
_PLACES = "a street|a lawn|a wooden floor|a white wall|the sea|a window|a crowd|a busy road".split("|")


def captions(seed: str) -> Iterator[str]:
    """Endless captions of 20 to 60 words."""
    rng = random.Random(seed)
    while True:
        noun = rng.choice(_NOUNS)
        text = [f"A {rng.choice(_COLOURS)} {rng.choice(_STUFF)} {noun} in front of {rng.choice(_PLACES)}."]
        text += [
            f"Its {rng.choice(_PARTS)} is {rng.choice(_COLOURS)} and {rng.choice(_STUFF)}, "
            f"with a {rng.choice(_COLOURS)} {rng.choice(_PARTS)} at one side."
            for _ in range(rng.randint(1, 4))
        ]
        yield " ".join(text)
