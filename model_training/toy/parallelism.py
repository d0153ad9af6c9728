"""Scores of decoding in few steps, in a toy world of many wordings: tokens per forward, and right captions.

    held_out = lay_out(processor, iter_photo_regions("out/toy-steps/heldout/corpus"), 32)
    scores = score_decoding(model, processor, held_out, DecodeOptions(strategy="factor", max_new_tokens=32))

Shape suffixes: B images of a batch, N regions of an image, S slots of a region, C any number of steps.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .wordings import VERDICTS, judge_wording

if TYPE_CHECKING:
    from ...schemas.decoding import DecodeOptions
    from ..decoding.read_regions import PhotoRegions
    from ..model.batch import Batch
    from ..model.perceptiondlm import PerceptionDLM
    from ..model.processor import PerceptionDLMProcessor


class LaidOut(NamedTuple):
    """Some images, ready to be decoded.

    Attributes:
        batch: the sequences.
        truths: a right caption for each region of each image, in the order of the sequence.
        tangled: for each of them, whether its box contains another region's box, is in one, or equals it.
    """

    batch: Batch
    truths: list[list[str]]
    tangled: list[list[bool]]


class ParallelScores(NamedTuple):
    """The scores of all regions.

    Attributes:
        regions: number of regions.
        right, untrue, contradictory, malformed: shares of the captions, as `judge_wording` tells them apart.
        right_tangled: share of right captions of things whose box contains, or is in, another one's.
        tokens_per_forward: tokens of a caption with its end, divided by the forwards that computed it: mean
            over all regions, weighted by forwards.
        forwards: mean number of forwards of a region.
    """

    regions: int
    right: float
    untrue: float
    contradictory: float
    malformed: float
    right_tangled: float
    tokens_per_forward: float
    forwards: float


def lay_out(
    processor: PerceptionDLMProcessor, photos: Iterable[PhotoRegions], num_slots: int, batch_size: int = 16
) -> list[LaidOut]:
    """Lay out photos of a toy world's corpus, all regions of a photo in one sequence."""
    from ..model.batch import collate

    found = []
    photos = iter(photos)
    while group := list(itertools.islice(photos, batch_size)):
        examples = [processor.make_example(each.pixels, each.masks(), num_slots) for each in group]
        pairs = list(zip(group, examples, strict=True))
        regions = [[photo.regions[number] for number in made.order] for photo, made in pairs]
        truths = [[region.caption or "" for region in each] for each in regions]
        tangled = [_tangled([region.dense() for region in each]) for each in regions]
        found.append(LaidOut(collate(examples), truths, tangled))
    return found


def _tangled(masks: list[np.ndarray]) -> list[bool]:
    places = [np.nonzero(mask) for mask in masks]
    boxes = [(*(each.min() for each in found), *(each.max() for each in found)) for found in places]
    return [
        any(_contains(box, other) or _contains(other, box) for other in boxes[:number] + boxes[number + 1 :])
        for number, box in enumerate(boxes)
    ]


def _contains(box: tuple[Any, ...], other: tuple[Any, ...], slack_px: int = 1) -> bool:
    return all(a <= b + slack_px for a, b in zip(box[:2], other[:2], strict=True)) and all(
        a >= b - slack_px for a, b in zip(box[2:], other[2:], strict=True)
    )


def score_decoding(
    model: PerceptionDLM, processor: PerceptionDLMProcessor, laid_out: list[LaidOut], options: DecodeOptions
) -> ParallelScores:
    """Decode the captions of all regions, and compare them with the truth."""
    import torch

    from ..decoding.sampler import decode_steps

    verdicts: Counter[str] = Counter()
    tangled: list[bool] = []
    tokens = forwards = 0
    eot = model.config.eot_token_id
    for batch, truths, is_tangled in laid_out:
        states = list(decode_steps(model, batch, options))
        last = states[-1]
        forwards_BN = torch.stack([state.open_BNS.any(-1) for state in states]).sum(0)
        for row, right in enumerate(truths):
            tokens_NS = last.tokens_BNS[row, : len(right)].numpy()
            captions = processor.read_captions(tokens_NS, range(len(right)))
            for region, (caption, truth) in enumerate(zip(captions, right, strict=True)):
                verdict = judge_wording(caption, truth)
                verdicts[verdict] += 1
                tangled += [verdict == "right"] if is_tangled[row][region] else []
                ends = np.flatnonzero(tokens_NS[region] == eot)
                tokens += int(ends[0]) + 1 if len(ends) else tokens_NS.shape[1]
                forwards += int(forwards_BN[row, region])
    total = verdicts.total()
    shares = {name: verdicts[name] / total for name in VERDICTS}
    return ParallelScores(
        regions=total,
        right_tangled=sum(tangled) / max(1, len(tangled)),
        tokens_per_forward=tokens / forwards,
        forwards=forwards / total,
        **shares,
    )


def position_thresholds(
    model: PerceptionDLM, laid_out: list[LaidOut], num_slots: int, agreements: Sequence[float]
) -> list[list[float]]:
    """For each position of a caption, the lowest threshold above which predictions can be trusted.

    The captions are decoded one token a step. A prediction of an early step can be trusted if it is what the
    position holds in the end.

    Args:
        model: the model whose confidences are calibrated.
        laid_out: images that are not used for scores.
        num_slots: positions of a caption.
        agreements: least share of the predictions above the threshold that the position holds in the end.

    Returns:
        The thresholds of all positions for each of the shares.
    """
    import torch

    from ..decoding.buckets import one_token_a_step
    from ..decoding.sampler import decode_steps

    options = one_token_a_step(model, "per-region", num_slots)
    sure: list[list[np.ndarray]] = [[] for _ in range(num_slots)]
    kept: list[list[np.ndarray]] = [[] for _ in range(num_slots)]
    for each in laid_out:
        states = list(decode_steps(model, each.batch, options))
        final_BNS = states[-1].tokens_BNS
        for before, after in itertools.pairwise(states):
            waiting_BNS = before.open_BNS & torch.isfinite(after.confidence_BNS)
            for slot in range(num_slots):
                at_BN = waiting_BNS[..., slot]
                sure[slot].append(after.confidence_BNS[..., slot][at_BN].numpy())
                kept[slot].append((after.predicted_BNS == final_BNS)[..., slot][at_BN].numpy())
    return [
        [
            lowest_threshold(np.concatenate(sure[slot]), np.concatenate(kept[slot]), agreement)
            for slot in range(num_slots)
        ]
        for agreement in agreements
    ]


def lowest_threshold(confidence_C: np.ndarray, kept_C: np.ndarray, agreement: float) -> float:
    """The lowest confidence with at least a share `agreement` of `kept_C` among all that are not below it.

    1.0, which few predictions reach, if there is no such confidence.
    """
    order = np.argsort(-confidence_C, kind="stable")
    confidence_C = confidence_C[order]
    share_C = np.cumsum(kept_C[order]) / np.arange(1, len(order) + 1)
    last_of_equal_C = np.append(confidence_C[1:] != confidence_C[:-1], True)
    good = np.flatnonzero((share_C >= agreement) & last_of_equal_C)
    return float(confidence_C[good[-1]]) if len(good) else 1.0
