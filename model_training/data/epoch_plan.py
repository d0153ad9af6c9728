"""Which items make up each batch of an epoch, as a function of the batch's number.

The order of an epoch is a permutation that is computed, not stored. It is cut into windows of 128 items, and
each window into batches by the items' lengths, which are known without reading the items. So a batch is the
same for any number of ranks and workers. To find it, only the number of batches of each window must be known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from ...schemas.training import DataOptions
from .order import Permutation, key_of, shuffled

WINDOW = 128
_AT_ONCE = 512


class ItemSource(Protocol):
    """What the plan of an epoch needs to know of a source of items to train on."""

    @property
    def num_items(self) -> int:
        """Number of items."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the items: it changes when they do."""
        ...

    def lengths(self, items: np.ndarray, passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of items before the captions or the answer, and from there on at most: (N,) int64 each.

        Args:
            items: (N,) indices of items.
            passes: (N,) index of the pass over the source (0, 1, ...).
        """
        ...


class Pick(NamedTuple):
    """An item of a batch.

    Attributes:
        source: index of the item's source.
        pass_index: index of the pass over this source (0, 1, ...).
        item: index of the item in its source.
    """

    source: int
    pass_index: int
    item: int


class Mixture:
    """Several sources, each passed over `weight` times in an epoch.

    A source is an endless stream of passes, each in its own order, and an epoch takes the next piece of the
    stream. So each item comes once in a pass, whatever the weight is.
    """

    def __init__(self, sources: Sequence[ItemSource], weights: Sequence[float], seed: int):
        self.sources, self.seed = sources, seed
        self.weights = [Fraction(str(weight)) for weight in weights]

    def starts(self, epoch: int) -> list[int]:
        """Where an epoch starts in each source's stream: the number of items in all epochs before it."""
        pairs = zip(self.weights, self.sources, strict=True)
        return [math.floor(epoch * weight * source.num_items) for weight, source in pairs]

    def sizes(self, epoch: int) -> list[int]:
        """Number of items that an epoch takes from each source."""
        return [end - start for start, end in zip(self.starts(epoch), self.starts(epoch + 1), strict=True)]

    def locate(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The items at some positions of an epoch.

        Args:
            epoch: index of the epoch.
            positions: (N,) positions below the number of the epoch's items.

        Returns:
            (N, 3) int64: source, pass and item, as in `Pick`.
        """
        sizes = self.sizes(epoch)
        ends = np.cumsum(sizes)
        spread = Permutation(int(ends[-1]), key_of(self.seed, "epoch", epoch))(positions)
        found = np.empty((len(positions), 3), np.int64)
        found[:, 0] = np.searchsorted(ends, spread, side="right")
        for number, (source, start) in enumerate(zip(self.sources, self.starts(epoch), strict=True)):
            here = np.flatnonzero(found[:, 0] == number)
            in_stream = spread[here] - (ends[number] - sizes[number]) + start
            passes, items = np.divmod(in_stream, source.num_items)
            whole = self.weights[number].denominator == 1  # then an epoch has all of each of its passes
            for index in () if whole else np.unique(passes).tolist():
                same = np.flatnonzero(passes == index)
                order = Permutation(source.num_items, key_of(self.seed, "pass", number, index))
                items[same] = order(items[same])
            found[here, 1], found[here, 2] = passes, items
        return found

    def lengths(self, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of items in tokens.

        Args:
            picks: (N, 3), from `locate`.

        Returns:
            Tokens before the captions, and the most tokens that the captions can have: (N,) int64 each. Both
            are 0 for an empty item.
        """
        prefix, captions = np.empty(len(picks), np.int64), np.empty(len(picks), np.int64)
        for number, source in enumerate(self.sources):
            here = np.flatnonzero(picks[:, 0] == number)
            prefix[here], captions[here] = source.lengths(picks[here, 2], picks[here, 1])
        return prefix, captions


def count_batches(mixture: Mixture, options: DataOptions, epoch: int) -> np.ndarray:
    """Number of batches of each window of an epoch. Takes about a second for a million items."""
    num_items = sum(mixture.sizes(epoch))
    counts = [np.zeros(0, np.int64)]
    for start in range(0, num_items, _AT_ONCE * WINDOW):
        positions = range(start, min(start + _AT_ONCE * WINDOW, num_items))
        counts.append(_cut(mixture, options, epoch, positions)[1].max(axis=1) + 1)
    return np.concatenate(counts)


class EpochPlan:
    """The batches of one epoch.

    Args:
        mixture: the sources.
        options: how items are put together into batches.
        epoch: index of the epoch.
        counts: number of batches of each window, from `count_batches`.

    Attributes:
        num_items: number of items in the epoch.
        num_batches: number of batches in the epoch.
    """

    def __init__(self, mixture: Mixture, options: DataOptions, epoch: int, counts: np.ndarray):
        self.mixture, self.options, self.epoch = mixture, options, epoch
        self.num_items = sum(mixture.sizes(epoch))
        self.starts = np.append(0, np.cumsum(counts))
        self.num_batches = int(self.starts[-1])
        self._window, self._batches = -1, []

    def batch(self, number: int) -> list[Pick]:
        """The items of a batch."""
        window = int(np.searchsorted(self.starts, number, side="right")) - 1
        if window != self._window:
            self._window, self._batches = window, self._batches_of(window)
        return self._batches[number - int(self.starts[window])]

    def _batches_of(self, window: int) -> list[list[Pick]]:
        start = window * WINDOW
        positions = range(start, min(start + WINDOW, self.num_items))
        picks, bins = _cut(self.mixture, self.options, self.epoch, positions)
        order = shuffled(int(bins.max()) + 1, self.mixture.seed, "batches", self.epoch, window)
        return [[Pick(*pick) for pick in picks[bins[0, : len(picks)] == number].tolist()] for number in order]


def _cut(
    mixture: Mixture, options: DataOptions, epoch: int, positions: range
) -> tuple[np.ndarray, np.ndarray]:
    """Cut whole windows into batches.

    Args:
        mixture: the sources.
        options: how items are put together into batches.
        epoch: index of the epoch.
        positions: positions of the windows' items in the epoch.

    Returns:
        Picks (N, 3), and the number of each item's batch within its window (W, WINDOW); -1 for an empty item.
    """
    picks = mixture.locate(epoch, np.arange(positions.start, positions.stop))
    windows = -(-len(picks) // WINDOW)
    lengths = np.zeros((2, windows * WINDOW), np.int64)
    lengths[:, : len(picks)] = mixture.lengths(picks)
    prefix, captions = lengths.reshape(2, windows, WINDOW)
    cut = cut_packed if options.packed else cut_padded
    bins = cut(prefix, captions, options.max_tokens, options.max_examples or WINDOW)
    return picks, np.where(prefix > 0, bins, -1)


def cut_packed(prefix: np.ndarray, captions: np.ndarray, budget: int, most: int) -> np.ndarray:
    """Pack items into batches: first fit, longest item first, in all windows at once.

    An item that is longer than the budget is a batch by itself.

    Args:
        prefix: (W, K) tokens before the captions.
        captions: (W, K) tokens of the captions.
        budget: most tokens of a batch.
        most: most items of a batch.

    Returns:
        (W, K) number of each item's batch within its window.
    """
    sizes = np.minimum(prefix + captions, budget)
    order = np.argsort(-sizes, axis=1, kind="stable")
    windows, every = np.arange(len(sizes)), sizes.shape[1]
    room = np.full(sizes.shape, budget, np.int32)
    free = np.full(sizes.shape, most, np.int32)
    bins, opened = np.empty_like(order), 0
    for rank in range(every):
        item = order[:, rank]
        size = sizes[windows, item]
        within = min(opened + 1, every)
        fits = (room[:, :within] >= size[:, None]) & (free[:, :within] > 0)
        found = fits.argmax(axis=1)
        bins[windows, item] = found
        room[windows, found] -= size
        free[windows, found] -= 1
        opened = max(opened, int(found.max()) + 1)
    return bins


def cut_padded(prefix: np.ndarray, captions: np.ndarray, budget: int, most: int) -> np.ndarray:
    """Put items of similar length into padded batches; arguments and result are those of `cut_packed`.

    Prefixes and captions are padded separately.
    """
    order = np.argsort(-(prefix * (1 << 20) + captions), axis=1, kind="stable")
    windows = np.arange(len(prefix))
    bins = np.empty_like(order)
    rows = longest = longest_captions = np.zeros(len(prefix), np.int64)
    current = np.full(len(prefix), -1)
    for rank in range(prefix.shape[1]):
        item = order[:, rank]
        own, own_captions = prefix[windows, item], captions[windows, item]
        both = np.maximum(longest, own) + np.maximum(longest_captions, own_captions)
        new = (rows == 0) | (rows >= most) | ((rows + 1) * both > budget)
        current = current + new
        rows = np.where(new, 1, rows + 1)
        longest = np.where(new, own, np.maximum(longest, own))
        longest_captions = np.where(new, own_captions, np.maximum(longest_captions, own_captions))
        bins[windows, item] = current
    return bins
