"""Distillation of decoding paths: states of a teacher's decoding, and the loss of what it decoded next.

A model that was trained on captions knows that a caption has many right wordings, so that few of its first
predictions are sure. Decoding settles on one wording, token by token. The student learns that one wording,
and to be sure of it earlier: from a state of the teacher's decoding it predicts the tokens of the next steps.

Shape suffixes: B batch, L tokens, E examples, K masked tokens that are learned, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..model.placement import upload
from .loss import Loss, draw_levels, level_groups, predict, shares

if TYPE_CHECKING:
    from ...schemas.distillation import Distillation
    from ...schemas.training import NoiseOptions
    from ..data.samples import TrainBatch
    from ..model.perceptiondlm import PerceptionDLM


class PathState(NamedTuple):
    """States of the teacher's decoding, one for each region of a batch, on the CPU.

    Attributes:
        masked_BL: bool, which tokens are masked: those that the teacher had not decoded yet.
        learned_BL: bool, which of them are learned: those of its next steps.
        share_BL: float32, share of the teacher's steps for the example, or for the region with the level
            "region", that are still to come; 1 outside of examples.
    """

    masked_BL: Tensor
    learned_BL: Tensor
    share_BL: Tensor


def window_of(options: Distillation, done: float) -> int:
    """How many of the teacher's next steps are learned, after a share of the run's steps is `done`."""
    grown = min(1.0, done / options.curriculum_ratio) if options.curriculum_ratio else 1.0
    return round(options.window_start + grown * (options.window_end - options.window_start))


def draw_path_state(
    batch: TrainBatch, options: NoiseOptions, window: int, generator: torch.Generator | None = None
) -> PathState:
    """Draw how far the teacher's decoding has come, for each example or each of its regions.

    Args:
        batch: the teacher's captions, with the step of each token, on the CPU.
        options: `level` and `stratified` are used.
        window: number of the next steps whose tokens are learned.
        generator: a generator on the CPU; None takes torch's own.
    """
    step_BL = batch.path_step_BL
    assert step_BL is not None, "the loader was opened with decoding paths"
    sample_BL = batch.tokens.roles.sample_BL
    # 1. How far along the path each example is, or each of its regions.
    level_BL = draw_levels(batch, options, generator)
    # 2. The state before one of the teacher's steps: what it decoded from then on is masked. How many steps
    #    there were is up to the example or region alone, not to others in the batch.
    group_BL, num_groups = level_groups(batch, options)
    last_step = torch.full((num_groups,), -1).scatter_reduce(0, group_BL.flatten(), step_BL.flatten(), "amax")
    num_steps_BL = last_step[group_BL] + 1
    first_BL = (level_BL * num_steps_BL).long()
    masked_BL = batch.label_BL & (step_BL >= first_BL)
    # 3. What it decoded in the next steps is learned.
    learned_BL = masked_BL & (step_BL < first_BL + window)
    share_BL = (1 - first_BL / num_steps_BL.clamp(min=1)).masked_fill(sample_BL < 0, 1)
    return PathState(masked_BL, learned_BL, share_BL)


def path_loss(model: PerceptionDLM, batch: TrainBatch, state: PathState, options: Distillation) -> Loss:
    """Predict what the teacher decoded next, and be sure of it.

    An example's loss is the mean over its learned tokens of the cross-entropy against the teacher's token,
    and, where the likeliest token is the teacher's, of `certainty_weight` times the entropy besides. An
    example in which nothing is learned has the loss 0. `Loss.ce_K` holds the cross-entropies alone.
    """
    # 1. Logits of the learned tokens, from a state in which all later tokens are masked.
    place_K = state.learned_BL.flatten().nonzero().flatten()
    logits_KV, target_K = predict(model, batch, state.masked_BL, place_K)
    # 2. Cross-entropy against the teacher's tokens.
    ce_K = functional.cross_entropy(logits_KV, target_K, reduction="none")
    # 3. Entropy where the prediction is right.
    loss_K = ce_K
    if options.certainty_weight:
        logp_KV = (logits_KV / options.certainty_temperature).log_softmax(-1)
        entropy_K = -(logp_KV.exp() * logp_KV).sum(-1)
        right_K = logits_KV.detach().argmax(-1) == target_K
        loss_K = ce_K + options.certainty_weight * entropy_K * right_K
    # 4. The share of each token in the loss.
    share_K = shares(batch, place_K, batch.tokens.roles.sample_BL.flatten()[place_K])
    masked_share_K = state.share_BL.flatten()[place_K]
    share_K, masked_share_K = (upload(each, ce_K.device) for each in (share_K, masked_share_K))
    return Loss((loss_K * share_K).sum(), batch.weight_E.sum(), ce_K.detach(), masked_share_K)
