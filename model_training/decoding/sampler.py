"""The sampler: captions of a batch, step by step.

Every caption is a row of slots, the places of its tokens. A step predicts a token for every open slot, and
`selection.select` decides which of the predictions stay. Every row of a batch may have options of its own;
rows that cannot share a pass, such as those with different caches, are decoded side by side in buckets.

On a GPU, the host launches a step and then reads how many slots the step before left open, so that the GPU
never waits for the host. A row that is finished does nothing in the step that was launched too many.

Shape suffixes: B rows of the batch (one sequence each), R rows of a bucket, N regions of a row, S slots of a
region.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ...schemas.decoding import DecodeOptions
from ...schemas.errors import ConfigError, StageFailed
from ..model.batch import Batch, Tokens
from ..model.config import PerceptionDLMConfig
from ..model.perceptiondlm import PerceptionDLM
from ..model.placement import check_placement, upload
from .head import broken, generator_of
from .readback import Readback, Sent, read_state
from .refresh import Refresh
from .rows import Bucket, LaidOut, Rows, lay_out
from .skipping import Skipping

AUTO_CACHE = {"cache": "approximate", "refresh_every": 8, "redo_below": 0.99, "settled": 0.9}
"""What "auto" means in layouts in which the prefix sees the captions, chosen by `benchmarks.caches`."""

_KEPT_BUCKETS = 2
"""How many buckets keep their tensors and graphs for the next batch. At 8B, one of 8 sequences has 10 GB."""

_PREFIX_STEP = 64
"""On a GPU, prefixes are padded to a multiple of this many tokens, so that batches share buckets."""


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
        agreement_B: share of a row's tokens equal to those without a cache; None unless `compare` is set.
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


PLAIN = {"cache": "none", "settled": None, "compare": False}
"""What `compare` compares with: every step is computed whole, and no region ends before all its slots."""


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
        if any(one.compare and choose_cache(self.model, one) == "approximate" for one in each):
            plain = [one.model_copy(update=PLAIN) for one in each]
            exact = self.decode(batch, plain)
            slots_BNS = decoding.slots_BNS()
            same_BNS = (exact.tokens_BNS == last.tokens_BNS) & slots_BNS
            agreement_B = same_BNS.double().sum((1, 2)) / slots_BNS.sum((1, 2))
        return DecodedBatch(last.tokens_BNS, last.confidence_BNS, exists_BN, last.forwards_B, agreement_B)

    @torch.inference_mode()
    def steps(self, batch: Batch, options: Options = None) -> Iterator[DecodeState]:
        """Decode the captions of a batch, and give the state before the first step and after every one.

        Raises:
            ConfigError, StageFailed: as `decode`.
        """
        decoding = _Decoding(self, batch, _for_rows(self.model, options, len(batch.prefix.ids_BL)))
        yield decoding.state()
        while decoding.step():
            yield decoding.state()
        decoding.close()

    def take(self, bucket: Bucket, never_X: Tensor | None) -> Rows:
        """Tensors for a bucket, which nobody else uses."""
        found = self.kept.pop(bucket, None)
        if found is not None:
            found.clear()
            return found
        while len(self.kept) >= _KEPT_BUCKETS:
            self.kept.pop(next(iter(self.kept)))
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
            loop = Loop(decoder, bucket, own[0])
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


class Loop:
    """The rows of a bucket while they are decoded, as the host knows them; each holds a sequence at a time.

    Attributes:
        options: of each row; None where no sequence was admitted.
        open_RN: regions with an open slot, as of the last step that was read.
        forwards_R: forward passes of each row's sequence.
        lag: how many steps may be launched before one is read.
    """

    def __init__(self, decoder: Decoder, bucket: Bucket, options: DecodeOptions):
        model, on_cpu = decoder.model, decoder.model.device.type == "cpu"
        never = suppressed(model, options)
        self.rows = decoder.take(bucket, upload(torch.tensor(never), model.device) if never else None)
        self.skipping = Skipping(self.rows) if on_cpu else None
        self.lag = 0 if on_cpu or bucket.redoes else 1
        self.refresh = Refresh(bucket.num_rows, bucket.refresh_every)
        self.readback = Readback(self.rows.status_BM, 1 + self.lag)
        self.num_steps = self.num_read = self.num_waited = 0
        self.options: list[DecodeOptions | None] = [None] * bucket.num_rows
        shape = (bucket.num_rows, bucket.regions)
        self.exists_RN, self.open_RN = np.zeros(shape, bool), np.zeros(shape, bool)
        self.stale_RN = np.ones(shape, bool)  # where a new prediction could differ
        self.forwards_R, self.turn_R = np.zeros((2, bucket.num_rows), np.int64)
        self.began_R = np.zeros(bucket.num_rows, np.int64)  # the first step of its sequence
        self.remask_R = np.zeros(bucket.num_rows, bool)

    def admit(
        self,
        places: Sequence[int],
        x_APD: Tensor,
        prefix: Tokens,
        captions: LaidOut,
        options: Sequence[DecodeOptions],
    ) -> None:
        """Put new sequences into rows in which nothing is open, see `Rows.admit`. The other rows go on."""
        at = list(places)
        for place, count, each in zip(at, captions.regions, options, strict=True):
            self.options[place] = each
            self.exists_RN[place] = np.arange(self.exists_RN.shape[1]) < count
            self.remask_R[place] = each.strategy == "remask"
            self.turn_R[place] = each.steps * (each.strategy == "sequential")
        self.open_RN[at], self.stale_RN[at] = self.exists_RN[at], True
        self.forwards_R[at], self.began_R[at] = 0, self.num_steps
        self.refresh.begin(at)
        places_A = upload(torch.tensor(at), self.rows.model.device)
        self.rows.admit(places_A, x_APD, prefix, captions, options)
        (self.skipping or self.rows).prepare(places_A, x_APD.shape[1])

    @property
    def admits(self) -> bool:
        """Whether sequences may be admitted now.

        A sequence begins with a pass over all of it. Where an approximate cache makes that a pass of the
        whole bucket, it waits until another row needs one.
        """
        if self.skipping is not None or self.rows.bucket.cache != "approximate":
            return True
        return not self.going or bool(self._due().any())

    def _due(self) -> np.ndarray:
        """The open rows whose approximate cache the next step computes again."""
        if self.rows.bucket.cache != "approximate":
            return np.zeros(len(self.open_RN), bool)
        return self.refresh.due_B() & self.open_RN.any(1)

    def _step_R(self) -> np.ndarray:
        """How many steps of each row's sequence have kept tokens."""
        return self.num_steps - self.began_R - self.refresh.num_held_B

    @property
    def going(self) -> bool:
        """Whether a slot was open after the last step that was read."""
        return bool(self.open_RN.any())

    def launch(self) -> None:
        """Begin the next step."""
        due_R, uniform_RNS = self._due(), self._uniform()
        if self.skipping is None:
            self.rows.step(self.rows.bucket.cache == "none" or bool(due_R.any()), due_R, uniform_RNS)
        else:
            self._launch_some(self.skipping, due_R, uniform_RNS)
        self.refresh.step(due_R)
        self.readback.send()
        self.num_steps += 1

    def _launch_some(self, skipping: Skipping, due_R: np.ndarray, uniform_RNS: Tensor | None) -> None:
        """Compute the regions that this step needs and that are not known yet."""
        active_R = np.asarray(np.any(self.open_RN, axis=1))
        wanted_RN = self._wanted()
        if not self.rows.bucket.draws:
            wanted_RN = wanted_RN & (self.stale_RN | due_R[:, None])
        whole_R = np.asarray(wanted_RN.any(1) if self.rows.bucket.cache == "none" else due_R)
        self.forwards_R += whole_R | wanted_RN.any(1)
        skipping.step(wanted_RN, active_R, whole_R, uniform_RNS)
        self.stale_RN &= ~wanted_RN

    def read(self, behind: int = 0) -> None:
        """Take in what the launched steps have done, but for the last `behind` of them.

        Raises:
            StageFailed: a prediction was none.
        """
        while self.num_read < self.num_steps - behind and self.going:
            status_BM = self.readback.receive()
            self.num_read += 1
            status_RN = status_BM[:, :-3].astype(np.int64)
            known_R = self.began_R < self.num_read  # else the step was that of the sequence before
            active_R = self.open_RN.any(1) & known_R
            if (active_R & broken(*status_BM[:, -2:].T, self.rows.num_others)).any():
                raise broken_weights(self.rows.model)
            if self.skipping is None:
                self.forwards_R += active_R
            if self.rows.bucket.redoes:
                self.refresh.unsure(active_R & (status_BM[:, -3] > 0))
            self.open_RN = np.where(known_R[:, None], status_RN >= 2, self.open_RN)
            changed_RN = (status_RN % 2 == 1) & known_R[:, None]
            model = self.rows.model
            if self.rows.bucket.cache == "none" and not model.layout.isolate_prefix:
                changed_RN = changed_RN.any(1, keepdims=True) & self.exists_RN  # all captions see each other
            self.stale_RN |= changed_RN

    def state(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, open slots, predictions and their confidence of the first rows, in one copy to the CPU."""
        return read_state(self._stacked()[:, :num_rows].cpu())

    def send(self, places: Sequence[int]) -> Sent:
        """Begin to copy the state of some rows to the CPU; they may hold other sequences from now on."""
        device = self.rows.model.device
        held = self._stacked()[:, upload(torch.tensor(places), device)]
        if device.type == "cpu":
            return Sent(held, 0)
        copy = torch.empty(held.shape, dtype=held.dtype, pin_memory=device.type == "cuda")
        return Sent(copy.copy_(held, non_blocking=True), self.num_steps + 1)

    def receive(self, sent: Sent) -> tuple[Tensor, Tensor] | None:
        """Tokens and confidence that were sent; None if they may not be there yet, which a step tells."""
        if max(self.num_read, self.num_waited) < sent.num_read:
            if self.going:
                return None
            self.readback.wait()
            self.num_waited = self.num_steps + 1
        tokens, _, _, confidence = read_state(sent.stacked)
        return tokens, confidence

    def _stacked(self) -> Tensor:
        rows = self.rows
        parts = (rows.tokens_BNS, rows.open_BNS, rows.predicted_BNS, rows.doubt_BNS)
        kind = rows.doubt_BNS.dtype  # float32 holds any token, there being fewer than 2^24
        return torch.stack([part.to(kind) for part in parts])

    def _wanted(self) -> np.ndarray:
        """The regions among whose slots the next step selects."""
        again_RN = self.exists_RN & self.open_RN.any(1, keepdims=True)
        step_R1 = self._step_R()[:, None]
        now_RN = np.arange(self.exists_RN.shape[1]) == step_R1 // np.maximum(self.turn_R, 1)[:, None]
        single_RN = self.open_RN & (now_RN | (self.turn_R == 0)[:, None])
        return np.where(self.remask_R[:, None], again_RN, single_RN)

    def _uniform(self) -> Tensor | None:
        """A random number for every slot, the same in every batch; None where nothing is drawn."""
        bucket = self.rows.bucket
        if not bucket.draws:
            return None
        uniform_RNS = torch.zeros(bucket.num_rows, bucket.regions, bucket.slots, dtype=torch.float64)
        for row, each in enumerate(self.options):
            if each is None or not self.open_RN[row].any():
                continue
            shape = (self.rows.model.config.num_prompts, each.max_new_tokens)
            generator = generator_of(each.seed, int(self._step_R()[row]))
            drawn_NS = torch.rand(shape, generator=generator, dtype=torch.float64)[: bucket.regions]
            uniform_RNS[row, : len(drawn_NS), : each.max_new_tokens] = drawn_NS
        return uniform_RNS


def broken_weights(model: PerceptionDLM) -> StageFailed:
    """The error for a model that predicts nothing."""
    name, dtype = model.name_or_path or "the model", model.dtype
    return StageFailed(
        f"{name}: the probabilities in {dtype} are NaN, or equal for all tokens: the weights are "
        "damaged, or this type overflows; download the weights again, or load the model in float32"
    )


def choose_cache(model: PerceptionDLM, options: DecodeOptions) -> str:
    """The cache that a model decodes with: "none", "exact" or "approximate".

    Raises:
        ConfigError: as `resolve_cache`.
    """
    cache = resolve_cache(model, resolve_options(model, options).cache, "captions")
    return "exact" if cache == "approximate" and model.layout.isolate_prefix else cache


def resolve_options(model: PerceptionDLM, options: DecodeOptions) -> DecodeOptions:
    """Options in which the cache "auto" is replaced by what it means for a model's captions.

    A `redo_below` or `settled` that is given stays.
    """
    if options.cache != "auto" or model.layout.isolate_prefix:
        return options
    given = {
        name: value for name in ("redo_below", "settled") if (value := getattr(options, name)) is not None
    }
    return options.model_copy(update=AUTO_CACHE | given)


def resolve_cache(model: PerceptionDLM, cache: str, decoded: str) -> str:
    """A cache that a model can decode with: "auto" is "exact" where the layout allows it, else "none".

    Captions have more for such layouts, see `resolve_options`.

    Args:
        model: the network.
        cache: as the options have it.
        decoded: what is decoded, for the message.

    Raises:
        ConfigError: "exact" is asked for, and in this model's layout the prefix sees what is decoded.
    """
    isolated = model.layout.isolate_prefix
    if cache == "exact" and not isolated:
        raise ConfigError(
            f"cache 'exact' needs a layout that isolates the prefix, and in this model {decoded} change what "
            "comes before them; choose 'approximate' or 'none'"
        )
    if cache == "auto":
        return "exact" if isolated else "none"
    return cache


def _for_rows(model: PerceptionDLM, options: Options, num_rows: int) -> list[DecodeOptions]:
    if options is None or isinstance(options, DecodeOptions):
        return [resolve_options(model, options or DecodeOptions())] * num_rows
    if len(options) != num_rows:
        raise ConfigError(f"{len(options)} options for {num_rows} rows; give one for each, or one for all")
    return [resolve_options(model, each) for each in options]


def kind_of(model: PerceptionDLM, options: DecodeOptions) -> tuple:
    """What rows must have in common to share passes: cache, its refresh, suppression, and drawing."""
    cache = choose_cache(model, options)
    every = options.refresh_every if cache == "approximate" else 0
    return cache, every, bool(suppressed(model, options)), options.temperature > 0


def bucket_of(model: PerceptionDLM, options: list[DecodeOptions], prefix_len: int, regions: int) -> Bucket:
    """The bucket of rows of one kind: their own shape on a CPU, on GPUs one that other batches have, too."""
    num_rows = len(options)
    if model.device.type != "cpu":
        num_rows = 1 << (num_rows - 1).bit_length()
        prefix_len = -(-prefix_len // _PREFIX_STEP) * _PREFIX_STEP
    return Bucket(
        num_rows,
        prefix_len,
        regions,
        max(each.max_new_tokens for each in options),
        max(each.steps for each in options),
        *kind_of(model, options[0]),
        strategies=frozenset(each.strategy for each in options),
        may_exit=any(each.early_exit and each.strategy != "remask" for each in options),
        may_settle=any(each.settled is not None for each in options),
        redoes=kind_of(model, options[0])[0] == "approximate"
        and any(each.redo_below is not None for each in options),
    )


def suppressed(model: PerceptionDLM, options: DecodeOptions) -> list[int]:
    """The tokens that are never predicted, ascending."""
    config = model.config
    suppress = options.suppress_special
    if suppress is None:
        suppress = config.layout != "reference"
    return sorted(special_tokens(config)) if suppress else []


def special_tokens(config: PerceptionDLMConfig) -> set[int]:
    """The tokens that stand for something other than text: mask, image, regions, captions."""
    return {
        config.mask_token_id,
        cast(int, config.image_token_id),
        *(config.region_token_ids or ()),
        *(config.caption_token_ids or ()),
    }


def _some(tokens: Tokens, rows: list[int]) -> Tokens:
    """Some rows of tokens."""
    return Tokens(tokens.ids_BL[rows], tokens.position_BL[rows], tokens.roles.at(rows))
