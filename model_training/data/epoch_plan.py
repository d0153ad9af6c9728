"""Which items make up each batch of an epoch, as a function of its number.

The order of an epoch is a permutation that is computed. It is cut into windows of 128 items, and each window
into batches by the items' lengths, which are known without reading them. So batch number b is the same for
any number of ranks and workers, and to find it takes no look at those before it but for a count a window.
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


class Source(Protocol):
    """What a plan needs to know of items to train on."""

    @property
    def num_items(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def lengths(self, items: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class Pick(NamedTuple):
    """An item of a batch: its source, the how manieth pass over the source this is, and the item."""

    source: int
    turn: int
    item: int


class Mixture:
    """Several sources, each passed over `weight` times an epoch.

    A source is an endless stream of passes, each in an order of its own, of which an epoch takes the next
    piece: so each item comes once in a pass, whatever the weight.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int):
        self.sources, self.seed = sources, seed
        self.weights = [Fraction(str(weight)) for weight in weights]

    def begins(self, epoch: int) -> list[int]:
        """How much of each source's stream went before an epoch."""
        pairs = zip(self.weights, self.sources, strict=True)
        return [math.floor(epoch * weight * source.num_items) for weight, source in pairs]

    def sizes(self, epoch: int) -> list[int]:
        """Items of an epoch from each source."""
        return [end - begin for begin, end in zip(self.begins(epoch), self.begins(epoch + 1), strict=True)]

    def locate(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """What is at positions (N,) of an epoch: (N, 3) int64, source, pass and item."""
        sizes = self.sizes(epoch)
        ends = np.cumsum(sizes)
        spread = Permutation(int(ends[-1]), key_of(self.seed, "epoch", epoch))(positions)
        found = np.empty((len(positions), 3), np.int64)
        found[:, 0] = np.searchsorted(ends, spread, side="right")
        for number, (source, begin) in enumerate(zip(self.sources, self.begins(epoch), strict=True)):
            here = np.flatnonzero(found[:, 0] == number)
            places = spread[here] - (ends[number] - sizes[number]) + begin
            turns, items = np.divmod(places, source.num_items)
            whole = self.weights[number].denominator == 1  # then an epoch has all of each of its passes
            for turn in () if whole else np.unique(turns).tolist():
                same = np.flatnonzero(turns == turn)
                order = Permutation(source.num_items, key_of(self.seed, "pass", number, turn))
                items[same] = order(items[same])
            found[here, 1], found[here, 2] = turns, items
        return found

    def lengths(self, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens before the captions and at most of them: (N, 3) to two of (N,); 0 for empty items."""
        prefix, captions = np.empty(len(picks), np.int64), np.empty(len(picks), np.int64)
        for number, source in enumerate(self.sources):
            here = np.flatnonzero(picks[:, 0] == number)
            prefix[here], captions[here] = source.lengths(picks[here, 2], picks[here, 1])
        return prefix, captions


def count_batches(mixture: Mixture, options: DataOptions, epoch: int) -> np.ndarray:
    """Batches of each window of an epoch; about a second for a million items."""
    num_items = sum(mixture.sizes(epoch))
    counts = [np.zeros(0, np.int64)]
    for start in range(0, num_items, _AT_ONCE * WINDOW):
        positions = range(start, min(start + _AT_ONCE * WINDOW, num_items))
        counts.append(_cut(mixture, options, epoch, positions)[1].max(axis=1) + 1)
    return np.concatenate(counts)


class Plan:
    """The batches of one epoch.

    Attributes:
        num_items: of the epoch.
        num_batches: likewise.
    """

    def __init__(self, mixture: Mixture, options: DataOptions, epoch: int, counts: np.ndarray):
        """`counts` are those of `count_batches`."""
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
    """Picks (N, 3) of whole windows, and each one's batch in its window, (W, WINDOW); -1 if it is empty."""
    picks = mixture.locate(epoch, np.arange(positions.start, positions.stop))
    windows = -(-len(picks) // WINDOW)
    lengths = np.zeros((2, windows * WINDOW), np.int64)
    lengths[:, : len(picks)] = mixture.lengths(picks)
    prefix, captions = lengths.reshape(2, windows, WINDOW)
    cut = cut_packed if options.packed else cut_padded
    bins = cut(prefix, captions, options.max_tokens, options.max_examples or WINDOW)
    return picks, np.where(prefix > 0, bins, -1)


def cut_packed(prefix: np.ndarray, captions: np.ndarray, budget: int, most: int) -> np.ndarray:
    """First fit, longest first, in all windows at once; what is longer than the budget is a batch by itself.

    Args:
        prefix: (W, K) tokens.
        captions: (W, K) tokens.
        budget: tokens of a batch.
        most: items of a batch.

    Returns:
        (W, K) number of the batch within the window.
    """
    sizes = np.minimum(prefix + captions, budget)
    order = np.argsort(-sizes, axis=1, kind="stable")
    windows, every = np.arange(len(sizes)), sizes.shape[1]
    room = np.full(sizes.shape, budget, np.int32)
    free = np.full(sizes.shape, most, np.int32)
    bins, opened = np.empty_like(order), 0
    for place in range(every):
        item = order[:, place]
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
    """Items of similar length side by side, prefixes and captions padded apart; as `cut_packed`."""
    order = np.argsort(-(prefix * (1 << 20) + captions), axis=1, kind="stable")
    windows = np.arange(len(prefix))
    bins = np.empty_like(order)
    rows = longest = longest_captions = np.zeros(len(prefix), np.int64)
    current = np.full(len(prefix), -1)
    for place in range(prefix.shape[1]):
        item = order[:, place]
        own, own_captions = prefix[windows, item], captions[windows, item]
        both = np.maximum(longest, own) + np.maximum(longest_captions, own_captions)
        new = (rows == 0) | (rows >= most) | ((rows + 1) * both > budget)
        current = current + new
        rows = np.where(new, 1, rows + 1)
        longest = np.where(new, own, np.maximum(longest, own))
        longest_captions = np.where(new, own_captions, np.maximum(longest_captions, own_captions))
        bins[windows, item] = current
    return bins
