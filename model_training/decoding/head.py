"""Tokens for slots, and how sure they are, from the hidden states under the head.

A prediction's doubt is (1 - p) / p for its probability p: the sum of the other tokens' exponentials, over its
own. Of a sure model, float32 takes every probability for 1; the doubt is a small number that float32 does
resolve. Doubts are rounded so that they order, and tie, as probabilities in float64 do.

Shape suffixes: K slots, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..model.placement import fetched

if TYPE_CHECKING:
    from ..model.perceptiondlm import PerceptionDLM

_LOGITS_AT_ONCE = {"cpu": (256, 1024), "gpu": (1024, 1 << 20)}
"""Slots and tokens whose logits exist at once. 1 MB, which fits into a core's cache; on a GPU all tokens, at
LLaDA's vocabulary 0.5 GB in float32."""

_DRAWN_AT_ONCE = 256
"""Slots whose tokens are drawn at once. Drawing needs all their logits: 130 MB at LLaDA's vocabulary."""

_GRID = 2.0**52
"""Steps between 1 and 2 in float64."""


def generator_of(seed: int, step: int) -> torch.Generator:
    """The random numbers of a decoding step, for any seed of 64 bits.

    PyTorch's generator on the CPU takes the low 32 bits: seeds that differ in others alone draw the same.
    """
    number = seed * 1_000_003 + step
    return torch.Generator().manual_seed(number if -(1 << 63) <= number < 1 << 64 else number % (1 << 64))


def sample(
    model: PerceptionDLM, never_X: Tensor | None, hidden_KD: Tensor, chances: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Tokens for slots, and their doubts: the likeliest ones, or drawn ones.

    Args:
        model: whose head it is.
        never_X: as for `likeliest`.
        hidden_KD: hidden states of the slots.
        chances: temperature, top-p and a random number of each slot, as for `drawn`; nothing for the
            likeliest tokens.
    """
    with fetched(model.lm_head) as weight_VD:
        if not chances:
            return likeliest(hidden_KD, weight_VD, never_X)
        temperature_K, top_p_K, uniform_K = chances
        return drawn(hidden_KD, weight_VD, never_X, temperature_K, top_p_K, uniform_K)


def num_others(model: PerceptionDLM, never_X: Tensor | None) -> int:
    """How many tokens besides one can be predicted: the doubt where all are equally likely."""
    return model.config.text.vocab_size - (0 if never_X is None else len(never_X)) - 1


def broken(low_R: np.ndarray, high_R: np.ndarray, others: int) -> np.ndarray:
    """Rows whose probabilities are no numbers, or those of all tokens alike in all slots.

    Args:
        low_R: the lowest doubt of each row.
        high_R: the highest one.
        others: `num_others` of the model.
    """
    alike_R = np.isclose(low_R, others, rtol=1e-7) & np.isclose(high_R, others, rtol=1e-7)
    return np.isnan(high_R) | (alike_R & (others > 0))


def likeliest(hidden_KD: Tensor, weight_VD: Tensor, never_X: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The likeliest tokens and their doubts: maximum and sum in one pass over parts of the vocabulary.

    Args:
        hidden_KD: hidden states of the slots.
        weight_VD: the head's weights.
        never_X: tokens that are never predicted, ascending, on the device; None for none.

    Returns:
        int64 tokens, and doubts in float32, or float64 for a model in float64. A doubt is NaN where there is
        no likeliest token.
    """
    num_slots, num_tokens = _LOGITS_AT_ONCE["cpu" if hidden_KD.is_cpu else "gpu"]
    if len(hidden_KD) > num_slots:
        parts = [likeliest(part, weight_VD, never_X) for part in hidden_KD.split(num_slots)]
        return torch.cat([token for token, _ in parts]), torch.cat([doubt for _, doubt in parts])
    starts = range(0, len(weight_VD), num_tokens)
    top_K = others_K = token_K = None
    for start in starts:
        part_VD = weight_VD[start : start + num_tokens]
        logits_KV = _logits(hidden_KD, part_VD, _within(never_X, start, len(part_VD), len(weight_VD)))
        part_top_K, place_K = logits_KV.max(dim=-1)
        logits_KV.scatter_(1, place_K[:, None], -torch.inf)
        if top_K is None or others_K is None or token_K is None:
            others_K = logits_KV.sub_(part_top_K[:, None]).exp_().sum(dim=-1)
            top_K, token_K = part_top_K, place_K
            continue
        token_K = torch.where(part_top_K > top_K, place_K + start, token_K)
        new_top_K, second_K = torch.maximum(top_K, part_top_K), torch.minimum(top_K, part_top_K)
        part_others_K = logits_KV.sub_(new_top_K[:, None]).exp_().sum(dim=-1)
        others_K = others_K * (top_K - new_top_K).exp() + part_others_K + (second_K - new_top_K).exp()
        top_K = new_top_K
    assert top_K is not None and others_K is not None and token_K is not None
    # Minus itself, a logit is 0, or NaN if it is infinite: that one would look sure.
    return token_K, _rounded(others_K + (top_K - top_K))


def drawn(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    never_X: Tensor | None,
    temperature_K: Tensor,
    top_p_K: Tensor,
    uniform_K: Tensor,
) -> tuple[Tensor, Tensor]:
    """Drawn tokens and their doubts at temperature 1 in float64, a part of the slots at a time.

    Args:
        hidden_KD: hidden states of the slots.
        weight_VD: the head's weights.
        never_X: as for `likeliest`.
        temperature_K: float64, above 0.
        top_p_K: float64.
        uniform_K: float64, a random number in [0, 1) for each slot.
    """
    parts = []
    given = (hidden_KD, temperature_K, top_p_K, uniform_K)
    for hidden_kD, *chance in zip(*(each.split(_DRAWN_AT_ONCE) for each in given), strict=True):
        logits_KV = _logits(hidden_kD, weight_VD, never_X)
        token_K = draw(logits_KV, *chance)
        probability_K = logits_KV.double().softmax(dim=-1).gather(1, token_K[:, None])[:, 0]
        parts.append((token_K, (1 - probability_K) / probability_K))
    tokens, doubts = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(doubts)


def draw(logits_KV: Tensor, temperature_K: Tensor, top_p_K: Tensor, uniform_K: Tensor) -> Tensor:
    """Tokens by inverting the distribution function, the likeliest first, at `uniform_K` in [0, 1)."""
    scaled_KV = logits_KV / temperature_K[:, None].to(logits_KV.dtype)
    sorted_KV, order_KV = scaled_KV.double().sort(dim=-1, descending=True, stable=True)
    sums_KV = sorted_KV.softmax(dim=-1).cumsum(dim=-1)
    within_K = (sums_KV < top_p_K[:, None]).sum(-1, keepdim=True).clamp(max=sums_KV.shape[-1] - 1)
    total_K1 = sums_KV.gather(1, within_K)
    place_K1 = torch.searchsorted(sums_KV, uniform_K[:, None] * total_K1, right=True)
    return order_KV.gather(1, torch.minimum(place_K1, within_K))[:, 0]


def confidence_of(doubt: Tensor) -> Tensor:
    """Probabilities in float64 from doubts; NaN where there is no prediction yet, whose doubt is negative."""
    doubt = doubt.double()
    return (1 / (1 + doubt)).masked_fill(doubt < 0, torch.nan)


def doubt_type(dtype: torch.dtype) -> torch.dtype:
    """The type of the doubts of a model that computes in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(hidden_KD: Tensor, weight_VD: Tensor, never_X: Tensor | None) -> Tensor:
    logits_KV = (hidden_KD @ weight_VD.T).to(doubt_type(hidden_KD.dtype))
    return logits_KV if never_X is None else logits_KV.index_fill_(1, never_X, -torch.inf)


def _within(never_X: Tensor | None, start: int, count: int, total: int) -> Tensor | None:
    """Which of `count` tokens from `start` on are never predicted; there are several parts on CPUs alone."""
    if never_X is None or count == total:
        return never_X
    inside_X = never_X[(never_X >= start) & (never_X < start + count)] - start
    return inside_X if len(inside_X) else None


def _rounded(doubt_K: Tensor) -> Tensor:
    """Doubts as they are left of probabilities in float64: below 2^-29, multiples of 2^-52."""
    if doubt_K.dtype == torch.float64:
        return (1 + doubt_K) - 1
    return torch.where(doubt_K < 2.0**-29, (doubt_K * _GRID).round() / _GRID, doubt_K)
