"""The sampler of answers: long rows of slots that are decided block by block.

An answer's slots follow its question in a sequence. A step predicts the open slots of each row's current
block, and `selection.select` decides which predictions stay. What stays is never opened again, so an answer
that has ended, or whose stop string is found, needs no further step. Every row has options of its own, and
depends on no other row.

The tensors lie in `BlockRows`. Here the host launches steps, and reads one copy of each: the next step is
launched first, except on a CPU, and except with an approximate cache, where what it computes depends on the
step before. A row that is finished does nothing in the step that was launched too many.

Shape suffixes: B rows, R rows that are still in work, S slots of an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...schemas.answering import AnswerOptions
from ..model.perceptiondlm import PerceptionDLM
from ..model.placement import check_placement, upload
from . import head
from .block_rows import Asked, BlockRows
from .buckets import resolve_cache
from .loop import broken_weights
from .readback import Readback


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


class _Answering:
    """A batch of answers while it is decoded, as the host knows it.

    Attributes:
        live_R: the rows of the batch that are still in work, and those that finished not long ago.
        lag: how many steps may be launched before one is read.
        step_R: the step of its block that each live row is in; where `lag` is 0 it is known.
    """

    def __init__(self, model: PerceptionDLM, asked: Sequence[Asked]):
        check_placement(model)
        cache, never, draws = kind_of(model, asked[0])
        self.options = [each.options for each in asked]
        self.rows = BlockRows(model, asked, cache, never, draws)
        self.live_R = np.arange(len(asked))
        # Which rows fill an approximate cache again follows from how many steps their blocks took.
        self.lag = 0 if model.device.type == "cpu" or cache == "approximate" else 1
        self.num_steps = 0
        self.forwards_B = np.zeros(len(asked), np.int64)
        length_B = np.array([each.max_new_tokens for each in self.options])
        shape = (len(asked), self.rows.num_slots)
        self.found = AnswerState(
            self.forwards_B,
            np.full(shape, model.config.mask_token_id),
            np.arange(shape[1]) < length_B[:, None],
            np.full(shape, np.nan),
            length_B,
            np.zeros(len(asked), bool),
        )
        self._listen()

    def _listen(self) -> None:
        self.readback = Readback(self.rows.status_RM, 1 + self.lag)
        self.step_R = np.zeros(len(self.live_R), np.int64)

    def state(self) -> AnswerState:
        """A copy."""
        return AnswerState(*(part.copy() for part in self.found))

    def step(self) -> bool:
        """Launch a step and take one in, in every row that is not finished; whether there was one."""
        while not self.found.done_B.all():
            on_their_way = self.readback.sent - self.readback.received
            active_R = ~self.found.done_B[self.live_R]
            shrinks = 2 * active_R.sum() <= len(active_R)
            if shrinks and not on_their_way:
                self._drop(active_R)
            if not shrinks or not on_their_way:
                self._launch()
                on_their_way += 1
            if shrinks or on_their_way > self.lag:
                self._read()
                return True
        return False

    def _launch(self) -> None:
        """Begin the next step."""
        refresh_R = self._refreshed() if self.rows.cache == "approximate" else None
        self.rows.step(refresh_R, self._uniform() if self.rows.draws else None)
        self.readback.send()
        self.num_steps += 1

    def _refreshed(self) -> np.ndarray:
        """The rows that fill their cache again; finished ones go where they cost least."""
        every_R = np.array([self.options[row].refresh_every for row in self.live_R.tolist()])
        refresh_R, done_R = self.step_R % every_R == 0, self.found.done_B[self.live_R]
        refresh_R[done_R] = refresh_R[~done_R].all()
        return refresh_R

    def _uniform(self) -> Tensor:
        """A random number for every slot, the same in every batch."""
        uniform_RS = torch.zeros(len(self.live_R), self.rows.num_slots, dtype=torch.float64)
        for row, number in enumerate(self.live_R.tolist()):
            length, seed = self.options[number].max_new_tokens, self.options[number].seed
            generator = head.generator_of(seed, self.num_steps)
            uniform_RS[row, :length] = torch.rand(length, generator=generator, dtype=torch.float64)
        return uniform_RS

    def _read(self) -> None:
        """Take in the oldest step that was launched.

        Raises:
            StageFailed: a prediction was none.
        """
        status, active_R = self.rows.read_status(self.readback.receive()), ~self.found.done_B[self.live_R]
        others = head.num_others(self.rows.model, self.rows.never_X)
        if (active_R & head.broken(status.low_R, status.high_R, others)).any():
            raise broken_weights(self.rows.model)
        self.forwards_B[self.live_R] += active_R
        for mine_B, new_R in zip(self.found[1:], status[:5], strict=True):
            mine_B[self.live_R] = new_R
        self.step_R = status.step_R

    def _drop(self, active_R: np.ndarray) -> None:
        """Work on from here with the active rows alone."""
        step_R = self.step_R[active_R]
        self.rows.keep(upload(torch.from_numpy(np.flatnonzero(active_R)), self.rows.model.device))
        self.live_R = self.live_R[active_R]
        self._listen()
        self.step_R = step_R
