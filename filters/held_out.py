"""Which images of a corpus are held out of training. The key alone decides, so every copy of an image agrees.

A larger share holds out the images of a smaller one and more.
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal

from .benchmark_photos import canonical

Split = Literal["train", "held_out", "all"]

_REPEATED = re.compile(r"-dup\d+$")


def without_repeat(key: str) -> str:
    """A key without the `-dup2` or the like that tells images of one name apart."""
    return _REPEATED.sub("", key)


def is_held_out(key: str, share: float) -> bool:
    """Whether an image is held out.

    Images of one file name share a key but for `-dup2` and the like, and photos of COCO and Objects365 a name
    but for what stands before it, so that copies of a photo are in one split.

    Args:
        key: of the image.
        share: of all images, from 0 (none) to 1.
    """
    name = without_repeat(key)
    digest = hashlib.sha256(f"held out: {canonical(name) or name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def is_in(split: Split, key: str, share: float) -> bool:
    """Whether an image is in a split of a corpus that holds out a share of its images."""
    return split == "all" or is_held_out(key, share) == (split == "held_out")
