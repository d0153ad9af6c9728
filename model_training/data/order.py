"""Random orders that are computed, not stored: a permutation of any size, and shuffles by a key.

All of them are functions of their keys alone: they are the same on every machine, for any number of workers,
and after a resume. They need no memory that grows with the data.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 4
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def key_of(*parts: object) -> int:
    """A 64-bit hash of numbers and strings."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class Permutation:
    """A random permutation of 0 .. size - 1.

    A Feistel network permutes the numbers below the next power of two; a number that falls outside of the
    size is permuted again until it is inside.
    """

    def __init__(self, size: int, key: int):
        bits = max(2, (size - 1).bit_length())
        self.size = size
        self.low_bits = np.uint64(bits // 2)
        self.low, self.high = (np.uint64((1 << count) - 1) for count in (bits // 2, bits - bits // 2))
        self.keys = _mix(np.arange(1, 2 * _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN) ^ np.uint64(key))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The images of positions (N,) under the permutation: (N,) int64."""
        found = self._once(positions.astype(np.uint64))
        while (outside := np.flatnonzero(found >= self.size)).size:
            found[outside] = self._once(found[outside])
        return found.astype(np.int64)

    def _once(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self.low_bits, x & self.low
        for first, second in self.keys.reshape(-1, 2):
            left = left ^ (_mix(right ^ first) & self.high)
            right = right ^ (_mix(left ^ second) & self.low)
        return (left << self.low_bits) | right


def shuffled(size: int, *key: object) -> np.ndarray:
    """0 .. size - 1 in the order of a key; for small sizes."""
    numbers = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return np.argsort(_mix(numbers + np.uint64(key_of(*key))), kind="stable")


def num_groups(regions: np.ndarray, regions_per_group: float) -> np.ndarray:
    """In how many groups images with (N,) regions are visited, at most: (N,) int64."""
    return np.ceil(regions / regions_per_group).astype(np.int64)


def even_groups(regions: np.ndarray, groups: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut the shuffled regions of images into groups whose sizes differ by one at most, larger ones first.

    Args:
        regions: (N,) number of regions of each image.
        groups: (N,) number of groups they are cut into.
        group: (N,) index of the group that is asked for.

    Returns:
        Where that group starts among the image's shuffled regions, and its size: (N,) each.
    """
    size, larger = np.divmod(regions, groups)
    return group * size + np.minimum(group, larger), size + (group < larger)


def varied_groups(
    regions: np.ndarray, groups: np.ndarray, group: np.ndarray, most: int, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the shuffled regions of images into groups of random sizes.

    A group has any size from 1 to `most` that leaves enough room for the rest in the groups after it. The
    regions may be used up before the last group; then that is empty.

    Args:
        regions: (N,) number of regions of each image; at most `most * groups`.
        groups: (N,) number of groups they are cut into.
        group: (N,) index of the group that is asked for.
        most: most regions of a group.
        keys: (N,) uint64, the same for all groups of an image.

    Returns:
        Where that group starts among the image's shuffled regions, and its size: (N,) each.
    """
    start, size = np.zeros_like(regions), np.zeros_like(regions)
    at = np.arange(len(regions))
    for number in range(int(group.max(initial=-1)) + 1):
        at = at[group[at] >= number]
        start[at] += size[at]
        left = regions[at] - start[at]
        least = np.maximum(np.minimum(left, 1), left - most * (groups[at] - number - 1))
        drawn = _mix(keys[at] + np.uint64((number + 1) * _GOLDEN & _MASK)) >> np.uint64(32)
        choices = (np.minimum(left, most) - least + 1).astype(np.uint64)
        size[at] = least + (drawn * choices >> np.uint64(32)).astype(np.int64)
    return start, size


def keys_of(numbers: np.ndarray, passes: np.ndarray, *key: object) -> np.ndarray:
    """A 64-bit hash for each pair of (N,) numbers and (N,) passes: (N,) uint64."""
    mixed = _mix(passes.astype(np.uint64) + np.uint64(key_of(*key)))
    return _mix(numbers.astype(np.uint64) * np.uint64(_GOLDEN) ^ mixed)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
