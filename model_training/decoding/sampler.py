"""The sampler: a pure function that selects predictions, and a loop that computes what it needs, nothing
else.

Every caption is a row of slots, the places of its tokens. A step predicts a token for every open slot, with
its confidence, and `select_predictions` decides which of the predictions stay.

Shape suffixes: B images of the batch (one sequence each), N regions of a sequence, S slots of a region, K any
number of slots, M regions computed in a step, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, assert_never, cast

import torch
from torch import Tensor

from ...schemas.decoding import DecodeOptions
from ...schemas.errors import ConfigError, StageFailed
from ..model.attention import PADDING, TokenRoles, join_roles
from ..model.batch import Batch
from ..model.llada import KVCache
from ..model.perceptiondlm import PerceptionDLM
from ..model.placement import check_placement, fetched

_LOGITS_AT_ONCE = {"cpu": (256, 1024), "gpu": (4096, 16384)}
"""Slots and tokens whose logits exist at once: 1 MB, which fits into a core's cache; a quarter of a GB."""

_DRAWN_AT_ONCE = 256
"""Slots whose tokens are drawn at once. Drawing needs all their logits: 130 MB at LLaDA's vocabulary."""


class DecodeState(NamedTuple):
    """All captions of a batch between two steps, on the CPU.

    Attributes:
        forwards_B: forward passes of the language model for each image so far.
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
        tokens_BNS: the tokens, with rows for regions that an image has fewer than others.
        confidence_BNS: the probability of the latest prediction for each token, in float64.
        exists_BN: bool, which of the rows are regions.
        forwards_B: forward passes of the language model for each image.
        agreement_B: share of an image's tokens equal to those without a cache; None unless `compare` is set.
    """

    tokens_BNS: Tensor
    confidence_BNS: Tensor
    exists_BN: Tensor
    forwards_B: Tensor
    agreement_B: Tensor | None = None


def decode_batch(model: PerceptionDLM, batch: Batch, options: DecodeOptions | None = None) -> DecodedBatch:
    """Decode the captions of a batch.

    Raises:
        ConfigError: the captions have not `options.max_new_tokens` slots, the cache does not suit the layout,
            or a weight of the model is not loaded.
        StageFailed: the model's probabilities are no numbers, or the same for every token.
    """
    options = options or DecodeOptions()
    *_, last = decode_steps(model, batch, options)
    exists_BN = (_blocks(batch, options.max_new_tokens)[2].sample_BL[..., 0] != PADDING).cpu()
    agreement_B = None
    if options.compare and options.cache == "approximate":
        *_, exact = decode_steps(model, batch, options.model_copy(update={"cache": "none"}))
        same_BN = (exact.tokens_BNS == last.tokens_BNS).double().mean(-1)
        agreement_B = (same_BN * exists_BN).sum(1) / exists_BN.sum(1)
    return DecodedBatch(last.tokens_BNS, last.confidence_BNS, exists_BN, last.forwards_B, agreement_B)


@torch.inference_mode()
def decode_steps(model: PerceptionDLM, batch: Batch, options: DecodeOptions) -> Iterator[DecodeState]:
    """Decode the captions of a batch, and give the state before the first step and after every one.

    Raises:
        ConfigError, StageFailed: as `decode_batch`.
    """
    decoder = _BatchDecoder(model, batch, options)
    yield decoder.state()
    step = 0
    while bool(decoder.open_BNS.any()):
        decoder.predict(step)
        decoder.write(*select_predictions(options, step, *decoder.slots()))
        yield decoder.state()
        step += 1


def select_predictions(
    options: DecodeOptions,
    step: int,
    tokens_BNS: Tensor,
    open_BNS: Tensor,
    predicted_BNS: Tensor,
    confidence_BNS: Tensor,
) -> tuple[Tensor, Tensor]:
    """Select the predictions that stay.

    Args:
        options: the strategy and its schedule.
        step: 0, 1, ...
        tokens_BNS: the tokens so far; only those of closed slots are read.
        open_BNS: the slots that are not decided. A region that an image does not have has none.
        predicted_BNS: a token for every open slot.
        confidence_BNS: of the predictions; for "remask", of the latest prediction at every slot.

    Returns:
        tokens_BNS with the predictions that stay, and the slots that are open now.
    """
    if options.strategy == "remask":
        return _remask(options, step, tokens_BNS, open_BNS, predicted_BNS, confidence_BNS)
    num_slots = open_BNS.shape[-1]
    score_BNS = confidence_BNS
    if options.strategy == "left-to-right":
        score_BNS = -torch.arange(num_slots, device=open_BNS.device).expand(open_BNS.shape).to(confidence_BNS)
    rank_BNS = _rank(score_BNS.masked_fill(~open_BNS, -torch.inf))
    if options.strategy in ("threshold", "factor"):
        least = math.ceil(num_slots / options.steps)
        enough_BNS = (rank_BNS < least) | _is_sure(options, rank_BNS, confidence_BNS)
    elif options.strategy in ("per-region", "sequential", "left-to-right"):
        region_step_N = torch.full(open_BNS.shape[1:2], step)
        if options.strategy == "sequential":
            region_step_N = step - torch.arange(open_BNS.shape[1]) * options.steps
        left_N = [_left_open(num_slots, options.steps, each) for each in region_step_N.tolist()]
        left_BN = torch.tensor(left_N, device=open_BNS.device)
        enough_BNS = rank_BNS < (open_BNS.sum(-1) - left_BN)[..., None]
    else:
        assert_never(options.strategy)
    stay_BNS = enough_BNS & open_BNS
    return torch.where(stay_BNS, predicted_BNS, tokens_BNS), open_BNS & ~stay_BNS


def _is_sure(options: DecodeOptions, rank_BNS: Tensor, confidence_BNS: Tensor) -> Tensor:
    """Which predictions are confident enough to stay: bool, a pure function of ranks and confidences.

    Args:
        options: "threshold": at least its threshold, or that of its position. "factor": with the n most
            confident of its region, n being the largest number with (n + 1)(1 - p_n) < factor. The left side
            grows with n, so each prediction can be tested by itself.
        rank_BNS: places in falling order of confidence, 0 for the most confident.
        confidence_BNS: probabilities of the predictions.
    """
    if options.strategy == "factor":
        return (rank_BNS + 2) * (1 - confidence_BNS) < options.factor
    if options.position_thresholds is not None:
        return confidence_BNS >= confidence_BNS.new_tensor(options.position_thresholds)
    return confidence_BNS >= options.threshold


def _remask(
    options: DecodeOptions,
    step: int,
    tokens_BNS: Tensor,
    open_BNS: Tensor,
    predicted_BNS: Tensor,
    confidence_BNS: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write all open slots, then open the least confident of each image again, whenever they were written."""
    tokens_BNS = torch.where(open_BNS, predicted_BNS, tokens_BNS)
    exists_BNS = torch.isfinite(confidence_BNS) & open_BNS.any((1, 2), keepdim=True)
    left_B = torch.tensor(
        [_left_open(num_slots, options.steps, step) for num_slots in exists_BNS.sum((1, 2)).tolist()],
        device=open_BNS.device,
    )
    doubt_BNS = (-confidence_BNS).masked_fill(~exists_BNS, -torch.inf)
    rank_BNS = _rank(doubt_BNS.flatten(1)).view_as(doubt_BNS)
    return tokens_BNS, (rank_BNS < left_B[:, None, None]) & exists_BNS


def _left_open(num_slots: int, steps: int, step: int) -> int:
    """Slots still open after a step of the linear schedule, rounded as PerceptionDLM's released code does."""
    if step < 0:
        return num_slots
    return 0 if step >= steps - 1 else int(num_slots * ((steps - 1 - step) / steps))


def _rank(score: Tensor) -> Tensor:
    """Place of each number in falling order along the last dimension; equal ones stay in their order."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[-1], device=score.device).expand(score.shape)
    return torch.empty_like(order).scatter_(-1, order, places)


class _BatchDecoder:
    """A batch while it is decoded: its slots, and what is known of the tokens before them."""

    def __init__(self, model: PerceptionDLM, batch: Batch, options: DecodeOptions):
        check_placement(model)
        self.model, self.options = model, options
        self.suppressed = _suppressed(model, options)
        batch = batch.to(model.device)
        self.cache = choose_cache(model, options)
        self.prefix, self.prefix_len = batch.prefix, batch.prefix.ids_BL.shape[1]
        self.ids_BNL, self.position_BNL, self.roles = _blocks(batch, options.max_new_tokens)
        self.exists_BN = self.roles.sample_BL[..., 0] != PADDING
        self.x_BLD = model.embed(batch.prefix, *model.encode_images(batch.images))
        self.kv_cache: KVCache | None = None
        self.cached_rows_B = torch.arange(len(self.ids_BNL), device=model.device)  # the images in the cache
        self.tokens_BNS = self.ids_BNL[..., 1:-1]
        self.open_BNS = (self.tokens_BNS == model.config.mask_token_id) & self.exists_BN[..., None]
        self.predicted_BNS = self.tokens_BNS.clone()
        # What slots are compared in. Apple's GPUs have no float64.
        self.exact = torch.device("cpu") if model.device.type == "mps" else model.device
        self.confidence_BNS = torch.full(
            self.tokens_BNS.shape, torch.nan, dtype=torch.float64, device=self.exact
        )
        self.broken = torch.zeros((), dtype=torch.bool, device=self.exact)
        self.stale_BN = self.exists_BN.clone()  # where a new prediction could differ
        self.forwards_B = torch.zeros_like(self.cached_rows_B)

    def slots(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `select_predictions` selects from, on one device."""
        return (
            self.tokens_BNS.to(self.exact),
            self.open_BNS.to(self.exact),
            self.predicted_BNS.to(self.exact),
            self.confidence_BNS,
        )

    def state(self) -> DecodeState:
        """A copy on the CPU.

        Raises:
            StageFailed: a prediction was none. Said here, where the device is waited for anyway.
        """
        if bool(self.broken):
            name, dtype = self.model.name_or_path or "the model", self.model.dtype
            raise StageFailed(
                f"{name}: the probabilities in {dtype} are NaN, or equal for all tokens: the weights are "
                "damaged, or "
                "this type overflows; download the weights again, or load the model in float32"
            )
        return DecodeState(
            self.forwards_B.cpu().clone(),
            self.tokens_BNS.cpu().clone(),
            self.open_BNS.cpu().clone(),
            self.predicted_BNS.cpu().clone(),
            self.confidence_BNS.cpu().clone(),
        )

    def predict(self, step: int) -> None:
        """Predict what this step selects from and is not known yet."""
        wanted_BN = self._wanted(step)
        refresh = self.cache == "approximate" and step % self.options.refresh_every == 0
        if self.options.temperature == 0 and not refresh:
            wanted_BN = wanted_BN & self.stale_BN
        if not bool(wanted_BN.any()) and not refresh:
            return
        if refresh or self.kv_cache is None:
            hidden_MSD = self._forward_all(wanted_BN)
        else:
            hidden_MSD = self._forward_captions(self.kv_cache, wanted_BN)
        if not bool(wanted_BN.any()):
            return
        at_BNS = wanted_BN[..., None] & (self.open_BNS | (self.options.strategy == "remask"))
        at_MS = at_BNS[wanted_BN]
        uniform_BNS = self._uniform(step)
        uniform_K = None if uniform_BNS is None else uniform_BNS.expand_as(at_BNS)[at_BNS]
        predicted_K, confidence_K = self._sample(hidden_MSD[at_MS], uniform_K)
        self.predicted_BNS[at_BNS] = predicted_K
        self.confidence_BNS[at_BNS.to(self.exact)] = confidence_K.to(self.exact)
        self.broken |= self._says_nothing(confidence_K).to(self.exact)
        self.stale_BN &= ~wanted_BN

    def write(self, tokens_BNS: Tensor, open_BNS: Tensor) -> None:
        """Write the selected tokens into the sequences, and end the captions that have ended."""
        config = self.model.config
        tokens_BNS, self.open_BNS = tokens_BNS.to(self.ids_BNL), open_BNS.to(self.ids_BNL.device)
        if self.options.early_exit and self.options.strategy != "remask":
            tokens_BNS = self._end(tokens_BNS)
        tokens_BNS = tokens_BNS.masked_fill(self.open_BNS, config.mask_token_id)
        changed_BN = (tokens_BNS != self.tokens_BNS).any(-1)
        if self.cache == "none" and not self.model.layout.isolate_prefix:  # every caption sees every other
            changed_BN = changed_BN.any(1, keepdim=True) & self.exists_BN
        self.stale_BN |= changed_BN
        self.tokens_BNS = tokens_BNS
        self.ids_BNL[..., 1:-1] = tokens_BNS

    def _end(self, tokens_BNS: Tensor) -> Tensor:
        """Fill everything after a region's first end of text, once nothing before it is open."""
        eot = cast(int, self.model.config.eot_token_id)
        undecided_BNS = self.open_BNS.cumsum(-1) > 0
        ended_BNS = ((tokens_BNS == eot) & ~undecided_BNS).cumsum(-1) > 0
        self.open_BNS = self.open_BNS & ~ended_BNS
        return tokens_BNS.masked_fill(ended_BNS, eot)

    def _wanted(self, step: int) -> Tensor:
        """The regions among whose slots this step selects."""
        if self.options.strategy == "remask":
            return self.exists_BN & self.open_BNS.any((1, 2))[:, None]
        wanted_BN = self.open_BNS.any(-1)
        if self.options.strategy == "sequential":
            region_N = torch.arange(wanted_BN.shape[1], device=wanted_BN.device)
            wanted_BN = wanted_BN & (region_N == step // self.options.steps)
        return wanted_BN

    def _forward_all(self, wanted_BN: Tensor) -> Tensor:
        """Hidden states (M, S, D) of the wanted regions, from a pass over whole sequences."""
        cached = self.cache != "none"
        rows_B = (self.open_BNS.any((1, 2)) if cached else wanted_BN.any(1)).nonzero().flatten()
        self.forwards_B[rows_B] += 1
        parts = (self.ids_BNL, self.position_BNL, *self.roles)
        ids, position, sample, region, caption = (part[rows_B].flatten(1, 2) for part in parts)
        roles = join_roles(self.prefix.roles.at(rows_B), TokenRoles(sample, region, caption))
        x_BLD = torch.cat([self.x_BLD[rows_B], self.model.language_model.embed_tokens(ids)], dim=1)
        position_BL = torch.cat([self.prefix.position_BL[rows_B], position], dim=1)
        kv_cache = KVCache(self.prefix_len, ids.shape[1]) if cached else None
        mask = self.model.attention_mask(roles, roles)
        captions = slice(self.prefix_len, None)
        x_BLD = self.model.language_model(x_BLD, position_BL, mask, captions, kv_cache)
        if kv_cache is not None:
            self.kv_cache, self.cached_rows_B = kv_cache, rows_B
        hidden_BNSD = x_BLD.unflatten(1, self.ids_BNL.shape[1:])[:, :, 1:-1]
        return hidden_BNSD[wanted_BN[rows_B]]

    def _forward_captions(self, kv_cache: KVCache, wanted_BN: Tensor) -> Tensor:
        """Hidden states (M, S, D) of the wanted regions, from a pass over their captions alone."""
        going_B = self.open_BNS.any((1, 2))[self.cached_rows_B]
        if int(going_B.sum()) <= len(going_B) // 2:  # worth the copy of what stays cached
            self.kv_cache = kv_cache = kv_cache.for_sequences(going_B)
            self.cached_rows_B = self.cached_rows_B[going_B]
        rows_B = self.cached_rows_B
        self.forwards_B += wanted_BN.any(1)
        wanted_BN = wanted_BN[rows_B]
        most = int(wanted_BN.sum(1).max())
        pick_BM = wanted_BN.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        real_BM = wanted_BN.gather(1, pick_BM)
        row_B1 = rows_B[:, None]
        parts = (part[row_B1, pick_BM] for part in (self.ids_BNL, self.position_BNL, *self.roles))
        ids, position, sample, region, caption = parts
        sample = sample.masked_fill(~real_BM[..., None], PADDING)
        roles = TokenRoles(sample.flatten(1), region.flatten(1), caption.flatten(1))
        keys = join_roles(self.prefix.roles.at(rows_B), roles)
        mask = self.model.attention_mask(roles, keys)
        x_BLD = self.model.language_model.embed_tokens(ids.flatten(1))
        x_BLD = self.model.language_model(x_BLD, position.flatten(1), mask, cache=kv_cache)
        return x_BLD.unflatten(1, (most, -1))[:, :, 1:-1][real_BM]

    def _says_nothing(self, confidence_K: Tensor) -> Tensor:
        """Whether probabilities are no numbers, or those of all tokens alike in all slots."""
        num_choices = self.model.config.text.vocab_size - len(set(self.suppressed))
        alike_K = (confidence_K * num_choices - 1).abs() < 1e-9
        return ~confidence_K.isfinite().all() | (alike_K.all() & (num_choices > 1))

    def _uniform(self, step: int) -> Tensor | None:
        """A random number for every slot, the same in every batch; None where nothing is drawn."""
        if self.options.temperature == 0:
            return None
        seed = self.options.seed * 1_000_003 + step
        shape = (self.model.config.num_prompts, self.options.max_new_tokens)
        uniform_NS = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return uniform_NS[: self.open_BNS.shape[1]].to(self.model.device)

    def _sample(self, hidden_KD: Tensor, uniform_K: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens for slots, and their probabilities."""
        with fetched(self.model.lm_head) as weight_VD:
            if uniform_K is None:
                return _likeliest(hidden_KD, weight_VD, self.suppressed)
            return _drawn(hidden_KD, weight_VD, self.suppressed, self.options, uniform_K)


def _likeliest(hidden_KD: Tensor, weight_VD: Tensor, suppressed: list[int]) -> tuple[Tensor, Tensor]:
    """The likeliest tokens and their probabilities, in one pass over parts of the vocabulary.

    A part's logits are small enough to stay in a CPU's cache, and all logits never exist at once.

    Of a sure model, float32 takes every probability for 1. The sum of the other tokens' exponentials is a
    small number that float32 does resolve. The probabilities that follow from it are as the released code has
    them from a softmax in float64, ties included, and no exponential is computed in float64.
    """
    num_slots, num_tokens = _LOGITS_AT_ONCE["cpu" if hidden_KD.is_cpu else "gpu"]
    if len(hidden_KD) > num_slots:
        parts = [_likeliest(part, weight_VD, suppressed) for part in hidden_KD.split(num_slots)]
        return torch.cat([token for token, _ in parts]), torch.cat([confidence for _, confidence in parts])
    top_K = hidden_KD.new_full(hidden_KD.shape[:1], -torch.inf, dtype=_wide(hidden_KD))
    others_K, token_K = torch.zeros_like(top_K), torch.zeros_like(top_K, dtype=torch.int64)
    for start in range(0, len(weight_VD), num_tokens):
        never = [i - start for i in suppressed if start <= i < min(start + num_tokens, len(weight_VD))]
        logits_KV = _logits(hidden_KD, weight_VD[start : start + num_tokens], never)
        part_top_K, place_K = logits_KV.max(dim=-1)
        token_K = torch.where(part_top_K > top_K, place_K + start, token_K)
        new_top_K, second_K = torch.maximum(top_K, part_top_K), torch.minimum(top_K, part_top_K)
        logits_KV.scatter_(1, place_K[:, None], -torch.inf)
        part_others_K = logits_KV.sub_(new_top_K[:, None]).exp_().sum(dim=-1)
        others_K = others_K * (top_K - new_top_K).exp() + part_others_K + (second_K - new_top_K).exp()
        top_K = new_top_K
    sound_K = others_K.masked_fill(~top_K.isfinite(), torch.nan)  # an infinite logit would look sure
    return token_K, 1 / (1 + _exact(sound_K))


def _exact(x_K: Tensor) -> Tensor:
    """Numbers in float64; on the CPU where the device has none."""
    return (x_K.cpu() if x_K.device.type == "mps" else x_K).double()


def _drawn(
    hidden_KD: Tensor, weight_VD: Tensor, suppressed: list[int], options: DecodeOptions, uniform_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Drawn tokens and their probabilities at temperature 1, a part of the slots at a time."""
    parts = []
    for hidden_kD, uniform_k in zip(
        hidden_KD.split(_DRAWN_AT_ONCE), uniform_K.split(_DRAWN_AT_ONCE), strict=True
    ):
        logits_KV = _logits(hidden_kD, weight_VD, suppressed)
        token_K = _draw(logits_KV, options, uniform_k)
        probability_KV = logits_KV.double().softmax(dim=-1)
        parts.append((token_K, probability_KV.gather(1, token_K[:, None])[:, 0]))
    tokens, confidences = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(confidences)


def _logits(hidden_KD: Tensor, weight_VD: Tensor, suppressed: list[int]) -> Tensor:
    logits_KV = (hidden_KD @ weight_VD.T).to(_wide(hidden_KD))
    if suppressed:
        logits_KV[:, suppressed] = -torch.inf
    return logits_KV


def _draw(logits_KV: Tensor, options: DecodeOptions, uniform_K: Tensor) -> Tensor:
    """Tokens by inverting the distribution function, the likeliest first, at `uniform_K` in [0, 1)."""
    sorted_KV, order_KV = (
        (logits_KV / options.temperature).double().sort(dim=-1, descending=True, stable=True)
    )
    sums_KV = sorted_KV.softmax(dim=-1).cumsum(dim=-1)
    within_K = (sums_KV < options.top_p).sum(-1, keepdim=True).clamp(max=sums_KV.shape[-1] - 1)
    total_K1 = sums_KV.gather(1, within_K)
    place_K1 = torch.searchsorted(sums_KV, uniform_K[:, None] * total_K1, right=True)
    return order_KV.gather(1, torch.minimum(place_K1, within_K))[:, 0]


def _blocks(batch: Batch, num_slots: int) -> tuple[Tensor, Tensor, TokenRoles]:
    """The captions' ids, positions and roles as (B, N, S + 2): opening token, slots, closing token."""
    tokens = batch.captions
    if tokens.ids_BL.shape[1] % (num_slots + 2):
        raise ConfigError(
            f"the batch was laid out for captions of another length than {num_slots} slots; lay it out again"
        )
    parts = (tokens.ids_BL, tokens.position_BL, *tokens.roles)
    ids, position, sample, region, caption = (part.unflatten(1, (-1, num_slots + 2)) for part in parts)
    return ids.clone(), position, TokenRoles(sample, region, caption)


def choose_cache(model: PerceptionDLM, options: DecodeOptions) -> str:
    """The cache that a model decodes with: "none", "exact" or "approximate".

    Raises:
        ConfigError: "exact" is asked for, and the prefix sees captions in this model's layout.
    """
    isolated = model.layout.isolate_prefix
    if options.cache == "exact" and not isolated:
        raise ConfigError(
            "cache 'exact' needs a layout that isolates the prefix, and in this model captions change what "
            "comes before them; choose 'approximate' or 'none'"
        )
    if options.cache == "auto":
        return "exact" if isolated else "none"
    return "exact" if options.cache == "approximate" and isolated else options.cache


def _suppressed(model: PerceptionDLM, options: DecodeOptions) -> list[int]:
    config = model.config
    suppress = options.suppress_special
    if suppress is None:
        suppress = config.layout != "reference"
    if not suppress:
        return []
    return [
        config.mask_token_id,
        cast(int, config.image_token_id),
        *(config.region_token_ids or ()),
        *(config.caption_token_ids or ()),
    ]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
