"""Which predictions stay: pure functions of a batch, in which every row has its own strategy and numbers.

A row is a sequence: the captions of up to N regions, or any other blocks of slots. Rows may be at different
steps. Nothing here knows what makes the predictions, waits for a device, or changes a tensor in place.

Shape suffixes: B rows, N regions of a row, S slots of a region, T entries of a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...schemas.decoding import DecodeOptions, Strategy

_BY_CONFIDENCE = ("threshold", "factor")
"""The strategies whose regions keep what they are sure of, whatever the schedule."""


class RowOptions(NamedTuple):
    """How each row is decoded, as tensors on the rows' device.

    Attributes:
        strategies: those that occur, so that no work is done for others.
        may_exit: whether any of `exits_BNS` is set.
        may_settle: whether any of `settled_B` is set.
        may_wait: whether any of `last_B` is set.
        slot_BNS: bool, which places are slots. Regions that a row does not have, and places behind the slots
            of a row with fewer, are none.
        remask_B: bool, rows of the strategy "remask".
        leftmost_B: bool, rows of the strategy "left-to-right".
        left_BT: int64, how many slots stay open after 0, 1, ... steps: of the whole row for "remask", of a
            region for others.
        turn_B: int64, steps after which a region's schedule begins later than that of the region before it;
            0 except for "sequential".
        least_B: int64, how many slots a region closes at least in a step.
        doubt_BS: the largest doubt at which a prediction stays in each place of a caption, whatever its rank;
            -inf for none, also where there is no prediction yet, whose doubt is negative.
        ranked_doubt_BS: the same for the surest, the second, ... of a region's predictions.
        exits_BNS: bool, slots of regions that end with their first end of text.
        settled_B: the largest doubt at which a region ends at once if all its open predictions are as sure,
            or a row for "remask"; -inf for none.
        redo_B: the largest doubt of a prediction that a step over a part of a sequence may keep; inf for any.
        last_B: int64, the token that is kept last: its confidence counts as 0. -1 for none.
    """

    strategies: frozenset[Strategy]
    may_exit: bool
    may_settle: bool
    may_wait: bool
    slot_BNS: Tensor
    remask_B: Tensor
    leftmost_B: Tensor
    left_BT: Tensor
    turn_B: Tensor
    least_B: Tensor
    doubt_BS: Tensor
    ranked_doubt_BS: Tensor
    exits_BNS: Tensor
    settled_B: Tensor
    redo_B: Tensor
    last_B: Tensor


def row_options(
    options: Sequence[DecodeOptions],
    regions: Sequence[int],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    eot: int,
) -> RowOptions:
    """The options of rows, on the CPU.

    Args:
        options: of each row.
        regions: how many each row has.
        shape: (B, N, S) of the batch, with room for all of them.
        dtype: the type of doubts, float32 or float64.
        eot: the token that ends a text.
    """
    num_rows = shape[0]
    most_steps = max((each.steps for each in options), default=1)
    left = np.zeros((num_rows, most_steps + 1), np.int64)
    slots = np.zeros(shape, bool)
    for row, (each, count) in enumerate(zip(options, regions, strict=True)):
        slots[row, :count, : each.max_new_tokens] = True
        num_slots = each.max_new_tokens * (count if each.strategy == "remask" else 1)
        if each.strategy in _BY_CONFIDENCE:
            left[row] = num_slots
        else:
            left[row, : each.steps + 1] = [
                left_open(num_slots, each.steps, step) for step in range(-1, each.steps)
            ]

    def column(values: list, kind: torch.dtype, fill: float = 0) -> Tensor:
        return torch.tensor([*values, *[fill] * (num_rows - len(values))], dtype=kind)

    names: list[Strategy] = [each.strategy for each in options]
    exits = [each.early_exit and each.strategy != "remask" for each in options]
    least = [
        math.ceil(each.max_new_tokens / each.steps) * (each.strategy in _BY_CONFIDENCE) for each in options
    ]
    doubts, ranked_doubts = torch.full((2, num_rows, shape[2]), -math.inf, dtype=dtype)
    for row, each in enumerate(options):
        if each.strategy == "threshold":
            doubts[row, : each.max_new_tokens] = threshold_doubts(each, dtype)
        elif each.strategy == "factor":
            ranked_doubts[row, : each.max_new_tokens] = factor_doubts(each, dtype)
    return RowOptions(
        strategies=frozenset(names),
        may_exit=any(exits),
        may_settle=any(each.settled is not None for each in options),
        may_wait=any(each.end_of_text_last for each in options),
        slot_BNS=torch.from_numpy(slots),
        remask_B=column([name == "remask" for name in names], torch.bool),
        leftmost_B=column([name == "left-to-right" for name in names], torch.bool),
        left_BT=torch.from_numpy(left),
        turn_B=column([each.steps * (each.strategy == "sequential") for each in options], torch.int64),
        least_B=column(least, torch.int64),
        doubt_BS=doubts,
        ranked_doubt_BS=ranked_doubts,
        exits_BNS=torch.from_numpy(slots) & column(exits, torch.bool)[:, None, None],
        settled_B=column([_doubt_at(each.settled, -math.inf) for each in options], dtype),
        redo_B=column([_doubt_at(each.redo_below, math.inf) for each in options], dtype),
        last_B=column([eot if each.end_of_text_last else -1 for each in options], torch.int64, -1),
    )


def _doubt_at(confidence: float | None, otherwise: float) -> float:
    """The doubt of a confidence."""
    if confidence is None:
        return otherwise
    return (1 - confidence) / confidence if confidence else math.inf


def left_open(num_slots: int, steps: int, step: int) -> int:
    """Slots still open after a step of the linear schedule, rounded as PerceptionDLM's released code does."""
    if step < 0:
        return num_slots
    return 0 if step >= steps - 1 else int(num_slots * ((steps - 1 - step) / steps))


def threshold_doubts(options: DecodeOptions, dtype: torch.dtype) -> Tensor:
    """The largest doubts (S,) at which predictions are at least as sure as the threshold of their place."""
    threshold_S = np.array(options.position_thresholds or [options.threshold] * options.max_new_tokens)
    return _largest_doubts(lambda confidence_S: confidence_S >= threshold_S, len(threshold_S), dtype)


def factor_doubts(options: DecodeOptions, dtype: torch.dtype) -> Tensor:
    """The largest doubts (S,) at which the surest, the second, ... prediction stays by "factor".

    The n-th stays if (n + 1)(1 - p) < factor. The left side grows with n, so each is tested alone.
    """
    count_S = np.arange(options.max_new_tokens) + 2
    return _largest_doubts(
        lambda confidence_S: count_S * (1 - confidence_S) < options.factor, len(count_S), dtype
    )


def _largest_doubts(stays: Callable[[np.ndarray], np.ndarray], count: int, dtype: torch.dtype) -> Tensor:
    """The largest doubts of a type at whose confidence in float64, 1 / (1 + doubt), predictions stay.

    Comparing with them decides as comparing probabilities does, to the last bit. They are found by halving:
    numbers from 0 to inf are ordered as the integers with their bits.

    Args:
        stays: which of `count` predictions stay at these confidences. One that stays also does when surer.
        count: how many.
        dtype: of doubts.

    Returns:
        -inf where a prediction does not stay even at doubt 0.
    """
    floats, bits = (np.float64, np.int64) if dtype == torch.float64 else (np.float32, np.int32)

    def stay_at(place: np.ndarray) -> np.ndarray:
        return stays(1 / (1 + place.view(floats).astype(np.float64)))

    low, high = np.zeros(count, bits), np.full(count, math.inf, floats).view(bits)
    never = ~stay_at(low)
    while (low < high).any():
        middle = high - (high - low) // 2
        kept = stay_at(middle)
        low, high = np.where(kept, middle, low), np.where(kept, high, np.maximum(middle - 1, low))
    return torch.from_numpy(np.where(never, floats(-math.inf), low.view(floats)))


def select(
    options: RowOptions,
    step_B: Tensor,
    tokens_BNS: Tensor,
    open_BNS: Tensor,
    predicted_BNS: Tensor,
    doubt_BNS: Tensor,
) -> tuple[Tensor, Tensor]:
    """Select the predictions that stay.

    Args:
        options: of the rows.
        step_B: int64, the step that each row is in: 0, 1, ...
        tokens_BNS: the tokens so far; only those of closed slots are read.
        open_BNS: the slots that are not decided. A region that a row does not have has none.
        predicted_BNS: a token for every open slot; for "sequential", at least of regions whose turn it is.
        doubt_BNS: how unsure each prediction is: (1 - p) / p for its probability p; negative where there is
            none yet. For "remask", that of the latest prediction at every slot.

    Returns:
        tokens_BNS with the predictions that stay, and the slots that are open now.
    """
    remasked = stayed = None
    counted_BNS = doubt_BNS
    if options.may_wait:
        last_BNS = predicted_BNS == options.last_B[:, None, None]
        counted_BNS = doubt_BNS.masked_fill(last_BNS, torch.finfo(doubt_BNS.dtype).max)
    if "remask" in options.strategies:
        left_B1 = options.left_BT.gather(1, _entry(options, step_B[:, None]))
        rank_BK = _rank(torch.where(options.slot_BNS, counted_BNS, -torch.inf).flatten(1), descending=True)
        again_BNS = (
            (rank_BK < left_B1).view_as(open_BNS) & options.slot_BNS & open_BNS.any((1, 2), keepdim=True)
        )
        if options.may_settle:
            again_BNS = _without(again_BNS, _settled(options, open_BNS, doubt_BNS, (1, 2)))
        remasked = torch.where(open_BNS, predicted_BNS, tokens_BNS), again_BNS
    if options.strategies - {"remask"}:
        settled_BN1 = _settled(options, open_BNS, doubt_BNS, (2,)) if options.may_settle else None
        stay_BNS = _staying(options, step_B, open_BNS, counted_BNS, settled_BN1)
        stayed = torch.where(stay_BNS, predicted_BNS, tokens_BNS), _without(open_BNS, stay_BNS)
    if remasked is None or stayed is None:
        return remasked or stayed or (tokens_BNS, open_BNS)
    tokens, opens = (
        torch.where(options.remask_B[:, None, None], one, other)
        for one, other in zip(remasked, stayed, strict=True)
    )
    return tokens, opens


def _staying(
    options: RowOptions, step_B: Tensor, open_BNS: Tensor, doubt_BNS: Tensor, settled_BN1: Tensor | None
) -> Tensor:
    """The open slots whose predictions stay, in rows that decide by region."""
    order_BNS, step_BN = doubt_BNS, step_B[:, None]
    if "left-to-right" in options.strategies:
        place_S = torch.arange(open_BNS.shape[2], device=open_BNS.device).to(doubt_BNS)
        order_BNS = torch.where(options.leftmost_B[:, None, None], place_S, doubt_BNS)
    if "sequential" in options.strategies:
        region_N = torch.arange(open_BNS.shape[1], device=open_BNS.device)
        step_BN = step_BN - region_N * options.turn_B[:, None]
    left_BN = options.left_BT.gather(1, _entry(options, step_BN))
    stay_BN = torch.maximum(open_BNS.sum(-1) - left_BN, options.least_B[:, None])
    rank_BNS = _rank(torch.where(open_BNS, order_BNS, torch.inf), descending=False)
    enough_BNS = rank_BNS < stay_BN[..., None]
    if "threshold" in options.strategies:
        enough_BNS = enough_BNS | (doubt_BNS <= options.doubt_BS[:, None])
    if "factor" in options.strategies:
        most_BNS = options.ranked_doubt_BS[:, None].expand(doubt_BNS.shape).gather(2, rank_BNS)
        enough_BNS = enough_BNS | (doubt_BNS <= most_BNS)
    if settled_BN1 is not None:
        enough_BNS = enough_BNS | (settled_BN1 & (step_BN >= 0)[..., None])  # not before its turn
    return enough_BNS & open_BNS


def _settled(options: RowOptions, open_BNS: Tensor, doubt_BNS: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Whether the predictions for all open slots of a region, or of a row, are sure enough to end it."""
    sure_BNS = (doubt_BNS >= 0) & (doubt_BNS <= options.settled_B[:, None, None])
    return ~_without(open_BNS, sure_BNS).any(dims, keepdim=True)


def unsure_rows(options: RowOptions, before_BNS: Tensor, after_BNS: Tensor, doubt_BNS: Tensor) -> Tensor:
    """Rows (B,) in which a step would keep a prediction that is not sure enough, see `RowOptions.redo_B`.

    Args:
        options: of the rows.
        before_BNS: the open slots before the step.
        after_BNS: those after it.
        doubt_BNS: of the step's predictions.
    """
    unsure_BNS = _without(before_BNS, after_BNS) & (doubt_BNS > options.redo_B[:, None, None])
    return unsure_BNS.flatten(1).any(1)


def end_captions(
    options: RowOptions, tokens_BNS: Tensor, open_BNS: Tensor, eot: int
) -> tuple[Tensor, Tensor]:
    """Fill everything after a region's first end of text, once nothing before it is open."""
    if not options.may_exit:
        return tokens_BNS, open_BNS
    decided_BNS = (tokens_BNS == eot) & (open_BNS.cumsum(-1) == 0) & options.exits_BNS
    ended_BNS = (decided_BNS.cumsum(-1) > 0) & options.exits_BNS
    return tokens_BNS.masked_fill(ended_BNS, eot), _without(open_BNS, ended_BNS)


def _entry(options: RowOptions, step: Tensor) -> Tensor:
    """Places in `left_BT` of what is left after the given steps."""
    return (step + 1).clamp(0, options.left_BT.shape[1] - 1)


def predicted_slots(options: RowOptions, open_BNS: Tensor) -> Tensor:
    """The slots whose predictions are taken: open ones, and for "remask" all of a row with an open one."""
    if "remask" not in options.strategies:
        return open_BNS
    again_B = open_BNS.flatten(1).any(1)
    if options.strategies == {"remask"}:
        return again_B[:, None, None] & options.slot_BNS
    again_BNS = (again_B & options.remask_B)[:, None, None] & options.slot_BNS
    return open_BNS | again_BNS


def _without(one: Tensor, other: Tensor) -> Tensor:
    """`one & ~other`, in one operation."""
    return one > other


def _rank(score: Tensor, descending: bool) -> Tensor:
    """Place of each number in order along the last dimension; equal ones stay in their order."""
    order = score.argsort(dim=-1, descending=descending, stable=True)
    places = torch.arange(score.shape[-1], device=score.device).expand(score.shape)
    return torch.empty_like(order).scatter_(-1, order, places)
