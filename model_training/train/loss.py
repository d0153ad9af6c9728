"""The training objective: tokens of captions are masked at a random level, and the model predicts them.

Shape suffixes: B batch, L tokens, E examples (several can share a row), K masked tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, assert_never

import torch
from torch import Tensor
from torch.nn import functional

from ...schemas.training import LossWeighting, NoiseOptions
from ..model.attention import SHARED
from ..model.placement import upload

if TYPE_CHECKING:
    from ..data.samples import TrainBatch
    from ..model.perceptiondlm import PerceptionDLM


class Noise(NamedTuple):
    """The noise that was drawn for a batch, on the CPU.

    Attributes:
        masked_BL: bool, which tokens are masked.
        probability_BL: float32, with which probability each token is masked; 1 outside of examples.
    """

    masked_BL: Tensor
    probability_BL: Tensor


class Loss(NamedTuple):
    """The loss of a batch.

    Attributes:
        total: weighted sum over the examples; divide it by the weights of everything that steps together.
        weight: sum of the examples' weights.
        ce_K: cross-entropy of each masked token in nats, detached.
        probability_K: probability with which each of them was masked.
    """

    total: Tensor
    weight: Tensor
    ce_K: Tensor
    probability_K: Tensor

    @property
    def mean(self) -> Tensor:
        """The loss of this batch by itself."""
        return self.total / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)


def draw_noise(batch: TrainBatch, options: NoiseOptions, generator: torch.Generator | None = None) -> Noise:
    """Mask labeled tokens at random, each with the probability that its noise level gives.

    Args:
        batch: the clean sequences, on the CPU.
        options: the `noise` part of a training configuration.
        generator: a generator on the CPU; None takes torch's own.
    """
    sample_BL = batch.tokens.roles.sample_BL
    # 1. The level decides with which probability a token is masked.
    level_BL = draw_levels(batch, options, generator)
    probability_BL = ((1 - options.eps) * level_BL + options.eps).masked_fill(sample_BL < 0, 1)
    # 2. A draw for every token; only labeled ones can be masked.
    uniform_BL = torch.rand(sample_BL.shape, generator=generator)
    return Noise((uniform_BL < probability_BL) & batch.label_BL, probability_BL)


def draw_levels(batch: TrainBatch, options: NoiseOptions, generator: torch.Generator | None = None) -> Tensor:
    """(B, L) numbers from 0 to 1: one for all tokens of an example, or of each of its regions.

    Args:
        batch: the clean sequences, on the CPU.
        options: `level` and `stratified` are used.
        generator: a generator on the CPU; None takes torch's own.
    """
    group_BL, num_groups = level_groups(batch, options)
    level = torch.rand(num_groups, generator=generator)
    if options.stratified:
        level = (level[:1] + torch.arange(len(level)) / len(level)) % 1
    return level[group_BL]


def level_groups(batch: TrainBatch, options: NoiseOptions) -> tuple[Tensor, int]:
    """Which tokens share a level: (B, L) int64 numbers of examples, or of their regions, and how many."""
    sample_BL, region_BL = batch.tokens.roles.sample_BL.clamp(min=0), batch.tokens.roles.region_BL
    if options.level != "region":
        return sample_BL, len(batch.weight_E)
    regions = 1 + int(region_BL.max())
    return sample_BL * regions + region_BL.clamp(min=SHARED), len(batch.weight_E) * regions


def diffusion_loss(
    model: PerceptionDLM, batch: TrainBatch, noise: Noise, weighting: LossWeighting = "1/t"
) -> Loss:
    """Predict the masked tokens, and measure how wrong the predictions are.

    An example's loss is the sum of the cross-entropies of its masked tokens, divided by the number of its
    labeled tokens. With the weighting "1/t", each cross-entropy is divided by the token's probability of
    masking first; with "none", the sum is divided by the number of masked tokens instead. An example in which
    nothing is masked has the loss 0.

    Batch and noise are on the CPU, where the masked tokens are known without waiting for a GPU.
    """
    sample_L, masked_L = batch.tokens.roles.sample_BL.flatten(), noise.masked_BL.flatten()
    # 1. The share of each masked token in the loss.
    place_K = masked_L.nonzero().flatten()
    probability_K = noise.probability_BL.flatten()[place_K]
    match weighting:
        case "1/t":
            counted_L = batch.label_BL.flatten()
        case "none":
            counted_L = masked_L
        case _:
            assert_never(weighting)
    share_K = shares(batch, place_K, sample_L[counted_L])
    if weighting == "1/t":
        share_K = share_K / probability_K
    # 2. Logits of the masked tokens, and of no others.
    logits_KV, target_K = predict(model, batch, noise.masked_BL, place_K)
    # 3. Cross-entropy against the clean tokens, without a shift.
    ce_K = functional.cross_entropy(logits_KV, target_K, reduction="none")
    share_K, probability_K = (upload(each, ce_K.device) for each in (share_K, probability_K))
    return Loss((ce_K * share_K).sum(), batch.weight_E.sum(), ce_K.detach(), probability_K)


def shares(batch: TrainBatch, place_K: Tensor, example_C: Tensor) -> Tensor:
    """The share of tokens in the loss: the weight of their example by its number of tokens that count.

    Args:
        batch: the batch, on the CPU.
        place_K: int64, places of the tokens in the flattened (B, L).
        example_C: int64, the example of each token that counts.
    """
    counted_E = torch.bincount(example_C, minlength=len(batch.weight_E))
    example_K = batch.tokens.roles.sample_BL.flatten()[place_K]
    return batch.weight_E[example_K] / counted_E[example_K]


def predict(
    model: PerceptionDLM, batch: TrainBatch, masked_BL: Tensor, place_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (K, V) of some of the masked tokens, at least in float32, and the clean tokens (K,).

    Args:
        model: the network; both results are on its device.
        batch: the clean sequences, on the CPU. Which token attends to which follows from them.
        masked_BL: bool, which tokens are masked.
        place_K: int64, places of the predicted tokens in the flattened (B, L).
    """
    clean_BL, device = batch.tokens.ids_BL, model.device
    tokens = batch.tokens._replace(ids_BL=clean_BL.masked_fill(masked_BL, model.config.mask_token_id))
    logits_KV = model(tokens.to(device), batch.images.to(device), wanted_K=upload(place_K, device))
    logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    return logits_KV, upload(clean_BL.flatten()[place_K], device)
