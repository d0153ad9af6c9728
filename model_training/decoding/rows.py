"""Rows that are decoded together: their tensors, which stay where they are, and a step that works on them.

A row is one sequence: a prefix, then the captions of up to N regions with S slots each. What differs between
rows is data. So a step on a GPU depends on no value that the host would have to wait for, and is captured as
a CUDA graph: all regions are predicted in every step, whether or not they have changed. `skipping` is the
other way to predict, for CPUs, where arithmetic is dear and waiting costs nothing.

Shape suffixes: B rows, N regions of a row, S slots of a region, L tokens of a caption (its opening, S slots,
its closing), P tokens of the prefix, K slots of all rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ...schemas.decoding import DecodeOptions, Strategy
from ...schemas.errors import ConfigError
from ..model.attention import PADDING, SHARED, AttentionMask, TokenRoles, join_roles
from ..model.batch import Tokens
from ..model.llada import KVCache
from ..model.perceptiondlm import PerceptionDLM
from ..model.placement import upload
from . import head
from .refresh import RefreshedCache
from .selection import RowOptions, end_captions, predicted_slots, row_options, select, unsure_rows


class Bucket(NamedTuple):
    """What rows that share tensors have in common; rows of equal buckets can use the same tensors in turn.

    Attributes:
        num_rows, prefix_len, regions, slots: the shape, B, P, N and S.
        steps: the most of a row.
        cache: "none", "exact" or "approximate".
        refresh_every: steps after which an approximate cache is filled again; 0 for others.
        suppress: whether special tokens are never predicted.
        draws: whether tokens are drawn, at a temperature above 0.
        strategies: those that occur.
        may_exit: whether a region can end early.
        may_settle: whether a region can end since all of it is sure.
        may_wait: whether end of text is kept last.
        redoes: whether a step may have to be done again, see `refresh`.
    """

    num_rows: int
    prefix_len: int
    regions: int
    slots: int
    steps: int
    cache: str
    refresh_every: int
    suppress: bool
    draws: bool
    strategies: frozenset[Strategy]
    may_exit: bool
    may_settle: bool
    may_wait: bool
    redoes: bool


class LaidOut(NamedTuple):
    """Captions of a batch as blocks, on the CPU.

    Attributes:
        ids_BNL, position_BNL, roles: tokens, with room for the most regions and slots that a row has.
        regions: how many each row has.
    """

    ids_BNL: Tensor
    position_BNL: Tensor
    roles: TokenRoles
    regions: list[int]

    def at(self, rows: list[int], shape: tuple[int, int, int]) -> LaidOut:
        """Some rows, cut or padded to a shape (B, N, L)."""
        parts = (self.ids_BNL, self.position_BNL, *self.roles)
        fills = (0, 0, PADDING, SHARED, False)
        ids, position, *roles = (
            _fitted(part[rows], shape, fill) for part, fill in zip(parts, fills, strict=True)
        )
        return LaidOut(ids, position, TokenRoles(*roles), [self.regions[row] for row in rows])


def lay_out(captions: Tokens, slots: Sequence[int]) -> LaidOut:
    """The captions' blocks of each row, which has `slots` slots a region.

    Raises:
        ConfigError: a row was laid out for another number of slots.
    """
    parts = [part.cpu() for part in (captions.ids_BL, captions.position_BL, *captions.roles)]
    regions = []
    for row, count in enumerate(slots):
        region_L = parts[3][row][parts[2][row] != PADDING]
        _, lengths = region_L.unique_consecutive(return_counts=True)
        if (lengths != count + 2).any():
            raise ConfigError(
                f"the batch was laid out for captions of another length than {count} slots; lay it out again"
            )
        regions.append(len(lengths))
    shape = (len(regions), max(regions, default=0), max(slots, default=0) + 2)
    blocks = [
        torch.full(shape, fill, dtype=part.dtype)
        for part, fill in zip(parts, (0, 0, PADDING, SHARED, False), strict=True)
    ]
    for row, (count, length) in enumerate(zip(regions, slots, strict=True)):
        for block, part in zip(blocks, parts, strict=True):
            block[row, :count, : length + 2] = part[row, : count * (length + 2)].unflatten(
                0, (count, length + 2)
            )
    return LaidOut(blocks[0], blocks[1], TokenRoles(*blocks[2:]), regions)


class Rows:
    """The tensors of a bucket, and what is computed on them.

    Args:
        model: the network.
        bucket: the shape, and what all rows have in common.
        never_X: tokens that are never predicted, on the model's device.
        captures: whether steps on CUDA are captured as graphs.

    Attributes:
        status_BM: float32, what the host has to know of a step. For each region, twice the number of its open
            slots, plus one if a token of it has changed; then whether the step was unsure (0 unless the
            bucket `redoes`), and the lowest and the highest doubt of the row.
    """

    def __init__(self, model: PerceptionDLM, bucket: Bucket, never_X: Tensor | None, captures: bool = True):
        self.model, self.bucket, self.never_X = model, bucket, never_X
        self.kv_cache: KVCache | None = None
        self.mask: AttentionMask | None = None
        self.rope: tuple[Tensor, Tensor] | None = None
        shape, device = (bucket.num_rows, bucket.regions, bucket.slots), model.device
        self.x_BPD = torch.zeros(
            bucket.num_rows,
            bucket.prefix_len,
            model.config.text.hidden_size,
            device=device,
            dtype=model.dtype,
        )
        kind = torch.float64 if bucket.draws else head.doubt_type(model.dtype)
        self.predicted_BNS = torch.zeros(shape, dtype=torch.int64, device=device)
        self.open_BNS = torch.zeros(shape, dtype=torch.bool, device=device)
        self.doubt_BNS = torch.zeros(shape, dtype=kind, device=device)
        self.status_BM = torch.zeros(bucket.num_rows, bucket.regions + 3, device=device)
        self.fresh_B = torch.ones(bucket.num_rows, dtype=torch.bool, device=device)
        self.step_B = torch.zeros(bucket.num_rows, dtype=torch.int64, device=device)
        self.uniform_BNS = torch.zeros(shape, dtype=torch.float64, device=device) if bucket.draws else None
        self._values = [upload(part, device) for part in self._laid_out(bucket.num_rows, None, None, ())]
        self.ids_BNL, self.position_BNL, self.roles = *self._values[:2], TokenRoles(*self._values[2:5])
        self.prefix_position_BP, self.prefix_roles = self._values[5], TokenRoles(*self._values[6:9])
        flags = (bucket.strategies, bucket.may_exit, bucket.may_settle, bucket.may_wait)
        self.options = RowOptions(*flags, *self._values[9:-2])
        self.temperature_B, self.top_p_B = self._values[-2:]
        self.doubt_BNS.fill_(self.num_others)
        # Weights that are fetched for each pass have no place of their own, which a graph would need.
        captures = captures and device.type == "cuda" and not getattr(model, "hf_device_map", None)
        self._replays = {full: _Replay(partial(self._step, full), captures) for full in (True, False)}

    def clear(self) -> None:
        """Make every row one without regions, in which nothing is open."""
        for mine, part in zip(
            self._values, self._laid_out(self.bucket.num_rows, None, None, ()), strict=True
        ):
            mine.copy_(upload(part, mine.device))
        self.open_BNS.zero_()

    def admit(
        self,
        places_A: Tensor,
        x_APD: Tensor,
        prefix: Tokens,
        captions: LaidOut,
        options: Sequence[DecodeOptions],
    ) -> None:
        """Put new sequences into some rows, whatever was there.

        Args:
            places_A: the rows, on the device.
            x_APD: embeddings of the prefixes, on the device.
            prefix: their tokens, on the CPU.
            captions: on the CPU.
            options: of each of them.
        """
        parts = self._laid_out(len(options), prefix, captions, options)
        for mine, part in zip(self._values, parts, strict=True):
            mine[places_A] = upload(part, mine.device)
        self.x_BPD[:, : x_APD.shape[1]][places_A] = x_APD
        tokens_ANS, slot_ANS = self.tokens_BNS[places_A], self.options.slot_BNS[places_A]
        self.predicted_BNS[places_A] = tokens_ANS
        self.open_BNS[places_A] = (tokens_ANS == self.model.config.mask_token_id) & slot_ANS
        # No prediction yet; and places that are no slots do not speak against a row that is broken.
        doubt_ANS = torch.full_like(tokens_ANS, -1, dtype=self.doubt_BNS.dtype)
        self.doubt_BNS[places_A] = doubt_ANS.masked_fill_(~slot_ANS, self.num_others)
        self.step_B.index_fill_(0, places_A, 0)

    def _laid_out(
        self,
        num_rows: int,
        prefix: Tokens | None,
        captions: LaidOut | None,
        options: Sequence[DecodeOptions],
    ) -> list[Tensor]:
        """What `num_rows` rows hold as data, on the CPU; after those that are given, ones without regions."""
        bucket = self.bucket
        shape = (num_rows, bucket.regions, bucket.slots)
        if prefix is None or captions is None:
            nothing = torch.zeros(0, 0, dtype=torch.int64)
            roles = TokenRoles(nothing, nothing, nothing.bool())
            prefix = Tokens(nothing, nothing, roles)
            captions = LaidOut(nothing[None], nothing[None], TokenRoles(*(part[None] for part in roles)), [])
        blocks = captions.at(list(range(len(options))), (num_rows, bucket.regions, bucket.slots + 2))
        sides = [
            _fitted(part, (num_rows, bucket.prefix_len), fill)
            for part, fill in zip(
                (prefix.position_BL, *prefix.roles), (0, PADDING, SHARED, False), strict=True
            )
        ]
        eot = cast(int, self.model.config.eot_token_id)
        given = row_options(options, captions.regions, shape, self.doubt_BNS.dtype, eot)
        given = given._replace(left_BT=_fitted(given.left_BT, (num_rows, bucket.steps + 1), 0))
        rest = [1.0] * (num_rows - len(options))
        hot, nucleus = [each.temperature or 1.0 for each in options], [each.top_p for each in options]
        chances = [torch.tensor(each + rest, dtype=torch.float64) for each in (hot, nucleus)]
        return [blocks.ids_BNL, blocks.position_BNL, *blocks.roles, *sides, *given[4:], *chances]

    @property
    def tokens_BNS(self) -> Tensor:
        """The tokens, a view; the mask token in open slots."""
        return self.ids_BNL[..., 1:-1]

    def prepare(self, places_A: Tensor, prefix_len: int) -> None:
        """Make what is the same in all steps: positions and the mask of whole sequences, an exact cache.

        Args:
            places_A: the rows that are new, on the device.
            prefix_len: tokens of the longest of their prefixes.
        """
        position_BL = torch.cat([self.prefix_position_BP, self.position_BNL.flatten(1)], dim=1)
        rope = self.model.language_model.rope(position_BL, self.model.dtype)
        if self.rope is None:
            self.rope = rope
        for mine, new in zip(self.rope, rope, strict=True):
            mine.copy_(new)
        roles = join_roles(self.prefix_roles, TokenRoles(*(part.flatten(1) for part in self.roles)))
        mask = self.model.attention_mask(roles, roles, "sdpa")
        mask.prepare(self.model.dtype)
        if self.mask is None or self.mask.mask is None or mask.mask is None:
            self.mask = mask
        else:
            self.mask.mask.copy_(mask.mask)
        if self.bucket.cache == "exact":
            self.kv_cache = self.kv_cache or KVCache(self.bucket.prefix_len, self.ids_BNL[0].numel())
            self.kv_cache.put(places_A, self.prefill(places_A, prefix_len), self.bucket.num_rows)

    def prefill(self, places_A: Tensor, prefix_len: int) -> KVCache:
        """Keys and values of the prefixes of some rows, which see no caption."""
        at = (places_A, slice(prefix_len))
        roles = self.prefix_roles.at(at)
        mask = self.model.attention_mask(roles, roles, "sdpa")
        cache = KVCache(prefix_len, 0)
        self.model.language_model(self.x_BPD[at], self.prefix_position_BP[at], mask, slice(0, 1), cache)
        return cache

    def step(self, full: bool, fresh_B: np.ndarray, uniform_BNS: Tensor | None) -> None:
        """Predict every slot and select. Waits for nothing.

        Args:
            full: whether to run over whole sequences, or over captions alone.
            fresh_B: the rows whose cache a pass over whole sequences fills; the others go on with theirs.
            uniform_BNS: random numbers on the CPU, for rows that are drawn.
        """
        self.receive(uniform_BNS)
        if self.bucket.cache == "approximate":
            if full or self.bucket.redoes:
                self.fresh_B.copy_(upload(torch.from_numpy(fresh_B), self.fresh_B.device))
            self._refreshed().filling = full
        self._replays[full]()

    def _refreshed(self) -> KVCache:
        """The approximate cache."""
        if self.kv_cache is None:
            self.kv_cache = RefreshedCache(self.bucket.prefix_len, self.ids_BNL[0].numel())
            self.kv_cache.fresh_B = self.fresh_B
        return self.kv_cache

    def _step(self, full: bool) -> None:
        hidden_BNSD = self._forward(full)[:, :, 1:-1]
        flat = (hidden_BNSD.flatten(0, 2), *self.chances(slice(None)))
        token_K, doubt_K = self.sample(*flat)
        at_BNS = predicted_slots(self.options, self.open_BNS)
        for mine_BNS, new_K in ((self.predicted_BNS, token_K), (self.doubt_BNS, doubt_K)):
            torch.where(at_BNS, new_K.view_as(mine_BNS), mine_BNS, out=mine_BNS)
        self.settle()

    def _forward(self, full: bool) -> Tensor:
        """Hidden states (B, N, L, D) of all captions."""
        model, mask = self.model.language_model, cast(AttentionMask, self.mask)
        captions = slice(self.bucket.prefix_len, None)
        cos_BLK, sin_BLK = cast(tuple[Tensor, Tensor], self.rope)
        x_BLD = model.embed_tokens(self.ids_BNL.flatten(1))
        if full:
            x_BLD = torch.cat([self.x_BPD, x_BLD], dim=1)
            rope, wanted = (cos_BLK, sin_BLK), captions
        else:
            rope, wanted = (cos_BLK[:, captions], sin_BLK[:, captions]), slice(None)
            mask = mask.for_queries(captions)
        x_BLD = model(x_BLD, None, mask, wanted, self.kv_cache, rope)
        return x_BLD.unflatten(1, self.ids_BNL.shape[1:])

    def settle(self) -> None:
        """Select from the predictions, write what stays, and make the step's status."""
        tokens_BNS, open_BNS = select(
            self.options, self.step_B, self.tokens_BNS, self.open_BNS, self.predicted_BNS, self.doubt_BNS
        )
        held_B = None
        if self.bucket.redoes:
            unsure_B = unsure_rows(self.options, self.open_BNS, open_BNS, self.doubt_BNS)
            self.status_BM[:, -3] = unsure_B
            held_B = unsure_B & ~self.fresh_B
        eot = cast(int, self.model.config.eot_token_id)
        tokens_BNS, open_BNS = end_captions(self.options, tokens_BNS, open_BNS, eot)
        tokens_BNS = tokens_BNS.masked_fill(open_BNS, self.model.config.mask_token_id)
        if held_B is not None:
            tokens_BNS = self.tokens_BNS.where(held_B[:, None, None], tokens_BNS)
            open_BNS = self.open_BNS.where(held_B[:, None, None], open_BNS)
            self.step_B.sub_(held_B.long())
        changed_BN = (tokens_BNS != self.tokens_BNS).any(-1)
        self.status_BM[:, :-3] = torch.add(changed_BN, open_BNS.sum(-1), alpha=2)
        self.status_BM[:, -2], self.status_BM[:, -1] = self.doubt_BNS.flatten(1).aminmax(dim=1)
        self.tokens_BNS.copy_(tokens_BNS)
        self.open_BNS.copy_(open_BNS)
        self.step_B.add_(1)

    @property
    def num_others(self) -> int:
        """How many tokens besides one can be predicted: the doubt where all are equally likely."""
        return head.num_others(self.model, self.never_X)

    def sample(
        self, hidden_KD: Tensor, temperature_K: Tensor, top_p_K: Tensor, uniform_K: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens for slots, and their doubts."""
        chances = () if uniform_K is None else (temperature_K, top_p_K, uniform_K)
        return head.sample(self.model, self.never_X, hidden_KD, chances)

    def chances(self, at: slice | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Temperature, top-p and random number of each slot, or of those that a mask (B, N, S) chooses."""
        if self.uniform_BNS is None:
            return self.temperature_B, self.top_p_B, None
        wide = (self.temperature_B[:, None, None], self.top_p_B[:, None, None], self.uniform_BNS)
        temperature, top_p, uniform = (each.expand_as(self.uniform_BNS)[at].flatten() for each in wide)
        return temperature, top_p, uniform

    def receive(self, uniform_BNS: Tensor | None) -> None:
        """Take random numbers of the host."""
        if self.uniform_BNS is not None and uniform_BNS is not None:
            self.uniform_BNS.copy_(upload(uniform_BNS, self.uniform_BNS.device))


class _Replay:
    """A function of tensors that stay where they are: on CUDA, its second call is captured as a graph.

    The first call runs as it is, and warms up what a capture must not do.
    """

    def __init__(self, function: Callable[[], None], captures: bool):
        self.function, self.captures = function, captures
        self.num_calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.num_calls += 1
        if not self.captures or self.num_calls == 1:
            self.function()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # others read photos
                self.function()
        self.graph.replay()


def _fitted(part: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
    """A tensor cut and padded at the end of each dimension."""
    fitted = torch.full(shape, fill, dtype=part.dtype)
    here = tuple(slice(min(have, want)) for have, want in zip(part.shape, shape, strict=True))
    fitted[here] = part[here]
    return fitted
