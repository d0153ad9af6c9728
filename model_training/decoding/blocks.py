"""The sampler of answers: long rows of slots that are decided block by block.

An answer's slots follow its question in a sequence. A step predicts the open slots of each row's current
block, and `selection.select` decides which predictions stay. What stays is never opened again, so an answer
that has ended, or whose stop string is found, needs no further step. Every row has options of its own, and
depends on no other row.

Shape suffixes: B rows, R rows that are still in work, P tokens before the first answer, L tokens of a
sequence, S slots of an answer, Q slots of a block, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...schemas.answering import AnswerOptions, AnswerStrategy
from ...schemas.decoding import DecodeOptions, Strategy
from ..model.attention import AttentionMask
from ..model.batch import Example, collate
from ..model.perceptiondlm import PerceptionDLM
from ..model.placement import check_placement, fetched, upload
from . import head
from .placed_cache import PlacedCache
from .sampler import broken_weights, resolve_cache
from .selection import RowOptions, row_options, select

_SELECTS_AS: dict[AnswerStrategy, Strategy] = {
    "confidence": "per-region",
    "threshold": "threshold",
    "factor": "factor",
    "left-to-right": "left-to-right",
}
"""The names that `selection` has for strategies: a block is its region."""


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


class AnswerState(NamedTuple):
    """All answers of a batch between two steps.

    Attributes:
        forwards_B: forward passes of the language model for each row so far.
        tokens_BS: the tokens; the mask token in open slots.
        open_BS: bool, the slots that are not decided.
        confidence_BS: the probability of each token in float64 when it was written; NaN in open slots.
        ends_B: the number of slots before a stop string; all slots where none is found.
        done_B: bool, the answers that are finished.
    """

    forwards_B: np.ndarray
    tokens_BS: np.ndarray
    open_BS: np.ndarray
    confidence_BS: np.ndarray
    ends_B: np.ndarray
    done_B: np.ndarray


def kind_of(model: PerceptionDLM, asked: Asked) -> tuple:
    """What rows must have in common to share passes: their cache, what they never say, and drawing."""
    return choose_cache(model, asked.options), asked.never, asked.options.temperature > 0


def choose_cache(model: PerceptionDLM, options: AnswerOptions) -> str:
    """The cache that a model answers with: "none", "exact" or "approximate".

    Raises:
        ConfigError: as `resolve_cache`.
    """
    return resolve_cache(model, options.cache, "answers")


@torch.inference_mode()
def answer_steps(model: PerceptionDLM, asked: Sequence[Asked]) -> Iterator[AnswerState]:
    """Answer questions of one kind, and give the state before the first step and after every one.

    Raises:
        ConfigError: a cache does not suit the layout, or a weight of the model is not loaded.
        StageFailed: the model's probabilities are no numbers, or the same for every token.
    """
    answering = _Answering(model, asked)
    yield answering.state()
    while answering.step():
        yield answering.state()


@torch.inference_mode()
def answer_batch(model: PerceptionDLM, asked: Sequence[Asked]) -> AnswerState:
    """Answer questions of one kind; raises as `answer_steps`."""
    answering = _Answering(model, asked)
    while answering.step():
        pass
    return answering.state()


class _Schedule:
    """Where each row is: its block, its step, and how many slots a step may leave open."""

    def __init__(self, options: Sequence[AnswerOptions]):
        self.options = options
        self.length_B = np.array([each.max_new_tokens for each in options])
        self.block_B = np.minimum([each.block_length for each in options], self.length_B)
        self.steps_B = np.array([each.block_steps for each in options])
        self.number_B = np.zeros_like(self.length_B)
        self.step_B = np.zeros_like(self.length_B)

    @property
    def start_B(self) -> np.ndarray:
        """The first slot of each row's block."""
        return self.number_B * self.block_B

    @property
    def width_B(self) -> np.ndarray:
        """Slots of each row's block; the last one may be shorter."""
        return np.minimum(self.block_B, self.length_B - self.start_B).clip(min=1)

    def left_B(self) -> np.ndarray:
        """Open slots of each row's block after this step: every step keeps as many, the first ones one
        more.
        """
        base, more = np.divmod(self.width_B, self.steps_B)
        done = self.step_B + 1
        left = self.width_B - (base * done + np.minimum(done, more))
        return np.where([self._by_confidence(each) for each in self.options], self.width_B, left.clip(min=0))

    def least_B(self) -> np.ndarray:
        """Slots that a step closes at least, in rows that keep what they are sure of."""
        least = -(-self.width_B // self.steps_B)
        return np.where([self._by_confidence(each) for each in self.options], least, 0)

    def advance(self, open_BS: np.ndarray) -> None:
        """Take a step; a row whose block has no open slot begins the next one."""
        self.step_B += 1
        for row, (start, width) in enumerate(zip(self.start_B, self.width_B, strict=True)):
            if not open_BS[row, start : start + width].any():
                self.number_B[row] += 1
                self.step_B[row] = 0

    @staticmethod
    def _by_confidence(options: AnswerOptions) -> bool:
        return options.strategy in ("threshold", "factor")


class _Answering:
    """A batch of answers while it is decoded.

    Attributes:
        live_R: the rows of the batch that are still in work, and those that finished not long ago.
    """

    def __init__(self, model: PerceptionDLM, asked: Sequence[Asked]):
        check_placement(model)
        self.model, self.asked = model, asked
        self.cache_kind, never, self.draws = kind_of(model, asked[0])
        device = model.device
        batch = collate([each.example for each in asked])
        tokens = batch.tokens().to(device)
        self.position_RL, self.roles = tokens.position_BL, tokens.roles
        self.prefix_len = batch.prefix.ids_BL.shape[1]
        self.x_RLD = model.embed(tokens, *model.encode_images(batch.images.to(device)))
        self.never_X = upload(torch.tensor(never), device) if never else None
        self.kv_cache: PlacedCache | None = None
        self.masks: dict[str, tuple[tuple, AttentionMask]] = {}
        self.schedule = _Schedule([each.options for each in asked])
        self.first_B = self.prefix_len + np.array([each.first for each in asked])
        self.rows = _rows(
            [each.options for each in asked], torch.float64 if self.draws else head.doubt_type(model.dtype)
        )
        self.live_R = np.arange(len(asked))
        shape = (len(asked), int(self.schedule.length_B.max()))
        self.open_BS = np.arange(shape[1]) < self.schedule.length_B[:, None]
        self.tokens_BS = np.full(shape, model.config.mask_token_id)
        self.confidence_BS = np.full(shape, np.nan)
        self.ends_B = self.schedule.length_B.copy()
        self.done_B = np.zeros(len(asked), bool)
        self.forwards_B = np.zeros(len(asked), np.int64)

    def state(self) -> AnswerState:
        """A copy."""
        parts = (self.forwards_B, self.tokens_BS, self.open_BS, self.confidence_BS, self.ends_B, self.done_B)
        return AnswerState(*(part.copy() for part in parts))

    def step(self) -> bool:
        """Predict and select in every row that is not finished; whether there was one."""
        active_R = ~self.done_B[self.live_R]
        if not active_R.any():
            return False
        if 2 * active_R.sum() <= len(active_R):
            self._drop(active_R)
            active_R = active_R[active_R]
        slot_RQ, inside_RQ = self._block()
        rows_R1 = self.live_R[:, None]
        in_block_RQ = self.open_BS[rows_R1, slot_RQ] & inside_RQ & active_R[:, None]
        open_RQ = in_block_RQ & (slot_RQ < self.ends_B[rows_R1])
        hidden_RQD = self._forward(self.first_B[rows_R1] + slot_RQ)
        predicted_RQ, doubt_RQ = self._predict(hidden_RQD, open_RQ, slot_RQ)
        beyond_R = in_block_RQ.sum(1) - open_RQ.sum(1)
        left_R = (self.schedule.left_B()[self.live_R] - beyond_R).clip(min=0)
        kept_RQ = self._select(open_RQ, predicted_RQ, doubt_RQ, left_R)
        self._write(kept_RQ, slot_RQ, predicted_RQ, doubt_RQ)
        self.forwards_B[self.live_R] += active_R
        self.schedule.advance(self.open_BS)
        for row in self.live_R[active_R].tolist():
            self._finish(row)
        return True

    def _block(self) -> tuple[np.ndarray, np.ndarray]:
        """The slots of each row's block, and which of them there are; the last one stands for others."""
        start_R1, width_R1 = (
            part[self.live_R, None] for part in (self.schedule.start_B, self.schedule.width_B)
        )
        place_Q = np.arange(width_R1[~self.done_B[self.live_R]].max())
        slot_RQ = start_R1 + np.minimum(place_Q, width_R1 - 1)
        return slot_RQ.clip(max=self.schedule.length_B[self.live_R, None] - 1), place_Q < width_R1

    def _forward(self, at_RQ: np.ndarray) -> Tensor:
        """Hidden states (R, Q, D) of the blocks, whose tokens lie at the given places of the sequences."""
        whole, answers = slice(None), slice(self.prefix_len, None)
        if self.cache_kind == "none":
            return self._of_block(self._pass("all", None, whole), at_RQ)
        if self.kv_cache is None:
            self.kv_cache = PlacedCache(self.x_RLD.shape[1])
            return self._of_block(self._pass("all", None, whole), at_RQ)
        again = answers if self.model.layout.isolate_prefix else whole
        if self.cache_kind == "exact":
            return self._of_block(self._pass("answers", None, again), at_RQ)
        every_R = np.array([self.asked[row].options.refresh_every for row in self.live_R.tolist()])
        refresh_R = self.schedule.step_B[self.live_R] % every_R == 0
        hidden_RQD = self.x_RLD.new_zeros(*at_RQ.shape, self.x_RLD.shape[2])
        for name, chosen_R in (("refresh", refresh_R), ("block", ~refresh_R)):
            if not chosen_R.any():
                continue
            rows = upload(torch.from_numpy(np.flatnonzero(chosen_R)), self.model.device)
            at = at_RQ[chosen_R]
            if name == "refresh":
                found = self._of_block(self._pass(name, rows, again), at)
            else:
                found = self._pass(name, rows, upload(torch.from_numpy(at), self.model.device))
            hidden_RQD[rows] = found
        return hidden_RQD

    def _pass(self, name: str, rows: Tensor | None, places: slice | Tensor) -> Tensor:
        """Hidden states of some tokens of some rows; of a slice, those from the first answer on."""
        if rows is not None and len(rows) == len(self.live_R):
            rows = None
        every = slice(None) if rows is None else rows
        at = (every, places)
        if isinstance(places, Tensor):
            numbers = torch.arange(len(self.live_R), device=places.device) if rows is None else rows
            at = (numbers[:, None], places)
        mask = self._mask(name, every, at)
        wanted = slice(None)
        if isinstance(places, slice):
            wanted = slice(self.prefix_len - (places.start or 0), None)
        if self.kv_cache is not None:
            self.kv_cache.rows, self.kv_cache.places = rows, places
        model = self.model.language_model
        return model(self.x_RLD[at], self.position_RL[at], mask, wanted, self.kv_cache)

    def _mask(self, name: str, every: slice | Tensor, at: tuple) -> AttentionMask:
        """The mask of a pass; the last one of its name again, if it is of the same tokens."""
        numbers = self.live_R if isinstance(every, slice) else self.live_R[every.cpu().numpy()]
        places = at[1].cpu().numpy().tobytes() if isinstance(at[1], Tensor) else str(at[1])
        mask_of = (numbers.tobytes(), places)
        if name not in self.masks or self.masks[name][0] != mask_of:
            mask = self.model.attention_mask(self.roles.at(at), self.roles.at(every), "sdpa")
            self.masks[name] = mask_of, mask
        return self.masks[name][1]

    def _of_block(self, hidden_RCD: Tensor, at_RQ: np.ndarray) -> Tensor:
        """Of the hidden states from the first answer on, those of the block."""
        index = upload(torch.from_numpy(at_RQ - self.prefix_len), hidden_RCD.device)
        return hidden_RCD.gather(1, index[..., None].expand(-1, -1, hidden_RCD.shape[2]))

    def _predict(self, hidden_RQD: Tensor, open_RQ: np.ndarray, slot_RQ: np.ndarray) -> tuple[Tensor, Tensor]:
        """A token for each open slot, and its doubt; 0 and infinity elsewhere. On the CPU."""
        hidden_KD = hidden_RQD[upload(torch.from_numpy(open_RQ), hidden_RQD.device)]
        with fetched(self.model.lm_head) as weight_VD:
            if self.draws:
                chances = [each.to(hidden_KD.device) for each in self._chances(open_RQ, slot_RQ)]
                token_K, doubt_K = head.drawn(hidden_KD, weight_VD, self.never_X, *chances)
            else:
                token_K, doubt_K = head.likeliest(hidden_KD, weight_VD, self.never_X)
        token_K, doubt_K = token_K.cpu(), doubt_K.cpu()
        self._refuse_broken(doubt_K)
        predicted_RQ = torch.zeros(open_RQ.shape, dtype=torch.int64)
        doubt_RQ = torch.full(open_RQ.shape, math.inf, dtype=doubt_K.dtype)
        where = torch.from_numpy(open_RQ)
        predicted_RQ[where], doubt_RQ[where] = token_K, doubt_K
        return predicted_RQ, doubt_RQ

    def _chances(self, open_RQ: np.ndarray, slot_RQ: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Temperature, top-p and a random number for each open slot, the same in every batch."""
        parts = []
        for row, opens, slots in zip(self.live_R.tolist(), open_RQ, slot_RQ, strict=True):
            options = self.asked[row].options
            generator = head.generator_of(options.seed, int(self.forwards_B[row]))
            uniform_S = torch.rand(options.max_new_tokens, generator=generator, dtype=torch.float64)
            uniform_k = uniform_S[torch.from_numpy(slots[opens])]
            parts.append(
                (
                    torch.full_like(uniform_k, options.temperature or 1.0),
                    torch.full_like(uniform_k, options.top_p),
                    uniform_k,
                )
            )
        temperature, top_p, uniform = (torch.cat(each) for each in zip(*parts, strict=True))
        return temperature, top_p, uniform

    def _select(
        self, open_RQ: np.ndarray, predicted_RQ: Tensor, doubt_RQ: Tensor, left_R: np.ndarray
    ) -> np.ndarray:
        """Bool (R, Q), the predictions that stay."""
        live, width = torch.from_numpy(self.live_R), open_RQ.shape[1]
        given = self.rows
        rows = given._replace(
            slot_BNS=given.slot_BNS[live, :, :width],
            remask_B=given.remask_B[live],
            leftmost_B=given.leftmost_B[live],
            left_BT=torch.from_numpy(left_R)[:, None],
            turn_B=given.turn_B[live],
            least_B=torch.from_numpy(self.schedule.least_B()[self.live_R]),
            doubt_BS=given.doubt_BS[live, :width],
            ranked_doubt_BS=given.ranked_doubt_BS[live, :width],
        )
        _, still_open = select(
            rows,
            torch.zeros_like(live),
            predicted_RQ[:, None],
            torch.from_numpy(open_RQ)[:, None],
            predicted_RQ[:, None],
            doubt_RQ[:, None],
        )
        return open_RQ & ~still_open[:, 0].numpy()

    def _write(
        self, kept_RQ: np.ndarray, slot_RQ: np.ndarray, predicted_RQ: Tensor, doubt_RQ: Tensor
    ) -> None:
        """Take in the predictions that stay."""
        row_K, place_K = np.nonzero(kept_RQ)
        at = (self.live_R[row_K], slot_RQ[row_K, place_K])
        self.tokens_BS[at] = predicted_RQ.numpy()[row_K, place_K]
        self.confidence_BS[at] = head.confidence_of(doubt_RQ).numpy()[row_K, place_K]
        self.open_BS[at] = False
        device = self.model.device
        ids_K, *places = (
            upload(torch.from_numpy(part), device)
            for part in (self.tokens_BS[at], row_K, self.first_B[at[0]] + at[1])
        )
        self.x_RLD[places[0], places[1]] = self.model.get_input_embeddings()(ids_K)

    def _finish(self, row: int) -> None:
        """Look for a stop string, and for the end of the answer."""
        tokens_S, open_S = self.tokens_BS[row], self.open_BS[row]
        end = int(self.ends_B[row])
        for stop in self.asked[row].stops:
            end = min(end, _find(tokens_S[: self.schedule.length_B[row]], stop, end))
        self.ends_B[row] = end
        waiting_K = np.flatnonzero(open_S[:end])
        self.done_B[row] = not len(waiting_K)
        if self.asked[row].options.early_exit and len(waiting_K):
            settled_S = tokens_S[: waiting_K[0]]
            self.done_B[row] = bool((settled_S == self.model.config.eot_token_id).any())

    def _drop(self, active_R: np.ndarray) -> None:
        """Work on from here with the active rows alone."""
        keep = upload(torch.from_numpy(np.flatnonzero(active_R)), self.model.device)
        self.live_R = self.live_R[active_R]
        self.x_RLD, self.position_RL = self.x_RLD[keep], self.position_RL[keep]
        self.roles = self.roles.at(keep)
        if self.kv_cache is not None:
            self.kv_cache.keep(keep)

    def _refuse_broken(self, doubt_K: Tensor) -> None:
        config = self.model.config
        others = config.text.vocab_size - (0 if self.never_X is None else len(self.never_X)) - 1
        alike = (
            others > 0
            and len(doubt_K)
            and bool(torch.isclose(doubt_K, doubt_K.new_tensor(others), rtol=1e-7).all())
        )
        if alike or bool(doubt_K.isnan().any()):
            raise broken_weights(self.model)


def _rows(options: Sequence[AnswerOptions], dtype: torch.dtype) -> RowOptions:
    """How each row's block is selected from, but for what a step may leave open."""
    each_block = [
        DecodeOptions(
            strategy=_SELECTS_AS[each.strategy],
            max_new_tokens=min(each.block_length, each.max_new_tokens),
            threshold=each.threshold,
            factor=each.factor,
            early_exit=False,
        )
        for each in options
    ]
    shape = (len(options), 1, max(block.max_new_tokens for block in each_block))
    return row_options(each_block, [1] * len(options), shape, dtype)


def _find(tokens_S: np.ndarray, run: Sequence[int], default: int) -> int:
    """The place where a run of tokens begins first."""
    if len(run) > len(tokens_S):
        return default
    windows = np.lib.stride_tricks.sliding_window_view(tokens_S, len(run))
    found = np.flatnonzero((windows == np.array(run)).all(1))
    return int(found[0]) if len(found) else default
