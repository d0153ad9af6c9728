"""Many sequences, one after the other: a row of a bucket takes the next one as soon as its own has ended.

Sequences of about one shape share a bucket. Features of images are computed ahead, for as many sequences at a
time as there are rows. A bucket gives way to the next one when nothing fits into it any more; so that no step
has few rows while sequences wait, two are decoded side by side then.

Shape suffixes: A sequences that are admitted, N regions of a row, S slots of a region, P tokens of the
prefix, D width.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...schemas.decoding import DecodeOptions
from ..model.batch import Example, collate, collate_tokens
from ..model.placement import check_placement
from .buckets import PLAIN, bucket_of, choose_cache, resolve_options
from .loop import Loop
from .readback import Sent
from .rows import Bucket, lay_out
from .sampler import Decoder

_MOST_WASTE = 1.5
"""A sequence shares a bucket in which a step computes up to this many times the tokens that it needs."""

_AHEAD = 8
"""The source is read no further ahead of the oldest sequence than this many times the rows of a bucket."""

_MOST_LOOPS = 2
"""Buckets that are decoded side by side. At 8B, one of 8 sequences has 10 GB."""


class Finished(NamedTuple):
    """The decoded captions of a sequence.

    Attributes:
        number: its number among those that were given: 0, 1, ...
        tokens_NS: the tokens, on the CPU.
        confidence_NS: the probability of the latest prediction for each token, in float64.
        forwards: forward passes of the language model.
        seconds: its share of the time in which it was encoded and decoded.
        agreement: share of its tokens equal to those without a cache; None unless `compare` is set.
    """

    number: int
    tokens_NS: Tensor
    confidence_NS: Tensor
    forwards: int
    seconds: float
    agreement: float | None = None


@dataclass
class _Sequence:
    """A sequence that waits, with its features in place, or is decoded."""

    number: int
    example: Example
    options: DecodeOptions
    x_PD: Tensor
    bucket: Bucket
    seconds: float = 0.0
    is_twin: bool = False  # decoded without a cache, for `compare`


class _Leaving(NamedTuple):
    """Sequences whose tokens are on their way to the host."""

    loop: Loop
    sequences: list[_Sequence]
    forwards: list[int]
    sent: Sent


def decode_stream(
    decoder: Decoder, examples: Iterable[tuple[Example, DecodeOptions]], num_rows: int = 8
) -> Iterator[Finished]:
    """Decode any number of sequences, and give each as it ends; order them by their numbers.

    What is given does not depend on what else is decoded at the same time. Of `examples`, no more than
    `8 * num_rows` are taken before the first of them has been given.

    Args:
        decoder: of the model.
        examples: sequences, and how each is decoded. They are taken as they are needed.
        num_rows: sequences that share a step.

    Raises:
        ConfigError, StageFailed: as `Decoder.decode`.
        Exception: what taking an example raised, after the sequences before it have been given.
    """
    return _Stream(decoder, num_rows).run(examples)


class _Stream:
    """The sequences that wait, that are decoded and that leave."""

    def __init__(self, decoder: Decoder, num_rows: int):
        self.decoder, self.num_rows = decoder, num_rows
        self.ready: list[_Sequence] = []
        self.loops: list[tuple[Loop, list[_Sequence | None]]] = []
        self.leaving: list[_Leaving] = []
        self.twins: dict[int, list[tuple[_Sequence, Finished]]] = {}
        self.longest: dict[str, int] = {}  # prefix so far, by cache
        self.num_taken = 0
        self.has_more = True
        self.failure: Exception | None = None  # of the source

    @torch.inference_mode()
    def run(self, examples: Iterable[tuple[Example, DecodeOptions]]) -> Iterator[Finished]:
        """All of them, each as it ends."""
        check_placement(self.decoder.model)
        source = iter(examples)
        try:
            while self._fill(source) or self.loops or self.leaving:
                yield from self._step()
            if self.failure is not None:
                raise self.failure
        except torch.OutOfMemoryError:
            self.decoder.kept.clear()  # fewer rows may fit then
            raise

    def _fill(self, source: Iterator[tuple[Example, DecodeOptions]]) -> bool:
        """Take sequences until as many wait as a bucket has rows; whether one waits."""
        while self.has_more and len(self.ready) < self.num_rows and not self._too_far():
            given: list[tuple[Example, DecodeOptions]] = []
            try:
                given.extend(islice(source, self.num_rows))  # keeps what came before an error
            except Exception as error:  # noqa: BLE001 - raised after all that came before it
                self.failure = error
            self.has_more = self.failure is None and len(given) == self.num_rows
            if given:
                start = time.perf_counter()
                encoded = self._encode(given)
                seconds = (time.perf_counter() - start) / len(encoded)
                for sequence in encoded:
                    sequence.seconds += seconds
                self.ready += encoded
        return bool(self.ready)

    def _too_far(self) -> bool:
        decoded = [each for _, held in self.loops for each in held if each is not None]
        oldest = min((each.number for each in (*self.ready, *decoded)), default=self.num_taken)
        return self.num_taken - oldest > (_AHEAD - 1) * self.num_rows

    def _encode(self, given: list[tuple[Example, DecodeOptions]]) -> list[_Sequence]:
        """Sequences with the features of their images and regions in place, computed together."""
        model = self.decoder.model
        batch = collate([example for example, _ in given])
        x_BPD = model.embed(
            batch.prefix.to(model.device), *model.encode_images(batch.images.to(model.device))
        )
        found: list[_Sequence] = []
        for (example, asked), x_PD in zip(given, x_BPD, strict=True):
            options = resolve_options(model, asked)
            length, regions = example.prefix.shape[1], len(example.order)
            example = example.without_images()
            ways = [options]
            if options.compare and choose_cache(model, options) == "approximate":
                ways.append(options.model_copy(update=PLAIN))
            for way in ways:
                bucket = bucket_of(model, [way], length, regions)
                sequence = _Sequence(self.num_taken, example, way, x_PD[:length], bucket)
                sequence.is_twin = way is not options
                self.longest[bucket.cache] = max(self.longest.get(bucket.cache, 0), bucket.prefix_len)
                found.append(sequence)
            self.num_taken += 1
        return found

    def _step(self) -> Iterator[Finished]:
        """Take a step in every bucket, after whoever waits has been admitted, and give what has ended."""
        start = time.perf_counter()
        self._admit()
        going = [loop for loop, _ in self.loops if loop.going]
        for loop in going:
            loop.launch()
        for loop in going:
            loop.read(behind=loop.lag)
        decoded = [each for _, held in self.loops for each in held if each is not None]
        for loop, held in self.loops:
            self._release(loop, held)
        arrived = self._arrived()
        seconds = time.perf_counter() - start
        for sequence in decoded:
            sequence.seconds += seconds / len(decoded)
        for leaving, parts in arrived:
            for row, sequence in enumerate(leaving.sequences):
                tokens_NS, confidence_NS = (
                    part[row, : len(sequence.example.order), : sequence.options.max_new_tokens]
                    for part in parts
                )
                yield from self._finish(
                    sequence,
                    Finished(
                        sequence.number, tokens_NS, confidence_NS, leaving.forwards[row], sequence.seconds
                    ),
                )

    def _admit(self) -> None:
        """Put sequences that wait into free rows, and begin and end buckets."""
        for loop, held in self.loops:
            free = [place for place, each in enumerate(held) if each is None]
            if free and self.ready and loop.admits:
                bucket = loop.rows.bucket
                fitting = [each for each in self.ready if _joined(bucket, each.bucket) == bucket]
                self._put(loop, held, free, [each for each in fitting if _shares(bucket, each.bucket)])
        for loop, held in self.loops:
            if not any(held):
                self.decoder.give_back(loop.rows)
        self.loops = [(loop, held) for loop, held in self.loops if any(held)]
        busy = [sum(each is not None for each in held) for _, held in self.loops]
        if self.ready and len(self.loops) < _MOST_LOOPS and all(2 * count <= self.num_rows for count in busy):
            self._begin()

    def _begin(self) -> None:
        """Begin a bucket for the oldest sequence that waits and for those that are like it."""
        first = self.ready[0]
        bucket, chosen, least = first.bucket, [first], _num_tokens(first.bucket)
        for each in self.ready[1:]:
            wider, least_of_all = _joined(bucket, each.bucket), min(least, _num_tokens(each.bucket))
            if wider is not None and _num_tokens(wider) <= _MOST_WASTE * least_of_all:
                bucket, least = wider, least_of_all
                chosen.append(each)
        if bucket.cache == "exact":  # where a longer prefix costs memory alone, a bucket is for all of them
            bucket = bucket._replace(prefix_len=self.longest[bucket.cache])
        num_rows = self.num_rows
        if not self.has_more:
            num_rows = min(num_rows, 1 << (len(chosen) - 1).bit_length())
        loop = Loop(self.decoder.take(bucket._replace(num_rows=num_rows), first.options))
        held: list[_Sequence | None] = [None] * num_rows
        self.loops.append((loop, held))
        self._put(loop, held, range(num_rows), chosen)

    def _put(
        self, loop: Loop, held: list[_Sequence | None], free: Iterable[int], sequences: list[_Sequence]
    ) -> None:
        """Admit the first of some sequences to the free rows of a bucket."""
        pairs = list(zip(free, sequences, strict=False))
        if not pairs:
            return
        places, admitted = [place for place, _ in pairs], [each for _, each in pairs]
        for place, each in pairs:
            held[place] = each
        taken = {id(each) for each in admitted}
        self.ready = [each for each in self.ready if id(each) not in taken]
        prefix, captions = collate_tokens([each.example for each in admitted])
        options = [each.options for each in admitted]
        x_APD = torch.nn.utils.rnn.pad_sequence([each.x_PD for each in admitted], batch_first=True)
        blocks = lay_out(captions, [each.max_new_tokens for each in options])
        loop.admit(places, x_APD, prefix, blocks, options)
        for each in admitted:
            each.x_PD = x_APD.new_empty(0)  # a view would keep all of them

    def _release(self, loop: Loop, held: list[_Sequence | None]) -> None:
        """Free the rows whose sequences have ended, which begin to leave."""
        open_R = np.asarray(np.any(loop.open_RN, axis=1))
        ended = [(place, each) for place, each in enumerate(held) if each is not None and not open_R[place]]
        if not ended:
            return
        places = [place for place, _ in ended]
        forwards = loop.forwards_R[places].tolist()
        self.leaving.append(_Leaving(loop, [each for _, each in ended], forwards, loop.send(places)))
        for place in places:
            held[place] = None

    def _arrived(self) -> list[tuple[_Leaving, tuple[Tensor, Tensor]]]:
        """What has left and is on the host."""
        found = [(each, each.loop.receive(each.sent)) for each in self.leaving]
        self.leaving = [each for each, parts in found if parts is None]
        return [(each, parts) for each, parts in found if parts is not None]

    def _finish(self, sequence: _Sequence, found: Finished) -> Iterator[Finished]:
        """Give what has ended; if it is compared, after both of its ways have ended."""
        if not sequence.is_twin and not sequence.options.compare:
            yield found
            return
        pair = self.twins.setdefault(sequence.number, [])
        pair.append((sequence, found))
        if not sequence.is_twin and choose_cache(self.decoder.model, sequence.options) != "approximate":
            del self.twins[sequence.number]
            yield found
        elif len(pair) == 2:
            del self.twins[sequence.number]
            (_, cached), (_, exact) = sorted(pair, key=lambda each: each[0].is_twin)
            same = (cached.tokens_NS == exact.tokens_NS).double().mean()
            yield cached._replace(agreement=float(same), seconds=cached.seconds + exact.seconds)


def _joined(one: Bucket, other: Bucket) -> Bucket | None:
    """The bucket that takes sequences of both; None if they cannot share passes."""
    kinds = [(each.cache, each.refresh_every, each.suppress, each.draws) for each in (one, other)]
    if kinds[0] != kinds[1]:
        return None
    return one._replace(
        prefix_len=max(one.prefix_len, other.prefix_len),
        regions=max(one.regions, other.regions),
        slots=max(one.slots, other.slots),
        steps=max(one.steps, other.steps),
        strategies=one.strategies | other.strategies,
        may_exit=one.may_exit or other.may_exit,
        may_settle=one.may_settle or other.may_settle,
        may_wait=one.may_wait or other.may_wait,
        redoes=one.redoes or other.redoes,
    )


def _shares(bucket: Bucket, needed: Bucket) -> bool:
    """Whether a sequence is worth a row of a bucket."""
    return _num_tokens(bucket) <= _MOST_WASTE * _num_tokens(needed)


def _num_tokens(bucket: Bucket) -> int:
    """Tokens of a row that a step computes, the passes that fill a cache left out."""
    captions = bucket.regions * (bucket.slots + 2)
    return captions if bucket.cache == "exact" else captions + bucket.prefix_len
