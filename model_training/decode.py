"""The decoder: fills every caption slot of a batch, a few tokens of every region in each step.

A step is four things: which slots matter now (`needed`), their hidden states (`Forward`: vision, prompt and mask
are computed once, the prefix's keys and values are kept where that is asked for), the most likely token of each
and how sure the model is of it (`predict`), and what is kept (`select`). `predict` and `select` are pure.

Legend: B rows, L positions of a row, S caption slots of a row, N regions, P pools, X slots that matter now,
O and Q as in `model`, D model width, V vocabulary. A pool is the set of slots that share a budget: those of one
region, or, for `remask`, those of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from model_training.batch import Batch
from model_training.model import Cache, PerceptionDLM, take
from schemas.errors import ConfigError

STRATEGIES = ("remask", "per_region", "threshold", "sequential", "left_to_right")
CACHES = ("none", "exact", "approximate")
VOCABULARY_CHUNK = 4096
"""Logits of 192 slots and so many words are 3 MB: they stay in the processor's cache between passes."""
MAX_LOGITS = 1 << 28
"""Of a sampled step at once: 1 GB in float32."""


@dataclass(frozen=True)
class Decoding:
    """How to decode.

    Attributes:
        strategy: `remask`: each step writes all open slots, then opens the least sure ones of the whole sequence
            again, written long ago or just now; their number falls linearly (the original's). `per_region`: the
            same with a budget for each region. `threshold`: keeps what is surer than `threshold`, at least one
            token per region and step. `sequential`: `per_region`, one region after another. `left_to_right`:
            keeps the leftmost open slots of every region.
        steps: of the linear schedule, per sequence, or per region for `sequential`; `threshold` needs none.
        temperature: 0 takes the most likely token; else samples.
        top_p: samples among the likeliest tokens that hold this share.
        threshold: of the probability, for `threshold`.
        early_exit: a region ends when an end of text and everything before it are written.
        cache: `none` computes whole rows in every step. `exact` keeps the prefix's keys and values and needs a
            model with `isolate_prefix`. `approximate` keeps them for `refresh_every` steps in any model.
            None: `exact` where the model allows it, else `none`.
        refresh_every: full passes of `approximate` are so many steps apart.
        seed: of sampling. A region's draws depend on the seed and its number in its image, not on the batch.
        suppress: tokens never to write. The mask token is always among them, except for `remask`: the original
            may write it.
    """

    strategy: str = "remask"
    steps: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    threshold: float = 0.9
    early_exit: bool = False
    cache: str | None = None
    refresh_every: int = 8
    seed: int = 0
    suppress: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"strategy: {self.strategy!r} is none of {', '.join(STRATEGIES)}")
        if self.cache is not None and self.cache not in CACHES:
            raise ConfigError(f"cache: {self.cache!r} is none of {', '.join(CACHES)}")
        for name in ("steps", "refresh_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not at least 1")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature: {self.temperature} is not 0 or more")
        for name in ("top_p", "threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not above 0 and at most 1")


@dataclass(frozen=True)
class Slots:
    """What of the caption slots stays as it is while they are filled.

    Attributes:
        position_BS: within the row; 0 for padding.
        region_BS, pool_BS: which of the N regions, P pools; N, P for padding.
        sequence_of_P: which sequence a pool belongs to.
        budget_PT: how many slots of a pool stay open after each of its T steps; -1: it is not in the schedule.
        steps_P: steps that a pool takes until nothing of it stays open.
    """

    position_BS: Tensor
    region_BS: Tensor
    pool_BS: Tensor
    sequence_of_P: Tensor
    budget_PT: Tensor
    steps_P: Tensor
    num_regions: int

    @property
    def valid_BS(self) -> Tensor:
        return self.region_BS < self.num_regions


@dataclass(frozen=True)
class State:
    """The slots between two steps.

    Attributes:
        ids_BS: what is written; the mask token where a slot is open.
        frozen_BS: of regions that ended early, and padding: written for good.
        age_P: steps that each pool has taken.
    """

    ids_BS: Tensor
    frozen_BS: Tensor
    age_P: Tensor


@dataclass(frozen=True)
class Step:
    """One step, for whoever watches. All BS; slots that this step did not need have confidence NaN.

    Attributes:
        number: from 1.
        before_BS, after_BS: token ids, the mask token where open.
        predicted_BS: the token that the model holds most likely, or drew.
        confidence_BS: its probability.
        state: for the next step.
    """

    number: int
    before_BS: Tensor
    predicted_BS: Tensor
    confidence_BS: Tensor
    after_BS: Tensor
    state: State


@dataclass(frozen=True)
class Decoded:
    """What a decode wrote, and what it took.

    Attributes:
        ids_BS: token ids in the slots.
        tokens: those of each of the batch's N regions, whole slots, end of text and what follows included.
        forwards: passes of the language model.
        tokens_per_forward: slots written over the passes that their sequence took part in.
        stale_agreement: `approximate` alone: over all refreshes, the share of open slots where the kept keys and
            values led to the same token as fresh ones, in the same state. None: nothing was refreshed.
    """

    ids_BS: Tensor
    tokens: list[list[int]]
    forwards: int
    tokens_per_forward: float
    stale_agreement: float | None = None


def decode(model: PerceptionDLM, batch: Batch, how: Decoding = Decoding()) -> Decoded:
    """Fill all slots of a batch. Sequences do not influence each other: batched is the same as one by one."""
    forward = Forward(model, batch, how)
    state, passes = None, 0
    for step in steps(model, batch, how, forward):
        state = step.state
        passes = step.number
    slots = arrange(batch, how)
    ids_BS = start(batch, slots).ids_BS if state is None else state.ids_BS
    at = slots.valid_BS.nonzero(as_tuple=True)
    by_region: list[list[int]] = [[] for _ in range(slots.num_regions)]
    for region, token in zip(slots.region_BS[at].tolist(), ids_BS[at].tolist(), strict=True):
        by_region[region].append(token)
    agreed, compared = forward.agreed.tolist()
    return Decoded(
        ids_BS,
        by_region,
        passes,
        sum(map(len, by_region)) / max(forward.sequence_passes, 1),
        agreed / compared if compared else None,
    )


@torch.inference_mode()
def steps(
    model: PerceptionDLM, batch: Batch, how: Decoding = Decoding(), forward: Forward | None = None
) -> Iterator[Step]:
    """The loop. Yields after each step; the batch is left as it was."""
    config = model.config
    forward = forward or Forward(model, batch, how)
    slots = arrange(batch, how)
    state = start(batch, slots)
    suppress = sorted({*how.suppress} | ({config.mask_token_id} if how.strategy != "remask" else set()))
    uniform_NTS = _uniform(batch, slots, how) if how.temperature > 0 else None
    number = 0
    while (needed_BS := needed(state, slots, how, config.mask_token_id)).any():
        number += 1
        at = needed_BS.nonzero(as_tuple=True)
        uniform_X = None
        if uniform_NTS is not None:
            uniform_X = uniform_NTS[slots.region_BS[at], number - 1, _place(slots)[at]]
        if forward.refreshes:
            stale_X, _ = _predict(model, forward.partial(state.ids_BS, needed_BS), how, suppress, None)
            token_X, surety_X = _predict(
                model, forward(state.ids_BS, needed_BS), how, suppress, uniform_X
            )
            open_X = state.ids_BS[at] == config.mask_token_id
            forward.agreed += torch.stack((((stale_X == token_X) & open_X).sum(), open_X.sum())).cpu()
        else:
            hidden_XD = forward(state.ids_BS, needed_BS)
            token_X, surety_X = _predict(model, hidden_XD, how, suppress, uniform_X)
        token_BS = torch.zeros_like(state.ids_BS).index_put_(at, token_X)
        surety_BS = surety_X.new_full(needed_BS.shape, torch.nan).index_put_(at, surety_X)
        after = select(token_BS, surety_BS, state, slots, how, config.mask_token_id, config.eot_token_id)
        yield Step(number, state.ids_BS, token_BS, surety_BS.exp(), after.ids_BS, after)
        state = after


def arrange(batch: Batch, how: Decoding) -> Slots:
    """The slots of a batch, their pools, and how the schedule empties these."""
    device, num_regions = batch.slots_BS.device, len(batch.origins)
    sequence_of_N = _sequences(batch).to(device)
    valid_BS = batch.slot_regions_BS >= 0
    region_BS = torch.where(valid_BS, batch.slot_regions_BS, num_regions)
    sequence_of_P, pool_BS = sequence_of_N, region_BS
    if how.strategy == "remask":
        sequence_of_P = torch.arange(len(batch.regions), device=device)
        pool_BS = torch.cat((sequence_of_N, sequence_of_N.new_tensor([len(batch.regions)])))[region_BS]
    sizes_P = pool_BS.flatten().bincount(minlength=len(sequence_of_P) + 1)[: len(sequence_of_P)].tolist()
    # The product in double precision and cut, as the original does it: it differs from the exact floor here and
    # there, e.g. at 90 slots, 10 steps, step 2.
    budgets = [[int(n * ((how.steps - 1 - s) / how.steps)) for s in range(how.steps)] for n in sizes_P]
    taken = [next(s for s in range(how.steps) if row[s] == 0) + 1 for row in budgets]
    if how.strategy == "threshold":
        taken = sizes_P
    return Slots(
        position_BS=batch.slots_BS.clamp_min(0),
        region_BS=region_BS,
        pool_BS=pool_BS,
        sequence_of_P=sequence_of_P,
        budget_PT=torch.tensor(budgets, dtype=torch.long, device=device).view(-1, how.steps),
        steps_P=torch.tensor(taken, dtype=torch.long, device=device),
        num_regions=num_regions,
    )


def _sequences(batch: Batch) -> Tensor:
    """Which sequence each answer belongs to, N. One without regions has one answer."""
    answers = torch.tensor([max(n, 1) for n in batch.regions])
    return torch.arange(len(answers)).repeat_interleave(answers)


def start(batch: Batch, slots: Slots) -> State:
    """The state before the first step: slots as the batch has them."""
    return State(
        ids_BS=batch.input_ids_BL.gather(1, slots.position_BS),
        frozen_BS=~slots.valid_BS,
        age_P=torch.zeros_like(slots.steps_P),
    )


def running(state: State, slots: Slots, how: Decoding, mask_id: int) -> Tensor:
    """Which pools take part in the next step, P+1 bool (the last one is the padding's). Pure."""
    num_pools = len(slots.steps_P)
    unfinished_BS = ~state.frozen_BS
    if how.strategy == "threshold":
        unfinished_BS = unfinished_BS & (state.ids_BS == mask_id)
    running_P = _any(unfinished_BS, slots.pool_BS, num_pools + 1)
    running_P[:-1] &= state.age_P < slots.steps_P
    running_P[-1] = False
    if how.strategy == "sequential":
        # Pools of a sequence are neighbours; the first one that is not done is the one.
        before_P = running_P[:-1].long().cumsum(0) - running_P[:-1].long()
        first_P = torch.full_like(before_P, num_pools).scatter_reduce(
            0, slots.sequence_of_P, before_P.masked_fill(~running_P[:-1], num_pools), "amin"
        )
        running_P[:-1] &= before_P == first_P[slots.sequence_of_P]
    return running_P


def needed(state: State, slots: Slots, how: Decoding, mask_id: int) -> Tensor:
    """Which slots the next step has to predict, BS. Pure.

    Remasking compares all slots, written or open, by what the model thinks of them now. The other strategies
    need open slots alone, and left to right only those that it is going to keep.
    """
    needed_BS = running(state, slots, how, mask_id)[slots.pool_BS] & ~state.frozen_BS
    if how.strategy == "threshold":
        return needed_BS & (state.ids_BS == mask_id)
    if how.strategy == "left_to_right":
        return needed_BS & (state.ids_BS == mask_id) & ~_reopened(None, state, slots, how)
    return needed_BS


def select(
    token_BS: Tensor,
    surety_BS: Tensor,
    state: State,
    slots: Slots,
    how: Decoding,
    mask_id: int,
    eot_id: int,
) -> State:
    """What a step makes of the predictions. Pure; no loop over rows, regions or slots.

    Args:
        token_BS, surety_BS: predicted token and its log probability, of the needed slots.
        state: before the step.
        slots, how: what stays the same.
        mask_id, eot_id: of an open slot; of the end of a caption.

    Returns:
        The state after the step.
    """
    running_P = running(state, slots, how, mask_id)
    runs_BS = running_P[slots.pool_BS] & ~state.frozen_BS
    open_BS = (state.ids_BS == mask_id) & runs_BS
    if how.strategy == "threshold":
        sure_BS = surety_BS.exp() > how.threshold
        best_BS = _rank(torch.where(open_BS, -surety_BS, torch.inf), slots.pool_BS) == 0
        reopened_BS = open_BS & ~(sure_BS | best_BS)
    else:
        reopened_BS = runs_BS & _reopened(surety_BS, state, slots, how)
    ids_BS = torch.where(open_BS, token_BS, state.ids_BS).masked_fill(reopened_BS, mask_id)
    age_P = state.age_P + running_P[:-1]
    if not how.early_exit:
        return State(ids_BS, state.frozen_BS, age_P)
    ended_BS, after_BS = _ended(ids_BS, slots, mask_id, eot_id)
    ended_BS = ended_BS & ~state.frozen_BS
    return State(ids_BS.masked_fill(ended_BS & after_BS, eot_id), state.frozen_BS | ended_BS, age_P)


def predict(
    logits_XV: Tensor, suppress: list[int], temperature: float, top_p: float, uniform_X: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A token for each slot and its log probability, from logits in float32. Pure but for the logits, which it
    overwrites.

    The probability of the likeliest token is 1 / (1 + r), with r the sum of all others relative to it. r is
    summed on its own and goes through log1p, so that float32 ranks sure slots better than a float64 softmax,
    which calls them all 1.

    Args:
        logits_XV: float32.
        suppress: ids that are not to be written.
        temperature: 0: the likeliest token, the lowest id of equals.
        top_p: see `Decoding`.
        uniform_X: a draw from [0, 1) for each slot, if temperature > 0. The probability is that of the model at
            temperature 1 whatever the draw's temperature.
    """
    logits_XV[:, suppress] = -torch.inf
    peak_X1, best_X1 = logits_XV.max(-1, keepdim=True)
    logits_XV.sub_(peak_X1)
    token_X1 = best_X1
    if temperature > 0:
        assert uniform_X is not None
        token_X1 = _draw(logits_XV, temperature, top_p, uniform_X)
    chosen_X1 = logits_XV.gather(1, token_X1)
    rest_X = logits_XV.scatter_(1, best_X1, -torch.inf).exp_().sum(-1)
    return token_X1[:, 0], chosen_X1[:, 0] - rest_X.log1p()


def predict_likeliest(
    hidden_XD: Tensor, weight_VD: Tensor, suppress: list[int], chunk: int = VOCABULARY_CHUNK
) -> tuple[Tensor, Tensor]:
    """`predict` at temperature 0 of the head's logits, a part of the vocabulary at a time: they never exist as a
    whole, which saves their memory and, on a CPU, most of the time that is not the product's."""
    peaks, tokens, rests = [], [], []
    for first in range(0, len(weight_VD), chunk):
        logits_Xv = linear(hidden_XD, weight_VD[first : first + chunk]).float()
        if barred := [token - first for token in suppress if first <= token < first + chunk]:
            logits_Xv[:, barred] = -torch.inf
        peak_X1, best_X1 = logits_Xv.max(-1, keepdim=True)
        peak_X1 = peak_X1.clamp_min(torch.finfo(torch.float32).min)  # all of the chunk may be suppressed
        rests.append(logits_Xv.sub_(peak_X1).scatter_(1, best_X1, -torch.inf).exp_().sum(-1))
        peaks.append(peak_X1[:, 0])
        tokens.append(best_X1[:, 0] + first)
    peak_Xc, token_Xc, rest_Xc = (torch.stack(x, 1) for x in (peaks, tokens, rests))
    top_X1, best_X1 = peak_Xc.max(-1, keepdim=True)
    share_Xc = (peak_Xc - top_X1).exp()
    rest_X = (share_Xc * rest_Xc).sum(-1) + share_Xc.scatter(1, best_X1, 0.0).sum(-1)
    return token_Xc.gather(1, best_X1)[:, 0], -rest_X.log1p()


class Forward:
    """Hidden states of caption slots, step after step.

    Vision, the prompt's embeddings and the mask are computed once. Rows without needed slots leave the batch;
    with kept keys and values, so do regions.
    """

    def __init__(self, model: PerceptionDLM, batch: Batch, how: Decoding):
        self.model, self.batch = model, batch
        kind = how.cache or ("exact" if model.config.isolate_prefix else "none")
        if kind == "exact" and not model.config.isolate_prefix:
            raise ConfigError(
                "cache: exact needs a model with isolate_prefix; in this one the prompt attends to captions. "
                "Use approximate or none"
            )
        self.every = {"none": 1, "exact": 0, "approximate": how.refresh_every}[kind]
        self.cache = None if kind == "none" else Cache()
        self.compares = kind == "approximate" and how.temperature == 0
        self.passes = self.sequence_passes = 0
        self.agreed = torch.zeros(2, dtype=torch.long)
        self.num_regions = len(batch.origins)
        self._slots = arrange(batch, how)
        self._sequence_of_N = _sequences(batch)
        self._live_B = torch.arange(len(batch.slots_BS), device=batch.slots_BS.device)
        self._x_BLD: Tensor | None = None
        self._wanted: dict[str, tuple[Tensor, _Rows]] = {}

    @property
    def fresh(self) -> bool:
        """Whether the next pass computes whole rows."""
        return self.passes == 0 if self.every == 0 else self.passes % self.every == 0

    @property
    def refreshes(self) -> bool:
        """Whether the next pass replaces kept keys and values that are worth a comparison."""
        return self.compares and self.passes > 0 and self.fresh

    def __call__(self, ids_BS: Tensor, needed_BS: Tensor) -> Tensor:
        """Hidden states XD of the needed slots, in their order, with the slots' tokens as given."""
        hidden_XD = self.whole(ids_BS, needed_BS) if self.fresh else self.partial(ids_BS, needed_BS)
        self.passes += 1
        self.sequence_passes += len(self._sequence_of_N[self._slots.region_BS[needed_BS].cpu()].unique())
        return hidden_XD

    def whole(self, ids_BS: Tensor, needed_BS: Tensor) -> Tensor:
        """Compute all positions; keep their keys and values if any are kept."""
        needed_BS = self._write(ids_BS, needed_BS)
        rows = self._rows("whole", needed_BS)
        hidden_BOD = self.model.language(
            self._x_BLD,
            self._batch.positions_BL,
            rows.mask,
            cache=self.cache,
            out_BO=rows.out_BO,
            out_mask=rows.out_mask,
        )
        return hidden_BOD[needed_BS.nonzero(as_tuple=True)[0], rows.place_BS[needed_BS]]

    def partial(self, ids_BS: Tensor, needed_BS: Tensor) -> Tensor:
        """Compute the captions of the needed slots' regions alone, over kept keys and values."""
        needed_BS = self._write(ids_BS, needed_BS)
        rows = self._rows("partial", needed_BS)
        hidden_BOD = self.model.language(
            take(self._x_BLD, rows.rows_BQ),
            self._batch.positions_BL.gather(1, rows.rows_BQ),
            rows.mask,
            cache=self.cache,
            rows_BQ=rows.rows_BQ,
            out_BO=rows.out_BO,
            out_mask=rows.out_mask,
        )
        return hidden_BOD[needed_BS.nonzero(as_tuple=True)[0], rows.place_BS[needed_BS]]

    def _write(self, ids_BS: Tensor, needed_BS: Tensor) -> Tensor:
        """Put the slots' tokens into the embeddings; drop rows that are done. Returns the needed slots of those
        that are left."""
        if self._x_BLD is None:
            self._x_BLD = self.model.embed(self.batch)
            self._narrow(self._live_B)
        alive_B = needed_BS[self._live_B].any(1)
        if not alive_B.all():
            keep_B = alive_B.nonzero()[:, 0]
            self._live_B = self._live_B[keep_B]
            self._x_BLD = self._x_BLD[keep_B]
            if self.cache is not None:
                self.cache.keys_BLGE = [x[keep_B] for x in self.cache.keys_BLGE]
                self.cache.values_BLGE = [x[keep_B] for x in self.cache.values_BLGE]
            self._narrow(self._live_B)
        ids_X = ids_BS[self._live_B][self._valid_BS]
        self._x_BLD.index_put_(self._at_X, self.model.embed_tokens(ids_X))
        return needed_BS[self._live_B]

    def _narrow(self, live_B: Tensor) -> None:
        """Keep what belongs to some rows."""
        batch = self.batch
        self._wanted = {}
        self._batch = replace(
            batch,
            input_ids_BL=batch.input_ids_BL[live_B],
            region_ids_BL=batch.region_ids_BL[live_B],
            documents_BL=batch.documents_BL[live_B],
            positions_BL=batch.positions_BL[live_B],
        )
        self._position_BS = self._slots.position_BS[live_B]
        self._region_BS = self._slots.region_BS[live_B]
        self._valid_BS = self._slots.valid_BS[live_B]
        row_X, slot_X = self._valid_BS.nonzero(as_tuple=True)
        self._at_X = row_X, self._position_BS[row_X, slot_X]
        self._region_of_BL = _regions_of(self._batch, self._position_BS, self._region_BS, self.num_regions)

    def _rows(self, kind: str, needed_BS: Tensor) -> _Rows:
        """What to compute; worked out anew only when the set of regions changes."""
        wanted_N = _any(needed_BS, self._region_BS, self.num_regions + 1)
        if kind in self._wanted and torch.equal(self._wanted[kind][0], wanted_N):
            return self._wanted[kind][1]
        model, batch = self.model, self._batch
        wanted_BS = wanted_N[self._region_BS]
        slot_BO = _listed(wanted_BS)
        position_BO = self._position_BS.gather(1, slot_BO)
        if kind == "whole":
            rows_BQ, out_BO = None, position_BO
        else:
            wanted_BL = wanted_N[self._region_of_BL]
            rows_BQ = _listed(wanted_BL)
            out_BO = (wanted_BL.long().cumsum(1) - 1).gather(1, position_BO)
        rows = _Rows(
            rows_BQ=rows_BQ,
            mask=model.mask(batch, rows_BQ),
            out_BO=out_BO,
            out_mask=model.mask(batch, position_BO),
            place_BS=wanted_BS.long().cumsum(1) - 1,
        )
        self._wanted[kind] = wanted_N, rows
        return rows


@dataclass(frozen=True)
class _Rows:
    """Positions that a pass computes, which of them are wanted, and where a slot finds its result."""

    rows_BQ: Tensor | None
    mask: object
    out_BO: Tensor
    out_mask: object
    place_BS: Tensor


def _predict(
    model: PerceptionDLM, hidden_XD: Tensor, how: Decoding, suppress: list[int], uniform_X: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The head and `predict`, in parts that bound the memory."""
    if uniform_X is None:
        return predict_likeliest(hidden_XD, model.lm_head.weight, suppress)
    at_once = max(1, MAX_LOGITS // model.lm_head.out_features)
    parts = [
        predict(model.head(h_XD), suppress, how.temperature, how.top_p, u_X)
        for h_XD, u_X in zip(hidden_XD.split(at_once), uniform_X.split(at_once), strict=True)
    ]
    return torch.cat([token for token, _ in parts]), torch.cat([surety for _, surety in parts])


def _draw(logits_XV: Tensor, temperature: float, top_p: float, uniform_X: Tensor) -> Tensor:
    """Sample by inversion, X1: one draw per slot, whatever else is in the batch."""
    ordered_XV, id_XV = (logits_XV / temperature).sort(dim=-1, descending=True, stable=True)
    share_XV = ordered_XV.softmax(-1)
    below_XV = share_XV.cumsum(-1)
    # The token that crosses top_p still belongs; at least one does.
    share_XV = share_XV.masked_fill(below_XV - share_XV >= top_p, 0.0)
    below_XV = share_XV.cumsum(-1)
    aim_X1 = uniform_X[:, None].to(below_XV.dtype) * below_XV[:, -1:]
    last_X1 = (share_XV > 0).sum(-1, keepdim=True) - 1
    return id_XV.gather(1, torch.searchsorted(below_XV, aim_X1, right=True).minimum(last_X1))


def _uniform(batch: Batch, slots: Slots, how: Decoding) -> Tensor:
    """Draws for sampling, NTS: of each region, step and place in the caption."""
    per_region = torch.bincount(slots.region_BS.flatten(), minlength=slots.num_regions)[: slots.num_regions]
    length = int(per_region.max()) if slots.num_regions else 0
    num_steps = length if how.strategy == "threshold" else how.steps
    if how.strategy == "sequential":
        num_steps *= max(1, *batch.regions)
    tables = []
    for _, mask in batch.origins:
        generator = torch.Generator().manual_seed((how.seed * 1_000_003 + mask) % (1 << 63))
        # Place by place, so that the table of a longer decode begins with that of a shorter one.
        tables.append(torch.rand(num_steps, length, generator=generator))
    return torch.stack(tables).to(slots.region_BS.device)


def _place(slots: Slots) -> Tensor:
    """A slot's place within its caption, BS."""
    return _rank(torch.zeros_like(slots.region_BS), slots.region_BS)


def _reopened(surety_BS: Tensor | None, state: State, slots: Slots, how: Decoding) -> Tensor:
    """Slots within their pool's budget of open ones: the least sure, or the rightmost. BS."""
    age_P = state.age_P.minimum(slots.steps_P - 1).clamp_min(0)
    budget_P = slots.budget_PT.gather(1, age_P[:, None])[:, 0]
    budget_BS = torch.cat((budget_P, budget_P.new_zeros(1)))[slots.pool_BS]
    if how.strategy == "left_to_right":
        value_BS = -torch.arange(slots.pool_BS.shape[1], device=budget_BS.device).expand_as(slots.pool_BS)
    else:
        assert surety_BS is not None
        value_BS = surety_BS.masked_fill(state.frozen_BS, torch.inf)
    return (_rank(value_BS, slots.pool_BS) < budget_BS) & ~state.frozen_BS


def _ended(ids_BS: Tensor, slots: Slots, mask_id: int, eot_id: int) -> tuple[Tensor, Tensor]:
    """(slots of regions whose text has ended, slots after the end of their region's text), both BS."""
    starts_BS = _rank(torch.zeros_like(slots.region_BS), slots.region_BS) == 0
    open_before_BS = _since(ids_BS == mask_id, starts_BS)
    end_BS = (ids_BS == eot_id) & (open_before_BS == 0) & slots.valid_BS
    ended_N = _any(end_BS, slots.region_BS, slots.num_regions + 1)
    return ended_N[slots.region_BS], _since(end_BS, starts_BS) > 0


def _since(counted_BS: Tensor, starts_BS: Tensor) -> Tensor:
    """How many are counted from the start of each slot's region up to the slot."""
    total_BS = counted_BS.long().cumsum(1)
    before_BS = torch.where(starts_BS, total_BS - counted_BS.long(), 0)
    return total_BS - before_BS.cummax(1).values


def _rank(value_BS: Tensor, pool_BS: Tensor) -> Tensor:
    """Each slot's rank within its pool, lowest value first, slots in order where values are equal. BS."""
    by_value_BS = value_BS.argsort(dim=1, stable=True)
    by_pool_BS = pool_BS.gather(1, by_value_BS).argsort(dim=1, stable=True)
    order_BS = by_value_BS.gather(1, by_pool_BS)
    sorted_BS = pool_BS.gather(1, order_BS)
    at_BS = torch.arange(pool_BS.shape[1], device=pool_BS.device).expand_as(pool_BS)
    begins_BS = torch.ones_like(sorted_BS, dtype=torch.bool)
    begins_BS[:, 1:] = sorted_BS[:, 1:] != sorted_BS[:, :-1]
    rank_BS = at_BS - torch.where(begins_BS, at_BS, 0).cummax(1).values
    return torch.empty_like(rank_BS).scatter_(1, order_BS, rank_BS)


def _any(chosen_BS: Tensor, group_BS: Tensor, num_groups: int) -> Tensor:
    """Which groups have a chosen slot."""
    counts = torch.zeros(num_groups, dtype=torch.long, device=chosen_BS.device)
    return counts.scatter_add_(0, group_BS.flatten(), chosen_BS.long().flatten()) > 0


def _listed(chosen_BL: Tensor) -> Tensor:
    """Indices of the chosen ones of each row, in order; a row with fewer repeats its first. BO."""
    count_B1 = chosen_BL.sum(1, keepdim=True)
    order_BL = (~chosen_BL).long().argsort(dim=1, stable=True)[:, : int(count_B1.max())]
    within = torch.arange(order_BL.shape[1], device=order_BL.device) < count_B1
    return torch.where(within, order_BL, order_BL[:, :1])


def _regions_of(batch: Batch, position_BS: Tensor, region_BS: Tensor, num_regions: int) -> Tensor:
    """Which of the N regions each position's caption block belongs to; N: none. BL."""
    captions_BL = batch.region_ids_BL.clamp_min(0)
    per_document = int(captions_BL.max()) + 1
    code_BL = batch.documents_BL.clamp_min(0) * per_document + captions_BL
    table = region_BS.new_full((len(code_BL), int(code_BL.max()) + 1), num_regions)
    table.scatter_reduce_(1, code_BL.gather(1, position_BS), region_BS, "amin")
    return table.gather(1, code_BL).masked_fill(batch.region_ids_BL <= 0, num_regions)
