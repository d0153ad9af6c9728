"""Captions for any number of regions of any number of images, in the caller's order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...schemas.decoding import DecodeOptions
from ...schemas.errors import ConfigError
from ..model.perceptiondlm import PerceptionDLM
from ..model.processor import Example, PerceptionDLMProcessor, check_masks, collate
from .sampler import State, decode, steps

if TYPE_CHECKING:
    from PIL.Image import Image


class Captioned(NamedTuple):
    """What an image's regions were called, and at what price.

    Attributes:
        captions: one a mask, in the caller's order.
        forwards: passes of the language model, summed over the image's groups.
        tokens: slots filled.
        seconds: of the batches that the image was in, by its share of their groups.
        agreement: share of tokens equal to an uncached decode's, where `compare` asked for it.
    """

    captions: list[str]
    forwards: int
    tokens: int
    seconds: float
    agreement: float | None = None


class Slot(NamedTuple):
    """One slot of a caption: its text, None while it is masked; its token; the latest guess's confidence."""

    text: str | None
    token: int
    confidence: float


class Snapshot(NamedTuple):
    """All captions of an image after a step.

    Attributes:
        forwards: passes of the language model so far, of the group with most.
        slots: of each region, in the caller's order.
        captions: as they read now, masked slots left out.
    """

    forwards: int
    slots: list[list[Slot]]
    captions: list[str]


class _Group(NamedTuple):
    """Regions of an image that share a sequence: the image's number, theirs in it, and the sequence."""

    image: int
    regions: list[int]
    example: Example


def caption_images(
    model: PerceptionDLM,
    processor: PerceptionDLMProcessor,
    images: Iterable[tuple[np.ndarray | Image, Sequence[np.ndarray]]],
    options: DecodeOptions | None = None,
    batch_size: int = 8,
    regions_per_call: int | None = None,
) -> list[Captioned]:
    """Caption the regions of images.

    An image with more regions than the model has prompts is split into groups of about equal size. Groups
    share batches across images; results do not depend on how.

    Args:
        model: in eval mode, on its device.
        processor: the model's.
        images: (pixels (H, W, 3) uint8 RGB or a Pillow image, masks (H, W) bool) each.
        options: of the decoder.
        batch_size: groups decoded at once.
        regions_per_call: regions of a group at most; 1 captions one by one.

    Raises:
        ConfigError: a mask is empty or not of its image's size, or options that do not suit the model.
    """
    options = options or DecodeOptions()
    results: list[Captioned] = []
    waiting: list[_Group] = []
    for number, (photo, masks) in enumerate(images):
        results.append(Captioned([""] * len(masks), 0, 0, 0.0))
        for group in _groups(
            model, processor, number, photo, masks, options.max_new_tokens, regions_per_call
        ):
            waiting.append(group)
            if len(waiting) == batch_size:
                _decode(model, processor, waiting, options, results)
                waiting = []
    if waiting:
        _decode(model, processor, waiting, options, results)
    return results


def caption_steps(
    model: PerceptionDLM,
    processor: PerceptionDLMProcessor,
    photo: np.ndarray | Image,
    masks: Sequence[np.ndarray],
    options: DecodeOptions | None = None,
    regions_per_call: int | None = None,
) -> Iterator[Snapshot]:
    """Caption one image's regions, giving all captions before the first step and after every one.

    Raises:
        ConfigError: as `caption_images`.
    """
    options = options or DecodeOptions()
    groups = list(_groups(model, processor, 0, photo, masks, options.max_new_tokens, regions_per_call))
    if groups:
        batch = collate([group.example for group in groups])
        for state in steps(model, batch, options):
            yield _snapshot(processor, groups, state)


def _groups(
    model: PerceptionDLM,
    processor: PerceptionDLMProcessor,
    number: int,
    photo: np.ndarray | Image,
    masks: Sequence[np.ndarray],
    max_new_tokens: int,
    regions_per_call: int | None,
) -> Iterator[_Group]:
    if regions_per_call is not None and regions_per_call < 1:
        raise ConfigError(f"regions_per_call: {regions_per_call}; at least 1")
    pixels = np.asarray(photo.convert("RGB") if hasattr(photo, "convert") else photo)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ConfigError(f"image {number}: {pixels.shape} {pixels.dtype}; give (H, W, 3) uint8 RGB")
    masks = [np.asarray(mask).astype(bool) for mask in masks]
    check_masks(masks, pixels.shape[:2], len(masks))
    most = min(model.config.num_prompts, regions_per_call or model.config.num_prompts)
    parts = -(-len(masks) // most)
    for regions in np.array_split(np.arange(len(masks)), parts) if parts else ():
        chosen = regions.tolist()
        yield _Group(number, chosen, processor.example(pixels, [masks[i] for i in chosen], max_new_tokens))


def _decode(
    model: PerceptionDLM,
    processor: PerceptionDLMProcessor,
    groups: list[_Group],
    options: DecodeOptions,
    results: list[Captioned],
) -> None:
    start = time.perf_counter()
    decoded = decode(model, collate([group.example for group in groups]), options)
    seconds = (time.perf_counter() - start) / len(groups)
    for row, group in enumerate(groups):
        result, filled = results[group.image], len(group.regions) * options.max_new_tokens
        for region, caption in zip(
            group.regions, _read(processor, group, decoded.tokens_BNS[row]), strict=True
        ):
            result.captions[region] = caption
        agreement = None
        if decoded.agreement_B is not None:
            before = (result.agreement or 0.0) * result.tokens
            agreement = (before + float(decoded.agreement_B[row]) * filled) / (result.tokens + filled)
        results[group.image] = result._replace(
            forwards=result.forwards + int(decoded.forwards_B[row]),
            tokens=result.tokens + filled,
            seconds=result.seconds + seconds,
            agreement=agreement,
        )


def _read(processor: PerceptionDLMProcessor, group: _Group, tokens_NS) -> list[str]:
    return processor.read(tokens_NS[: len(group.regions)].numpy(), group.example.order)


def _snapshot(processor: PerceptionDLMProcessor, groups: list[_Group], state: State) -> Snapshot:
    total = sum(len(group.regions) for group in groups)
    slots: list[list[Slot]] = [[] for _ in range(total)]
    captions = [""] * total
    for row, group in enumerate(groups):
        tokens_NS = state.tokens_BNS[row]
        for region, caption in zip(group.regions, _read(processor, group, tokens_NS), strict=True):
            captions[region] = caption
        for place, number in enumerate(group.example.order):
            parts = (tokens_NS[place], state.open_BNS[row, place], state.confidence_BNS[row, place])
            slots[group.regions[number]] = [
                Slot(None if masked else processor.tokenizer.decode([token]), token, confidence)
                for token, masked, confidence in zip(*(part.tolist() for part in parts), strict=True)
            ]
    return Snapshot(int(state.forwards_B.max()), slots, captions)
