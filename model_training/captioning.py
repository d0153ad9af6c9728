"""Captions from photos and masks: the processor, the decoder and the processor again.

    captions = caption(model, processor, photo, masks)
    for snapshot in stream(model, processor, photo, masks): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_training import decode as decoding
from model_training.batch import Batch
from model_training.decode import Decoding
from model_training.model import PerceptionDLM
from model_training.processing import PerceptionDLMProcessor

Photo = Image.Image | np.ndarray
BATCH = 8
"""Sequences at once, if the caller does not say."""


@dataclass(frozen=True)
class Captioned:
    """Captions of several images, and what they took.

    Attributes:
        captions: for each image, for each of its masks, in the caller's order.
        forwards: passes of the language model, over all batches.
        tokens_per_forward: slots filled per pass that their sequence took part in.
        stale_agreement: see `decode.Decoded`.
        agreement: share of tokens equal to those without a cache, if that was asked for.
    """

    captions: list[list[str]]
    forwards: int
    tokens_per_forward: float
    stale_agreement: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Piece:
    """A slot as it stands: its text ("" for special tokens), None while it is open; whether this step wrote it."""

    text: str | None
    fresh: bool


@dataclass(frozen=True)
class Snapshot:
    """The state after a step: the slots of each mask, in the caller's order, and the captions so far."""

    number: int
    pieces: list[list[Piece]]
    captions: list[str]


def caption(
    model: PerceptionDLM,
    processor: PerceptionDLMProcessor,
    image: Photo,
    masks: Sequence[np.ndarray],
    how: Decoding = Decoding(),
    *,
    length: int | None = None,
    instruction: str | None = None,
    cut: str = "block",
) -> list[str]:
    """A caption for each mask of one image, in the order of the masks; without masks, one for the image.

    Args:
        model, processor: of one checkpoint.
        image: the photo as it is displayed.
        masks: HW, nonzero inside, any number.
        how: see `Decoding`.
        length: slots per caption; None: the config's.
        instruction: None: the config's.
        cut: see `PerceptionDLMProcessor.captions`.

    Raises:
        ConfigError: masks or options that cannot work.
    """
    done = caption_all(model, processor, [image], [masks], how, length=length, instruction=instruction, cut=cut)
    return done.captions[0]


def caption_all(
    model: PerceptionDLM,
    processor: PerceptionDLMProcessor,
    images: Sequence[Photo],
    masks: Sequence[Sequence[np.ndarray]],
    how: Decoding = Decoding(),
    *,
    length: int | None = None,
    instruction: str | None = None,
    cut: str = "block",
    batch_size: int = BATCH,
    compare: bool = False,
) -> Captioned:
    """Captions for the masks of several images, `batch_size` sequences at a time.

    With `compare`, everything is decoded without a cache as well, and the share of equal tokens reported.
    """
    captions: list[dict[int, str]] = [{} for _ in images]
    forwards, tokens, taken, equal = 0, 0, 0.0, 0
    stale: list[float] = []
    for batch in _batches(processor, images, masks, length, instruction, batch_size, model.device):
        done = decoding.decode(model, batch, how)
        forwards += done.forwards
        num_tokens = sum(map(len, done.tokens))
        tokens, taken = tokens + num_tokens, taken + num_tokens / max(done.tokens_per_forward, 1e-9)
        stale += [] if done.stale_agreement is None else [done.stale_agreement]
        if compare:
            plain = decoding.decode(model, batch, decoding.uncached(how))
            equal += sum(a == b for x, y in zip(done.tokens, plain.tokens, strict=True) for a, b in zip(x, y))
        for image, of_image in enumerate(_in_order(processor, batch, done.ids_BS, cut)):
            captions[image] |= of_image
    return Captioned(
        [[texts[i] for i in sorted(texts)] for texts in captions],
        forwards,
        tokens / taken if taken else 0.0,
        sum(stale) / len(stale) if stale else None,
        equal / tokens if compare and tokens else None,
    )


def stream(
    model: PerceptionDLM,
    processor: PerceptionDLMProcessor,
    image: Photo,
    masks: Sequence[np.ndarray],
    how: Decoding = Decoding(),
    *,
    length: int | None = None,
    instruction: str | None = None,
    cut: str = "block",
) -> Iterator[Snapshot]:
    """One image's decode as it happens: the state after each step. The last one holds what `caption` returns."""
    (batch,) = _batches(processor, [image], [masks], length, instruction, len(masks) + 1, model.device)
    regions_BS = batch.slot_regions_BS.cpu()
    for step in decoding.steps(model, batch, how):
        pieces: dict[int, list[Piece]] = {}
        before_BS, after_BS = step.before_BS.cpu(), step.after_BS.cpu()
        for row, slot in (regions_BS >= 0).nonzero().tolist():
            _, mask = batch.origins[int(regions_BS[row, slot])]
            token = int(after_BS[row, slot])
            fresh = token != int(before_BS[row, slot])
            text = processor.tokenizer.decode([token], skip_special_tokens=True)
            pieces.setdefault(mask, []).append(
                Piece(None if token == model.config.mask_token_id else text, fresh)
            )
        texts = _in_order(processor, batch, step.after_BS, cut)[0]
        order = sorted(pieces)
        yield Snapshot(step.number, [pieces[i] for i in order], [texts[i] for i in order])


def _batches(
    processor: PerceptionDLMProcessor,
    images: Sequence[Photo],
    masks: Sequence[Sequence[np.ndarray]],
    length: int | None,
    instruction: str | None,
    batch_size: int,
    device: torch.device,
) -> Iterator[Batch]:
    """A row per group of regions. An image's groups may fall into several batches."""
    rows = []
    for i, (image, of_image) in enumerate(zip(images, masks, strict=True)):
        for item in processor.items(image, of_image, length=length, instruction=instruction, image_index=i):
            rows.append([item])
            if len(rows) == batch_size:
                yield processor.collate(rows).to(device)
                rows = []
    if rows:
        yield processor.collate(rows).to(device)


def _in_order(
    processor: PerceptionDLMProcessor, batch: Batch, ids_BS: Tensor, cut: str
) -> list[dict[int, str]]:
    """Captions by mask, for each image up to the batch's last."""
    numbers: list[list[int]] = [[] for _ in range(1 + max(image for image, _ in batch.origins))]
    for image, mask in batch.origins:
        numbers[image].append(mask)
    texts = processor.captions(batch, ids_BS, cut)
    return [dict(zip(sorted(n), t, strict=True)) for n, t in zip(numbers, texts, strict=True)]
