"""The loop over the steps of a bucket, as the host knows it. Its rows hold one sequence after the other.

On a GPU, the host launches a step and then reads how many slots the step before left open, so that the GPU
never waits for the host. A row that is finished does nothing in the step that was launched too many.

Shape suffixes: R rows of a bucket, A sequences that are admitted, N regions of a row, S slots of a region, P
tokens of the prefix, D width, M numbers of a row's status.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...schemas.decoding import DecodeOptions
from ...schemas.errors import StageFailed
from ..model.batch import Tokens
from ..model.perceptiondlm import PerceptionDLM
from ..model.placement import upload
from .head import broken, generator_of
from .readback import Readback, Sent, read_state
from .refresh import Refresh
from .rows import LaidOut, Rows
from .skipping import Skipping


class Loop:
    """The rows of a bucket while they are decoded, as the host knows them; each holds a sequence at a time.

    Attributes:
        options: of each row; None where no sequence was admitted.
        open_RN: regions with an open slot, as of the last step that was read.
        forwards_R: forward passes of each row's sequence.
        lag: how many steps may be launched before one is read.
    """

    def __init__(self, rows: Rows):
        bucket, on_cpu = rows.bucket, rows.model.device.type == "cpu"
        self.rows = rows
        self.skipping = Skipping(rows) if on_cpu else None
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
            if (active_R & broken(status_BM[:, -2], status_BM[:, -1], self.rows.num_others)).any():
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
