"""Answers that are decoded together: their tensors, and a step on them in which the host waits for nothing.

A row is one sequence with the slots of its answer. Which block it is in, which step, where its answer ends
and whether it is finished are numbers on the device, so that rows differ in data alone, and a step on a row
that is finished changes nothing.

Shape suffixes: R rows, L tokens of a sequence, S slots of an answer, Q slots of a block, X stop strings, W
tokens of a stop string, K slots of all rows, M numbers of a row's status, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ...schemas.answering import AnswerOptions, AnswerStrategy
from ...schemas.decoding import DecodeOptions, Strategy
from ..model.attention import AttentionMask
from ..model.batch import Example, collate
from ..model.perceptiondlm import PerceptionDLM
from ..model.placement import upload
from . import head
from .placed_cache import PlacedCache
from .selection import RowOptions, row_options, select

_SELECTS_AS: dict[AnswerStrategy, Strategy] = {
    "confidence": "per-region",
    "threshold": "threshold",
    "factor": "factor",
    "left-to-right": "left-to-right",
}
"""The names that `selection` has for strategies: a block is its region."""

_BY_CONFIDENCE = ("threshold", "factor")
_NO_TOKEN, _ANY_TOKEN = -2, -1


class Asked(NamedTuple):
    """A question, laid out with masked slots for its answer.

    Attributes:
        example: the sequence. Its `captions` begin with what comes between the first answer and the slots.
        first: the place of the first slot in `example.captions`.
        options: how it is answered.
        never: tokens that are never predicted, ascending.
        stops: runs of tokens that end the answer.
    """

    example: Example
    first: int
    options: AnswerOptions
    never: tuple[int, ...] = ()
    stops: tuple[tuple[int, ...], ...] = ()


class Given(NamedTuple):
    """What is given for each row, on the device.

    Attributes:
        first_R, length_R, block_R: place of the first slot in the sequence, slots, and slots of a block.
        blocks_R: number of blocks.
        left_R2T: slots of a block that its steps leave open; of a whole block, and of the last one.
        least_R2: slots of it that a step closes at least.
        exits_R: bool, whether an answer ends with its first end of text.
        stop_RXW: stop strings, filled up with a number that stands for any token.
        stop_length_RX: their tokens; more than there are slots where there is no stop string.
        temperature_R, top_p_R: float64.
    """

    first_R: Tensor
    length_R: Tensor
    block_R: Tensor
    blocks_R: Tensor
    left_R2T: Tensor
    least_R2: Tensor
    exits_R: Tensor
    stop_RXW: Tensor
    stop_length_RX: Tensor
    temperature_R: Tensor
    top_p_R: Tensor


class Answers(NamedTuple):
    """Where each row is.

    Attributes:
        tokens_RS: the tokens; the mask token in open slots.
        open_RS: bool, the slots that are not decided.
        doubt_RS: the doubt of each token when it was written; negative in open slots.
        ends_R: slots before a stop string.
        done_R: bool, the answers that are finished.
        number_R, step_R: the block, and the step of it.
    """

    tokens_RS: Tensor
    open_RS: Tensor
    doubt_RS: Tensor
    ends_R: Tensor
    done_R: Tensor
    number_R: Tensor
    step_R: Tensor


class Block(NamedTuple):
    """The slots of each row's block before a step.

    Attributes:
        slot_RQ: their numbers; those behind a block that is shorter than others repeat its last one.
        inside_RQ: bool, which of them there are.
        open_RQ: bool, those that are predicted.
        beyond_R: open ones behind a stop string, which are not.
        at_RQ: their places in the sequence.
    """

    slot_RQ: Tensor
    inside_RQ: Tensor
    open_RQ: Tensor
    beyond_R: Tensor
    at_RQ: Tensor


class Status(NamedTuple):
    """What the host reads of a step: `Answers` as the host has them, and each row's extreme doubts."""

    tokens_RS: np.ndarray
    open_RS: np.ndarray
    confidence_RS: np.ndarray
    ends_R: np.ndarray
    done_R: np.ndarray
    step_R: np.ndarray
    low_R: np.ndarray
    high_R: np.ndarray


class BlockRows:
    """The tensors of answers of one kind, and what is computed on them.

    Args:
        model: the network.
        asked: the questions.
        cache: "none", "exact" or "approximate".
        never: tokens that are never predicted, ascending.
        draws: whether tokens are drawn.

    Attributes:
        status_RM: what the host reads, see `read_status`.
    """

    def __init__(
        self, model: PerceptionDLM, asked: Sequence[Asked], cache: str, never: Sequence[int], draws: bool
    ):
        self.model, self.cache, self.draws = model, cache, draws
        options = [each.options for each in asked]
        self.kind = torch.float64 if draws else head.doubt_type(model.dtype)
        batch, device = collate([each.example for each in asked]), model.device
        tokens = batch.tokens().to(device)
        self.prefix_len = batch.prefix.ids_BL.shape[1]
        self.x_RLD = model.embed(tokens, *model.encode_images(batch.images.to(device)))
        self.rope = model.language_model.rope(tokens.position_BL, model.dtype)
        self.roles = tokens.roles
        self.masks: dict[str, AttentionMask] = {}
        self.kv_cache: PlacedCache | None = None
        self.never_X = upload(torch.tensor(never), device) if never else None
        self.given = Given(*(upload(part, device) for part in _given(asked, self.prefix_len)))
        self.has_stops = any(each.stops for each in asked)
        rows = _row_options(options, self.kind, cast(int, model.config.eot_token_id))
        self.options = rows._replace(**{name: upload(part, device) for name, part in _tensors(rows).items()})
        self.num_slots = max(each.max_new_tokens for each in options)
        self.block_slots = rows.slot_BNS.shape[2]
        self.slot_S, self.place_Q = (
            torch.arange(count, device=device) for count in (self.num_slots, self.block_slots)
        )
        self.answers = self._begin()
        self.status_RM = self._status(self._block())

    def _begin(self) -> Answers:
        num_rows, device = len(self.x_RLD), self.model.device
        shape = (num_rows, self.num_slots)
        zero_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        return Answers(
            torch.full(shape, self.model.config.mask_token_id, device=device),
            self.slot_S < self.given.length_R[:, None],
            torch.full(shape, -1.0, dtype=self.kind, device=device),
            self.given.length_R.clone(),
            zero_R.bool(),
            zero_R,
            zero_R.clone(),
        )

    def step(self, refresh_R: np.ndarray | None, uniform_RS: Tensor | None) -> None:
        """Predict the open slots of each row's block, and select. Waits for nothing.

        Args:
            refresh_R: for an approximate cache, bool, the rows that fill it again.
            uniform_RS: random numbers on the CPU, for rows that are drawn.
        """
        block = self._block()
        hidden_RQD = self._forward(block.at_RQ, refresh_R)
        predicted_RQ, doubt_RQ = self._predict(hidden_RQD, block, uniform_RS)
        self._settle(block, predicted_RQ, doubt_RQ)
        self.status_RM.copy_(self._status(block, doubt_RQ))

    def keep(self, rows: Tensor) -> None:
        """Work on with some of the rows alone."""
        self.x_RLD, self.roles = self.x_RLD[rows], self.roles.at(rows)
        cos_RLK, sin_RLK = self.rope
        self.rope = cos_RLK[rows], sin_RLK[rows]
        self.given = Given(*(part[rows] for part in self.given))
        self.answers = Answers(*(part[rows] for part in self.answers))
        self.options = self.options._replace(
            **{name: part[rows] for name, part in _tensors(self.options).items()}
        )
        self.status_RM = self.status_RM[rows]
        self.masks = {}
        if self.kv_cache is not None:
            self.kv_cache.keep(rows)

    def read_status(self, status_RM: np.ndarray) -> Status:
        """A status as it arrives, taken apart."""
        tokens, opens, doubt, few = np.split(status_RM, np.arange(1, 4) * self.num_slots, axis=1)
        ends, done, step, low, high = few.T
        return Status(
            tokens.astype(np.int64),
            opens.astype(bool),
            head.confidence_of(torch.from_numpy(doubt)).numpy(),
            ends.astype(np.int64),
            done.astype(bool),
            step.astype(np.int64),
            low,
            high,
        )

    def _block(self) -> Block:
        given, answers = self.given, self.answers
        start_R1 = (answers.number_R * given.block_R)[:, None]
        length_R1 = given.length_R[:, None]
        width_R1 = torch.minimum(given.block_R[:, None], length_R1 - start_R1)
        slot_RQ = torch.minimum(start_R1 + torch.minimum(self.place_Q, width_R1 - 1), length_R1 - 1)
        inside_RQ = (self.place_Q < width_R1) & ~answers.done_R[:, None]
        waiting_RQ = answers.open_RS.gather(1, slot_RQ) & inside_RQ
        open_RQ = waiting_RQ & (slot_RQ < answers.ends_R[:, None])
        beyond_R = waiting_RQ.sum(1) - open_RQ.sum(1)
        return Block(slot_RQ, inside_RQ, open_RQ, beyond_R, given.first_R[:, None] + slot_RQ)

    def _forward(self, at_RQ: Tensor, refresh_R: np.ndarray | None) -> Tensor:
        """Hidden states (R, Q, D) of the blocks, whose tokens lie at the given places of the sequences."""
        whole, slots = slice(None), slice(self.prefix_len, None)
        again = slots if self.model.layout.isolate_prefix else whole
        if self.cache == "none":
            return self._of_block(self._pass(None, whole), at_RQ)
        if self.kv_cache is None:
            self.kv_cache = PlacedCache(self.x_RLD.shape[1])
            return self._of_block(self._pass(None, whole), at_RQ)
        if refresh_R is None or refresh_R.all():
            return self._of_block(self._pass(None, again), at_RQ)
        if not refresh_R.any():
            return self._pass(None, at_RQ)
        fresh, rest = (
            upload(torch.from_numpy(np.flatnonzero(each_R)), self.model.device)
            for each_R in (refresh_R, ~refresh_R)
        )
        found = self._of_block(self._pass(fresh, again), at_RQ[fresh])
        hidden_RQD = found.new_zeros(*at_RQ.shape, found.shape[2])
        hidden_RQD[fresh] = found
        hidden_RQD[rest] = self._pass(rest, at_RQ[rest])
        return hidden_RQD

    def _pass(self, rows: Tensor | None, places: slice | Tensor) -> Tensor:
        """Hidden states of some tokens of some rows; of a slice, those from the first answer on.

        Args:
            rows: None for all.
            places: a slice of each sequence, or (R, Q).
        """
        if self.kv_cache is not None:
            self.kv_cache.rows, self.kv_cache.places = rows, places
        if isinstance(places, slice):
            at: Any = (slice(None) if rows is None else rows, places)
            name = "whole" if places.start is None else "slots"
            mask = self._mask(name).pick(rows)
            wanted = slice(self.prefix_len - (places.start or 0), None)
        else:
            numbers = torch.arange(len(self.x_RLD), device=places.device) if rows is None else rows
            at = (numbers[:, None], places)
            mask = self._mask("slots").pick(rows, places - self.prefix_len)
            wanted = slice(None)
        cos_RLK, sin_RLK = self.rope
        rope = (cos_RLK[at], sin_RLK[at])
        return self.model.language_model(self.x_RLD[at], None, mask, wanted, self.kv_cache, rope)

    def _mask(self, name: str) -> AttentionMask:
        """The mask of all tokens as queries, or of the slots' side of the sequences."""
        if name not in self.masks:
            queries = (slice(None), slice(self.prefix_len if name == "slots" else None, None))
            mask = self.model.attention_mask(self.roles.at(queries), self.roles, "sdpa")
            mask.prepare(self.model.dtype)
            self.masks[name] = mask
        return self.masks[name]

    def _of_block(self, hidden_RCD: Tensor, at_RQ: Tensor) -> Tensor:
        """Of the hidden states from the first answer on, those of the block."""
        index_RQ1 = (at_RQ - self.prefix_len)[..., None]
        return hidden_RCD.gather(1, index_RQ1.expand(-1, -1, hidden_RCD.shape[2]))

    def _predict(self, hidden_RQD: Tensor, block: Block, uniform_RS: Tensor | None) -> tuple[Tensor, Tensor]:
        """A token for each open slot, and its doubt, which is infinite elsewhere."""
        chances: list[Tensor] = []
        if uniform_RS is not None:
            uniform_RQ = upload(uniform_RS, self.model.device).gather(1, block.slot_RQ)
            heat = (self.given.temperature_R, self.given.top_p_R)
            chances = [*(each[:, None].expand_as(uniform_RQ) for each in heat), uniform_RQ]
        # The host may ask which slots are open where it computes itself.
        at: Any = block.open_RQ if hidden_RQD.is_cpu else slice(None)
        width = hidden_RQD.shape[2]
        token_K, doubt_K = head.sample(
            self.model,
            self.never_X,
            hidden_RQD[at].reshape(-1, width),
            [each[at].flatten() for each in chances],
        )
        if not hidden_RQD.is_cpu:
            token_RQ, doubt_RQ = token_K.view(block.slot_RQ.shape), doubt_K.view(block.slot_RQ.shape)
            return token_RQ, doubt_RQ.masked_fill(~block.open_RQ, math.inf)
        predicted_RQ = torch.zeros_like(block.slot_RQ)
        doubt_RQ = torch.full(block.slot_RQ.shape, math.inf, dtype=doubt_K.dtype)
        predicted_RQ[block.open_RQ], doubt_RQ[block.open_RQ] = token_K, doubt_K
        return predicted_RQ, doubt_RQ

    def _settle(self, block: Block, predicted_RQ: Tensor, doubt_RQ: Tensor) -> None:
        """Select from the predictions, write what stays, and find out what is finished."""
        given, answers = self.given, self.answers
        kept_RQ = self._select(block, predicted_RQ, doubt_RQ)
        start_R1 = (answers.number_R * given.block_R)[:, None]
        place_RS = self.slot_S - start_R1
        index_RS = place_RS.clamp(0, self.block_slots - 1)
        kept_RS = kept_RQ.gather(1, index_RS) & (place_RS == index_RS)
        tokens_RS = torch.where(kept_RS, predicted_RQ.gather(1, index_RS), answers.tokens_RS)
        written_RS = torch.where(kept_RS, doubt_RQ.gather(1, index_RS), answers.doubt_RS)
        open_RS = answers.open_RS & ~kept_RS
        ids_RQ, row_R1 = (
            tokens_RS.gather(1, block.slot_RQ),
            torch.arange(len(tokens_RS), device=tokens_RS.device),
        )
        self.x_RLD[row_R1[:, None], block.at_RQ] = self.model.get_input_embeddings()(ids_RQ)
        ends_R = torch.minimum(answers.ends_R, self._stops(tokens_RS)) if self.has_stops else answers.ends_R
        closed_R = ~(open_RS.gather(1, block.slot_RQ) & block.inside_RQ).any(1)
        step_R = (answers.step_R + 1).masked_fill(closed_R, 0)
        number_R = torch.minimum(answers.number_R + closed_R, given.blocks_R - 1)
        done_R = answers.done_R | self._done(tokens_RS, open_RS, ends_R)
        self.answers = Answers(tokens_RS, open_RS, written_RS, ends_R, done_R, number_R, step_R)

    def _select(self, block: Block, predicted_RQ: Tensor, doubt_RQ: Tensor) -> Tensor:
        """Bool (R, Q), the predictions that stay."""
        given, answers = self.given, self.answers
        last_R1 = (answers.number_R == given.blocks_R - 1).long()[:, None]
        most = given.left_R2T.shape[2] - 1
        index_R11 = answers.step_R.clamp(max=most)[:, None, None]
        left_R2 = given.left_R2T.gather(2, index_R11.expand(-1, 2, -1))[..., 0]
        left_R = (left_R2.gather(1, last_R1)[:, 0] - block.beyond_R).clamp(min=0)
        options = self.options._replace(
            left_BT=left_R[:, None], least_B=given.least_R2.gather(1, last_R1)[:, 0]
        )
        wide = [each[:, None] for each in (predicted_RQ, block.open_RQ, predicted_RQ, doubt_RQ)]
        _, still_open = select(options, torch.zeros_like(left_R), *wide)
        return block.open_RQ & ~still_open[:, 0]

    def _stops(self, tokens_RS: Tensor) -> Tensor:
        """The first slot of each row at which a stop string begins; all slots where none does."""
        stop_RXW, length_R1 = self.given.stop_RXW, self.given.length_R[:, None]
        longest = stop_RXW.shape[2]
        padded_RS = torch.nn.functional.pad(tokens_RS, (0, longest - 1), value=_NO_TOKEN)
        window_R1SW = padded_RS.unfold(1, longest, 1)[:, None]
        same_RXSW = (window_R1SW == stop_RXW[:, :, None]) | (stop_RXW == _ANY_TOKEN)[:, :, None]
        fits_RXS = self.slot_S + self.given.stop_length_RX[..., None] <= length_R1[..., None]
        found_RS = (same_RXSW.all(-1) & fits_RXS).any(1)
        return torch.where(found_RS, self.slot_S, length_R1).amin(1)

    def _done(self, tokens_RS: Tensor, open_RS: Tensor, ends_R: Tensor) -> Tensor:
        """Rows with no open slot before their end, or with an end of text and no open slot before that."""
        waiting_RS = open_RS & (self.slot_S < ends_R[:, None])
        settled_RS = waiting_RS.cumsum(1) == 0
        ended_RS = (tokens_RS == self.model.config.eot_token_id) & settled_RS
        return ~waiting_RS.any(1) | (ended_RS.any(1) & self.given.exits_R)

    def _status(self, block: Block, doubt_RQ: Tensor | None = None) -> Tensor:
        """What the host reads; `read_status` takes it apart. float32 holds any token, of fewer than 2^24."""
        tokens, opens, doubt, ends_R, done_R, _, step_R = self.answers
        others = head.num_others(self.model, self.never_X)
        low_R = high_R = torch.zeros_like(doubt[:, 0])
        if doubt_RQ is not None:  # slots without a prediction do not speak against a row that is broken
            low_R, high_R = doubt_RQ.masked_fill(~block.open_RQ, others).aminmax(dim=1)
        few = torch.stack([ends_R, done_R, step_R, low_R, high_R], dim=1)
        return torch.cat([tokens, opens, doubt, few], dim=1)  # all of them in the doubts' type


def _given(asked: Sequence[Asked], prefix_len: int) -> Given:
    """What is given for rows, on the CPU."""
    options = [each.options for each in asked]
    length = np.array([each.max_new_tokens for each in options])
    block = np.minimum([each.block_length for each in options], length)
    blocks = -(-length // block)
    widths = [
        (wide, all_ - (number - 1) * wide) for wide, all_, number in zip(block, length, blocks, strict=True)
    ]
    most = max(each.block_steps for each in options)
    left = [
        [left_open(each, width, most) for width in pair] for each, pair in zip(options, widths, strict=True)
    ]
    least = [
        [-(-width // each.block_steps) * (each.strategy in _BY_CONFIDENCE) for width in pair]
        for each, pair in zip(options, widths, strict=True)
    ]
    stops = [each.stops for each in asked]
    longest = max((len(stop) for each in stops for stop in each), default=1)
    stop_RXW = np.full((len(asked), max(map(len, stops)), longest), _ANY_TOKEN)
    stop_length = np.full(stop_RXW.shape[:2], 1 + int(length.max()))
    for row, each in enumerate(stops):
        for number, stop in enumerate(each):
            stop_RXW[row, number, : len(stop)], stop_length[row, number] = stop, len(stop)
    numbers = (
        *(prefix_len + np.array([each.first for each in asked]), length, block, blocks, np.array(left)),
        *(np.array(least), np.array([each.early_exit for each in options]), stop_RXW, stop_length),
    )
    heat = [[each.temperature or 1.0 for each in options], [each.top_p for each in options]]
    return Given(*map(torch.from_numpy, numbers), *torch.tensor(heat, dtype=torch.float64))


def left_open(options: AnswerOptions, width: int, num_steps: int) -> list[int]:
    """Slots of a block that are open after each of some steps: every step keeps as many, the first ones one
    more. Rows that keep what they are sure of may leave all of them open.
    """
    if options.strategy in _BY_CONFIDENCE:
        return [width] * num_steps
    base, more = divmod(width, options.block_steps)
    return [max(width - base * done - min(done, more), 0) for done in range(1, num_steps + 1)]


def _row_options(options: Sequence[AnswerOptions], dtype: torch.dtype, eot: int) -> RowOptions:
    """How each row's block is selected from, but for what a step may leave open."""
    each_block = [
        DecodeOptions(
            strategy=_SELECTS_AS[each.strategy],
            max_new_tokens=min(each.block_length, each.max_new_tokens),
            threshold=each.threshold,
            factor=each.factor,
            early_exit=False,
            end_of_text_last=each.end_of_text_last,
        )
        for each in options
    ]
    shape = (len(options), 1, max(block.max_new_tokens for block in each_block))
    return row_options(each_block, [1] * len(options), shape, dtype, eot)


def _tensors(options: RowOptions) -> dict[str, Tensor]:
    """The fields of row options that are tensors."""
    return {name: part for name, part in options._asdict().items() if isinstance(part, Tensor)}
