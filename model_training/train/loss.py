"""The training objective: captions are masked at a random level, and what is masked is to be guessed.

Shape suffixes: B batch, L tokens, E examples (several can share a row), K masked tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...schemas.training import LossWeighting, NoiseOptions
from ..model.attention import SHARED

if TYPE_CHECKING:
    from ..data import TrainBatch
    from ..model.perceptiondlm import PerceptionDLM


class Noised(NamedTuple):
    """What is masked: `masked_BL` bool, and `probability_BL` of it, which is 1 outside of examples."""

    masked_BL: Tensor
    probability_BL: Tensor


class Loss(NamedTuple):
    """A batch's loss.

    Attributes:
        total: of all examples by their weights; divide by the weights of everything that steps together.
        weight: of the examples.
        ce_K: cross-entropy of each masked token in nats, detached.
        probability_K: of masking it.
    """

    total: Tensor
    weight: Tensor
    ce_K: Tensor
    probability_K: Tensor

    @property
    def mean(self) -> Tensor:
        """Of the batch by itself."""
        return self.total / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)


def draw(batch: TrainBatch, noise: NoiseOptions, generator: torch.Generator | None = None) -> Noised:
    """Mask labelled tokens, each with the probability of its level.

    Args:
        batch: the clean sequences.
        noise: the `noise` part of a training configuration.
        generator: on the CPU, so that every device draws alike; None: torch's own.
    """
    sample_BL, region_BL = batch.tokens.structure.sample_BL, batch.tokens.structure.region_BL
    num_examples = len(batch.weight_E)
    # 1. A level for each example, or for each of its regions.
    regions = 1 + int(region_BL.max()) if noise.level == "region" else 1
    level = torch.rand(num_examples * regions, generator=generator)
    if noise.stratified:
        level = (level[:1] + torch.arange(len(level)) / len(level)) % 1
    # 2. The probability of masking a token is its level's.
    probability = ((1 - noise.eps) * level + noise.eps).view(num_examples, regions).to(sample_BL.device)
    place_BL = region_BL.clamp(min=SHARED) if noise.level == "region" else torch.zeros_like(region_BL)
    probability_BL = probability[sample_BL.clamp(min=0), place_BL].masked_fill(sample_BL < 0, 1)
    # 3. A draw for every token; only labelled ones can be masked.
    uniform_BL = torch.rand(sample_BL.shape, generator=generator).to(sample_BL.device)
    return Noised((uniform_BL < probability_BL) & batch.label_BL, probability_BL)


def loss(model: PerceptionDLM, batch: TrainBatch, noised: Noised, weighting: LossWeighting = "1/t") -> Loss:
    """Guess what is masked, and count how badly.

    The mean over an example's labelled tokens of the cross-entropy of the masked ones, each over its
    probability of masking; then the examples' sum by their weights. Nothing masked gives 0.
    """
    tokens, (masked_BL, probability_BL) = batch.tokens, noised
    # 1. Masked tokens are replaced; who sees whom is a matter of the clean sequence.
    ids_BL = tokens.ids_BL.masked_fill(masked_BL, model.config.mask_token_id)
    # 2. Logits where something is masked, and nowhere else.
    logits_KV = model(tokens._replace(ids_BL=ids_BL), batch.images, wanted_BL=masked_BL)
    # 3. Cross-entropy against the clean tokens, without a shift.
    logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    ce_K = functional.cross_entropy(logits_KV, tokens.ids_BL[masked_BL], reduction="none")
    # 4. One over the probability of masking, over the number of labelled tokens of the example.
    probability_K = probability_BL[masked_BL]
    example_K = tokens.structure.sample_BL[masked_BL]
    labelled_BL = batch.label_BL if weighting == "1/t" else masked_BL
    labelled_E = torch.bincount(tokens.structure.sample_BL[labelled_BL], minlength=len(batch.weight_E))
    share_K = batch.weight_E[example_K] / labelled_E[example_K]
    if weighting == "1/t":
        share_K = share_K / probability_K
    return Loss((ce_K * share_K).sum(), batch.weight_E.sum(), ce_K.detach(), probability_K)
