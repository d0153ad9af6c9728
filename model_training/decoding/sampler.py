"""The sampler: captions of a batch, step by step.

Every caption is a row of slots, the places of its tokens. A step predicts a token for every open slot, and
`selection.select` decides which of the predictions stay. Every row of a batch may have options of its own;
rows that cannot share a pass, such as those with different caches, are decoded side by side in buckets.

Shape suffixes: B rows of the batch (one sequence each), R rows of a bucket, N regions of a row, S slots of a
region.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...schemas.decoding import DecodeOptions
from ...schemas.errors import ConfigError
from ..model.batch import Batch, Tokens
from ..model.perceptiondlm import PerceptionDLM
from ..model.placement import check_placement, upload
from .buckets import PLAIN, bucket_of, choose_cache, kind_of, resolve_options, suppressed
from .loop import Loop
from .rows import Bucket, Rows, lay_out

_KEPT_BUCKETS = 2
"""How many buckets keep their tensors and graphs for the next batch. At 8B, one of 8 sequences has 10 GB."""


class DecodeState(NamedTuple):
    """All captions of a batch between two steps, on the CPU.

    Attributes:
        forwards_B: forward passes of the language model for each row so far.
        tokens_BNS: the tokens; the mask token in open slots.
        open_BNS: bool, the slots that are not decided.
        predicted_BNS: the latest prediction for each slot.
        confidence_BNS: the probability of that prediction in float64; NaN before the first one.
    """

    forwards_B: Tensor
    tokens_BNS: Tensor
    open_BNS: Tensor
    predicted_BNS: Tensor
    confidence_BNS: Tensor


class DecodedBatch(NamedTuple):
    """The decoded captions of a batch, on the CPU.

    Attributes:
        tokens_BNS: the tokens. A row may have fewer regions than others, and fewer slots; what stands there
            means nothing.
        confidence_BNS: the probability of the latest prediction for each token, in float64.
        exists_BN: bool, which of the regions exist.
        forwards_B: forward passes of the language model for each row.
        agreement_B: share of a row's tokens equal to those without a cache; NaN for rows without `compare`,
            None if no row has it.
    """

    tokens_BNS: Tensor
    confidence_BNS: Tensor
    exists_BN: Tensor
    forwards_B: Tensor
    agreement_B: Tensor | None = None


Options = DecodeOptions | Sequence[DecodeOptions] | None
"""How all rows of a batch are decoded, or each of them; None is `DecodeOptions()`."""


def decode_batch(model: PerceptionDLM, batch: Batch, options: Options = None) -> DecodedBatch:
    """Decode the captions of a batch with a decoder that is not kept, see `Decoder.decode`."""
    return Decoder(model).decode(batch, options)


def decode_steps(model: PerceptionDLM, batch: Batch, options: Options = None) -> Iterator[DecodeState]:
    """Decode the captions of a batch with a decoder that is not kept, see `Decoder.steps`."""
    return Decoder(model).steps(batch, options)


class Decoder:
    """Decodes batches with a model, and keeps the tensors and graphs of its latest buckets on a GPU.

    Args:
        model: the network.
        captures: whether steps on CUDA are captured as graphs; never where weights are offloaded.
    """

    def __init__(self, model: PerceptionDLM, captures: bool = True):
        self.model, self.captures = model, captures
        self.kept: dict[Bucket, Rows] = {}

    def decode(self, batch: Batch, options: Options = None) -> DecodedBatch:
        """Decode the captions of a batch.

        Raises:
            ConfigError: a row's captions have not `max_new_tokens` slots, a cache does not suit the layout,
                or a weight of the model is not loaded.
            StageFailed: the model's probabilities are no numbers, or the same for every token.
        """
        each = _for_rows(self.model, options, len(batch.prefix.ids_BL))
        decoding = _Decoding(self, batch, each)
        with torch.inference_mode():
            decoding.run()
            last = decoding.state()
        decoding.close()
        exists_BN = decoding.exists_BN()
        agreement_B = None
        compared = [one.compare and choose_cache(self.model, one) == "approximate" for one in each]
        if any(compared):
            plain = [one.model_copy(update=PLAIN) for one in each]
            exact = self.decode(batch, plain)
            slots_BNS = decoding.slots_BNS()
            same_BNS = (exact.tokens_BNS == last.tokens_BNS) & slots_BNS
            agreement_B = same_BNS.double().sum((1, 2)) / slots_BNS.sum((1, 2))
            agreement_B[~torch.tensor(compared)] = torch.nan
        return DecodedBatch(last.tokens_BNS, last.confidence_BNS, exists_BN, last.forwards_B, agreement_B)

    @torch.inference_mode()
    def steps(self, batch: Batch, options: Options = None) -> Iterator[DecodeState]:
        """Decode the captions of a batch, and give the state before the first step and after every one.

        Raises:
            ConfigError, StageFailed: as `decode`.
        """
        each = _for_rows(self.model, options, len(batch.prefix.ids_BL))
        try:
            decoding = _Decoding(self, batch, each)
            yield decoding.state()
            while decoding.step():
                yield decoding.state()
        except torch.OutOfMemoryError:
            self.kept.clear()  # fewer rows may fit then
            raise
        decoding.close()

    def take(self, bucket: Bucket, options: DecodeOptions) -> Rows:
        """Tensors for a bucket, which nobody else uses.

        Args:
            bucket: the bucket.
            options: of one of its sequences.
        """
        found = self.kept.pop(bucket, None)
        if found is not None:
            found.clear()
            return found
        while len(self.kept) >= _KEPT_BUCKETS:
            self.kept.pop(next(iter(self.kept)))
        never = suppressed(self.model, options)
        never_X = upload(torch.tensor(never), self.model.device) if never else None
        return Rows(self.model, bucket, never_X, self.captures)

    def give_back(self, rows: Rows) -> None:
        """Keep tensors for a later batch, where they are worth it."""
        if self.model.device.type != "cpu":
            self.kept[rows.bucket] = rows
            while len(self.kept) > _KEPT_BUCKETS:
                self.kept.pop(next(iter(self.kept)))


class _Decoding:
    """A batch while it is decoded: its buckets, side by side."""

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, batch: Batch, options: list[DecodeOptions]):
        model = decoder.model
        check_placement(model)
        self.decoder, self.options = decoder, options
        self.captions = lay_out(batch.captions, [each.max_new_tokens for each in options])
        groups: dict[tuple, list[int]] = {}
        for row, each in enumerate(options):
            groups.setdefault(kind_of(model, each), []).append(row)
        prefix, host = batch.prefix, batch.prefix.to("cpu")
        x_BPD = model.embed(prefix.to(model.device), *model.encode_images(batch.images.to(model.device)))
        self.loops = []
        for rows in groups.values():
            whole, own = len(groups) == 1, [options[row] for row in rows]
            x_RPD = x_BPD if whole else x_BPD[upload(torch.tensor(rows), model.device)]
            regions = max((self.captions.regions[row] for row in rows), default=0)
            bucket = bucket_of(model, own, x_RPD.shape[1], regions)
            loop = Loop(decoder.take(bucket, own[0]))
            block = (len(rows), bucket.regions, bucket.slots + 2)
            loop.admit(range(len(rows)), x_RPD, _some(host, rows), self.captions.at(rows, block), own)
            self.loops.append((rows, loop))

    def step(self) -> bool:
        """Take a step in every bucket that has something to do; whether there was one."""
        going = [loop for _, loop in self.loops if loop.going]
        for loop in going:
            loop.launch()
        for loop in going:
            loop.read()
        return bool(going)

    def run(self) -> None:
        """Take all steps, each launched before the one before it is read on a device that is not the host."""
        while going := [loop for _, loop in self.loops if loop.going]:
            for loop in going:
                loop.launch()
            for loop in going:
                loop.read(behind=loop.lag)

    def close(self) -> None:
        """Give the tensors back."""
        for _, loop in self.loops:
            self.decoder.give_back(loop.rows)

    def state(self) -> DecodeState:
        """A copy on the CPU."""
        num_rows, regions, most = self.captions.ids_BNL.shape
        shape = (num_rows, regions, most - 2)
        forwards_B = torch.zeros(num_rows, dtype=torch.int64)
        tokens_BNS = self.captions.ids_BNL[..., 1:-1].clone()
        predicted_BNS, open_BNS = tokens_BNS.clone(), torch.zeros(shape, dtype=torch.bool)
        confidence_BNS = torch.full(shape, torch.nan, dtype=torch.float64)
        for rows, loop in self.loops:
            here = (torch.tensor(rows), slice(loop.rows.bucket.regions), slice(loop.rows.bucket.slots))
            tokens, opens, predicted, confidence = loop.state(len(rows))
            tokens_BNS[here], open_BNS[here], predicted_BNS[here] = tokens, opens, predicted
            confidence_BNS[here] = confidence.masked_fill(~self.slots_BNS()[here], torch.nan)
            forwards_B[here[0]] = torch.from_numpy(loop.forwards_R[: len(rows)])
        return DecodeState(forwards_B, tokens_BNS, open_BNS, predicted_BNS, confidence_BNS)

    def exists_BN(self) -> Tensor:
        """Which regions exist."""
        return torch.arange(self.captions.ids_BNL.shape[1]) < torch.tensor(self.captions.regions)[:, None]

    def slots_BNS(self) -> Tensor:
        """Which places are slots."""
        lengths_B = torch.tensor([each.max_new_tokens for each in self.options])
        inside_BS = torch.arange(self.captions.ids_BNL.shape[2] - 2) < lengths_B[:, None]
        return self.exists_BN()[..., None] & inside_BS[:, None]


def _for_rows(model: PerceptionDLM, options: Options, num_rows: int) -> list[DecodeOptions]:
    if options is None or isinstance(options, DecodeOptions):
        return [resolve_options(model, options or DecodeOptions())] * num_rows
    if len(options) != num_rows:
        raise ConfigError(f"{len(options)} options for {num_rows} rows; give one for each, or one for all")
    return [resolve_options(model, each) for each in options]


def _some(tokens: Tokens, rows: list[int]) -> Tokens:
    """Some rows of tokens."""
    return Tokens(tokens.ids_BL[rows], tokens.position_BL[rows], tokens.roles.at(rows))
